"""The loop of a stage, on real slices: a chain of them says what the whole model says, and wrong asks hurt nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp.llama_cpp as c
import numpy as np
import pytest
from engine_support import GREEDY, prompt_of, request
from stage_support import N_EMBD, N_LAYERS, N_VOCAB, OPTIONS, Chain, Stage, resumed, stage_model

from swarmcpp.core import BlockRef, GenerateRequest, Rows, SamplingParams
from swarmcpp.engine.stageloop import StageLoop
from swarmcpp.errors import DecodeFailed
from swarmcpp.kv.arena import ArenaFile, ArenaGeometry
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Context, Model
from swarmcpp.llama.rows import FloatRows
from swarmcpp.llama.stage import StageContext, StageRows
from swarmcpp.testing import FakeClock
from swarmcpp.wire.codec import Buffer
from swarmcpp.wire.engine import (
    BlocksStored,
    Cancel,
    FromEngine,
    Place,
    Placed,
    Ran,
    Run,
    RunPart,
    Stop,
    StoreBlocks,
    ToEngine,
    UseArena,
)

STEPS = 50
Decode = Callable[[Sequence[StageRows]], FloatRows]
SAMPLED = SamplingParams(temperature=1.2, seed=7, repeat_penalty=1.1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage_model(tmp_path_factory.mktemp("stageloop"))


@pytest.fixture(scope="module")
def whole(path: Path) -> Iterator[LlamaBackend]:
    model = Model(path, use_extra_bufts=False)
    context = Context(model, OPTIONS)
    yield LlamaBackend(model, context)
    context.close()
    model.close()


@pytest.fixture
def chain(path: Path) -> Iterator[Chain]:
    chain = Chain(path)
    yield chain
    chain.close()


@pytest.fixture
def first(path: Path) -> Iterator[Stage]:
    stage = Stage(path, 0, 2)
    yield stage
    stage.close()


@pytest.fixture
def tail(path: Path) -> Iterator[Stage]:
    stage = Stage(path, 2, N_LAYERS)
    yield stage
    stage.close()


def prompts(count: int) -> dict[int, GenerateRequest]:
    return {serial: request(prompt_of(9 + 3 * serial, serial, N_VOCAB), STEPS) for serial in range(1, count + 1)}


def alone(whole: LlamaBackend, asked: GenerateRequest, steps: int = STEPS) -> list[int]:
    """What the whole model says, in a slot of its own, computed as a head has it computed."""
    whole.truncate(0, 0)
    sampler = whole.sampler(asked)
    whole.decode([Rows(0, 0, list(asked.prompt), outputs=1)])
    told = [whole.sample(sampler, 0).id]
    while len(told) < steps:
        whole.decode([Rows(0, len(asked.prompt) + len(told) - 1, told[-1:], outputs=1)])
        told.append(whole.sample(sampler, 0).id)
    sampler.close()
    whole.truncate(0, 0)
    return told


def rows_of(count: int, value: float = 0.1) -> bytes:
    return np.full((count, N_EMBD), value, "<f4").tobytes()


def run(stage: Stage, parts: Sequence[RunPart], frame: bytes | None = None, run: int = 1) -> tuple[Ran, bytes | None]:
    rows = rows_of(max(0, sum(part.count for part in parts))) if frame is None else frame
    return stage.ask(Run(run=run, parts=tuple(parts), encoding="f32", reply="f32"), Ran, rows)


# -- the same tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 3, 4), (0, 4)])
def test_stages_say_what_the_whole_model_says(path: Path, whole: LlamaBackend, cuts: tuple[int, ...]) -> None:
    chain = Chain(path, cuts)
    asked = prompts(3)
    assert chain.greedy(asked, STEPS) == {serial: alone(whole, one) for serial, one in asked.items()}
    chain.close()


def test_a_tail_has_room_for_so_many_outputs(tail: Stage) -> None:
    tail.place(1, request(prompt_of(5), 5))
    ran, _ = run(tail, [RunPart(1, 0, 49, 49, guesses=(1,) * 48)])
    assert (ran.code, ran.message) == ("wire", "49 outputs in a pass, which has at most 48")
    assert len(run(tail, [RunPart(1, 0, 48, 48, guesses=(1,) * 47)])[0].tokens[0]) >= 1


def test_rows_as_q8_0_give_tokens_too(path: Path) -> None:
    chain = Chain(path, wire="q8_0")
    told = chain.greedy(prompts(2), 10)
    assert [len(tokens) for tokens in told.values()] == [10, 10]
    chain.close()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_guesses_are_verified_as_far_as_they_are_right(
    chain: Chain, whole: LlamaBackend, sampling: SamplingParams
) -> None:
    asked = request(prompt_of(20, 3, N_VOCAB), STEPS, sampling=sampling)
    expected = alone(whole, asked)
    chain.place(1, asked)
    told = [chain.run({1: (0, asked.prompt)})[1]]
    for right, wrong in ((3, 2), (0, 4), (5, 0), (1, 1), (6, 1)):
        at = len(told)
        guesses = [*expected[at : at + right], *((each + 1) % N_VOCAB for each in expected[at + right :][:wrong])]
        came = chain.window(1, 19 + at, [told[-1], *guesses])
        assert came == expected[at : at + right + 1]
        told += came
    chain.go_on({1: asked}, {1: told}, STEPS)
    assert told == expected


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_what_follows_a_wrong_guess_is_void(chain: Chain, whole: LlamaBackend, sampling: SamplingParams) -> None:
    asked = request(prompt_of(20, 3, N_VOCAB), STEPS, sampling=sampling)
    expected = alone(whole, asked)
    chain.place(1, asked)
    told = [chain.run({1: (0, asked.prompt)})[1]]
    # Two windows, the second on the right guess that the first one holds, with the token that it brings beside.
    told += chain.window(1, 20, expected[:3])
    assert told == expected[:4]
    told += chain.window(1, 23, expected[3:6], follows=expected[3])
    assert told == expected[:7]
    # The next one is wrong in its last guess: nothing that was sent behind it counts, be its first token right or not.
    other = (expected[8] + 1) % N_VOCAB
    told += chain.window(1, 26, [expected[6], expected[7], other])
    assert told == expected[:9]
    assert chain.window(1, 29, expected[9:12], follows=expected[9]) == []
    assert chain.window(1, 32, expected[12:15], follows=expected[12]) == []
    # At the right place, but of another token than was drawn there.
    assert chain.window(1, 28, [other, *expected[9:11]], follows=other) == []
    # What is known goes on from where it stood, with no random number lost.
    chain.go_on({1: asked}, {1: told}, STEPS)
    assert told == expected


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_a_sequence_goes_on_in_new_stages(chain: Chain, whole: LlamaBackend, sampling: SamplingParams) -> None:
    """Its stages are lost after any number of tokens: everything is computed again, and no random number twice."""
    asked = request(prompt_of(20, 3, N_VOCAB), STEPS, sampling=sampling)
    expected = alone(whole, asked)
    for serial, kept in enumerate((0, 1, 17), 1):
        chain.place(serial, resumed(asked, expected[:kept]))
        chain.run({serial: (0, asked.prompt)}, outputs=int(not kept))
        told = {serial: list(expected[:kept])}
        for index in range(kept - 1):
            chain.run({serial: (20 + index, expected[index : index + 1])}, outputs=0)
        if not kept:
            # Replayed at the same position after another Place: the token of before is not counted.
            chain.place(serial, asked, tokens=19)
            told[serial].append(chain.run({serial: (19, asked.prompt[19:])})[serial])
        chain.go_on({serial: asked}, told, STEPS)
        assert len(told[serial]) == STEPS
        # A last row that was computed alone may differ in the last bit, but hardly ever in the token.
        assert told[serial] == expected


def test_a_run_cuts_back_what_was_there(chain: Chain, whole: LlamaBackend) -> None:
    """Tokens that were tried and did not hold leave nothing behind."""
    asked = request(prompt_of(12, 5, N_VOCAB), 20)
    told = chain.greedy({1: asked}, 5)
    chain.run({1: (16, (told[1][-1], 3, 3, 3))}, outputs=0)
    chain.place(1, resumed(asked, told[1]), tokens=16)
    chain.go_on({1: asked}, told, 20)
    assert told[1] == alone(whole, asked, 20)


def test_order_of_parts_is_the_callers(chain: Chain, whole: LlamaBackend) -> None:
    asked = prompts(3)
    for serial in (2, 3, 1):
        chain.place(serial, asked[serial])
    ids = chain.run({serial: (0, asked[serial].prompt) for serial in (1, 2, 3)})
    assert ids == {serial: alone(whole, one, 1)[0] for serial, one in asked.items()}


# -- slots -------------------------------------------------------------------------------------------------------


def test_sequences_move_to_where_their_head_wants_them(chain: Chain, whole: LlamaBackend) -> None:
    asked = prompts(4)
    told = chain.greedy(asked, 10)
    for stage in chain.stages:
        stage.loop.handle(Cancel(2))
        stage.loop.handle(Cancel(3))
    left = {serial: told[serial] for serial in (1, 4)}
    chain.go_on(asked, left, 12)
    assert all(stage.slots() == {1: 0, 4: 3} for stage in chain.stages), "nobody wanted them elsewhere"
    chain.go_on(asked, left, STEPS, places={1: 0, 4: 1})
    assert all(stage.slots() == {1: 0, 4: 1} for stage in chain.stages)
    assert left == {serial: alone(whole, asked[serial]) for serial in left}


def test_a_place_belongs_to_who_is_at_it(chain: Chain, whole: LlamaBackend) -> None:
    """Two heads that number alike keep what they have; one that is elsewhere than it wants makes room."""
    asked = prompts(3)
    told = chain.greedy(asked, 3)
    chain.go_on(asked, told, 6, places={1: 0, 2: 0, 3: 99})
    assert all(stage.slots() == {1: 0, 2: 1, 3: 2} for stage in chain.stages)
    chain.go_on(asked, told, 9, places={1: 1, 2: 0, 3: 2})
    assert all(stage.slots() == {1: 1, 2: 0, 3: 2} for stage in chain.stages)
    assert told == {serial: alone(whole, asked[serial], 9) for serial in told}


def test_sequences_change_places_when_no_slot_is_free(chain: Chain, whole: LlamaBackend) -> None:
    """As many sequences as slots, of different lengths; one has not computed anything yet."""
    asked = prompts(4)
    told = chain.greedy({serial: asked[serial] for serial in (1, 2, 3)}, 5)
    chain.place(4, asked[4])
    assert all(stage.slots() == {1: 0, 2: 1, 3: 2, 4: 3} for stage in chain.stages)
    chain.go_on({serial: asked[serial] for serial in told}, told, 9, places={1: 3, 2: 0, 3: 1})
    assert all(stage.slots() == {1: 3, 2: 0, 3: 1, 4: 2} for stage in chain.stages)
    chain.go_on({serial: asked[serial] for serial in told}, told, STEPS, places={1: 0, 2: 1, 3: 2})
    assert told == {serial: alone(whole, asked[serial]) for serial in told}
    for stage in chain.stages:
        stage.loop.check_integrity()


def test_sequences_are_given_out_lowest_first_and_no_more_than_there_are(first: Stage) -> None:
    for serial in range(4):
        assert not first.place(serial).code
    assert first.place(9).code == "queue_full"
    first.loop.handle(Cancel(2))
    first.loop.handle(Cancel(1))
    first.loop.handle(Cancel(77))
    assert not first.place(9).code
    assert first.slots() == {0: 0, 3: 3, 9: 1}


# -- what is wrong -----------------------------------------------------------------------------------------------

GOOD = RunPart(1, 4, 1, 0)


@pytest.mark.parametrize(
    ("parts", "frame", "code", "reason"),
    [
        ([RunPart(7, 0, 1, 0)], None, "stage_lost", "with 0 tokens"),
        ([RunPart(1, 6, 1, 0)], None, "stage_lost", "position 6 of a sequence with 5 tokens"),
        ([RunPart(1, -1, 1, 0)], None, "wire", "position -1"),
        ([], b"", "wire", "0 rows in 0 parts"),
        ([RunPart(1, 0, 513, 0)], None, "wire", "513 rows"),
        ([RunPart(1, 4, 2, 0), RunPart(2, 0, -1, 0)], None, "wire", "1 rows in 2 parts"),
        ([GOOD, GOOD], None, "wire", "two parts of one sequence"),
        ([RunPart(1, 4, 2, 3)], None, "wire", "3 outputs of 2 rows"),
        ([RunPart(1, 4, 2, 2)], None, "wire", "2 outputs of 2 rows with 0 guesses"),
        ([RunPart(1, 4, 509, 0)], None, "wire", "509 rows from position 4, where a sequence holds 512"),
        ([GOOD], b"", "wire", "0 bytes of f32 for 1 rows of 64 values, which take 256"),
        ([GOOD], rows_of(2), "wire", "512 bytes"),
        ([GOOD], rows_of(1, float("nan")), "wire", "finite"),
        ([GOOD, RunPart(2, 9, 1, 0)], None, "stage_lost", "position 9"),
    ],
)
def test_a_wrong_run_is_answered_and_hurts_nobody(
    first: Stage, parts: Sequence[RunPart], frame: bytes | None, code: str, reason: str
) -> None:
    first.place(1)
    first.place(2)
    assert not run(first, [RunPart(1, 0, 4, 0)])[0].code
    good = run(first, [GOOD])
    ran, rows = run(first, parts, frame, run=5)
    assert (ran.run, ran.code, rows) == (5, code, None)
    assert reason in ran.message
    again = run(first, [GOOD])
    assert again == good, "as if nothing had been asked"


def test_values_that_are_not_finite_fail_the_pass_and_nobody_else(
    first: Stage, tail: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [RunPart(1, 4, 1, 1), RunPart(2, 0, 2, 0)]
    for stage in (first, tail):
        for serial in (1, 2):
            stage.place(serial, request(prompt_of(4), sampling=SAMPLED))
        run(stage, [RunPart(1, 0, 4, 0)])
        context, decode = stage.context, stage.context.decode

        def poisoned(batch: Sequence[StageRows], context: StageContext = context, decode: Decode = decode) -> FloatRows:
            hidden = decode(batch)
            if context.is_tail:
                last = context.outputs[next(part.slot for part in batch if part.outputs)][-1]
                c.llama_get_logits_ith(context.context.pointer, last)[7] = float("inf")
            return hidden * np.float32("nan")

        with monkeypatch.context() as patch:
            patch.setattr(context, "decode", poisoned)
            ran, rows = run(stage, parts)
        assert (ran.code, rows, ran.tokens) == ("decode_failed", None, ())
        assert "finite" in ran.message
        assert {serial: opened.length for serial, opened in stage.loop._sequences.items()} == {1: 4, 2: 0}
        # The random number of the token that was not drawn is still to come.
        again = run(stage, parts)
        stage.place(3, request(prompt_of(4), sampling=SAMPLED))
        run(stage, [RunPart(3, 0, 4, 0)])
        assert run(stage, [RunPart(3, 4, 1, 1)])[0].tokens == again[0].tokens


def test_a_tail_needs_the_request_only_to_sample(tail: Stage) -> None:
    tail.place(1)
    assert not run(tail, [RunPart(1, 0, 4, 0)])[0].code
    ran, _ = run(tail, [RunPart(1, 4, 1, 1)])
    assert (ran.code, "without its request" in ran.message) == ("wire", True)
    too_long = tail.place(1, request(prompt_of(512)))
    assert (too_long.code, "512 tokens" in too_long.message) == ("wire", True)
    assert not tail.slots()


def test_an_output_elsewhere_means_nothing(first: Stage) -> None:
    first.place(1, request(prompt_of(4)))
    ran, rows = run(first, [RunPart(1, 0, 4, 1)])
    assert (ran.tokens, len(rows or b"")) == ((), 4 * 4 * N_EMBD)


def test_a_context_that_always_fails_is_given_up(first: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise DecodeFailed("llama_decode returned -3")

    first.place(1)
    monkeypatch.setattr(first.context, "decode", broken)
    for _ in range(2):
        assert run(first, [RunPart(1, 0, 1, 0)])[0].code == "decode_failed"
    with pytest.raises(DecodeFailed):
        run(first, [RunPart(1, 0, 1, 0)])


def test_stop_ends_the_loop(first: Stage) -> None:
    first.link.inbox.extend((Place(serial=1), Stop()))
    first.loop.serve()
    assert first.slots() == {1: 0}


# -- blocks ------------------------------------------------------------------------------------------------------


def test_blocks_come_back_from_the_arena(first: Stage, tmp_path: Path) -> None:
    assert first.layout.n_layers == 2
    geometry = ArenaGeometry(first.layout.token_bytes * 64, 4)
    file = tmp_path / "blocks"
    file.write_bytes(bytes(geometry.file_bytes))
    message = UseArena(path=str(file), block_bytes=geometry.block_bytes, n_blocks=4)

    first.place(1)
    blocks = (BlockRef(2, bytes(32)),)
    unread, _ = first.ask(Place(serial=1, tokens=64, blocks=blocks), Placed)
    assert (unread.tokens, unread.bad_blocks) == (0, False), "an arena that is not there damages nothing"

    def use(_: UseArena) -> None:
        first.backend.use_file(ArenaFile(file, geometry))

    first.loop._open_arena = use
    first.loop.handle(message)
    run(first, [RunPart(1, 0, 64, 0)])
    run(first, [RunPart(1, 64, 64, 0)])
    after = run(first, [RunPart(1, 128, 1, 0)])
    stored, _ = first.ask(StoreBlocks(serial=1, grants=((0, 3), (1, 1), (2, 0))), BlocksStored)
    assert [slot for slot, _ in stored.written] == [3, 1], "the third block is not full"
    assert first.ask(StoreBlocks(serial=8, grants=((0, 3),)), BlocksStored)[0].written == ()

    refs = tuple(BlockRef(slot, digest) for slot, digest in stored.written)
    placed, _ = first.ask(Place(serial=2, tokens=128, blocks=refs), Placed)
    assert (placed.tokens, placed.blocks, placed.bad_blocks) == (128, 2, False)
    assert run(first, [RunPart(2, 128, 1, 0)]) == after
    placed, _ = first.ask(Place(serial=3, tokens=100, blocks=refs), Placed)
    assert (placed.tokens, placed.blocks) == (100, 2), "within a block"
    placed, _ = first.ask(Place(serial=1, tokens=90, blocks=refs), Placed)
    assert (placed.tokens, placed.blocks) == (90, 0), "what it has is enough"
    placed, _ = first.ask(Place(serial=4, tokens=128, blocks=(refs[0], BlockRef(1, bytes(32)))), Placed)
    assert (placed.tokens, placed.blocks, placed.bad_blocks) == (64, 1, True)


# -- how it waits ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Comings:
    """A `StageLink` at which messages come after some time each; None: nothing comes within the time-out."""

    clock: FakeClock
    comings: list[tuple[float, ToEngine | None]]
    polls: list[float] = field(default_factory=list)
    frame: bytes | None = None

    def receive(self, timeout_s: float, poll_s: float = 0.0) -> ToEngine | None:
        self.polls.append(poll_s)
        seconds, message = self.comings.pop(0)
        self.clock.advance(seconds)
        self.frame = rows_of(1)
        return message

    def send(self, message: FromEngine, frame: Buffer | None = None) -> None:
        pass


def test_it_watches_for_a_pass_if_the_last_one_came_soon(first: Stage) -> None:
    clock = FakeClock()
    soon, late = 0.02, 0.04
    run = Run(run=1, parts=(RunPart(serial=1, start=0, count=1, outputs=0),), encoding="f32", reply="f32")
    comings = [(0.0, run), (soon, run), (soon, run), (late, run), (soon, run), (soon, None), (soon, Stop())]
    link = Comings(clock, list(comings))
    StageLoop(first.backend, link, clock, poll_s=0.03).serve()
    assert link.polls == pytest.approx([0.0, 0.0, 0.03, 0.03, 0.0, 0.03, 0.0])
    link = Comings(clock, list(comings))
    StageLoop(first.backend, link, clock).serve()
    assert set(link.polls) == {0.0}
