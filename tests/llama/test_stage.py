"""Stages compute what the whole model does: same logits, bit for bit, whatever the cuts and the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import llama_cpp.llama_cpp as lc
import numpy as np
import pytest
from engine_support import GREEDY, prompt_of
from hypothesis import given
from hypothesis import strategies as st
from trained_models import TRAINED_LAYERS, trained_model

from swarmcpp import _native
from swarmcpp.core import Rows
from swarmcpp.engine.abortflag import AbortFlag
from swarmcpp.errors import BadModel, BadRequest, DecodeAborted, DecodeFailed
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Context, ContextOptions, Model
from swarmcpp.llama.sampler import Sampler
from swarmcpp.llama.snapshot import block_of, parse
from swarmcpp.llama.stage import EmbeddingTable, StageContext, StageRows, ubatch_order
from swarmcpp.models.slicing import ARCHITECTURES, write_slice
from swarmcpp.models.synthetic import Quant, Shape, write_model

N_LAYERS = 5
OPTIONS = ContextOptions(n_ctx=256, n_seqs=4, n_threads=1)
FINGERPRINT = bytes(range(32))
MODELS = (*ARCHITECTURES, "llama with experts", "qwen2 tied")

Parts = Sequence[tuple[int, Sequence[int]]]


def model_file(name: str, directory: Path, quant: Quant = "Q8_0") -> Path:
    architecture = name.split()[0]
    assert architecture in ("llama", "phi3", "qwen2", "qwen3", "qwen3moe"), "a tested architecture without a shape"
    experts = 4 if architecture == "qwen3moe" or name.endswith("experts") else 0
    # Not named as the architecture: llama.cpp looks for tokens of Phi in a model that is called so.
    shape = Shape("random", architecture, N_LAYERS, 64, 4, 2, 128, 512, 512, name.endswith("tied"), n_expert=experts)
    return write_model(directory / f"{name}.gguf", shape, quant=quant)


class Pipeline:
    """Stages of one model in this process; `cuts` are their borders, such as 0, 2, 5."""

    def __init__(self, path: Path, cuts: Sequence[int], directory: Path, options: ContextOptions = OPTIONS) -> None:
        self.table = EmbeddingTable(path)
        self.models: list[Model] = []
        self.stages: list[StageContext] = []
        for first, last in pairwise(cuts):
            file = write_slice(path, first, last, directory / f"{first}-{last}.gguf", fingerprint=FINGERPRINT)
            self.models.append(Model(file, use_extra_bufts=False))
            self.stages.append(StageContext(self.models[-1], options, is_tail=last == cuts[-1]))

    def decode(self, parts: Sequence[Rows]) -> None:
        rows = [StageRows(p.slot, p.start, self.table.rows(p.tokens), p.outputs) for p in parts]
        for stage in self.stages[:-1]:
            hidden = np.split(stage.decode(rows), np.cumsum([len(part.rows) for part in rows])[:-1])
            rows = [StageRows(p.slot, p.start, h, p.outputs) for p, h in zip(rows, hidden, strict=True)]
        assert self.tail.decode(rows).shape == (0, self.table.n_embd)

    @property
    def tail(self) -> StageContext:
        return self.stages[-1]

    def close(self) -> None:
        for stage in self.stages:
            stage.close()
        for model in self.models:
            model.close()


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_file(request.param, tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_file("llama", tmp_path_factory.mktemp("small"))


@pytest.fixture
def whole(path: Path) -> Iterator[LlamaBackend]:
    model = Model(path, use_extra_bufts=False)
    context = Context(model, OPTIONS)
    yield LlamaBackend(model, context)
    context.close()
    model.close()


STEPS = (
    [(0, 64), (1, 64)],
    [(0, 64), (1, 5)],
    [(0, 1), (1, 1), (2, 64)],
    [(0, 1), (1, 1), (2, 7), (3, 20)],
    [(1, 2), (3, 9)],
    [(0, 5), (2, 3)],
    [(3, 6), (1, 4)],
    [(0, 1), (1, 1), (2, 1), (3, 1)],
    [(3, 1)],
)
"""(slot, rows) of each decode: tiles of 64, short tails, decode rows beside chunks, slots that are not neighbours."""


@pytest.mark.parametrize("cuts", [(0, 2, 5), (0, 1, 3, 5)])
def test_logits_are_those_of_the_whole_model(
    path: Path, whole: LlamaBackend, cuts: tuple[int, ...], tmp_path: Path
) -> None:
    pipeline = Pipeline(path, cuts, tmp_path)
    held = [0] * 4
    for step, sizes in enumerate(STEPS):
        parts = [Rows(slot, held[slot], prompt_of(count, step + slot, 512), outputs=1) for slot, count in sizes]
        whole.decode(parts)
        pipeline.decode(parts)
        for slot, count in sizes:
            held[slot] += count
            logits = pipeline.tail.logits(slot)
            np.testing.assert_array_equal(logits, whole.logits(slot))
            assert logits.std() > 1
    assert [[stage.context.length(slot) for slot in range(4)] for stage in pipeline.stages] == [held] * len(cuts[1:])
    pipeline.close()


@pytest.mark.parametrize("quant", ["F32", "F16", "Q4_0"])
def test_any_type_of_weights(quant: Quant, tmp_path: Path) -> None:
    path = model_file("qwen2 tied", tmp_path, quant)
    model = Model(path, use_extra_bufts=False)
    context = Context(model, OPTIONS)
    whole, pipeline = LlamaBackend(model, context), Pipeline(path, (0, 3, 5), tmp_path)
    for part in (Rows(0, 0, prompt_of(70, 3, 512), outputs=1), Rows(0, 70, [511], outputs=1)):
        whole.decode([part])
        pipeline.decode([part])
        np.testing.assert_array_equal(pipeline.tail.logits(0), whole.logits(0))
    pipeline.close()
    context.close()
    model.close()


Decode = Callable[[Sequence[Rows]], None]


def greedy(decode: Decode, sample: Callable[[], int], prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens after `prompt`, in slot 0."""
    tokens: list[int] = []
    rows = Rows(0, 0, prompt, outputs=1)
    while len(tokens) < count:
        decode([rows])
        tokens.append(sample())
        rows = Rows(0, len(prompt) + len(tokens) - 1, [tokens[-1]], outputs=1)
    return tokens


@pytest.mark.parametrize("cuts", [(0, 5, TRAINED_LAYERS), (0, 1, 9, TRAINED_LAYERS)])
def test_a_trained_model_tells_the_same_story(cuts: tuple[int, ...], trained: Model, tmp_path: Path) -> None:
    prompt = trained.vocab.tokenize("Once upon a time", add_special=True, parse_special=False)
    context = Context(trained, OPTIONS)
    whole = LlamaBackend(trained, context)
    sampler = Sampler(GREEDY, trained.vocab, prompt, ())
    expected = greedy(whole.decode, lambda: whole.sample(sampler, 0).id, prompt, 200)
    sampler.close()
    context.close()

    pipeline = Pipeline(trained_model(), cuts, tmp_path)
    tail, vocab = pipeline.tail, pipeline.models[-1].vocab
    sampler = Sampler(GREEDY, vocab, prompt, ())
    told = greedy(pipeline.decode, lambda: sampler.sample(tail.context, tail.outputs[0][-1]), prompt, 200)
    sampler.close()
    assert told == expected
    assert b"".join(map(vocab.piece, told)).startswith(b" there was a ")
    pipeline.close()


def test_stages_roll_back_and_go_on(small: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(small, (0, 2, 5), tmp_path)
    pipeline.decode([Rows(1, 0, prompt_of(64, 1, 512), outputs=0)])
    pipeline.decode([Rows(1, 64, prompt_of(20, 2, 512), outputs=1)])
    expected = pipeline.tail.logits(1)
    for stage in pipeline.stages:
        stage.context.truncate(1, 64)
    pipeline.decode([Rows(1, 64, prompt_of(20, 2, 512), outputs=1)])
    np.testing.assert_array_equal(pipeline.tail.logits(1), expected)
    pipeline.close()


def test_the_kv_of_stages_is_that_of_the_whole_model(small: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(small, (0, 2, 5), tmp_path)
    model = Model(small, use_extra_bufts=False)
    context = Context(model, OPTIONS)
    whole = LlamaBackend(model, context)
    backends = [whole, *map(LlamaBackend, pipeline.models, [stage.context for stage in pipeline.stages])]
    # Learnt by decoding a token, which a stage without a vocabulary can do too.
    layouts = [backend.learn() for backend in backends]
    part = Rows(2, 0, prompt_of(64, 4, 512), outputs=1)
    whole.decode([part])
    pipeline.decode([part])
    contexts = [context, *(stage.context for stage in pipeline.stages)]
    snapshots = [parse(each.export(2), layout) for each, layout in zip(contexts, layouts, strict=True)]
    # Keys of all layers, then values of all layers.
    halves = [np.split(block_of(snapshot.part(64), 0, 64), 2) for snapshot in snapshots]
    for half in range(2):
        np.testing.assert_array_equal(np.concatenate([stage[half] for stage in halves[1:]]), halves[0][half])
    pipeline.close()
    context.close()
    model.close()


def test_only_the_tail_has_a_vocabulary(small: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(small, (0, 1, 3, 5), tmp_path)
    assert [model.vocab.n_vocab for model in pipeline.models] == [1, 1, 512]
    kinds = [lc.llama_vocab_type(lc.llama_model_get_vocab(model.pointer)) for model in pipeline.models]
    assert kinds == [lc.LLAMA_VOCAB_TYPE_NONE, lc.LLAMA_VOCAB_TYPE_NONE, lc.LLAMA_VOCAB_TYPE_BPE]
    pipeline.close()


# -- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_stage_goes_on_after_a_decode_that_failed(small: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(small, (0, 2, 5), tmp_path)
    first = pipeline.stages[0]
    part = StageRows(0, 0, pipeline.table.rows([1, 2, 3]), outputs=0)
    expected = first.decode([part])
    with pytest.raises(DecodeFailed, match="on 3 rows"):
        first.decode([StageRows(0, 100, part.rows, outputs=0)])
    first.context.truncate(0, 0)
    np.testing.assert_array_equal(first.decode([part]), expected)
    pipeline.close()


def test_an_abort_stops_a_stage_and_it_goes_on(small: Path, tmp_path: Path) -> None:
    node = AbortFlag(tmp_path / "abort", create=True)
    engine = AbortFlag(tmp_path / "abort", create=False)
    options = ContextOptions(256, 4, 1, _native.abort_callback_address(), engine.address)
    pipeline = Pipeline(small, (0, 2, 5), tmp_path, options)
    first = pipeline.stages[0]
    part = StageRows(0, 0, pipeline.table.rows(prompt_of(64)), outputs=0)
    expected = first.decode([part])
    first.context.truncate(0, 0)
    engine.begin(1, [1])
    assert node.abort_prompt(1)
    with pytest.raises(DecodeAborted):
        first.decode([part])
    engine.end()
    first.context.truncate(0, 0)
    np.testing.assert_array_equal(first.decode([part]), expected)
    pipeline.close()
    engine.close()
    node.close()


@pytest.mark.parametrize("shape", [(2, 32), (0, 64), (513, 64), (64,)])
def test_rows_of_a_wrong_shape_are_refused(small: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    pipeline = Pipeline(small, (0, 2, 5), tmp_path)
    for stage in pipeline.stages:
        with pytest.raises(ValueError, match="rows"):
            stage.decode([StageRows(0, 0, np.zeros(shape, np.float32), outputs=1)])
    pipeline.close()


def test_embeddings_of_no_token(small: Path, tmp_path: Path) -> None:
    table = EmbeddingTable(small)
    assert table.rows([]).shape == (0, 64)
    assert table.rows([511]).shape == (1, 64)
    for token in (-1, 512):
        with pytest.raises(BadRequest, match=f"token {token} is not in the vocabulary; ids are 0 to 511"):
            table.rows([3, token])
    tail = write_slice(small, 2, 5, tmp_path / "tail.gguf", fingerprint=FINGERPRINT)
    with pytest.raises(BadModel, match="is a slice, which has no token embeddings"):
        EmbeddingTable(tail)


def test_a_tap_takes_no_more_than_fits(small: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(small, (0, 2, 5), tmp_path)
    first = pipeline.stages[0]
    first._taken = np.full((2, 64), 7, np.float32)
    with pytest.raises(DecodeFailed, match="0 bytes of hidden rows for 3 rows"):
        first.decode([StageRows(0, 0, pipeline.table.rows([1, 2, 3]), outputs=0)])
    assert (first._taken == 7).all()
    pipeline.close()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=8))
def test_every_row_is_computed_once(parts: list[tuple[int, int]]) -> None:
    order = ubatch_order(parts)
    assert sorted(order) == list(range(sum(count for _, count in parts)))
    seqs = [seq for seq, count in parts for _ in range(count)]
    for seq in set(seqs):
        own = [row for row in order if seqs[row] == seq]
        assert own == sorted(own), "a sequence's rows stay in order"
