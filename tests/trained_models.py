"""Models that have learnt something, in the forms that tests need, and what their stories begin with."""

from __future__ import annotations

from pathlib import Path

import environment
import gguf
import numpy as np
import pytest

from swarmcpp.models.embedded import GUIDE, embedded_file

TRAINED = GUIDE
"""What nodes call the model of `trained_model`."""

TRAINED_LAYERS = 12
"""Of the trained model."""

BEGINNINGS = (
    "Tom the cat was sad.",
    "Sue was a small boat.",
    "Bo was a train.",
    "In a village lived a small boat named Jack.",
    "Ben was a cloud.",
    "Lily was a dog.",
    "There once was a mouse. Ben",
    "Lucy was a princess.",
)
"""Of stories of 300 greedy tokens in which the unquantised model's best two tokens are never nearer than 0.04. What was
computed token by token and is computed again in chunks moves that distance by up to 0.008: another one goes on as the
first would have, and so does the test."""


def trained_model() -> Path:
    """The model of the package: 12 layers in Q8_0, 3072 tokens of byte-level BPE with a chat template."""
    return embedded_file()


def write_unquantised(path: Path) -> Path:
    """The trained model with its weights as F32.

    With Q8_0 rows are rounded to 8 bits on their way, which makes of the last bit's difference between a chunk and the
    same tokens one by one up to 0.2 between the best two tokens: any story comes past nearer ties.
    """
    source, writer = gguf.GGUFReader(trained_model()), gguf.GGUFWriter(path, "llama")
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key != gguf.Keys.General.ARCHITECTURE:
            value = int(gguf.LlamaFileType.ALL_F32) if key == gguf.Keys.General.FILE_TYPE else field.contents()
            writer.add_key_value(key, value, field.types[0], field.types[-1])
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_sentencepiece(path: Path) -> Path:
    """A vocabulary as sentencepiece makes them: no byte-level BPE, but scores, bytes for what is no piece, and a space
    before the first word. No weights."""
    words = ["\u2581", *"aeinorst", "in", "on", "er", "\u2581t", "\u2581the", "\u2581a"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = {"<unk>": gguf.TokenType.UNKNOWN, "<s>": gguf.TokenType.CONTROL, "</s>": gguf.TokenType.CONTROL}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*kinds, *byte_tokens, *words])
    writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(len(words), 0, -1)])
    writer.add_token_types([*kinds.values(), *[gguf.TokenType.BYTE] * 256, *[gguf.TokenType.NORMAL] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def stories_model() -> Path:
    """stories260K, of which llama-server's own answers are known; skips the test where it is not at hand."""
    beside = Path(__file__).parents[2] / "shared" / "models" / "stories260K.gguf"
    path = Path(environment.STORIES or beside)
    if not path.is_file():
        pytest.skip("stories260K.gguf is not here; SWARMCPP_STORIES may name it")
    return path
