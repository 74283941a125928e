"""What comes from those without the key, and nonsense from those with it: no effect on anybody's answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import count

import pytest
import zmq
from engine_support import part_of
from swarm_support import DEADLINE_S, HOST, Peers, pong, swarm

from swarmcpp.core import GenerateRequest
from swarmcpp.peers import Address, Capability, Load, StageOffer
from swarmcpp.swarm.endpoint import Responder
from swarmcpp.swarm.peerlink import PeerLink
from swarmcpp.wire.peers import (
    Alive,
    Ask,
    BlockPage,
    Blocks,
    Cancel,
    ChunkReply,
    CloseSequence,
    Failure,
    FetchBlocks,
    Generate,
    GetChunk,
    GetManifest,
    Gossip,
    Hello,
    Hop,
    KeepAlive,
    Leaving,
    ListBlocks,
    ManifestReply,
    NodeCapability,
    OpenSequence,
    Part,
    PassPart,
    PassReply,
    PeerMessage,
    Ping,
    Pong,
    PrefixCacheAnnounce,
    ResumeSequence,
    RunStage,
    SequenceReady,
    StoreSequence,
    Welcome,
    encode,
)

STRANGERS = 10_000
AT_ONCE = 200
MUTANTS = 1000
NODE = "0123456789abcdef"
ADDRESS = Address(HOST, 1, "k" * 40)
ROOT = b"r" * 32
IDS = (b"a" * 16, b"b" * 16)
STAGE = StageOffer(
    model="tiny",
    fingerprint=ROOT,
    first=4,
    last=8,
    n_layers=8,
    ctx_size=4096,
    slots=4,
    free=2,
    pass_s=((1, 0.1), (64, 0.5)),
)
CAPABILITY = Capability(NODE, 1, "n", (ADDRESS,), 2, "v", "ready", "cpu", 4, 1 << 30, 1 << 29, (), stages=(STAGE,))
HOP = Hop(NODE, 4, 8)

MESSAGES: list[PeerMessage] = [
    Hello(1, 1, CAPABILITY),
    Ping(5),
    Generate(GenerateRequest("r", "m", (1, 2, 3), 10)),
    Cancel(),
    FetchBlocks(ROOT, IDS, "f16", 1.0),
    ListBlocks(ROOT),
    GetManifest(ROOT),
    GetChunk(ROOT, 3),
    OpenSequence(ROOT, HOP, IDS[0], 1, (ROOT,), 3, GenerateRequest("r", "m", (1, 2, 3), 10)),
    ResumeSequence(ROOT, HOP, IDS[0], 1, 2),
    RunStage(ROOT, HOP, (PassPart(IDS[0], 1, 0, 3, 1), PassPart(IDS[1], 1, 9, 1, 0)), "f32", (HOP,), "q8_0"),
    StoreSequence(ROOT, HOP, IDS[0], 1, (ROOT,)),
    CloseSequence(ROOT, HOP, IDS[0]),
    Welcome(1, CAPABILITY, (ADDRESS,)),
    Pong(),
    Part(part_of((1, 2), "stop")),
    KeepAlive(),
    Blocks((ROOT,)),
    BlockPage(IDS, 1, True),
    ManifestReply(),
    ChunkReply(),
    SequenceReady(3),
    PassReply((1, 2), ((0.1, 0.2),)),
    Failure("queue_full", "busy", 1.0),
    Gossip(NODE, 1, 1, Alive(Load())),
    Gossip(NODE, 1, 2, PrefixCacheAnnounce(ROOT, IDS, IDS)),
    Gossip(NODE, 1, 3, Leaving()),
    Gossip(NODE, 1, 4, NodeCapability(CAPABILITY)),
]


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    async with swarm() as opened:
        yield opened


@dataclass
class Friend:
    """Somebody who asks and is answered, whatever others do."""

    link: PeerLink
    answered: int = 0

    async def ask_until(self, work: asyncio.Task[None]) -> None:
        """Ask until `work` is done; a question that is not answered fails the test."""
        while not work.done():
            size = self.answered % 1000
            reply, payload = await self.link.ask(Ping(size), timeout_s=DEADLINE_S)
            assert reply == Pong()
            assert payload == [b"x" * size]
            self.answered += 1
            await asyncio.sleep(0.002)
        await work


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15) + bytes(32)
"""ZMTP 3.0 as a client that wants CURVE begins it; what follows should be a HELLO command."""

OPENINGS = [
    b"",
    b"\x00",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\xff" * 64,
    GREETING[:20],
    GREETING,
    GREETING.replace(b"CURVE", b"NULL\x00"),
    GREETING + b"\x04\xc8\x05HELLO" + bytes(194),
    GREETING + b"\x06" + b"\x7f" + b"\xff" * 7,
    GREETING + random.Random(1).randbytes(500),
]


async def test_garbage_of_strangers_disturbs_nobody(peers: Peers) -> None:
    server, address = await peers.endpoint()
    friend = Friend(peers.link(address))
    ports = [server.port, server.port, server.port, server.pub_port]

    async def strangers(first: int) -> None:
        for number in count(first, AT_ONCE):
            if number >= STRANGERS and friend.answered > 20:
                return
            reader, writer = await asyncio.open_connection(HOST, ports[number % len(ports)])
            writer.write(OPENINGS[number % len(OPENINGS)])
            try:
                await writer.drain()
                if number % 7 == 0:
                    # Some stay to see what the node says; it begins with its greeting and ends the talk.
                    async with asyncio.timeout(0.05):
                        await reader.read(10)
            except (OSError, TimeoutError):
                pass
            writer.transport.abort()

    async def all_strangers() -> None:
        await asyncio.gather(*(strangers(first) for first in range(AT_ONCE)))

    await friend.ask_until(asyncio.create_task(all_strangers()))
    assert friend.link.connected
    assert server.bad_messages == 0


async def test_strangers_with_other_keys_are_never_heard(peers: Peers) -> None:
    """They know the node's public key, which is no secret, and speak CURVE as it should be."""
    asked: list[Ask] = []

    async def handle(message: Ask, payload: list[memoryview], respond: Responder) -> None:
        asked.append(message)
        await pong(message, payload, respond)

    server, address = await peers.endpoint(handle)
    friend = Friend(peers.link(address))
    refused = asyncio.Semaphore(0)

    async def stranger() -> None:
        socket = peers.context.socket(zmq.DEALER)
        socket.linger = 0
        socket.reconnect_ivl = -1
        socket.curve_serverkey = address.key.encode()
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        try:
            socket.connect(f"tcp://{address}")
            await socket.send_multipart([b"stranger", encode(GetManifest(ROOT))])
            await asyncio.wait_for(monitor.recv_multipart(), DEADLINE_S)
            refused.release()
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)

    async def all_strangers() -> None:
        for _ in range(10):
            await asyncio.gather(*(stranger() for _ in range(30)))

    await friend.ask_until(asyncio.create_task(all_strangers()))
    assert refused._value == 300
    assert all(isinstance(message, Ping) for message in asked)
    assert server.bad_messages == 0


def mutated(frame: bytes, chance: random.Random) -> bytes:
    """`frame` with a few bytes changed, cut, doubled or put in."""
    data = bytearray(frame)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(data):
            data[at] = chance.randrange(256)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = chance.randbytes(chance.randint(1, 9))
        elif kind == 3:
            data[at:at] = data[at : at + 20]
        else:
            del data[at : at + chance.randint(1, 5)]
    return bytes(data)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(getattr(message, "news", message)).__name__)
async def test_mutated_frames_of_a_member_disturb_nobody(peers: Peers, message: PeerMessage) -> None:
    async def handle(message: Ask, payload: list[memoryview], respond: Responder) -> None:
        if isinstance(message, Ping) and message.reply_bytes < 1000:
            await pong(message, payload, respond)
        else:
            respond.send(KeepAlive())

    _, address = await peers.endpoint(handle)
    link, bad = peers.link(address), peers.raw_dealer(address)
    chance = random.Random(repr(message))

    async def flood() -> None:
        for number in range(MUTANTS):
            frames = [number.to_bytes(8), mutated(encode(message), chance)]
            if number % 10 == 0:
                frames = [mutated(frame, chance) for frame in frames]
            if number % 17 == 0:
                frames += [chance.randbytes(chance.randrange(50)) for _ in range(chance.randrange(100))]
            await bad.send_multipart(frames)
        # A good question at the end: everything before it has been dealt with when it is answered.
        await bad.send_multipart([b"the last", encode(Ping(7))])
        while (await asyncio.wait_for(bad.recv_multipart(), DEADLINE_S))[0] != b"the last":
            pass

    await Friend(link).ask_until(asyncio.create_task(flood()))
    assert link.connected


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(getattr(message, "news", message)).__name__)
async def test_mutated_replies_and_news_disturb_nobody(peers: Peers, message: PeerMessage) -> None:
    """A peer that answers everything but Ping with nonsense, and gossips it too."""
    chance = random.Random(repr(message))

    async def handle(ask: Ask, payload: list[memoryview], respond: Responder) -> None:
        if isinstance(ask, Ping):
            await pong(ask, payload, respond)
            return
        for _ in range(20):
            frames = [respond._asker, respond._request, mutated(encode(message), chance)]
            await server._router.send_multipart(frames)
            await server._pub.send(mutated(encode(message), chance))

    server, address = await peers.endpoint(handle)
    link = peers.link(address)
    link.subscribe(server.pub_port)

    async def flood() -> None:
        for _ in range(MUTANTS // 20):
            await asyncio.gather(link.ask(GetManifest(ROOT), timeout_s=0.05), return_exceptions=True)

    await Friend(link).ask_until(asyncio.create_task(flood()))
    assert link.connected
