"""Beginnings of prompts are read once: by requests that arrive together, one after another, or after a restart."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from engine_support import prompt_of, request
from fake_backend import FakeBackend, FakeLink, continuation

from swarmcpp.core import GenerateRequest, Rows, SamplingParams, TokenPart
from swarmcpp.engine.abortflag import AbortFlag
from swarmcpp.engine.loop import Engine
from swarmcpp.engine.scheduler import Policy, Scheduler
from swarmcpp.kv.arena import Arena, ArenaFile, ArenaGeometry
from swarmcpp.kv.cache import Grant, Lease, PrefixCache
from swarmcpp.kv.keys import KvIdentity
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Context, ContextOptions, Model
from swarmcpp.testing import FakeClock
from swarmcpp.wire.engine import (
    BlocksFull,
    BlocksStored,
    Cancel,
    Forget,
    StepOut,
    StoreBlocks,
    Submit,
    UseArena,
)

BLOCK = 64
N_CTX = 512
COMMON = prompt_of(256, 3)


class CountingBackend(LlamaBackend):
    """llama.cpp, with the rows of all decodes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.computed = 0

    def decode(self, rows: Sequence[Rows]) -> None:
        self.computed += sum(len(part.tokens) for part in rows)
        super().decode(rows)

    def rows(self) -> int:
        return self.computed


AnyBackend = FakeBackend | CountingBackend


@dataclass(slots=True)
class Node:
    """An engine driven step by step, and the node's side of its blocks as the supervisor has it.

    Without a cache the engine has no arena.
    """

    backend: AnyBackend
    engine: Engine
    link: FakeLink
    abort: AbortFlag
    cache: PrefixCache | None = None
    leases: dict[int, Lease] = field(default_factory=dict)
    grants: list[tuple[int, Grant]] = field(default_factory=list)
    heard: int = 0

    def submit(self, serial: int, wanted: GenerateRequest) -> None:
        blocks = ()
        if self.cache:
            lease = self.cache.lease((*wanted.prompt, *wanted.generated), wanted.cache_salt)
            self.leases[serial], blocks = lease, lease.refs
        self.link.inbox.append(Submit(serial, wanted, blocks))

    def cancel(self, serial: int) -> None:
        self.release(serial)
        self.link.inbox.append(Cancel(serial))

    def release(self, serial: int, out: TokenPart | None = None) -> None:
        lease = self.leases.pop(serial, None)
        if lease and self.cache:
            told = out is not None and (out.tier == "arena" or out.bad_blocks)
            self.cache.release(lease, out.cached_tokens if told and out else None)

    def listen(self) -> None:
        """Do what a node does with what its engine says."""
        messages, self.heard = self.link.outbox[self.heard :], len(self.link.outbox)
        for message in messages:
            match message:
                case StepOut():
                    for out in message.tokens:
                        self.release(out.serial, out.part)
                case BlocksFull() if self.cache:
                    grant = self.cache.grant(message.tokens, message.salt)
                    self.grants.append((message.serial, grant))
                    self.link.inbox.append(StoreBlocks(message.serial, grant.grants))
                case BlocksStored() if self.cache:
                    serial, grant = self.grants.pop(0)
                    assert serial == message.serial
                    self.cache.enter(grant, message.written)

    def step(self) -> bool:
        """One step; False when there was nothing to do."""
        self.engine.receive(0.0)
        self.listen()
        busy = self.engine.busy
        if busy:
            self.engine.step()
        self.listen()
        self.engine.check_integrity()
        return busy or bool(self.link.inbox)

    def run(self) -> None:
        """Until nothing is left."""
        for _ in range(3000):
            if not self.step():
                break
        else:
            raise AssertionError("still busy")
        assert (self.engine.stats().slots_busy, self.engine.stats().waiting) == (0, 0)
        assert not self.grants
        if self.cache:
            self.cache.check_integrity()

    def die(self) -> None:
        """What the node does when its engine is gone."""
        for serial in list(self.leases):
            self.release(serial)
        if self.cache:
            for _, grant in self.grants:
                self.cache.enter(grant, ())
            self.cache.check_integrity()

    def ask(self, serial: int, wanted: GenerateRequest) -> list[int]:
        """Tokens of a request that runs alone."""
        self.submit(serial, wanted)
        self.run()
        return self.tokens(serial)

    def tokens(self, serial: int) -> list[int]:
        return [token for part in self.link.outputs(serial) for token in part.ids]

    def first(self, serial: int) -> TokenPart:
        return self.link.outputs(serial)[0]

    def prompt_rows(self, *serials: int) -> int:
        """Rows computed so far, but for the decode rows of these finished requests."""
        return self.backend.rows() - sum(len(self.tokens(serial)) - 1 for serial in serials)


NodeMaker = Callable[..., Node]


@pytest.fixture(params=["fake", "llama"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NodeMaker]:
    """Makes nodes whose engine has a new backend, fake or llama.cpp; `cache` gives it an arena."""
    with ExitStack() as stack:
        count = iter(range(100))

        def make(
            n_slots: int = 8,
            block_tokens: int = BLOCK,
            cache: PrefixCache | None = None,
            policy: Policy | None = None,
            **fields: Any,
        ) -> Node:
            backend: AnyBackend
            if request.param == "fake":
                backend = FakeBackend(n_slots=n_slots, n_ctx=N_CTX, block_tokens=block_tokens, **fields)
            else:
                model: Model = request.getfixturevalue("tiny_model")
                context = Context(model, ContextOptions(n_ctx=N_CTX, n_seqs=n_slots, n_threads=1))
                stack.callback(context.close)
                backend = CountingBackend(model, context, block_tokens)
                backend.learn()
                backend.computed = 0
            made = node_on(backend, tmp_path / f"abort{next(count)}", block_tokens, cache, policy)
            stack.callback(made.abort.close)
            return made

        yield make


def node_on(
    backend: AnyBackend, abort_file: Path, block_tokens: int, cache: PrefixCache | None, policy: Policy | None = None
) -> Node:
    abort = AbortFlag(abort_file, create=True)
    link = FakeLink()
    policy = policy or Policy(max_rows=backend.max_rows)
    engine = Engine(backend, link, Scheduler(policy), abort, FakeClock(), block_tokens=block_tokens)
    if cache:

        def open_arena(message: UseArena) -> None:
            file = ArenaFile(Path(message.path), ArenaGeometry(message.block_bytes, message.n_blocks))
            if isinstance(backend, FakeBackend):
                backend.file = file
            else:
                backend.use_file(file)

        engine._open_arena = open_arena
        link.inbox.append(UseArena(str(cache.path), cache.block_bytes, cache.n_blocks))
    return Node(backend, engine, link, abort, cache)


def open_cache(directory: Path, backend: AnyBackend, n_blocks: int = 64) -> PrefixCache:
    fake = isinstance(backend, FakeBackend)
    block_bytes = 8 + 4 * backend.block_tokens if fake else backend.learn().token_bytes * BLOCK
    identity = KvIdentity(bytes(32), backend.block_tokens if fake else BLOCK, (1, 1))
    size = ArenaGeometry(block_bytes, n_blocks).file_bytes
    arena = Arena.open(directory, identity.root(), block_bytes, size, 0)
    assert arena is not None
    return PrefixCache(arena, identity)


@pytest.fixture
def cache(node: NodeMaker, tmp_path: Path) -> Iterator[PrefixCache]:
    opened = open_cache(tmp_path / "arena", node(n_slots=1).backend)
    yield opened
    opened.close()


def family(count: int, own: int = 20, max_tokens: int = 24) -> dict[int, GenerateRequest]:
    """Requests with COMMON and `own` tokens of their own, by serial."""
    return {serial: request((*COMMON, *prompt_of(own, serial)), max_tokens) for serial in range(1, count + 1)}


def expected(node: NodeMaker, wanted: dict[int, GenerateRequest]) -> dict[int, list[int]]:
    """Answers where nothing is reused, each alone."""
    plain = node(block_tokens=0)
    return {serial: plain.ask(serial, each) for serial, each in wanted.items()}


def answers(node: Node, wanted: dict[int, GenerateRequest]) -> dict[int, list[int]]:
    return {serial: node.tokens(serial) for serial in wanted}


# -- together --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_start", [0, 1])
def test_eight_requests_read_their_common_beginning_once(node: NodeMaker, head_start: int) -> None:
    wanted = family(8)
    shared = node()
    shared.submit(1, wanted[1])
    for _ in range(head_start):
        shared.step()
    assert shared.backend.rows() in (0, 128), "the first is in the middle of its prompt"
    for serial in range(2, 9):
        shared.submit(serial, wanted[serial])
    shared.run()
    assert shared.prompt_rows(*wanted) == 256 + 8 * 20
    assert answers(shared, wanted) == expected(node, wanted)
    assert [shared.first(serial).cached_tokens for serial in wanted] == [0, *[256] * 7]
    assert {shared.first(serial).tier for serial in range(2, 9)} == {"slot"}


def test_more_requests_than_slots(node: NodeMaker) -> None:
    wanted = family(8)
    shared = node(n_slots=3)
    for serial, each in wanted.items():
        shared.submit(serial, each)
    shared.run()
    assert shared.prompt_rows(*wanted) == 256 + 8 * 20
    assert answers(shared, wanted) == expected(node, wanted)


def test_the_first_leaves_while_the_others_wait(node: NodeMaker) -> None:
    wanted = family(8)
    shared = node()
    for serial, each in wanted.items():
        shared.submit(serial, each)
    shared.step()
    shared.cancel(1)
    shared.run()
    del wanted[1]
    assert shared.tokens(1) == []
    assert shared.prompt_rows(*wanted) == 256 + 7 * 20, "what it had read is not lost"
    assert answers(shared, wanted) == expected(node, wanted)


def test_every_leader_leaves(node: NodeMaker) -> None:
    wanted = family(4)
    shared = node()
    for serial, each in wanted.items():
        shared.submit(serial, each)
    for serial in (1, 2, 3):
        shared.step()
        shared.cancel(serial)
    shared.run()
    assert shared.tokens(4) == expected(node, {4: wanted[4]})[4]
    assert not shared.tokens(1)
    assert not shared.tokens(2)


def test_equal_prompts_of_whole_blocks(node: NodeMaker) -> None:
    wanted = {serial: request(COMMON, 12) for serial in range(1, 5)}
    shared = node()
    for serial, each in wanted.items():
        shared.submit(serial, each)
    shared.run()
    # The last block is computed each time, for its logits.
    assert shared.prompt_rows(*wanted) == 192 + 4 * 64
    assert answers(shared, wanted) == expected(node, wanted)


def test_beginnings_of_different_lengths(node: NodeMaker) -> None:
    wanted = {
        serial: request((*COMMON[:length], *prompt_of(30, serial)), 16)
        for serial, length in enumerate((256, 64, 192, 130, 20, 256), 1)
    }
    shared = node()
    for serial, each in wanted.items():
        shared.submit(serial, each)
    shared.run()
    assert answers(shared, wanted) == expected(node, wanted)
    cached = sum(shared.first(serial).cached_tokens for serial in wanted)
    assert cached == 64 + 192 + 128 + 0 + 256
    assert shared.prompt_rows(*wanted) == sum(len(each.prompt) for each in wanted.values()) - cached


def test_switched_off_everything_is_read(node: NodeMaker) -> None:
    wanted = family(8)
    plain = node(block_tokens=0)
    for serial, each in wanted.items():
        plain.submit(serial, each)
    plain.run()
    assert plain.prompt_rows(*wanted) == 8 * 276
    assert {plain.first(serial).cached_tokens for serial in wanted} == {0}
    assert {plain.first(serial).tier for serial in wanted} == {""}
    assert all(plain.backend.length(slot) == 0 for slot in range(8))


@pytest.mark.parametrize("policy", [Policy(continuous_batching=False), Policy(batched_prefill_forward=False)])
def test_with_another_switch_off_the_answers_are_the_same(node: NodeMaker, policy: Policy) -> None:
    wanted = family(5)
    shared = node(policy=policy)
    for serial, each in wanted.items():
        shared.submit(serial, each)
    shared.run()
    assert shared.prompt_rows(*wanted) == 256 + 5 * 20
    assert answers(shared, wanted) == expected(node, wanted)


def test_a_static_batch_is_not_split_by_what_its_requests_have_in_common(node: NodeMaker) -> None:
    wanted = family(5)
    shared = node(policy=Policy(continuous_batching=False))
    for serial, each in wanted.items():
        shared.submit(serial, each)
    while not shared.tokens(1):
        shared.step()
    shared.submit(6, request(prompt_of(20, 6), 4))
    while len(shared.tokens(1)) < 12:
        shared.step()
    assert all(shared.tokens(serial) for serial in wanted), "they wait for the first one's prompt, not for its answer"
    assert not shared.tokens(6), "nobody joins later"
    shared.run()
    assert shared.tokens(6)
    assert shared.prompt_rows(*wanted, 6) == 256 + 5 * 20 + 20
    assert answers(shared, wanted) == expected(node, wanted)


# -- one after another -----------------------------------------------------------------------------------------------


def test_the_next_turn_reads_only_the_new_message(node: NodeMaker) -> None:
    shared = node()
    conversation = list(prompt_of(100, 7))
    for turn in range(4):
        before = shared.backend.rows()
        answer = shared.ask(turn + 1, request(conversation, 40))
        new = 100 if turn == 0 else 30
        rows = shared.backend.rows() - before - (len(answer) - 1)
        # The last sampled token never was in the KV, and a last block is not full.
        assert rows <= new + 1 + BLOCK - 1 or turn == 0
        assert shared.first(turn + 1).cached_tokens == len(conversation) - rows
        if isinstance(shared.backend, FakeBackend):
            # llama.cpp rounds rows of an answer otherwise than the same tokens as a prompt.
            assert answer == continuation(request(conversation, 40), 40, 97)
        conversation += [*answer, *prompt_of(30, 20 + turn)]


def test_two_conversations_with_one_beginning_keep_what_they_have(node: NodeMaker) -> None:
    shared = node(n_slots=3)
    turns = {name: [*COMMON[:64], *prompt_of(110, name)] for name in (1, 2)}
    serial = 0
    for turn in range(3):
        for name in turns:
            serial += 1
            answer = shared.ask(serial, request(turns[name], 20))
            cached = shared.first(serial).cached_tokens
            if turn:
                assert cached >= len(turns[name]) - 20 - 1 - BLOCK
            elif name == 2:
                assert cached == 64
            turns[name] += [*answer, *prompt_of(20, 30 + serial)]


def test_salts_share_nothing(node: NodeMaker) -> None:
    shared = node()
    wanted = {serial: replace(each, cache_salt=f"tenant {serial % 2}") for serial, each in family(4).items()}
    for serial, each in wanted.items():
        shared.submit(serial, each)
    shared.run()
    assert shared.prompt_rows(*wanted) == 2 * 256 + 4 * 20
    assert answers(shared, wanted) == expected(node, wanted)
    shared.ask(9, request(wanted[1].prompt, 2))
    assert shared.first(9).cached_tokens == 0


def test_sampled_answers_are_the_same_too(node: NodeMaker) -> None:
    sampling = SamplingParams(temperature=1.0, seed=11)
    wanted = {serial: replace(each, sampling=sampling) for serial, each in family(4).items()}
    shared = node()
    for serial, each in wanted.items():
        shared.submit(serial, each)
    shared.run()
    assert answers(shared, wanted) == expected(node, wanted)


# -- the arena -------------------------------------------------------------------------------------------------------


def test_a_new_engine_finds_what_the_old_one_read(node: NodeMaker, cache: PrefixCache) -> None:
    wanted = family(3)
    right = expected(node, wanted)
    first = node(cache=cache)
    assert first.ask(1, wanted[1]) == right[1]
    assert cache.stats().blocks >= 4
    second = node(cache=cache)
    for serial in (2, 3):
        second.submit(serial, wanted[serial])
    second.run()
    assert {serial: second.tokens(serial) for serial in (2, 3)} == {serial: right[serial] for serial in (2, 3)}
    assert {(second.first(serial).tier, second.first(serial).cached_tokens) for serial in (2, 3)} <= {
        ("arena", 256),
        ("slot", 256),
    }
    assert second.prompt_rows(2, 3) == 2 * 20
    assert cache.stats().bad == 0


def test_the_answer_is_stored_too(node: NodeMaker, cache: PrefixCache) -> None:
    first = node(cache=cache)
    prompt = list(prompt_of(150, 2))
    answer = first.ask(1, request(prompt, 60))
    second = node(cache=cache)
    second.ask(1, request([*prompt, *answer, 5], 4))
    assert (second.first(1).tier, second.first(1).cached_tokens) == ("arena", 192)


@pytest.mark.parametrize("max_tokens", [1, 90])
def test_a_node_that_answers_a_step_later_gets_the_blocks_though_others_wait_for_the_slot(
    node: NodeMaker, cache: PrefixCache, max_tokens: int
) -> None:
    wanted = {serial: request(prompt_of(70, serial), max_tokens) for serial in range(1, 9)}
    shared = node(cache=cache, n_slots=2)
    for serial, each in wanted.items():
        shared.submit(serial, each)
    late: list[StoreBlocks] = []
    for _ in range(3000):
        shared.engine.receive(0.0)
        if shared.engine.busy:
            shared.engine.step()
        answers_now = late
        shared.listen()
        late = [message for message in shared.link.inbox if isinstance(message, StoreBlocks)]
        for message in late:
            shared.link.inbox.remove(message)
        shared.link.inbox.extend(answers_now)
        if not shared.engine.busy and not late and not answers_now:
            break
    for serial, each in wanted.items():
        # The last token is sampled, not computed.
        tokens = (*each.prompt, *shared.tokens(serial)[:-1])
        assert cache.held((*tokens, 0), "")[1] == len(tokens) // BLOCK


def test_a_slot_of_which_nothing_is_wanted_goes_on_with_the_next_turn(node: NodeMaker, cache: PrefixCache) -> None:
    wanted = request(prompt_of(150, 1), 1)
    other = node(cache=cache)
    first = node(cache=cache, n_slots=2)
    # Both computed the same: the second to offer it is told that nothing is wanted.
    for each in (first, other):
        each.submit(1, wanted)
    other.run()
    first.run()
    assert first.ask(2, request((*wanted.prompt, *first.tokens(1), 5, 6, 7), 1))
    assert first.backend.length(0) == 154
    assert first.backend.length(1) == 0, "it is not copied"


def test_a_request_that_lost_its_engine_goes_on_from_its_blocks(node: NodeMaker, cache: PrefixCache) -> None:
    wanted = family(1, max_tokens=40)[1]
    right = expected(node, {1: wanted})[1]
    first = node(cache=cache)
    first.submit(1, wanted)
    while len(first.tokens(1)) < 15:
        first.step()
    # Killed here: what it was granted and has not written is given back.
    first.die()
    said = first.tokens(1)
    second = node(cache=cache)
    rest = second.ask(2, replace(wanted, generated=tuple(said)))
    assert second.first(2).cached_tokens == 256
    if isinstance(second.backend, FakeBackend):
        assert [*said, *rest] == right
    else:
        # A replayed tail is computed as a chunk, which rounds otherwise than rows of their own.
        assert [*said, *rest][:15] == right[:15]


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_a_damaged_block_is_a_miss_and_is_stored_again(node: NodeMaker, cache: PrefixCache, bad: int) -> None:
    wanted = family(2)
    right = expected(node, wanted)
    node(cache=cache).ask(1, wanted[1])
    lease = cache.lease(wanted[1].prompt, "")
    cache.release(lease)
    cache._arena.write(lease.refs[bad].slot, bytes(cache.block_bytes))
    second = node(cache=cache)
    assert second.ask(1, wanted[2]) == right[2]
    assert second.first(1).bad_blocks
    assert second.first(1).cached_tokens == bad * BLOCK
    assert cache.stats().bad == 1
    third = node(cache=cache)
    assert third.ask(1, wanted[1]) == right[1]
    assert (third.first(1).cached_tokens, third.first(1).bad_blocks) == (256, False)


def test_an_arena_that_the_engine_cannot_open_is_only_a_miss(
    node: NodeMaker, cache: PrefixCache, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = family(2)
    right = expected(node, wanted)
    node(cache=cache).ask(1, wanted[1])
    cache.path.unlink()
    second = node(cache=cache)
    assert second.ask(1, wanted[1]) == right[1]
    assert second.ask(2, wanted[2]) == right[2]
    assert second.first(1).cached_tokens == 0
    assert second.first(2).tier == "slot"
    assert (cache.stats().blocks, cache.stats().bad) == (4, 0), "that is not the fault of the blocks"
    assert not [message for message in second.link.outbox if isinstance(message, BlocksFull)]


@pytest.mark.parametrize("steps", [0, 1, 2, 8, 60])
def test_what_is_to_be_forgotten_is_used_by_nobody(node: NodeMaker, cache: PrefixCache, steps: int) -> None:
    wanted = family(3)
    right = expected(node, wanted)
    node(cache=cache).ask(1, wanted[1])
    second = node(cache=cache, n_slots=2)
    for serial in (1, 2):
        second.submit(serial, wanted[serial])
    for _ in range(steps):
        second.step()
    cache.drop(cache.keys(COMMON, "")[:1])
    second.link.inbox.append(Forget())
    second.submit(3, wanted[3])
    second.run()
    assert answers(second, wanted) == right
    assert second.first(3).cached_tokens in (0, 256 if steps == 0 else 0)
    stored = cache.keys((*wanted[3].prompt, *right[3]), "")
    assert cache.held((*wanted[3].prompt, *right[3]), "")[1] == len(stored)
    assert cache.stats().blocks == len(stored), "of the forgotten nothing is stored"


# -- the fake alone: what llama.cpp cannot be told to do ---------------------------------------------------------------


@pytest.fixture
def fake_node(tmp_path: Path) -> Iterator[NodeMaker]:
    with ExitStack() as stack:
        count = iter(range(10_000))

        def make(
            block_tokens: int = BLOCK, cache: PrefixCache | None = None, policy: Policy | None = None, **fields: Any
        ) -> Node:
            fields.setdefault("n_ctx", N_CTX)
            backend = FakeBackend(block_tokens=block_tokens, **fields)
            made = node_on(backend, tmp_path / f"abort{next(count)}", block_tokens, cache, policy)
            stack.callback(made.abort.close)
            return made

        yield make


def test_an_aborted_chunk_of_the_first_delays_the_others_only(fake_node: NodeMaker) -> None:
    wanted = family(5)
    shared = fake_node(n_slots=8, abort_at={1, 2, 4})
    for serial, each in wanted.items():
        shared.submit(serial, each)
    shared.run()
    for serial, each in wanted.items():
        assert shared.tokens(serial) == continuation(each, 24, 97)
        assert shared.first(serial).cached_tokens == (256 if serial > 1 else 0)


@pytest.mark.parametrize("block_tokens", [16, 24, 64, 100, 128])
def test_blocks_of_any_size(fake_node: NodeMaker, block_tokens: int) -> None:
    wanted = family(5)
    shared = fake_node(block_tokens, n_slots=4)
    for serial, each in wanted.items():
        shared.submit(serial, each)
    shared.run()
    kept = 256 // block_tokens * block_tokens
    for serial, each in wanted.items():
        assert shared.tokens(serial) == continuation(each, 24, 97)
        assert shared.first(serial).cached_tokens == (kept if serial > 1 else 0)


@pytest.mark.parametrize("seed", range(8))
def test_any_schedule_gives_the_right_answers(fake_node: NodeMaker, tmp_path: Path, seed: int) -> None:
    """Requests of few families come and go, engines die, blocks go bad, the arena is too small for all of it."""
    draw = random.Random(seed)
    block_tokens = draw.choice((4, 8, 64))
    shape: dict[str, Any] = {"n_slots": draw.randint(1, 5), "n_ctx": 40 * block_tokens}
    cache = open_cache(tmp_path / "arena", FakeBackend(block_tokens=block_tokens), n_blocks=draw.choice((3, 12, 200)))
    node = fake_node(block_tokens, cache, **shape)
    stems = [prompt_of(draw.randint(1, 12 * block_tokens), stem) for stem in range(3)]
    wanted: dict[int, GenerateRequest] = {}
    gone: set[int] = set()
    said: dict[int, list[int]] = {}
    serial = 0
    for _ in range(400):
        match draw.randrange(12):
            case 0 | 1 if len(wanted) < 60:
                serial += 1
                stem = draw.choice(stems)[: draw.randint(1, 12 * block_tokens)]
                each = request((*stem, *prompt_of(draw.randint(0, 20), serial)), draw.randint(1, 30))
                wanted[serial] = replace(each, cache_salt=draw.choice(("", "", "s")))
                node.submit(serial, wanted[serial])
            case 2 if wanted and draw.random() < 0.5:
                left = draw.choice(list(wanted))
                gone.add(left)
                node.cancel(left)
            case 3 if cache.stats().blocks and draw.random() < 0.3:
                cache._arena.write(draw.randrange(cache.n_blocks), draw.randbytes(cache.block_bytes))
            case 4 if draw.random() < 0.1:
                node.die()
                for each_serial in wanted:
                    said.setdefault(each_serial, []).extend(node.tokens(each_serial))
                node = fake_node(block_tokens, cache, **shape)
                for each_serial, each in wanted.items():
                    done = said[each_serial]
                    if each_serial not in gone and len(done) < each.max_tokens:
                        node.submit(each_serial, replace(each, generated=tuple(done)))
            case _:
                node.step()
    node.run()
    for each_serial, each in wanted.items():
        tokens = [*said.get(each_serial, []), *node.tokens(each_serial)]
        right = continuation(each, each.max_tokens, 97)
        assert tokens == right[: len(tokens)], f"request {each_serial}"
        assert len(tokens) == each.max_tokens or each_serial in gone
    assert node.backend.open_samplers == 0
    assert all(block.pins == 0 for block in cache._index._blocks.values())
    cache.close()


def test_blocks_that_no_slot_holds_any_more_are_not_stored(fake_node: NodeMaker) -> None:
    shared = fake_node(n_slots=1)
    shared.ask(1, request(prompt_of(130), 2))
    for serial, number in ((1, 2), (2, 0)):
        shared.link.inbox.append(StoreBlocks(serial, ((0, 5), (number, 6))))
        shared.run()
        assert shared.link.outbox[-1] == BlocksStored(serial, ())


def test_running_slots_stay_together_and_idle_ones_keep_what_they_have(fake_node: NodeMaker) -> None:
    shared = fake_node(n_slots=4)
    shared.ask(1, request(prompt_of(130, 1), 40))
    shared.ask(2, request(prompt_of(130, 2), 40))
    assert shared.backend.copies == [], "one running slot has no gap beside it"
    for serial, tokens in ((3, 60), (4, 60), (5, 60), (6, 5)):
        shared.submit(serial, request(prompt_of(100, serial), tokens))
    shared.run()
    assert shared.backend.copies, "the last one moves into the gap"
    for serial in (3, 4, 5, 6):
        wanted = request(prompt_of(100, serial), 60)
        assert shared.tokens(serial) == continuation(wanted, 60, 97)[: len(shared.tokens(serial))]
