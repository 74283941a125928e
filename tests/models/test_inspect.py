"""What inspect() reads from a model, and every kind of file that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from swarmcpp.errors import BadModel
from swarmcpp.models.inspect import KNOWN, RECURRENT, inspect
from swarmcpp.models.synthetic import QWEN25_05B, TINY, write_model

HPARAMS = {"block_count": 2, "context_length": 128, "embedding_length": 64, "attention.head_count": 4}


def write(path: Path, architecture: str = "llama", *, tensors: bool = True, **metadata: Any) -> Path:
    """A GGUF with good hyper-parameters but for `metadata` ("__" for "."; None removes a key)."""
    fields: dict[str, Any] = {f"{architecture}.{key}": value for key, value in HPARAMS.items()}
    fields |= {key.replace("__", ".").replace("ARCH", architecture): value for key, value in metadata.items()}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    if tensors:
        writer.add_tensor("token_embd.weight", np.zeros((10, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadModel) as caught:
        inspect(path)
    message = str(caught.value)
    assert message.startswith(str(path.parent))
    assert "\n" not in message
    return message


def test_reads_a_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", TINY, quant="Q8_0")
    model = inspect(path)
    assert (model.path, model.files, model.name, model.architecture) == (path, (path,), "tiny", "llama")
    assert (model.n_layers, model.n_ctx_train, model.n_embd, model.n_head) == (2, 512, 64, 4)
    assert (model.n_head_kv, model.head_dim_k, model.head_dim_v, model.n_ff) == ((2, 2), 16, 16, 128)
    assert (model.n_vocab, model.ftype, model.has_tokenizer) == (512, "Q8_0", True)
    assert model.chat_template is not None
    assert "<|im_start|>" in model.chat_template
    assert model.size_bytes == path.stat().st_size
    per_layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64
    assert model.n_params == 2 * 512 * 64 + 64 + 2 * per_layer


def test_without_tokenizer(tmp_path: Path) -> None:
    model = inspect(write_model(tmp_path / "tiny.gguf", TINY, quant="F16", tokenizer="none"))
    assert (model.n_vocab, model.has_tokenizer, model.chat_template, model.ftype) == (512, False, None, "F16")


def test_falls_back_where_the_file_is_silent(tmp_path: Path) -> None:
    model = inspect(write(tmp_path / "plain.gguf"))
    assert (model.name, model.n_vocab, model.ftype, model.n_head_kv) == ("plain", 10, "F32", (4, 4))


def test_heads_per_layer(tmp_path: Path) -> None:
    model = inspect(write(tmp_path / "m.gguf", "openelm", ARCH__attention__head_count_kv=[1, 3]))
    assert model.n_head_kv == (1, 3)


REFUSED: dict[str, dict[str, Any]] = {
    "vocabulary and no weights": {"tensors": False},
    "LoRA adapter": {"general__type": "adapter"},
    "multimodal projector (mmproj)": {"general__type": "mmproj"},
    "holds imatrix": {"general__type": "imatrix"},
    "'bert' only encodes": {"architecture": "bert"},
    "'qwen3' only encodes": {"architecture": "qwen3", "ARCH__attention__causal": False},
    "'t5' is an encoder-decoder": {"architecture": "t5"},
    "'wavtokenizer-dec' is no text model": {"architecture": "wavtokenizer-dec"},
    "'llada' generates by diffusion": {"architecture": "llada"},
    "'mamba' is recurrent or hybrid; swarmcpp serves attention models with a plain KV cache": {"architecture": "mamba"},
    "'transformer9000' is not supported": {"architecture": "transformer9000"},
    "has no llama.block_count": {"ARCH__block_count": None},
    "has no llama.context_length": {"ARCH__context_length": None},
    "has no llama.embedding_length": {"ARCH__embedding_length": None},
    "has no llama.attention.head_count": {"ARCH__attention__head_count": None},
    "llama.block_count = 4000000000, must be between 1 and 512": {"ARCH__block_count": 4_000_000_000},
    "llama.context_length = 'x'": {"ARCH__context_length": "x"},
    "llama.block_count = True": {"ARCH__block_count": True},
    "llama.attention.head_count_kv = (1, 2, 3)": {"ARCH__attention__head_count_kv": [1, 2, 3]},
    "no attention heads": {"ARCH__attention__head_count": 0},
}


@pytest.mark.parametrize("reason", REFUSED, ids=str)
def test_refuses(tmp_path: Path, reason: str) -> None:
    fields = dict(REFUSED[reason])
    architecture = fields.pop("architecture", "llama")
    assert reason in refusal(write(tmp_path / "m.gguf", architecture, **fields))


def test_refuses_mmproj_of_older_converters(tmp_path: Path) -> None:
    assert "mmproj" in refusal(write(tmp_path / "m.gguf", "clip"))


def test_architecture_groups_are_real() -> None:
    assert RECURRENT <= KNOWN


def test_no_architecture(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\x03" + bytes(19))
    assert "no general.architecture" in refusal(path)


def split(directory: Path, count: int = 3, *, tensors: int | None = None) -> list[Path]:
    """A model of `count` files with one tensor each, as llama-gguf-split names them."""
    paths = []
    for number in range(count):
        path = directory / f"m-{number + 1:05d}-of-{count:05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for key, value in HPARAMS.items():
                writer.add_uint32(f"llama.{key}", value)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count if tensors is None else tensors)
        name = "token_embd.weight" if number == 1 else f"w{number}"
        writer.add_tensor(name, np.zeros((10, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_split_model(tmp_path: Path) -> None:
    paths = split(tmp_path)
    model = inspect(paths[0])
    assert model.files == tuple(paths)
    assert (model.n_params, model.n_vocab) == (3 * 640, 10)
    assert model.size_bytes == sum(path.stat().st_size for path in paths)


def test_split_faults(tmp_path: Path) -> None:
    paths = split(tmp_path)
    assert "is file 00002 of a split GGUF; give the first, m-00001-of-00003.gguf" in refusal(paths[1])
    third = paths[2].read_bytes()
    paths[2].write_bytes(paths[1].read_bytes())
    assert "is not file 3 of 3" in refusal(paths[0])
    paths[2].write_bytes(third[:-1])
    assert "truncated" in refusal(paths[0])
    paths[2].unlink()
    assert "1 of 3 files missing (m-00003-of-00003.gguf)" in refusal(paths[0])
    renamed = paths[0].rename(tmp_path / "other.gguf")
    assert "give the files their original names" in refusal(renamed)


def test_split_with_wrong_total(tmp_path: Path) -> None:
    assert "has 3 tensors, expected 7" in refusal(split(tmp_path, tensors=7)[0])


def test_qwen_shape_is_qwen() -> None:
    """The 0.5B shape, as the published model counts itself: 494 million parameters."""
    assert QWEN25_05B.n_vocab * 896 + 24 * (
        896 * 896 * 2 + 2 * 896 * 128 + 896 + 2 * 128 + 3 * 896 * 4864 + 2 * 896
    ) + 896 == pytest.approx(494e6, rel=0.001)
