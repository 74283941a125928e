"""Text to tokens and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trained_models import write_sentencepiece

from swarmcpp.errors import BadModel
from swarmcpp.llama.context import Model
from swarmcpp.llama.vocab import Vocab, VocabModel
from swarmcpp.models.synthetic_vocab import CONTROL_TOKENS, ENDOFTEXT, IM_END, IM_START

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(any_text)
def test_any_text_survives_a_round_trip(tiny: Model, text: str) -> None:
    tokens = tiny.vocab.tokenize(text, add_special=False, parse_special=False)
    assert b"".join(map(tiny.vocab.piece, tokens)) == text.encode()
    assert len(tokens) <= len(text.encode())


@given(st.lists(st.integers(0, 255), max_size=40))
def test_pieces_may_be_parts_of_characters(tiny: Model, tokens: list[int]) -> None:
    """Tokens 0-255 are the bytes."""
    assert b"".join(map(tiny.vocab.piece, tokens)) == bytes(tokens)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vocab]:
    model = VocabModel(write_sentencepiece(tmp_path_factory.mktemp("vocab") / "sentencepiece.gguf"))
    yield model.vocab
    model.close()


@given(any_text)
def test_a_sentencepiece_vocabulary_keeps_text_too(sentencepiece: Vocab, text: str) -> None:
    tokens = sentencepiece.tokenize(text, add_special=False, parse_special=False)
    shown = b"".join(map(sentencepiece.piece, tokens))
    # It puts a space before the first word.
    assert shown == (b" " + text.encode() if text else b"")


def test_control_tokens_show_no_text(tiny: Model) -> None:
    for token, text in CONTROL_TOKENS.items():
        assert tiny.vocab.piece(token) == b""
        assert tiny.vocab.special_text(token) == text
        assert tiny.vocab.tokenize(text, add_special=False, parse_special=True) == [token]
        assert token not in tiny.vocab.tokenize(text, add_special=False, parse_special=False)


def test_ends_of_generation(tiny: Model) -> None:
    assert {ENDOFTEXT, IM_END} <= tiny.vocab.eog_tokens
    assert IM_START not in tiny.vocab.eog_tokens
    assert (tiny.vocab.bos, tiny.vocab.eos, tiny.vocab.adds_bos) == (ENDOFTEXT, IM_END, False)


@pytest.mark.parametrize("token", [-1, -(2**31), 512, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_empty(tiny: Model, token: int) -> None:
    assert tiny.vocab.piece(token) == b""
    assert tiny.vocab.special_text(token) == ""


def test_a_long_text_fits(tiny: Model) -> None:
    text = "The cat sat on the mat. " * 5000
    tokens = tiny.vocab.tokenize(text, add_special=True, parse_special=True)
    assert b"".join(map(tiny.vocab.piece, tokens)).decode() == text


def test_lone_surrogates_are_refused(tiny: Model) -> None:
    with pytest.raises(UnicodeEncodeError):
        tiny.vocab.tokenize("\ud800", add_special=False, parse_special=False)


def test_a_vocabulary_needs_no_weights(tiny_path: Path, tiny: Model) -> None:
    model = VocabModel(tiny_path)
    assert model.vocab.n_vocab == tiny.vocab.n_vocab
    assert model.vocab.eog_tokens == tiny.vocab.eog_tokens
    model.close()
    model.close()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    for load in (VocabModel, lambda broken: Model(broken, use_extra_bufts=False)):
        with pytest.raises(BadModel, match=r"broken\.gguf: llama\.cpp cannot load this model: .+") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_truncated_weights_are_named(tmp_path: Path, tiny_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_path.read_bytes()[:-1000])
    with pytest.raises(BadModel, match=r"cut\.gguf"):
        Model(path, use_extra_bufts=False)


def test_loading_reports_progress(tiny_path: Path) -> None:
    seen: list[float] = []
    Model(tiny_path, use_extra_bufts=False, progress=seen.append).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
