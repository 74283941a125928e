"""Configuration: which layer wins, what is refused, and what the refusal says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarmcpp.config import Config, ServerConfig, default_data_dir, is_loopback, load_config
from swarmcpp.errors import BadConfig
from swarmcpp.settings import Setting, describe

ALL = describe(Config)
FLAGGED = [each for each in ALL if each.flag]


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No swarmcpp.toml of the machine takes part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    return tmp_path


def toml(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(flags: dict[str, object] | None = None, env: dict[str, str] | None = None, file: Path | None = None) -> str:
    with pytest.raises(BadConfig) as caught:
        load_config(flags or {}, env or {}, file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults() -> None:
    loaded = load_config({}, {}, None)
    assert loaded.config == Config()
    assert loaded.config.server == ServerConfig("127.0.0.1", 8080, None, (), 8 * 1024 * 1024, 512, 0.0, 60.0)
    assert loaded.config.storage.data_dir == default_data_dir()
    assert set(loaded.sources) == {each.key for each in ALL}
    assert set(loaded.sources.values()) == {"default"}
    assert loaded.file is None


def valid(described: Setting) -> st.SearchStrategy[object]:
    """Values that the setting takes, as TOML would give them. The host is left where no key is needed."""
    word = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=20)
    if described.key == "server.host":
        return st.sampled_from(["127.0.0.1", "localhost", "::1", "127.8.8.8"])
    low, high = described.low, described.high
    zero = [st.just(0)] if described.zero else []
    match described.kind:
        case "boolean":
            return st.booleans()
        case "whole number":
            return st.one_of(st.integers(math.ceil(low or 0), int(high or 0)), *zero)
        case "number":
            return st.one_of(st.floats(low, high), *zero)
        case "text" if described.pattern:
            return st.from_regex(described.pattern, fullmatch=True, alphabet="0123456789.aGiBkMotufq_ ")
        case "list of text":
            return st.lists(word, max_size=3)
        case _:
            return word


def as_text(value: object) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_value(described: Setting, value: object) -> object:
    if described.kind == "path":
        return Path(str(value))
    return tuple(value) if isinstance(value, list) else value


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_the_later_layer_wins_for_every_setting(tmp_path: Path, data: st.DataObject) -> None:
    described = data.draw(st.sampled_from(ALL))
    layers = data.draw(
        st.sets(st.sampled_from(["file", "env", "short", "flag"] if described.flag else ["file", "env"]))
    )
    values = {layer: data.draw(valid(described), label=layer) for layer in sorted(layers)}
    section, _, name = described.key.rpartition(".")
    expected, source = described.default(), "default"

    file = None
    if "file" in values:
        head = f"[{section}]\n" if section else ""
        file = toml(tmp_path / "given.toml", f"{head}{name} = {json.dumps(values['file'])}\n")
        expected, source = values["file"], f"file {file}"
    env = {}
    for layer, variable in (("short", described.env_names[-1]), ("env", described.env_names[0])):
        if layer in values and as_text(values[layer]):
            env[variable] = as_text(values[layer])
            expected, source = (values[layer], f"env {variable}")
    flags: dict[str, object] = {}
    if "flag" in values:
        flags[described.flag_key] = data.draw(st.sampled_from([values["flag"], as_text(values["flag"])]))
        expected, source = values["flag"], f"flag {described.flag}"

    loaded = load_config(flags, env, file)
    assert described.value_in(loaded.config) == as_value(described, expected)
    kinds = {"number": float, "whole number": int, "boolean": bool}
    assert type(described.value_in(loaded.config)) is kinds.get(described.kind, type(as_value(described, expected)))
    assert loaded.sources[described.key] == source
    others = {key: at for key, at in loaded.sources.items() if key != described.key}
    assert set(others.values()) == {"default"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_number_outside_its_range_is_refused_from_every_layer(tmp_path: Path, data: st.DataObject) -> None:
    numbers = [each for each in ALL if "number" in each.kind]
    described = data.draw(st.sampled_from(numbers))
    assert described.low is not None and described.high is not None, f"{described.key} has no documented range"
    outside = st.integers(max_value=math.ceil(described.low) - 1) | st.integers(min_value=int(described.high) + 1)
    value = data.draw(outside.filter(lambda each: each != 0 or not described.zero))
    section, name = described.key.split(".")
    file = toml(tmp_path / "given.toml", f"[{section}]\n{name} = {value}\n")
    for message, source in (
        (refusal(file=file), f"file {file}"),
        (refusal(env={described.env_names[0]: str(value)}), f"env {described.env_names[0]}"),
    ):
        assert described.key in message and source in message and described.limit in message


def test_every_setting_has_help_and_its_own_names() -> None:
    names = [name for each in ALL for name in each.env_names]
    assert len(names) == len(set(names))
    assert all(each.help for each in ALL)
    assert {each.flag for each in FLAGGED} >= {"--host", "--port", "--api-key", "--threads", "--ctx-size", "--slots"}
    assert "SWARMCPP_SERVER_PORT" in names and "SWARMCPP_PORT" in names and "SWARMCPP_DATA_DIR" in names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[server]\nprot = 1\n", ["unknown key server.prot", "given.toml", "did you mean server.port"]),
        ("port = 1\n", ["unknown key port", "given.toml", "server.port"]),
        ("[sever]\nport = 1\n", ["unknown key sever.port", "server.port"]),
        ("server = 1\n", ["server", "given.toml", "[server]"]),
        ("[zzz]\nqqq = 1\n", ["unknown key zzz.qqq", "swarmcpp config"]),
        ("[server\n", ["given.toml", "TOML", "line 1"]),
        ("[server]\nport = '80'\n", ["server.port = '80'", "given.toml", "whole number", "65535"]),
        ("[server]\nport = true\n", ["server.port = True", "whole number"]),
        ("[server]\nport = 80.0\n", ["server.port = 80.0", "whole number"]),
        ("[inference]\ncontinuous_batching = 1\n", ["true or false"]),
        ("[server]\ncors_origins = 'x'\n", ["server.cors_origins", "list of text"]),
        ("[server]\ncors_origins = [1]\n", ["server.cors_origins", "list of text"]),
        ("[server]\nrequest_timeout_s = nan\n", ["server.request_timeout_s = nan", "or 0 for no limit"]),
        ("[server]\nhost = ''\n", ["server.host = ''", "at least 1 characters"]),
        ("[engine]\nctx_size = 63\n", ["engine.ctx_size = 63", "from 64 to", "or 0 for"]),
        ('[storage]\ndata_dir = "a\\u0000b"\n', ["storage.data_dir", "zero byte"]),
        ("model = []\n", ["model = []", "must be a text"]),
        (f"x = {'9' * 5000}\n", ["given.toml", "TOML"]),
        (f"x = {'[' * 5000}\n", ["given.toml", "TOML"]),
    ],
)
def test_a_bad_file_is_refused_with_key_place_and_limit(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(file=toml(tmp_path / "given.toml", text))
    for part in parts:
        assert part in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refusal(file=tmp_path / "missing.toml")
    assert "Is a directory" in refusal(file=tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"model = '\xe9'")
    assert "byte 9 is not UTF-8" in refusal(file=tmp_path / "latin.toml")
    assert "missing.toml" in refusal(env={"SWARMCPP_CONFIG": str(tmp_path / "missing.toml")})


def test_a_bad_variable_or_flag_is_refused() -> None:
    assert "SWARMCPP_SERVER_PORT" in refusal(env={"SWARMCPP_SEVER_PORT": "1"})
    message = refusal(env={"SWARMCPP_PORT": "tcp://10.0.0.1:80"})
    assert "server.port = 'tcp://10.0.0.1:80' (env SWARMCPP_PORT)" in message
    assert "engine.threads = '-1' (flag --threads): must be from 1 to 1024" in refusal({"threads": "-1"})
    assert "did you mean threads" in refusal({"thread": "1"})
    assert "true or false" in refusal(env={"SWARMCPP_INFERENCE_CONTINUOUS_BATCHING": "perhaps"})
    assert "home directory" in refusal({"data_dir": "~nobody-of-this-name/x"})
    assert len(refusal({"model": "m", "port": "9" * 5000})) < 300


def test_empty_variables_and_flags_not_given_do_not_count() -> None:
    loaded = load_config({"port": None}, {"SWARMCPP_PORT": "", "SWARMCPP_CONFIG": "", "HOME": "/x"}, None)
    assert loaded.config.server.port == 8080


def test_the_long_variable_wins_over_the_short_one() -> None:
    loaded = load_config({}, {"SWARMCPP_PORT": "1", "SWARMCPP_SERVER_PORT": "2"}, None)
    assert (loaded.config.server.port, loaded.sources["server.port"]) == (2, "env SWARMCPP_SERVER_PORT")


def test_the_file_is_looked_for_in_order(tmp_path: Path) -> None:
    def port(env: dict[str, str]) -> int:
        return load_config({}, env, None).config.server.port

    toml(tmp_path / "xdg/swarmcpp/swarmcpp.toml", "[server]\nport = 1\n")
    assert port({}) == 1
    toml(tmp_path / "swarmcpp.toml", "[server]\nport = 2\n")
    assert port({}) == 2
    named = toml(tmp_path / "named.toml", "[server]\nport = 3\n")
    assert port({"SWARMCPP_CONFIG": str(named)}) == 3
    given = toml(tmp_path / "given.toml", "[server]\nport = 4\n")
    loaded = load_config({}, {"SWARMCPP_CONFIG": str(named)}, given)
    assert (loaded.config.server.port, loaded.file) == (4, given)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_other_machines_need_a_key(host: str) -> None:
    message = refusal({"host": host})
    assert repr(host) in message and "flag --host" in message and "--api-key" in message
    assert load_config({"host": host}, {"SWARMCPP_API_KEY": "k"}, None).config.server.api_key == "k"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "LOCALHOST"])
def test_loopback_needs_none(host: str) -> None:
    assert is_loopback(host)
    assert load_config({"host": host}, {}, None).config.server.api_key is None


def test_the_key_is_never_shown() -> None:
    loaded = load_config({"api_key": "hunter2"}, {}, None)
    assert loaded.shown()["server.api_key"] == "***"
    assert "hunter2" not in json.dumps(loaded.shown())
    assert "hunter2" not in refusal({"api_key": "hunter2" * 1000})
    assert load_config({}, {}, None).shown()["server.api_key"] is None
