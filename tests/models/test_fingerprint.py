"""The fingerprint of a model: its bytes, and nothing else about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.errors import BadModel
from swarmcpp.models import fingerprint as module
from swarmcpp.models.fingerprint import fingerprint


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def memo(cache: Path) -> Path:
    (found,) = (cache / "fingerprints").iterdir()
    return found


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every hashing of files."""
    seen: list[object] = []
    hasher = module._hash
    monkeypatch.setattr(module, "_hash", lambda files: seen.append(files) or hasher(files))
    return seen


def test_it_depends_on_the_bytes_alone(tmp_path: Path, cache: Path) -> None:
    one = fingerprint([write(tmp_path / "a.gguf", b"model")], cache)
    assert len(one) == 32
    assert fingerprint([write(tmp_path / "b.gguf", b"model")], cache) == one
    assert fingerprint([write(tmp_path / "c.gguf", b"modem")], cache) != one
    assert fingerprint([write(tmp_path / "d.gguf", b"")], cache) not in (one, bytes(32))


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=3), st.lists(st.binary(max_size=4), min_size=1, max_size=3))
def test_parts_have_an_order_and_borders(
    tmp_path_factory: pytest.TempPathFactory, a: list[bytes], b: list[bytes]
) -> None:
    directory = tmp_path_factory.mktemp("parts")

    def of(name: str, parts: list[bytes]) -> bytes:
        files = [write(directory / f"{name}{index}", part) for index, part in enumerate(parts)]
        return fingerprint(files, directory / "cache")

    assert (of("a", a) == of("b", b)) == (a == b)


def test_it_is_remembered(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(tmp_path / "a.gguf", b"model")
    seen = count_hashes(monkeypatch)
    assert len({fingerprint([model], cache) for _ in range(3)}) == 1
    assert len(seen) == 1


def test_a_changed_file_is_hashed_again(tmp_path: Path, cache: Path) -> None:
    model = write(tmp_path / "a.gguf", b"model")
    before = fingerprint([model], cache)
    assert fingerprint([write(model, b"other")], cache) != before
    stat = model.stat()
    write(model, b"model")
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fingerprint([model], cache) == before


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b"\xff\xfe",
        b'{"files": 3, "fingerprint": "00"}',
        "short",
        "not hex",
        "a number",
        "missing",
    ],
)
def test_a_damaged_memo_is_hashed_again(tmp_path: Path, cache: Path, junk: bytes | str) -> None:
    model = write(tmp_path / "a.gguf", b"model")
    right = fingerprint([model], cache)
    text = memo(cache).read_text()
    replaced = {
        "short": text.replace(right.hex(), right.hex()[:-2]),
        "not hex": text.replace(right.hex(), "zz" * 32),
        "a number": text.replace(f'"{right.hex()}"', "7"),
        "missing": text.replace("fingerprint", "fingerprunt"),
    }
    memo(cache).write_bytes(junk if isinstance(junk, bytes) else replaced[junk].encode())
    assert fingerprint([model], cache) == right
    assert fingerprint([model], cache) == right
    assert right.hex() in memo(cache).read_text()


def test_without_a_place_for_memos_it_works_all_the_same(tmp_path: Path) -> None:
    model = write(tmp_path / "a.gguf", b"model")
    right = fingerprint([model], tmp_path / "cache")
    assert fingerprint([model], write(tmp_path / "file", b"")) == right
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "fingerprints", b"")
    assert fingerprint([model], tmp_path / "other") == right


def test_nothing_but_memos_is_left(tmp_path: Path, cache: Path) -> None:
    fingerprint([write(tmp_path / "a.gguf", b"model")], cache)
    assert memo(cache).suffix == ".json"


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, cache: Path, kind: str) -> None:
    path = tmp_path / "a.gguf"
    if kind == "directory":
        path.mkdir()
    with pytest.raises(BadModel, match=r"a\.gguf: cannot read it") as caught:
        fingerprint([path], cache)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_text_is_no_obstacle(tmp_path: Path, cache: Path) -> None:
    try:
        model = write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.gguf")), b"model")
    except OSError:
        pytest.skip("this file system wants names that are text")
    assert fingerprint([model], cache) == fingerprint([model], cache)
