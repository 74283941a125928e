"""The manifest of a model: its codec, and the fingerprint, which is its bytes and nothing else about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.errors import BadModel
from swarmcpp.models import manifest as module
from swarmcpp.models.manifest import (
    CHUNK_BYTES,
    MAX_FILE_BYTES,
    MAX_NAME_BYTES,
    Manifest,
    ManifestFile,
    chunk_digests,
    manifest_of,
    n_chunks,
    plain_name,
)

DIGEST = bytes(range(32))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def memo(cache: Path) -> Path:
    (found,) = (cache / "fingerprints").iterdir()
    return found


def fingerprint(files: list[Path], cache: Path) -> bytes:
    return manifest_of(files, cache).fingerprint


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    names = draw(st.lists(st.text(max_size=20).map(plain_name), min_size=1, max_size=4, unique_by=str.casefold))
    files = []
    for name in names:
        size = draw(st.integers(1, 3 * CHUNK_BYTES))
        digests = draw(st.lists(st.binary(min_size=32, max_size=32), min_size=n_chunks(size), max_size=n_chunks(size)))
        files.append(ManifestFile(name, size, tuple(digests)))
    return Manifest(tuple(files))


@given(manifests())
def test_it_survives_the_wire(manifest: Manifest) -> None:
    again = Manifest.from_bytes(memoryview(manifest.to_bytes()))
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint


@given(manifests(), st.data())
def test_damaged_bytes_are_refused_or_another_manifest(manifest: Manifest, data: st.DataObject) -> None:
    encoded = bytearray(manifest.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(encoded)))
    for damaged in (bytes(encoded), bytes(encoded[:cut]), bytes(encoded) + b"\0"):
        try:
            assert Manifest.from_bytes(damaged).to_bytes() == damaged
        except BadModel as error:
            assert "\n" not in str(error)


@given(st.binary(max_size=200))
def test_junk_is_refused(junk: bytes) -> None:
    for data in (junk, b"swarmcpp manifest 1\n" + junk):
        with pytest.raises(BadModel):
            Manifest.from_bytes(data)


@given(manifests(), st.lists(st.text(max_size=8), min_size=4, max_size=4))
def test_names_are_no_part_of_the_fingerprint(manifest: Manifest, names: list[str]) -> None:
    renamed = [
        ManifestFile(plain_name(f"{number}{names[number]}"), file.size, file.digests)
        for number, file in enumerate(manifest.files)
    ]
    assert Manifest(tuple(renamed)).fingerprint == manifest.fingerprint


@given(manifests(), manifests())
def test_all_else_is(one: Manifest, other: Manifest) -> None:
    same = [(f.size, f.digests) for f in one.files] == [(f.size, f.digests) for f in other.files]
    assert (one.fingerprint == other.fingerprint) == same


@given(st.text())
def test_a_plain_name_is_one_file_of_the_directory(name: str) -> None:
    plain = plain_name(name)
    assert plain_name(plain) == plain
    assert len(plain.encode()) <= MAX_NAME_BYTES
    assert plain.isprintable()
    assert Path("directory", plain).resolve().parent == Path("directory").resolve()


def test_a_name_keeps_what_it_can() -> None:
    assert plain_name("Qwen2.5 Übung-Q4_0.gguf") == "Qwen2.5 Übung-Q4_0.gguf"
    assert plain_name("x" * 300 + "-00001-of-00002.gguf").endswith("x-00001-of-00002.gguf")


@pytest.mark.parametrize(
    "name",
    ["", ".gguf", "..", "../a.gguf", "a/b.gguf", "a\\b.gguf", "/a.gguf", "a\0.gguf", "a\n.gguf", "c:a.gguf", "a.txt",
     ".a.gguf", "a" * 300 + ".gguf"],
)  # fmt: skip
def test_names_that_are_not_plain_are_refused(name: str) -> None:
    with pytest.raises(BadModel, match="file name"):
        Manifest((ManifestFile(name, 1, (DIGEST,)),))


@pytest.mark.parametrize(
    "files",
    [
        (),
        (ManifestFile("a.gguf", 0, ()),),
        (ManifestFile("a.gguf", -1, ()),),
        (ManifestFile("a.gguf", MAX_FILE_BYTES + 1, (DIGEST,)),),
        (ManifestFile("a.gguf", 1, ()),),
        (ManifestFile("a.gguf", 1, (DIGEST, DIGEST)),),
        (ManifestFile("a.gguf", 1, (DIGEST[:-1],)),),
        (ManifestFile("a.gguf", 1, (DIGEST,)), ManifestFile("A.gguf", 1, (DIGEST,))),
    ],
)
def test_what_no_model_has_is_refused(files: tuple[ManifestFile, ...]) -> None:
    with pytest.raises(BadModel):
        Manifest(files)


def test_a_huge_claim_costs_nothing() -> None:
    """A file of 2^63 bytes would have 2^41 digests."""
    claim = b"swarmcpp manifest 1\n" + b"\x01\0\0\0" + b"\x06\0" + b"\xff" * 7 + b"\x7f" + b"a.gguf"
    with pytest.raises(BadModel, match="ends before its digests"):
        Manifest.from_bytes(claim)


def test_chunks_are_counted_over_all_files() -> None:
    sizes = (2 * CHUNK_BYTES, 1, CHUNK_BYTES + 5)
    digests = [bytes([number]) * 32 for number in range(5)]
    manifest = Manifest(
        (
            ManifestFile("a.gguf", sizes[0], tuple(digests[:2])),
            ManifestFile("b.gguf", sizes[1], (digests[2],)),
            ManifestFile("c.gguf", sizes[2], tuple(digests[3:])),
        )
    )
    assert (manifest.n_chunks, manifest.size) == (5, sum(sizes))
    chunks = [manifest.chunk(index) for index in range(5)]
    assert [(c.file, c.offset, c.size) for c in chunks] == [
        (0, 0, CHUNK_BYTES),
        (0, CHUNK_BYTES, CHUNK_BYTES),
        (1, 0, 1),
        (2, 0, CHUNK_BYTES),
        (2, CHUNK_BYTES, 5),
    ]
    assert [c.digest for c in chunks] == digests
    for index in (-1, 5, 2**32):
        with pytest.raises(IndexError):
            manifest.chunk(index)


def test_digests_are_those_of_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 10)
    path = write(tmp_path / "a.gguf", bytes(range(25)))
    whole = [blake3(bytes(range(25))[start : start + 10]).digest() for start in (0, 10, 20)]
    assert chunk_digests(path, 25) == whole
    # A file that ends earlier has what it has; one that goes on is not read further.
    assert chunk_digests(path, 45) == [*whole[:2], None, None, None]
    assert chunk_digests(path, 10) == whole[:1]


def test_it_depends_on_the_bytes_alone(tmp_path: Path, cache: Path) -> None:
    one = fingerprint([write(tmp_path / "a.gguf", b"model")], cache)
    assert len(one) == 32
    assert fingerprint([write(tmp_path / "b.gguf", b"model")], cache) == one
    assert fingerprint([write(tmp_path / "c.gguf", b"modem")], cache) != one


@given(
    st.lists(st.binary(min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.binary(min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_parts_have_an_order_and_borders(
    tmp_path_factory: pytest.TempPathFactory, a: list[bytes], b: list[bytes]
) -> None:
    directory = tmp_path_factory.mktemp("parts")

    def of(name: str, parts: list[bytes]) -> bytes:
        files = [write(directory / f"{name}{index}", part) for index, part in enumerate(parts)]
        return fingerprint(files, directory / "cache")

    assert (of("a", a) == of("b", b)) == (a == b)


def test_it_is_remembered(tmp_path: Path, cache: Path) -> None:
    """A file whose size and time stay is not read again."""
    model = write(tmp_path / "a.gguf", b"model")
    first = manifest_of([model], cache)
    stat = model.stat()
    write(model, b"other")
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert manifest_of([model], cache) == first


def test_a_changed_file_is_hashed_again(tmp_path: Path, cache: Path) -> None:
    model = write(tmp_path / "a.gguf", b"model")
    before = fingerprint([model], cache)
    stat = model.stat()
    write(model, b"other")
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fingerprint([model], cache) != before
    write(model, b"model")
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns + 2))
    assert fingerprint([model], cache) == before


@given(junk=st.binary(max_size=80), at=st.integers(0, 60), flip=st.integers(1, 255))
def test_a_damaged_memo_is_hashed_again(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int, flip: int
) -> None:
    directory = tmp_path_factory.mktemp("memo")
    model, cache = write(directory / "a.gguf", b"model"), directory / "cache"
    right = manifest_of([model], cache)
    good = memo(cache).read_bytes()
    flipped = bytearray(good)
    flipped[at] ^= flip
    for damaged in (junk, blake3(junk).digest() + junk, bytes(flipped), good[:-1]):
        memo(cache).write_bytes(damaged)
        assert manifest_of([model], cache) == right
        assert memo(cache).read_bytes() == good


def test_without_a_place_for_memos_it_works_all_the_same(tmp_path: Path) -> None:
    model = write(tmp_path / "a.gguf", b"model")
    right = fingerprint([model], tmp_path / "cache")
    assert fingerprint([model], write(tmp_path / "file", b"")) == right
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "fingerprints", b"")
    assert fingerprint([model], tmp_path / "other") == right


def test_nothing_but_memos_is_left(tmp_path: Path, cache: Path) -> None:
    fingerprint([write(tmp_path / "a.gguf", b"model")], cache)
    assert memo(cache).suffix == ".manifest"


@pytest.mark.parametrize(
    ("kind", "words"), [("missing", "cannot read it"), ("directory", "cannot read it"), ("empty", "is empty")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, cache: Path, kind: str, words: str) -> None:
    path = tmp_path / "a.gguf"
    if kind == "directory":
        path.mkdir()
    if kind == "empty":
        path.touch()
    with pytest.raises(BadModel, match=rf"a\.gguf: {words}") as caught:
        manifest_of([path], cache)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_text_is_no_obstacle(tmp_path: Path, cache: Path) -> None:
    try:
        model = write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.gguf")), b"model")
    except OSError:
        pytest.skip("this file system wants names that are text")
    manifest = manifest_of([model], cache)
    assert manifest.files[0].name == "__.gguf"
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest_of([model], cache)
