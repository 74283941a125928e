"""The catalogue: the built-in file is valid, users extend it, and a bad entry is named with file, entry and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmcpp.errors import BadConfig, BadModel
from swarmcpp.models.catalogue import Catalogue, builtin_file, load_catalogue
from swarmcpp.models.download import resolve_model

GOOD = {
    "title": '"T"',
    "url": '"https://example.org/m.gguf"',
    "file": '"m.gguf"',
    "quant": '"Q8_0"',
    "size_hint": "100",
    "context": "2048",
    "parameters": '"1B"',
    "licence": '"MIT"',
}


def user_file(tmp_path: Path, name: str = "mine", **changed: str | None) -> Path:
    fields = {key: value for key, value in (GOOD | changed).items() if value is not None}
    path = tmp_path / "models.toml"
    path.write_text(f'[models."{name}"]\n' + "".join(f"{key} = {value}\n" for key, value in fields.items()))
    return path


@pytest.fixture(scope="module")
def builtin() -> Catalogue:
    return load_catalogue()


def test_builtin_catalogue(builtin: Catalogue) -> None:
    assert builtin_file().exists()
    assert len(builtin.entries) >= 20
    assert len({entry.file for entry in builtin.entries}) == len(builtin.entries)
    for entry in builtin.entries:
        assert entry.url.startswith("https://huggingface.co/")
        assert entry.url.endswith(f"/resolve/main/{entry.file}")
        assert entry.quant.lower() in entry.file.lower()
        assert 10**8 < entry.size_hint < 10**10


def test_find_and_suggest(builtin: Catalogue) -> None:
    assert builtin.find("Qwen2.5-0.5B").file == "qwen2.5-0.5b-instruct-q4_k_m.gguf"
    with pytest.raises(BadModel, match=r"no model called 'qwen2.5-0.5'.*did you mean qwen2.5-0.5b"):
        builtin.find("qwen2.5-0.5")
    with pytest.raises(BadModel, match="`swarmcpp models` lists"):
        builtin.find("zzzzzzzz")


def test_user_file_extends_and_replaces(tmp_path: Path, builtin: Catalogue) -> None:
    extended = load_catalogue(user_file(tmp_path))
    assert len(extended.entries) == len(builtin.entries) + 1
    assert extended.find("mine").sha256 is None
    replaced = load_catalogue(user_file(tmp_path, "qwen3-8b", sha256=f'"{"0" * 64}"', note='"n"'))
    assert len(replaced.entries) == len(builtin.entries)
    assert (replaced.find("qwen3-8b").title, replaced.find("qwen3-8b").note) == ("T", "n")
    assert load_catalogue(tmp_path / "absent.toml") == builtin


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("title", None, "key 'title' is missing"),
        ("context", None, "key 'context' is missing"),
        ("title", "3", "title = '3' must be a text"),
        ("title", '"a\\nb"', "must be a text of one line"),
        ("size_hint", "-1", "size_hint = '-1' must be a whole number above 0"),
        ("size_hint", "true", "size_hint = 'True' must be"),
        ("url", '"ftp://x/y"', "url = 'ftp://x/y' must be an http or https URL"),
        ("url", '"https://[x/y"', "must be an http or https URL"),
        ("file", '"../../etc/x.gguf"', "must be a plain file name"),
        ("file", '"x.bin"', "must be a plain file name that ends in .gguf"),
        ("sha256", '"abc"', "sha256 must be 64"),
        ("colour", '"red"', "unknown key 'colour'"),
    ],
)
def test_bad_entries(tmp_path: Path, key: str, value: str | None, fault: str) -> None:
    path = user_file(tmp_path, **{key: value})
    with pytest.raises(BadConfig) as caught:
        load_catalogue(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: entry 'mine': ")
    assert fault in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"models = [", "is not TOML"),
        (b"\xff", "is not TOML"),
        (b"[model.x]", "unknown key 'model'"),
        (b"models = 3", "'models' must be a table"),
        (b"[models]\nx = 3", "entry 'x': must be a table"),
        (b'[models."Bad Name"]', "entry 'Bad Name': a name is"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "models.toml"
    path.write_bytes(content)
    with pytest.raises(BadConfig) as caught:
        load_catalogue(path)
    assert str(caught.value).startswith(str(path))
    assert fault in str(caught.value)


def test_catalogue_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be read"):
        load_catalogue(tmp_path)


def test_resolve_model(tmp_path: Path, builtin: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = tmp_path / "models"
    entry = builtin.find("qwen3-8b")
    assert resolve_model("qwen3-8b", models, builtin) == entry
    models.mkdir()
    (models / entry.file).touch()
    assert resolve_model("QWEN3-8B", models, builtin) == models / entry.file
    own = tmp_path / "own.gguf"
    own.touch()
    assert resolve_model(str(own), models, builtin) == own
    assert resolve_model(str(models), models, builtin) == models
    (tmp_path / "smollm2-135m").mkdir()
    assert resolve_model("smollm2-135m", models, builtin) == builtin.find("smollm2-135m")


@pytest.mark.parametrize(
    ("arg", "fault"),
    [
        ("lama-3.1-8b", "is neither a file nor a known model; did you mean llama-3.1-8b"),
        ("missing.gguf", "missing.gguf: no such file"),
        ("dir/missing", "missing: no such file"),
        ("x" * 5000, "cannot be looked up"),
        ("~nobody-of-that-name/x.gguf", ""),
        ("a\0b", ""),
        ("", ""),
    ],
)
def test_resolve_model_refuses(tmp_path: Path, builtin: Catalogue, arg: str, fault: str) -> None:
    if arg == "":
        assert resolve_model(arg, tmp_path, builtin) == Path()
        return
    with pytest.raises(BadModel) as caught:
        resolve_model(arg, tmp_path, builtin)
    assert fault in str(caught.value)
