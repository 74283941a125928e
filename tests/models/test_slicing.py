"""Slices as files: what is in them, what is refused, and that nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from split_models import write_split

from swarmcpp.errors import BadConfig, BadModel, StartupError
from swarmcpp.models.gguf_header import GgufHeader, read_header
from swarmcpp.models.inspect import inspect
from swarmcpp.models.slicing import Slice, slice_of, write_slice
from swarmcpp.models.synthetic import Shape, write_model

FINGERPRINT = bytes(range(32))
SHAPE = Shape("random", "llama", 5, 64, 4, 2, 128, 512, 512)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("slicing") / "model.gguf", SHAPE, quant="Q8_0")


def cut(source: Path, first: int, last: int, directory: Path) -> GgufHeader:
    return read_header(write_slice(source, first, last, directory / f"{first}-{last}.gguf", fingerprint=FINGERPRINT))


def data(header: GgufHeader, name: str) -> bytes:
    tensor = next(each for each in header.tensors if each.name == name)
    return header.path.read_bytes()[tensor.offset : tensor.offset + tensor.n_bytes]


def rewritten(source: Path, target: Path, extra: dict[str, object], architecture: str = "llama") -> Path:
    """The model with other metadata: arrays of numbers, or one whole number. Not its tokenizer."""
    header = read_header(source)
    writer = gguf.GGUFWriter(target, architecture)
    plain = {key: value for key, value in header.metadata.items() if key.startswith("llama.")}
    for key, value in (plain | extra).items():
        name = key.replace("llama.", f"{architecture}.")
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
    writer.add_tokenizer_model("no_vocab")
    for tensor in gguf.GGUFReader(source).tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


# -- what is in them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [(0, 2), (1, 4), (3, 5), (0, 5)])
def test_layers_are_renumbered_and_their_bytes_kept(model: Path, tmp_path: Path, first: int, last: int) -> None:
    whole, found = read_header(model), cut(model, first, last, tmp_path)
    assert slice_of(found) == Slice(first, last, 5, FINGERPRINT)
    assert slice_of(whole) is None
    assert found.metadata["llama.block_count"] == last - first == inspect(found.path).n_layers
    suffixes = [tensor.name.removeprefix("blk.0.") for tensor in whole.tensors if tensor.name.startswith("blk.0.")]
    for layer in range(first, last):
        for suffix in suffixes:
            assert data(found, f"blk.{layer - first}.{suffix}") == data(whole, f"blk.{layer}.{suffix}")
    assert sum(tensor.name.startswith("blk.") for tensor in found.tensors) == len(suffixes) * (last - first)
    assert data(found, "output_norm.weight") == data(whole, "output_norm.weight")


def test_what_is_not_the_tail_has_no_vocabulary(model: Path, tmp_path: Path) -> None:
    found = cut(model, 0, 3, tmp_path)
    assert [key for key in found.metadata if key.startswith("tokenizer.")] == ["tokenizer.ggml.model"]
    assert found.metadata["tokenizer.ggml.model"] == "no_vocab"
    assert found.metadata["llama.vocab_size"] == 1
    shapes = {tensor.name: tensor.shape for tensor in found.tensors if not tensor.name.startswith("blk.")}
    assert shapes == {"token_embd.weight": (64, 1), "output_norm.weight": (64,)}


@pytest.mark.parametrize("tied", [False, True])
def test_the_tail_has_the_vocabulary_and_one_matrix_of_its_size(tmp_path: Path, tied: bool) -> None:
    shape = Shape("random", "qwen2", 3, 64, 4, 2, 128, 512, 512, tied)
    source = write_model(tmp_path / "model.gguf", shape, quant="Q8_0")
    whole, found = read_header(source), cut(source, 1, 3, tmp_path)
    head = "token_embd.weight" if tied else "output.weight"
    assert data(found, "token_embd.weight") == data(whole, head)
    assert "output.weight" not in {tensor.name for tensor in found.tensors}
    changed = {"qwen2.block_count": 2} | {k: v for k, v in found.metadata.items() if k.startswith("swarmcpp.")}
    assert found.metadata == whole.metadata | changed


def test_all_layers_are_the_model_with_a_mark(model: Path, tmp_path: Path) -> None:
    whole, found = read_header(model), cut(model, 0, 5, tmp_path)
    assert [(t.name, t.shape, data(found, t.name)) for t in found.tensors] == [
        (t.name, t.shape, data(whole, t.name)) for t in whole.tensors
    ]
    assert {k: v for k, v in found.metadata.items() if not k.startswith("swarmcpp.")} == whole.metadata


def test_numbers_of_each_layer_are_cut_too(model: Path, tmp_path: Path) -> None:
    extra: dict[str, object] = {
        "llama.attention.head_count_kv": [2] * 5,
        "llama.feed_forward_length": [11, 12, 13, 14, 15],
    }
    found = cut(rewritten(model, tmp_path / "arrays.gguf", extra), 1, 3, tmp_path)
    assert found.metadata["llama.attention.head_count_kv"] == (2, 2)
    assert found.metadata["llama.feed_forward_length"] == (12, 13)
    assert found.metadata["llama.attention.head_count"] == 4


def test_a_split_model_gives_the_same_tensors(model: Path, tmp_path: Path) -> None:
    paths = write_split(model, tmp_path, 3)
    (tmp_path / "one").mkdir()
    found, expected = cut(paths[0], 1, 4, tmp_path), cut(model, 1, 4, tmp_path / "one")
    assert not [key for key in found.metadata if key.startswith("split.")]
    assert {t.name: data(found, t.name) for t in found.tensors} == {
        t.name: data(expected, t.name) for t in expected.tensors
    }


# -- what is refused ---------------------------------------------------------------------------------------------


@given(first=st.integers(-3, 8), last=st.integers(-3, 8))
def test_a_range_that_is_none(model: Path, tmp_path_factory: pytest.TempPathFactory, first: int, last: int) -> None:
    target = tmp_path_factory.getbasetemp() / "range.gguf"
    if 0 <= first < last <= 5:
        write_slice(model, first, last, target, fingerprint=FINGERPRINT)
        target.unlink()
        return
    with pytest.raises(BadConfig, match=r"needs 0 <= A < B <= 5"):
        write_slice(model, first, last, target, fingerprint=FINGERPRINT)
    assert not target.exists()


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "granite", "deepseek2"])
def test_other_architectures_by_name(model: Path, tmp_path: Path, architecture: str) -> None:
    other = rewritten(model, tmp_path / "other.gguf", {}, architecture)
    with pytest.raises(BadModel, match=rf"{architecture!r}.*tested are llama, phi3, qwen2, qwen3, qwen3moe"):
        cut(other, 0, 2, tmp_path)


def test_a_slice_of_a_slice(model: Path, tmp_path: Path) -> None:
    first = cut(model, 0, 3, tmp_path).path
    with pytest.raises(BadModel, match=r"is a slice itself \(layers 0 to 3 of 5\)"):
        cut(first, 0, 1, tmp_path)


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        ({"llama.block_count": 6}, "has no tensors of layer 5"),
        ({"llama.expert_used_count": [1, 2]}, "no whole number for each of 5 layers"),
        ({"llama.nextn_predict_layers": 1}, "predict further tokens"),
        ({"swarmcpp.slice.first": 3}, "what no slice can be"),
    ],
)
def test_a_model_that_cannot_be_cut(model: Path, tmp_path: Path, extra: dict[str, object], fault: str) -> None:
    other = rewritten(model, tmp_path / "other.gguf", extra)
    with pytest.raises(BadModel, match=fault):
        write_slice(
            other, 2, int(str(extra.get("llama.block_count", 5))), tmp_path / "out.gguf", fingerprint=FINGERPRINT
        )
    assert {path.name for path in tmp_path.iterdir()} == {"other.gguf"}


def test_the_model_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    before = model.read_bytes()
    for target in (model, link):
        with pytest.raises(BadConfig, match="is the model itself"):
            write_slice(model, 0, 2, target, fingerprint=FINGERPRINT)
    assert model.read_bytes() == before


def test_a_target_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    for target in (tmp_path / "nowhere" / "out.gguf", tmp_path / "directory", model / "out.gguf"):
        with pytest.raises(StartupError, match=r"cannot write the slice \(.+\); it takes \d+ bytes"):
            write_slice(model, 0, 2, target, fingerprint=FINGERPRINT)
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


# -- how it is written -------------------------------------------------------------------------------------------

BOUNDED = """
import resource, sys
from pathlib import Path
from swarmcpp.models.slicing import write_slice
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_slice(Path(sys.argv[1]), 0, 2, Path(sys.argv[2]), fingerprint=bytes(32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_copy_takes_little_memory(tmp_path: Path) -> None:
    shape = Shape("wide", "llama", 3, 1024, 8, 2, 8192, 512, 512)
    source = write_model(tmp_path / "wide.gguf", shape, quant="F16")
    target = tmp_path / "out.gguf"
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(source), str(target)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert target.stat().st_size > 90 << 20
    assert int(done.stdout) << 10 < 16 << 20


@pytest.mark.parametrize("marks", [(1, 1, 5), (3, 2, 5), (0, 6, 5), (0, 3, 5)])
def test_marks_that_no_slice_has(model: Path, tmp_path: Path, marks: tuple[int, ...]) -> None:
    header = cut(model, 0, 2, tmp_path)
    names = ("swarmcpp.slice.first", "swarmcpp.slice.last", "swarmcpp.slice.of")
    bad = replace(header, metadata=header.metadata | dict(zip(names, marks, strict=True)))
    with pytest.raises(BadModel, match="what no slice can be"):
        slice_of(bad)
