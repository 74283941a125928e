"""The command line: what starts, what it prints, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_process import swarmcpp
from typer.testing import CliRunner

from swarmcpp import __version__
from swarmcpp.cli import app, main
from swarmcpp.config import Config
from swarmcpp.errors import BadConfig, SwarmError
from swarmcpp.settings import describe

HEAVY = {"aiohttp", "asyncio", "gguf", "jinja2", "llama_cpp", "msgspec", "numpy", "psutil", "prometheus_client"}
HEAVY |= {"rich.console", "zmq"}


def imported_by(*arguments: str) -> set[str]:
    code = (
        "import sys; sys.argv[0] = 'swarmcpp'\n"
        "from swarmcpp.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "sys.stderr.write('\\n'.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines())


@pytest.mark.e2e
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert HEAVY.isdisjoint(imported_by(*arguments))


@pytest.mark.e2e
def test_config_imports_no_engine_and_no_network() -> None:
    assert (HEAVY - {"rich.console", "asyncio"}).isdisjoint(imported_by("config"))


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    commands = (
        "serve",
        "join",
        "chat",
        "status",
        "peers",
        "token",
        "leave",
        "models",
        "pull",
        "doctor",
        "config",
        "bench",
    )
    for command in commands:
        assert f"  {command} " in result.output


def test_every_flag_of_the_settings_is_one_of_serve_and_of_config() -> None:
    for command in ("serve", "join", "config"):
        text = CliRunner().invoke(app, [command, "--help"]).output
        for described in describe(Config):
            # A model to join with is an option: the argument is the token.
            assert ("--model FILE" if command == "join" and described.key == "model" else described.flag) in text


@pytest.mark.parametrize(
    ("flags", "value", "source"),
    [([], False, "default"), (["--swarm"], True, "flag --swarm"), (["--no-swarm"], False, "flag --swarm")],
)
def test_a_flag_without_a_value(flags: list[str], value: bool, source: str) -> None:
    shown = json.loads(CliRunner().invoke(app, ["config", "--json", *flags]).output)
    assert shown["swarm.enabled"] == {"value": value, "source": source}


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"swarmcpp {__version__}\n"


def test_config_shows_values_and_sources(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "swarmcpp.toml").write_text("model = 'm.gguf'\n[inference]\nbatched_prefill_forward = false\n")
    monkeypatch.setenv("SWARMCPP_THREADS", "3")
    result = CliRunner().invoke(app, ["config", "--port", "9000", "--api-key", "hunter2"])
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line for line in result.output.splitlines()}
    assert set(rows) == {"key", *(described.key for described in describe(Config))}
    assert rows["server.port"].split()[1:4] == ["9000", "flag", "--port"]
    assert rows["engine.threads"].split()[1:4] == ["3", "env", "SWARMCPP_THREADS"]
    assert rows["model"].split()[1:4] == ["m.gguf", "file", "swarmcpp.toml"]
    assert rows["inference.batched_prefill_forward"].split()[1] == "false"
    assert rows["server.host"].split()[1:3] == ["127.0.0.1", "default"]
    assert "hunter2" not in result.output and "***" in rows["server.api_key"]


def test_config_as_json() -> None:
    result = CliRunner().invoke(app, ["config", "--json", "--slots", "4", "--api-key", "hunter2"])
    shown = json.loads(result.output)
    assert shown["engine.slots"] == {"value": 4, "source": "flag --slots"}
    assert shown["server.api_key"] == {"value": "***", "source": "flag --api-key"}
    assert shown["server.cors_origins"]["value"] == []


def test_a_bad_value_is_refused_by_every_command_that_reads_it() -> None:
    for command in (["serve", "m.gguf"], ["config"], ["doctor"]):
        result = CliRunner().invoke(app, [*command, "--port", "abc"])
        assert isinstance(result.exception, BadConfig)


def test_main_prints_one_line_and_exits_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise SwarmError("first\nsecond \x1b[31mline")

    monkeypatch.setattr("swarmcpp.cli.app", fail)
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().err) == (2, "error: first second [31mline\n")


def test_main_does_not_swallow_what_nobody_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("swarmcpp.cli.app", fail)
    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "no-such-model"], "neither a file nor a known model"),
        (["serve", "missing/x.gguf"], "no such file"),
        (["serve", "m.gguf", "--config", "missing.toml"], "missing.toml"),
        (["serve", "m.gguf", "--host", "0.0.0.0"], "API key"),
        (["pull", "no-such-model"], "no model called"),
        (["chat", "--url", "http://127.0.0.1:1"], "swarmcpp serve MODEL"),
        (["chat", "--url", "ftp://x"], "http://HOST:PORT"),
    ],
)
def test_expected_errors_are_one_line_and_exit_code_2(arguments: list[str], says: str) -> None:
    done = swarmcpp(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.e2e
def test_a_wrong_flag_is_a_usage_error() -> None:
    done = swarmcpp("serve", "--prot", "1")
    assert done.returncode == 2
    assert "--prot" in done.stderr and "Traceback" not in done.stderr
