"""Passes through chains of stages on several nodes, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
from engine_support import sampled_of
from stage_peers import (
    BOUNDS,
    CTX,
    FINGERPRINT,
    LAYERS,
    N_EMBD,
    N_LAYERS,
    REQUEST,
    Node,
    open_at,
    open_nodes,
    ref_of,
    run_pass,
)
from swarm_support import DEADLINE_S, HOST, Peers, swarm, until

from swarmcpp.core import GenerateRequest
from swarmcpp.errors import (
    DecodeFailed,
    NotReady,
    PeerLost,
    PeerTimeout,
    QueueFull,
    SnapshotError,
    StageFailed,
    StageLost,
    SwarmError,
    WireError,
)
from swarmcpp.peers import Address, Capability
from swarmcpp.pipeline import calls
from swarmcpp.pipeline.calls import StageBounds
from swarmcpp.pipeline.contract import Pass, Passed, StageCaller, StageRef, StageTime
from swarmcpp.pipeline.service import StageService
from swarmcpp.route.patience import UNKNOWN_S
from swarmcpp.swarm.endpoint import Responder
from swarmcpp.swarm.identity import SwarmKey, new_node_keys, node_id
from swarmcpp.swarm.mesh import Mesh
from swarmcpp.swarm.store import Identity
from swarmcpp.testing import FakeClock, FakeStage, Rows, summed, summed_token
from swarmcpp.wire.peers import (
    Ask,
    AskStage,
    CloseSequence,
    Hop,
    KeepAlive,
    OpenSequence,
    PassPart,
    PassReply,
    Pong,
    Reply,
    ResumeSequence,
    RunStage,
    SequenceReady,
    StoreSequence,
)

SEQUENCE = b"s" * 16
KEYS = (b"k" * 32, b"l" * 32)


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    async with swarm() as opened:
        yield opened


class Chain:
    """A head and a stage on each of three other nodes."""

    def __init__(self, nodes: list[Node], bounds: StageBounds = BOUNDS) -> None:
        self.head, *self.nodes = nodes
        self.stages = [node.host(*part, bounds) for node, part in zip(self.nodes, LAYERS, strict=True)]
        self.refs = tuple(ref_of(node.id, stage) for node, stage in zip(self.nodes, self.stages, strict=True))
        self.first = self.head.service.caller(self.refs[0])

    async def open(self, *sequences: bytes, epoch: int = 1) -> None:
        for sequence in sequences:
            for ref in self.refs:
                await open_at(self.head.service.caller(ref), ref, sequence, epoch)

    def work(self, parts: tuple[PassPart, ...], rows: Rows) -> Pass:
        return Pass(parts, "f32", rows.tobytes(), self.refs[1:])


@pytest.fixture
async def chain(peers: Peers) -> Chain:
    return Chain(await open_nodes(peers, 4))


def rows_of(count: int, seed: int = 1, n_embd: int = N_EMBD) -> Rows:
    return np.random.default_rng(seed).integers(0, 61, (count, n_embd)).astype(np.float32)


def part(count: int, start: int = 0, sequence: bytes = SEQUENCE, epoch: int = 1, output: bool = True) -> PassPart:
    return PassPart(sequence, epoch, start, count, int(output))


async def failure(caller: StageCaller, work: Pass) -> tuple[str, str]:
    """Node and reason with which a pass fails."""
    with pytest.raises(StageFailed) as caught:
        await asyncio.wait_for(run_pass(caller, work), DEADLINE_S)
    assert "\n" not in str(caught.value)
    return caught.value.node, caught.value.reason


# -- passes ------------------------------------------------------------------------------------------------------------


async def test_a_pass_goes_down_the_chain_and_its_ids_come_back(chain: Chain) -> None:
    other = b"o" * 16
    await chain.open(SEQUENCE, other)
    rows = rows_of(7)
    passed = await run_pass(chain.first, chain.work((part(4), part(3, sequence=other)), rows))
    assert passed == Passed(
        sampled_of(*(summed_token(summed(each, 0, N_LAYERS)) for each in (rows[:4], rows[4:]))),
        (StageTime(0.5, 0.25),) * 3,
    )
    assert (await run_pass(chain.first, chain.work((part(2, 4, output=False),), rows_of(2)))).tokens == ()
    more = rows_of(1, 2)
    expected = summed_token(summed(np.concatenate([rows[:3], more]), 0, N_LAYERS))
    assert (await run_pass(chain.first, chain.work((part(1, 3),), more))).tokens == sampled_of(expected), (
        "cut back to 3 rows first"
    )


async def test_rows_travel_in_the_encodings_that_the_pass_names(chain: Chain) -> None:
    await chain.open(SEQUENCE)
    with pytest.raises(StageFailed, match=r"as q8_0 came in 112 bytes instead of 238"):
        await run_pass(chain.first, replace(chain.work((part(7),), rows_of(7)), wire="q8_0"))
    assert [[how for _, *how in stage.begun] for stage in chain.stages] == [[["f32", "q8_0"]], [], []]


async def test_the_largest_pass_goes_in_several_frames(peers: Peers) -> None:
    chain = Chain(await open_nodes(peers, 4), replace(BOUNDS, n_embd=8192))
    await chain.open(SEQUENCE)
    rows = rows_of(512, n_embd=8192)
    passed = await run_pass(chain.first, chain.work((part(512),), rows))
    assert passed.tokens == sampled_of(summed_token(summed(rows, 0, N_LAYERS)))


async def test_stages_of_the_head_and_two_of_one_node(peers: Peers) -> None:
    head, other = await open_nodes(peers, 2)
    places = ((head, 0, 4), (other, 4, 6), (other, 6, 8), (head, 8, N_LAYERS))
    refs = [ref_of(node.id, node.host(first, last)) for node, first, last in places]
    for ref in refs:
        await open_at(head.service.caller(ref), ref, SEQUENCE)
    rows = rows_of(5)
    work = Pass((part(5),), "f32", rows.tobytes(), tuple(refs[1:]))
    passed = await run_pass(head.service.caller(refs[0]), work)
    assert passed.tokens == sampled_of(summed_token(summed(rows, 0, N_LAYERS)))
    assert len(passed.times) == 4


async def test_many_passes_keep_their_order_through_all_stages(chain: Chain) -> None:
    """Each adds a row to one sequence, so that one out of order leaves a hole or cuts off those before it."""
    await chain.open(SEQUENCE)
    rows = rows_of(64)
    done = summed(rows, 0, N_LAYERS)
    for stage in chain.stages:
        stage.gate.clear()
    passes = [
        asyncio.create_task(run_pass(chain.first, chain.work((part(1, n),), rows[n : n + 1]))) for n in range(len(rows))
    ]
    for stage in chain.stages:
        await until(lambda stage=stage: len(stage.begun) == 64, "all are in flight")
        stage.gate.set()
    assert [each.tokens for each in await asyncio.gather(*passes)] == [
        sampled_of(summed_token(done[: n + 1])) for n in range(64)
    ]
    for stage in chain.stages:
        assert [parts[0].start for parts, *_ in stage.begun] == list(range(64))


async def test_passes_that_fail_do_not_change_the_order_of_others(chain: Chain) -> None:
    names = [n.to_bytes(16) for n in range(48)]
    await chain.open(*names)
    first = chain.stages[0]
    first.gate.clear()
    passes = [
        asyncio.create_task(
            run_pass(chain.first, chain.work((part(1, sequence=name, epoch=2 if n % 7 == 3 else 1),), rows_of(1)))
        )
        for n, name in enumerate(names)
    ]
    await until(lambda: len(first.begun) == 48, "all are in flight")
    good = [n for n in range(48) if n % 7 != 3]
    await until(lambda: chain.nodes[0].endpoint._n_tasks == len(good), "the others have ended there")
    first.gate.set()
    results = await asyncio.gather(*passes, return_exceptions=True)
    assert [n for n, result in enumerate(results) if isinstance(result, Passed)] == good
    assert [parts[0].sequence for parts, *_ in chain.stages[2].begun] == [names[n] for n in good]


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [0, 1, 2])
async def test_a_node_that_ends_in_the_middle_of_a_pass_is_named(chain: Chain, dead: int) -> None:
    await chain.open(SEQUENCE)
    chain.stages[dead].gate.clear()
    running = asyncio.create_task(failure(chain.first, chain.work((part(3),), rows_of(3))))
    await until(lambda: len(chain.stages[dead].begun) == 1, "it is there")
    await chain.nodes[dead].endpoint.aclose()
    assert await running == (chain.nodes[dead].id, "peer_lost")
    assert await failure(chain.first, chain.work((part(3),), rows_of(3))) == (chain.nodes[dead].id, "peer_lost")


@pytest.mark.parametrize("hung", [0, 1, 2])
async def test_a_node_that_hangs_is_named_by_the_one_before_it(chain: Chain, hung: int) -> None:
    await chain.open(SEQUENCE)
    chain.stages[hung].gate.clear()
    work = replace(chain.work((part(3),), rows_of(3)), limit_s=0.6)
    assert await failure(chain.first, work) == (chain.nodes[hung].id, "peer_timeout")


async def test_a_stage_that_takes_all_the_time_names_itself_and_sends_nothing_on(chain: Chain) -> None:
    await chain.open(SEQUENCE)
    node, stage = chain.nodes[1], chain.stages[1]
    stage.gate.clear()
    running = asyncio.create_task(failure(chain.first, chain.work((part(3),), rows_of(3))))
    await until(lambda: len(stage.begun) == 1, "it is there")
    node.clock.advance(UNKNOWN_S)
    stage.gate.set()
    assert await running == (node.id, "peer_timeout")
    assert not chain.stages[2].begun


async def test_what_a_stage_fails_with_is_told_with_its_node(chain: Chain) -> None:
    await chain.open(SEQUENCE)
    work, last = chain.work((part(3),), rows_of(3)), chain.nodes[2].id
    assert await failure(chain.first, replace(work, parts=(part(3, epoch=2),))) == (chain.nodes[0].id, "stage_lost")
    assert await failure(chain.first, replace(work, parts=(part(3, 1),))) == (chain.nodes[0].id, "stage_lost")
    chain.stages[2].held.clear()
    assert await failure(chain.first, work) == (last, "stage_lost")
    chain.stages[2].error = DecodeFailed("values that are not finite \ud800" + "x" * 2000)
    assert await failure(chain.first, work) == (last, "decode_failed")
    chain.stages[2].error = ZeroDivisionError("a secret")
    assert await failure(chain.first, work) == (last, "internal")
    chain.nodes[2].service.drop(chain.refs[2])
    assert await failure(chain.first, work) == (last, "stage_lost")
    assert await failure(chain.head.service.caller(replace(chain.refs[0], node=chain.head.id)), work) == (
        chain.head.id,
        "stage_lost",
    )
    stranger = replace(work, onward=(replace(chain.refs[1], node="0" * 16), chain.refs[2]))
    assert await failure(chain.first, stranger) == ("0" * 16, "peer_lost")


async def test_a_stage_that_gives_no_rows_is_named(chain: Chain) -> None:
    await chain.open(SEQUENCE)
    chain.stages[1].last = N_LAYERS
    assert await failure(chain.first, chain.work((part(3),), rows_of(3))) == (chain.nodes[1].id, "engine_failed")


async def test_a_pass_whose_head_is_gone_disturbs_nobody(chain: Chain) -> None:
    await chain.open(SEQUENCE)
    chain.stages[2].gate.clear()
    running = asyncio.create_task(run_pass(chain.first, chain.work((part(3),), rows_of(3))))
    await until(lambda: len(chain.stages[2].begun) == 1, "it is there")
    await chain.head.links[chain.nodes[0].id].aclose()
    with pytest.raises(StageFailed):
        await running
    chain.stages[2].gate.set()
    other = chain.nodes[1].service.caller(chain.refs[0])
    for ref in chain.refs:
        await open_at(chain.nodes[0].service.caller(ref), ref, b"2" * 16)
    assert len((await run_pass(other, chain.work((part(3, sequence=b"2" * 16),), rows_of(3)))).tokens) == 1


# -- sequences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [True, False])
async def test_sequences_are_opened_resumed_stored_and_closed(peers: Peers, local: bool) -> None:
    head, other = await open_nodes(peers, 2)
    node = head if local else other
    stage = node.host(4, N_LAYERS)
    caller = head.service.caller(ref_of(node.id, stage))
    assert await caller.open(SEQUENCE, 4, KEYS, REQUEST, 3) == 0
    stage.held[SEQUENCE].rows = rows_of(2)
    assert await caller.open(SEQUENCE, 5, KEYS, REQUEST, 3) == 2
    assert await caller.resume(SEQUENCE, 5, 2) == 2
    await caller.store(SEQUENCE, 5, KEYS)
    with pytest.raises(StageLost, match="epoch"):
        await caller.resume(SEQUENCE, 4, 2)
    await caller.close(SEQUENCE)
    await caller.close(SEQUENCE)
    assert stage.held == {}
    assert stage.calls == [
        ("open", SEQUENCE, 4, KEYS, REQUEST, 3),
        ("open", SEQUENCE, 5, KEYS, REQUEST, 3),
        ("resume", SEQUENCE, 5, 2),
        ("store", SEQUENCE, 5, KEYS),
        ("resume", SEQUENCE, 4, 2),
        ("close", SEQUENCE),
        ("close", SEQUENCE),
    ]


async def test_a_close_that_nobody_waits_for_closes(peers: Peers) -> None:
    """As of a node that was frozen, whose head has long gone on: it reads the close and what comes after it at once."""
    head, other = await open_nodes(peers, 2)
    stage = other.host(4, N_LAYERS)
    caller = head.service.caller(ref_of(other.id, stage))
    for number in range(20):
        await caller.open(SEQUENCE, number, KEYS, REQUEST, 3)
        closing = asyncio.create_task(caller.close(SEQUENCE))
        for _ in range(3):
            await asyncio.sleep(0)
        closing.cancel()
        await until(lambda: not stage.held, "it is closed")


async def test_errors_of_a_peer_arrive_as_what_they_are(chain: Chain) -> None:
    caller, stage = chain.first, chain.stages[0]
    for error in (StageLost("gone"), QueueFull("no sequence is free", retry_after=3.0), NotReady("it restarts")):
        stage.error = error
        with pytest.raises(type(error), match=str(error)):
            await caller.open(SEQUENCE, 1, (), None, 3)
    stage.error = SnapshotError("odd")
    with pytest.raises(WireError, match=r"layers 0 to 4 at node [0-9a-f]{16} refuses: odd"):
        await caller.open(SEQUENCE, 1, (), None, 3)
    chain.nodes[0].service.drop(chain.refs[0])
    with pytest.raises(StageLost, match="not there"):
        await caller.close(SEQUENCE)
    with pytest.raises(PeerLost):
        await chain.head.service.caller(replace(chain.refs[0], node="0" * 16)).close(SEQUENCE)


# -- nonsense ----------------------------------------------------------------------------------------------------------


def ask_of(ref: StageRef, *parts: PassPart, onward: tuple[Hop, ...] = ()) -> RunStage:
    return RunStage(FINGERPRINT, calls.hop(ref), parts or (PassPart(SEQUENCE, 1, 0, 3, 1),), "f32", onward)


WHOLE = (Hop("1" * 16, 4, 6), Hop("2" * 16, 6, N_LAYERS))
ROW = bytes(4 * N_EMBD)
BAD_PASSES = {
    "too few rows": (ask_of, (), WHOLE, [ROW * 2]),
    "too many rows": (ask_of, (), WHOLE, [ROW * 3, b"x"]),
    "no rows": (ask_of, (), WHOLE, []),
    "an epoch below 0": (ask_of, (PassPart(SEQUENCE, -1, 0, 1, 1),), WHOLE, [ROW]),
    "a huge epoch": (ask_of, (PassPart(SEQUENCE, 2**40, 0, 1, 1),), WHOLE, [ROW]),
    "a start below 0": (ask_of, (PassPart(SEQUENCE, 1, -1, 1, 1),), WHOLE, [ROW]),
    "a start beyond the context": (ask_of, (PassPart(SEQUENCE, 1, CTX, 1, 1),), WHOLE, [ROW]),
    "an end beyond the context": (ask_of, (PassPart(SEQUENCE, 1, CTX - 1, 2, 1),), WHOLE, [ROW * 2]),
    "no row in a part": (ask_of, (PassPart(SEQUENCE, 1, 0, 0, 1),), WHOLE, []),
    "a negative count": (
        ask_of,
        (PassPart(SEQUENCE, 1, 0, -1, 1), PassPart(b"2" * 16, 1, 0, 2, 1)),
        WHOLE,
        [ROW],
    ),
    "513 rows": (
        ask_of,
        (PassPart(SEQUENCE, 1, 0, 512, 1), PassPart(b"2" * 16, 1, 0, 1, 1)),
        WHOLE,
        [ROW * 513],
    ),
    "a sequence twice": (
        ask_of,
        (PassPart(SEQUENCE, 1, 0, 1, 1), PassPart(SEQUENCE, 1, 1, 1, 1)),
        WHOLE,
        [ROW * 2],
    ),
    "no way on": (ask_of, (), (), [ROW * 3]),
    "a hole in the layers": (ask_of, (), (Hop("1" * 16, 5, N_LAYERS),), [ROW * 3]),
    "layers twice": (ask_of, (), (Hop("1" * 16, 3, N_LAYERS),), [ROW * 3]),
    "a loop": (ask_of, (), (Hop("1" * 16, 4, 6), Hop("1" * 16, 4, 6), Hop("1" * 16, 6, N_LAYERS)), [ROW * 3]),
    "no layers": (ask_of, (), (Hop("1" * 16, 4, 4), Hop("1" * 16, 4, N_LAYERS)), [ROW * 3]),
    "layers backwards": (ask_of, (), (Hop("1" * 16, 4, 2), Hop("1" * 16, 2, N_LAYERS)), [ROW * 3]),
    "too many layers": (ask_of, (), (Hop("1" * 16, 4, N_LAYERS + 1),), [ROW * 3]),
    "too few layers": (ask_of, (), (Hop("1" * 16, 4, N_LAYERS - 1),), [ROW * 3]),
}


@pytest.mark.parametrize("name", BAD_PASSES)
async def test_passes_that_make_no_sense_do_not_reach_a_stage(chain: Chain, name: str) -> None:
    make, parts, onward, payload = BAD_PASSES[name]
    await chain.open(SEQUENCE)
    link = chain.head.links[chain.nodes[0].id]
    reply, _ = await link.ask(make(chain.refs[0], *parts, onward=onward), payload, timeout_s=DEADLINE_S)
    assert isinstance(reply, PassReply)
    assert (reply.node, reply.code) == (chain.nodes[0].id, "wire")
    assert reply.message
    assert chain.stages[0].begun == []


def bad_calls(ref: StageRef) -> list[AskStage]:
    hop = calls.hop(ref)

    def opened(epoch: int = 1, n_tokens: int = 3, request: GenerateRequest | None = REQUEST) -> OpenSequence:
        return OpenSequence(FINGERPRINT, hop, SEQUENCE, epoch, (), n_tokens, request)

    return [
        opened(epoch=-1),
        opened(epoch=2**31),
        opened(n_tokens=0),
        opened(n_tokens=CTX),
        opened(n_tokens=4),
        opened(request=None),
        opened(request=replace(REQUEST, prompt=(1, 2, 99999))),
        opened(request=replace(REQUEST, prompt=(), generated=(1, 2, 3))),
        opened(request=replace(REQUEST, max_tokens=0)),
        opened(request=replace(REQUEST, sampling=replace(REQUEST.sampling, temperature=float("nan")))),
        replace_keys(opened(), KEYS * 2),
        ResumeSequence(FINGERPRINT, hop, SEQUENCE, -1, 0),
        ResumeSequence(FINGERPRINT, hop, SEQUENCE, 1, -1),
        ResumeSequence(FINGERPRINT, hop, SEQUENCE, 1, CTX),
        StoreSequence(FINGERPRINT, hop, SEQUENCE, -1, KEYS),
        StoreSequence(FINGERPRINT, hop, SEQUENCE, 1, (b"k" * 32,) * (CTX + 1)),
        CloseSequence(b"g" * 32, hop, SEQUENCE),
        CloseSequence(FINGERPRINT, Hop("0" * 16, hop.first, hop.last), SEQUENCE),
        CloseSequence(FINGERPRINT, Hop(hop.node, 0, hop.last), SEQUENCE),
    ]


def replace_keys(message: OpenSequence, keys: tuple[bytes, ...]) -> OpenSequence:
    return OpenSequence(message.fingerprint, message.stage, message.sequence, 1, keys, 3, message.request)


async def test_calls_that_make_no_sense_do_not_reach_a_stage(chain: Chain) -> None:
    link = chain.head.links[chain.nodes[2].id]
    for message in bad_calls(chain.refs[2]):
        with pytest.raises(SwarmError) as caught:
            await link.ask(message, timeout_s=DEADLINE_S)
        assert caught.value.code in ("wire", "stage_lost", "invalid_request"), message
    assert chain.stages[2].calls == []


BAD_REPLIES: list[Reply] = [
    Pong(),
    KeepAlive(),
    SequenceReady(3),
    PassReply((), ((0.0, 0.0),) * 3),
    PassReply((1, 2), ((0.0, 0.0),) * 3),
    PassReply((-1,), ((0.0, 0.0),) * 3),
    PassReply((2**31,), ((0.0, 0.0),) * 3),
    PassReply((1,), ((0.0, 0.0),) * 2),
    PassReply((1,), ((0.0, 0.0),) * 4),
    PassReply((1,), ((0.0, float("nan")),) * 3),
    PassReply((1,), ((0.0, -1.0),) * 3),
]


async def lying(peers: Peers, reply: Reply) -> tuple[StageCaller, StageRef]:
    async def handle(message: Ask, payload: list[memoryview], respond: Responder) -> None:
        respond.send(reply)

    keys = new_node_keys()
    _, address = await peers.endpoint(handle, keys=keys)
    ref = StageRef(node_id(keys.public), FINGERPRINT, 0, 4, N_LAYERS)
    service = StageService("0" * 16, {ref.node: peers.link(address)}.get, FakeClock())
    return service.caller(ref), ref


async def test_a_peer_that_gives_no_news_is_not_waited_for(peers: Peers) -> None:
    """It has frozen: links stay open, and a call's own time-out is for stages that are busy."""
    asked = asyncio.Event()

    async def handle(message: Ask, payload: list[memoryview], respond: Responder) -> None:
        asked.set()
        await asyncio.Event().wait()

    keys = new_node_keys()
    _, address = await peers.endpoint(handle, keys=keys)
    ref = StageRef(node_id(keys.public), FINGERPRINT, 0, 4, N_LAYERS)
    links, news = {ref.node: peers.link(address)}, {ref.node: True}
    caller = StageService("0" * 16, links.get, FakeClock(), alive=news.__getitem__).caller(ref)
    opening = asyncio.create_task(caller.open(SEQUENCE, 1, (), None, 4))
    await asked.wait()
    assert not (await asyncio.wait((opening,), timeout=0))[0]
    news[ref.node] = False
    with pytest.raises(PeerTimeout, match="gives no news"):
        await opening


def work_from(ref: StageRef) -> Pass:
    onward = (replace(ref, node="1" * 16, first=4, last=6), replace(ref, node="2" * 16, first=6, last=10))
    return Pass((part(3),), "f32", rows_of(3).tobytes(), onward)


@pytest.mark.parametrize("reply", BAD_REPLIES, ids=repr)
async def test_an_answer_that_is_none_fails_the_pass_at_the_peer(peers: Peers, reply: Reply) -> None:
    caller, ref = await lying(peers, reply)
    assert await failure(caller, work_from(ref)) == (ref.node, "wire")


@pytest.mark.parametrize(
    ("node", "code", "expected"),
    [
        ("1" * 16, "decode_failed", ("1" * 16, "decode_failed")),
        ("3" * 16, "decode_failed", (None, "decode_failed")),
        ("", "\x1b[31m", (None, "internal")),
    ],
)
async def test_a_peer_can_blame_nobody_but_the_nodes_of_the_chain(
    peers: Peers, node: str, code: str, expected: tuple[str | None, str]
) -> None:
    caller, ref = await lying(peers, PassReply(node=node, code=code, message="a\nb\x1b"))
    assert await failure(caller, work_from(ref)) == (expected[0] or ref.node, expected[1])


@pytest.mark.parametrize("reply", [Pong(), SequenceReady(-1), SequenceReady(4), PassReply()], ids=repr)
async def test_an_answer_that_is_none_fails_a_call(peers: Peers, reply: Reply) -> None:
    caller, _ = await lying(peers, reply)
    with pytest.raises(WireError):
        await caller.open(SEQUENCE, 1, (), None, 4)
    with pytest.raises(WireError):
        await caller.resume(SEQUENCE, 1, 3)
    if not isinstance(reply, Pong):
        with pytest.raises(WireError):
            await caller.store(SEQUENCE, 1, KEYS)


# -- the mesh ----------------------------------------------------------------------------------------------------------


class OneStage:
    """What a node of the mesh does for its peers, where that is only a stage."""

    def __init__(self, keys_public: str, node: str) -> None:
        self.public, self.node = keys_public, node
        self.mesh: Mesh | None = None
        self.service = StageService(node, lambda peer: self.mesh.caller(peer) if self.mesh else None, FakeClock())

    def capability(self) -> Capability:
        port, pub = (self.mesh.endpoint.port, self.mesh.endpoint.pub_port) if self.mesh else (0, 0)
        addresses = (Address(HOST, port, self.public),) if port else ()
        return Capability(self.node, 1, "n", addresses, pub, "v", "ready", "cpu", 1, 1, 1, ())

    async def stage(self, message: AskStage, respond: Responder) -> None:
        await self.service.answer(message, respond)

    def begin_pass(self, message: RunStage, payload: list[memoryview], respond: Responder) -> None:
        self.service.begin(message, payload, respond)


async def test_nodes_of_a_mesh_ask_one_another() -> None:
    key, nodes = SwarmKey.new(), []
    for _ in range(2):
        keys = new_node_keys()
        services = OneStage(keys.public, node_id(keys.public))
        services.mesh = Mesh(key, Identity(keys, services.node, 1), services, clock=FakeClock())  # type: ignore[arg-type]
        await services.mesh.endpoint.listen([HOST], 0)
        nodes.append(services)
    head, other = nodes
    assert head.mesh and other.mesh
    try:
        refs: list[StageRef] = []
        for services, (first, last) in zip(nodes, ((0, 6), (6, N_LAYERS)), strict=True):
            stage = FakeStage(first, last, N_LAYERS)
            refs.append(ref_of(services.node, stage))
            services.service.host(refs[-1], stage, BOUNDS)
        with pytest.raises(PeerLost, match="no link"):
            await head.service.caller(refs[1]).open(SEQUENCE, 1, (), REQUEST, 3)
        head.mesh.dial(other.capability().addresses)
        await until(lambda: head.mesh.caller(other.node) is not None, "they meet")
        for ref in refs:
            await open_at(head.service.caller(ref), ref, SEQUENCE)
        rows = rows_of(3)
        work = Pass((part(3),), "f32", rows.tobytes(), (refs[1],))
        passed = await run_pass(head.service.caller(refs[0]), work)
        assert passed.tokens == sampled_of(summed_token(summed(rows, 0, N_LAYERS)))
    finally:
        for services in nodes:
            await services.mesh.close()
