"""Writes trained weights as GGUF. `python -m bench.guide.export WEIGHTS NAME OUT.gguf [--type Q8_0|F16]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import quantize

CONTEXT = 2048
NORM_EPS = 1e-5
ROPE_BASE = 10000.0
END, USER_TURN, TURN_END = range(3)

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without a default system message; BOS is the tokenizer's to add."""

FILE_TYPES = {"Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "F16": gguf.LlamaFileType.MOSTLY_F16}
TITLES = {
    "guide": ("swarmcpp-guide", "answers questions about swarmcpp and tells stories"),
    "draft": ("swarmcpp-guide-draft", "guesses what swarmcpp-guide says next"),
}


def weights(folder: Path, name: str) -> dict[str, npt.NDArray[np.float32]]:
    """All tensors of model `name`, by their names in GGUF."""
    found: dict[str, npt.NDArray[np.float32]] = {}
    for part in sorted(folder.glob(f"{name}-*.npz")):
        with np.load(part) as arrays:
            found |= {key: arrays[key].astype(np.float32) for key in arrays.files}
    return found


def write(folder: Path, name: str, out: Path, kind: str) -> Path:
    """Write model `name` ("guide" or "draft") of a training's folder as GGUF. `kind` is the type of its matrices."""
    shape: dict[str, int] = json.loads((folder / f"{name}.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(out, "llama")
    try:
        _metadata(writer, name, shape, kind)
        _vocabulary(writer, tokenizer["model"])
        for key, values in sorted(weights(folder, name).items()):
            _tensor(writer, key, values, GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return out


def _metadata(writer: gguf.GGUFWriter, name: str, shape: dict[str, int], kind: str) -> None:
    title, description = TITLES[name]
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(title)
    writer.add_description(description)
    writer.add_license("mit")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(CONTEXT)
    writer.add_block_count(shape["n_layer"])
    writer.add_embedding_length(shape["n_embd"])
    writer.add_feed_forward_length(shape["n_ff"])
    writer.add_head_count(shape["n_head"])
    writer.add_head_count_kv(shape["n_head"])
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_dimension_count(shape["n_embd"] // shape["n_head"])
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_vocab_size(shape["n_vocab"])


def _vocabulary(writer: gguf.GGUFWriter, model: dict[str, Any]) -> None:
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = [gguf.TokenType.CONTROL if index <= TURN_END else gguf.TokenType.NORMAL for index in range(len(tokens))]
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(END)
    writer.add_eos_token_id(TURN_END)
    writer.add_eot_token_id(TURN_END)
    writer.add_pad_token_id(END)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


def _tensor(writer: gguf.GGUFWriter, name: str, values: npt.NDArray[np.float32], kind: GGMLQuantizationType) -> None:
    if values.ndim == 1:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write trained weights as GGUF.")
    parser.add_argument("weights", type=Path)
    parser.add_argument("name", choices=sorted(TITLES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=sorted(FILE_TYPES), default="Q8_0")
    chosen = parser.parse_args()
    made = write(chosen.weights, chosen.name, chosen.out, chosen.type)
    print(f"{made}: {made.stat().st_size / 1e6:.2f} MB")
