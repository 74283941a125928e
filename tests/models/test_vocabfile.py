"""A vocabulary from the first bytes of a model: llama.cpp reads it as it reads the whole model's."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trained_models import trained_model, write_sentencepiece

from swarmcpp.errors import BadModel
from swarmcpp.llama.vocab import VocabModel
from swarmcpp.models.gguf_header import read_header
from swarmcpp.models.synthetic import TINY, write_model
from swarmcpp.models.vocabfile import header_bytes_needed, write_vocab_file

TEXTS = ("", "Once upon a time", "  Ünï©ödé \U0001f642\n\tif x:", "<|im_start|>user\nhi<|im_end|>", "a" * 500)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("vocab") / "tiny.gguf", TINY, quant="Q8_0")


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("vocab") / "sentencepiece.gguf")


@pytest.fixture(params=["tiny", "trained", "sentencepiece"])
def model(request: pytest.FixtureRequest, tiny: Path, sentencepiece: Path) -> Path:
    return {"tiny": tiny, "trained": trained_model(), "sentencepiece": sentencepiece}[request.param]


def metadata_end(path: Path) -> int:
    """Bytes up to the end of the metadata: the least prefix that suffices."""
    data = path.read_bytes()
    low, high = 0, len(data)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if header_bytes_needed(data[:middle]) is None else (middle + 1, high)
    return low


def with_metadata(path: Path, changes: dict[str, list[object]], leave_out: str = "") -> Path:
    """A small vocabulary with some of its arrays replaced."""
    arrays: dict[str, list[object]] = {
        "tokenizer.ggml.tokens": ["a", "b", "c"],
        "tokenizer.ggml.scores": [0.0, 1.0, 2.0],
        "tokenizer.ggml.token_type": [1, 1, 1],
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, values in (arrays | changes).items():
        if key != leave_out:
            writer.add_array(key, values)
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def both(model: Path, vocab_file: Path) -> Iterator[VocabModel]:
    for path in (model, vocab_file):
        loaded = VocabModel(path)
        yield loaded
        loaded.close()


@pytest.mark.parametrize("whole", [True, False])
def test_it_tokenises_as_the_model_does(model: Path, tmp_path: Path, whole: bool) -> None:
    target = tmp_path / "vocab.gguf"
    write_vocab_file(model.read_bytes()[: None if whole else metadata_end(model)], target)
    seen = []
    for loaded in both(model, target):
        vocab = loaded.vocab
        tokens = [vocab.tokenize(text, add_special=True, parse_special=True) for text in TEXTS]
        pieces = [vocab.piece(token) for token in range(vocab.n_vocab)]
        seen.append((vocab.n_vocab, vocab.bos, vocab.eos, vocab.adds_bos, vocab.eog_tokens, tokens, pieces))
    assert seen[0] == seen[1]


def test_the_rest_of_the_metadata_is_there(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "vocab.gguf"
    write_vocab_file(model.read_bytes(), target)
    assert read_header(target).metadata == read_header(model).metadata
    assert read_header(target).tensors == ()
    assert [path.name for path in tmp_path.iterdir()] == ["vocab.gguf"]


def test_the_chat_template_survives(tiny: Path, tmp_path: Path) -> None:
    write_vocab_file(tiny.read_bytes(), tmp_path / "vocab.gguf")
    template = read_header(tmp_path / "vocab.gguf").metadata["tokenizer.chat_template"]
    assert isinstance(template, str)
    assert "<|im_start|>" in template


def test_each_answer_brings_the_header_nearer(model: Path, tmp_path: Path) -> None:
    """Asking for what is needed, again and again, ends at the metadata's end and never goes beyond it."""
    data, end = model.read_bytes(), metadata_end(model)
    have = 0
    while (needed := header_bytes_needed(data[:have])) is not None:
        assert have < needed <= end
        have = max(needed, min(have + 200, end))
    assert have == end


def test_a_prefix_that_is_too_short_is_no_vocabulary(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()[: metadata_end(tiny) - 1]
    with pytest.raises(BadModel, match="end after"):
        write_vocab_file(data, tmp_path / "vocab.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_split_model_gives_a_whole_vocabulary(tmp_path: Path) -> None:
    write_vocab_file(with_metadata(tmp_path / "a.gguf", {}).read_bytes(), tmp_path / "vocab.gguf")
    metadata = read_header(tmp_path / "vocab.gguf").metadata
    assert "split.count" not in metadata
    assert metadata["tokenizer.ggml.tokens"] == ("a", "b", "c")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("tokenizer.ggml.tokens", [1, 2, 3]),
        ("tokenizer.ggml.scores", [0.0, 1.0]),
        ("tokenizer.ggml.scores", [0, 1, 2]),
        ("tokenizer.ggml.token_type", [1, 1, 1, 1]),
        ("tokenizer.ggml.token_type", ["a", "b", "c"]),
        ("tokenizer.ggml.merges", [1]),
        ("tokenizer.ggml.precompiled_charsmap", ["x"]),
    ],
)
def test_arrays_that_llama_cpp_would_fall_over_are_refused(tmp_path: Path, key: str, values: list[object]) -> None:
    path = with_metadata(tmp_path / "a.gguf", {key: values})
    with pytest.raises(BadModel, match=key):
        write_vocab_file(path.read_bytes(), tmp_path / "vocab.gguf")


def test_a_model_without_tokens_is_refused(tmp_path: Path) -> None:
    path = with_metadata(tmp_path / "a.gguf", {}, leave_out="tokenizer.ggml.tokens")
    with pytest.raises(BadModel, match=r"has no tokenizer\.ggml\.tokens"):
        write_vocab_file(path.read_bytes(), tmp_path / "vocab.gguf")


@pytest.mark.parametrize("junk", [b"no GGUF", b"GGUF" + bytes(20), b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40)])
def test_what_is_no_gguf_is_refused_at_once(tmp_path: Path, junk: bytes) -> None:
    for reads in (header_bytes_needed, lambda data: write_vocab_file(data, tmp_path / "vocab.gguf")):
        with pytest.raises(BadModel):
            reads(junk)


@pytest.mark.parametrize("claim", [1 << 30, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("kind", ["string", "strings", "numbers", "key"])
def test_huge_claims_cost_nothing(claim: int, kind: str) -> None:
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    value = {
        "string": struct.pack("<Q1sIQ", 1, b"k", 8, claim),
        "strings": struct.pack("<Q1sIIQ", 1, b"k", 9, 8, claim),
        "numbers": struct.pack("<Q1sIIQ", 1, b"k", 9, 12, claim),
        "key": struct.pack("<Q", claim),
    }[kind]
    with pytest.raises(BadModel):
        header_bytes_needed(start + value + bytes(64))


@given(data=st.data())
def test_damage_is_named_or_harmless(tiny: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    end = metadata_end(tiny)
    damaged = bytearray(tiny.read_bytes()[:end])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    target = tmp_path_factory.getbasetemp() / "damaged.gguf"
    try:
        write_vocab_file(bytes(damaged), target)
    except BadModel as error:
        assert "\n" not in str(error)
    else:
        read_header(target)
