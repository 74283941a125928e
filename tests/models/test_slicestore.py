"""The store of slices, and where headers end."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcpp.errors import BadModel, StartupError
from swarmcpp.models.gguf_header import read_header
from swarmcpp.models.manifest import manifest_of
from swarmcpp.models.modelfiles import SparseModel
from swarmcpp.models.slicestore import SliceStore, header_bytes
from swarmcpp.models.slicing import write_slice
from swarmcpp.models.synthetic import TINY, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("store") / "m-00001.gguf", TINY, quant="Q8_0")


def test_a_slice_of_a_local_model_is_made_once(model: Path, tmp_path: Path) -> None:
    store = SliceStore(tmp_path / "data")
    found = store.from_file(model, 1, 2)
    manifest = manifest_of([model], tmp_path / "data")
    expected = write_slice(model, 1, 2, tmp_path / "expected.gguf", fingerprint=manifest.fingerprint)
    assert found.slice.read_bytes() == expected.read_bytes()
    assert found.slice.name == f"m-00001-1-2-{manifest.fingerprint.hex()[:8]}.gguf"
    assert (found.source, found.embedding, found.parts) == (model, True, None)
    changed = found.slice.stat().st_mtime_ns
    assert store.from_file(model, 1, 2).slice.stat().st_mtime_ns == changed
    found.slice.write_bytes(b"damaged")
    assert store.from_file(model, 1, 2).slice.read_bytes() == expected.read_bytes()


def test_a_slice_of_other_layers_is_not_taken_for_this_one(model: Path, tmp_path: Path) -> None:
    store = SliceStore(tmp_path)
    manifest = manifest_of([model], tmp_path)
    other = store.from_file(model, 0, 1).slice
    other.rename(store.path_of(manifest, 1, 2))
    assert not store.is_sound(manifest, 1, 2)
    other = write_slice(model, 1, 2, store.path_of(manifest, 1, 2), fingerprint=bytes(32))
    assert not store.is_sound(manifest, 1, 2)


def test_a_directory_that_cannot_be_made_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "slices").write_bytes(b"a file")
    with pytest.raises(StartupError, match=r"m-00001-0-1-.*\.gguf: cannot be written"):
        SliceStore(tmp_path).from_file(model, 0, 1)


def prefix(model: Path, ready: int, directory: Path) -> Path:
    """A file of the model's size that has only its first bytes."""
    path = directory / "prefix.gguf"
    with path.open("wb") as file:
        file.write(model.read_bytes()[:ready])
        file.truncate(model.stat().st_size)
    return path


@settings(max_examples=60, deadline=None)
@given(ready=st.integers(1, 20_000))
def test_a_header_is_known_to_be_whole(model: Path, tmp_path_factory: pytest.TempPathFactory, ready: int) -> None:
    end = read_header(model).data_offset
    needed = header_bytes(prefix(model, ready, tmp_path_factory.mktemp("prefix")), ready)
    assert needed == end if ready >= end else ready < needed <= end


def test_the_bytes_around_the_end_of_a_header(model: Path, tmp_path: Path) -> None:
    end = read_header(model).data_offset
    for ready in range(end - 200, end + 3):
        needed = header_bytes(prefix(model, ready, tmp_path), ready)
        assert needed == end if ready >= end else ready < needed <= end


def test_a_damaged_header_is_not_waited_for(model: Path, tmp_path: Path) -> None:
    data = model.read_bytes()
    for bad in (b"FUGG" + data[4:], data[:8] + bytes([255]) * 8 + data[16:]):
        path = tmp_path / "bad.gguf"
        path.write_bytes(bad)
        with pytest.raises(BadModel):
            header_bytes(path, 20_000)


def test_a_sparse_model_gives_only_what_was_stored(model: Path, tmp_path: Path) -> None:
    manifest = manifest_of([model], tmp_path / "cache")
    parts = SparseModel(manifest, tmp_path / "parts")
    assert parts.read(0) is None
    parts.prepare()
    data = model.read_bytes()
    chunk = data[: manifest.chunk(0).size]
    assert parts.missing({0}) == {0}
    assert not parts.store(0, chunk[:-1])
    assert not parts.store(0, bytes(len(chunk)))
    assert parts.store(0, memoryview(chunk))
    assert (parts.missing({0}), parts.read(0)) == (set(), chunk)
    with pytest.raises(IndexError):
        parts.read(manifest.n_chunks)
    parts.prepare()
    assert parts.read(0) == chunk
