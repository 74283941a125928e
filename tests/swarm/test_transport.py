"""Requests, replies and news between nodes over real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import zmq
from engine_support import part_of
from swarm_support import DEADLINE_S, HOST, Peers, pong, swarm, until

from swarmcpp.core import GenerateRequest
from swarmcpp.errors import BadConfig, PeerLost, PeerTimeout, PortInUse, QueueFull, SwarmError, UnknownModel, WireError
from swarmcpp.peers import Address, Load
from swarmcpp.swarm.endpoint import AskLimits, Endpoint, Handler, Responder
from swarmcpp.swarm.identity import SwarmKey, new_node_keys, node_id
from swarmcpp.swarm.peerlink import MAX_BUFFERED, MAX_OUTSTANDING, PeerLink
from swarmcpp.wire.peers import (
    MAX_FRAMES,
    PROTOCOL,
    Alive,
    Ask,
    Cancel,
    Failure,
    Generate,
    GetManifest,
    Gossip,
    KeepAlive,
    ManifestReply,
    Part,
    Ping,
    Pong,
    Reply,
    decode,
    encode,
)

GENERATE = Generate(GenerateRequest("r", "m", (1, 2, 3), 100))
MANIFEST = GetManifest(b"f" * 32)


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    async with swarm() as opened:
        yield opened


class Holding:
    """A handler that answers Ping at once and holds every other request until it is cancelled or released."""

    def __init__(self) -> None:
        self.started = 0
        self.cancelled = 0
        self.release = asyncio.Event()

    async def __call__(self, message: Ask, payload: list[memoryview], respond: Responder) -> None:
        if isinstance(message, Ping):
            await pong(message, payload, respond)
            return
        self.started += 1
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        respond.send(ManifestReply())


async def ping(link: PeerLink, n_bytes: int = 0, payload: tuple[bytes, ...] = ()) -> list[memoryview]:
    reply, got = await link.ask(Ping(n_bytes), payload, timeout_s=DEADLINE_S)
    assert reply == Pong()
    return got


def answering(*replies: Reply) -> Handler:
    async def handle(message: Ask, _payload: list[memoryview], respond: Responder) -> None:
        if isinstance(message, Ping):
            respond.send(Pong())
            return
        for reply in replies:
            respond.send(reply)

    return handle


async def test_a_request_is_answered_with_its_payload(peers: Peers) -> None:
    _, address = await peers.endpoint()
    link = peers.link(address)
    assert [bytes(frame) for frame in await ping(link, 3, (b"one", b"", b"y" * 100_000))] == [
        b"one",
        b"",
        b"y" * 100_000,
        b"xxx",
    ]
    assert link.connected
    assert link.refusal == ""


async def test_large_frames_pass(peers: Peers) -> None:
    frame = bytes(8 << 20)

    async def handle(_message: Ask, _payload: list[memoryview], respond: Responder) -> None:
        respond.send(ManifestReply(), [frame, memoryview(frame)])

    _, address = await peers.endpoint(handle)
    reply, got = await peers.link(address).ask(MANIFEST, timeout_s=DEADLINE_S)
    assert reply == ManifestReply()
    assert got == [frame, frame]


async def test_requests_in_parallel_get_each_its_own_reply(peers: Peers) -> None:
    _, address = await peers.endpoint(limits=AskLimits(tasks_per_asker=256))
    links = [peers.link(address) for _ in range(3)]
    replies = await asyncio.gather(*(ping(link, n) for n in range(200) for link in links))
    assert [len(reply[0]) for reply in replies] == [n for n in range(200) for _ in links]


async def test_a_stream_ends_with_its_last_part(peers: Peers) -> None:
    parts = [Part(part_of((n,))) for n in range(500)]
    last = Part(part_of((7,), finish="stop"))
    _, address = await peers.endpoint(answering(KeepAlive(), *parts, last, Part(part_of((8,)))))
    link = peers.link(address)
    assert [reply async for reply in link.stream(GENERATE, silence_s=DEADLINE_S)] == [KeepAlive(), *parts, last]
    assert await ping(link) == []


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (UnknownModel("no such model"), UnknownModel, "no such model"),
        (QueueFull("busy", retry_after=7.5), QueueFull, "busy"),
        (UnknownModel("lone \ud800 surrogate"), UnknownModel, r"lone \? surrogate"),
        (UnknownModel("x" * 5000), UnknownModel, "^x{1000}$"),
        (ZeroDivisionError("secret detail"), SwarmError, "the peer failed to answer"),
    ],
)
async def test_what_a_handler_raises_reaches_the_asker(
    peers: Peers, raised: Exception, expected: type[SwarmError], message: str
) -> None:
    async def handle(_message: Ask, _payload: list[memoryview], _respond: Responder) -> None:
        raise raised

    _, address = await peers.endpoint(handle)
    with pytest.raises(expected, match=message) as caught:
        await peers.link(address).ask(MANIFEST, timeout_s=DEADLINE_S)
    assert not isinstance(caught.value, QueueFull) or caught.value.retry_after == 7.5


async def test_a_timeout_cancels_the_task_at_the_server(peers: Peers) -> None:
    holding = Holding()
    _, address = await peers.endpoint(holding)
    link = peers.link(address)
    await ping(link)
    with pytest.raises(PeerTimeout, match=r"within 0\.05 s"):
        await link.ask(MANIFEST, timeout_s=0.05)
    await until(lambda: holding.cancelled == 1, "the task ends")


async def test_closing_a_stream_cancels_the_task_at_the_server(peers: Peers) -> None:
    holding = Holding()

    async def handle(message: Ask, payload: list[memoryview], respond: Responder) -> None:
        respond.send(Part(part_of((1,))))
        await holding(message, payload, respond)

    _, address = await peers.endpoint(handle)
    stream = peers.link(address).stream(GENERATE, silence_s=DEADLINE_S)
    assert await anext(stream) == Part(part_of((1,)))
    assert holding.cancelled == 0
    await stream.aclose()
    await until(lambda: holding.cancelled == 1, "the task ends")


async def test_a_cancelled_ask_cancels_only_its_own_task(peers: Peers) -> None:
    holding = Holding()
    _, address = await peers.endpoint(holding)
    link, other = peers.link(address), peers.link(address)
    asks = [asyncio.create_task(each.ask(MANIFEST, timeout_s=DEADLINE_S)) for each in (link, link, other)]
    await until(lambda: holding.started == 3, "all are asked")
    asks[0].cancel()
    await until(lambda: holding.cancelled == 1, "one ends")
    holding.release.set()
    assert [reply for reply, _ in await asyncio.gather(*asks[1:])] == [ManifestReply()] * 2
    assert holding.cancelled == 1


async def test_a_silent_stream_times_out(peers: Peers) -> None:
    holding = Holding()
    _, address = await peers.endpoint(holding)
    with pytest.raises(PeerTimeout, match="silent"):
        await anext(peers.link(address).stream(GENERATE, silence_s=0.05))


async def test_a_server_that_dies_fails_requests_at_once_and_serves_again_when_it_is_back(peers: Peers) -> None:
    holding, keys, lost = Holding(), new_node_keys(), []
    server, address = await peers.endpoint(holding, keys=keys)
    link = peers.link(address, on_lost=lambda: lost.append(1))
    stream = link.stream(GENERATE, silence_s=600.0)
    asks = [asyncio.create_task(link.ask(MANIFEST, timeout_s=600.0)) for _ in range(5)]
    asks.append(asyncio.create_task(anext(stream)))  # type: ignore[arg-type]
    await until(lambda: holding.started == 6, "all are asked")
    assert lost == []
    await server.aclose()
    for ended in await asyncio.wait_for(asyncio.gather(*asks, return_exceptions=True), DEADLINE_S):
        assert isinstance(ended, PeerLost)
    await until(lambda: lost == [1], "the loss is told")
    assert not link.connected
    with pytest.raises(PeerLost):
        await link.ask(Ping(), timeout_s=600.0)
    await peers.endpoint(keys=keys, port=address.port)
    await until(lambda: link.connected, "it is connected again")
    assert await ping(link, 2) == [b"xx"]


async def test_an_address_where_nobody_listens_fails_at_once(peers: Peers) -> None:
    with socket.socket() as reserved:
        reserved.bind((HOST, 0))
        link = peers.link(Address(HOST, reserved.getsockname()[1], new_node_keys().public))
        with pytest.raises(PeerLost, match="nobody listens there"):
            await link.ask(Ping(), timeout_s=600.0)
    assert link.refusal == ""


async def test_a_wrong_member_key_is_refused_and_says_so(peers: Peers) -> None:
    server, address = await peers.endpoint()
    good, link = peers.link(address), peers.link(address, member=SwarmKey.new().member)
    with pytest.raises(PeerLost, match="key is not accepted"):
        await link.ask(Ping(), timeout_s=600.0)
    assert link.refusal == "the swarm key is not accepted there"
    assert not link.connected
    assert await ping(good, 1) == [b"x"]
    assert server.bad_messages == 0


async def test_the_key_of_another_node_is_refused_and_says_so(peers: Peers) -> None:
    _, address = await peers.endpoint()
    link = peers.link(Address(address.host, address.port, new_node_keys().public))
    with pytest.raises(PeerLost, match="another node answers there"):
        await link.ask(Ping(), timeout_s=600.0)
    assert link.refusal.startswith("another node")


async def test_a_refused_link_works_once_the_key_is_accepted(peers: Peers) -> None:
    """After a refusal ZeroMQ itself never connects again."""
    member, keys = peers.key.member, new_node_keys()
    peers.key = SwarmKey.new()
    server, address = await peers.endpoint(keys=keys)
    link = peers.link(address, member=member)
    await until(lambda: link.refusal != "", "it is refused")
    await server.aclose()
    peers.key = SwarmKey.new()
    again = Endpoint(keys, member.public, pong)
    try:
        await again.listen([HOST], address.port)
        await until(lambda: link.connected, "it is connected")
        assert await ping(link, 1) == [b"x"]
        assert link.refusal == ""
    finally:
        await again.aclose()


async def test_too_many_requests_of_one_asker_are_refused_and_others_are_not(peers: Peers) -> None:
    holding = Holding()
    _, address = await peers.endpoint(holding, limits=AskLimits(tasks=5, tasks_per_asker=3))
    first, second = peers.link(address), peers.link(address)
    held = [asyncio.create_task(first.ask(MANIFEST, timeout_s=DEADLINE_S)) for _ in range(3)]
    await until(lambda: holding.started == 3, "three are held")
    with pytest.raises(QueueFull) as caught:
        await first.ask(MANIFEST, timeout_s=DEADLINE_S)
    assert caught.value.retry_after == 1.0
    held += [asyncio.create_task(second.ask(MANIFEST, timeout_s=DEADLINE_S)) for _ in range(2)]
    await until(lambda: holding.started == 5, "five are held")
    with pytest.raises(QueueFull):
        await second.ask(MANIFEST, timeout_s=DEADLINE_S)
    holding.release.set()
    await asyncio.gather(*held)
    assert await ping(second) == [b""]


async def test_payload_of_requests_under_way_is_bounded(peers: Peers) -> None:
    holding = Holding()
    _, address = await peers.endpoint(holding, limits=AskLimits(payload_per_asker=2000, payload=3000))
    first, second = peers.link(address), peers.link(address)
    held = [asyncio.create_task(first.ask(MANIFEST, (bytes(500), bytes(500)), timeout_s=DEADLINE_S)) for _ in range(2)]
    await until(lambda: holding.started == 2, "two are held")
    with pytest.raises(QueueFull):
        await first.ask(MANIFEST, (b"x",), timeout_s=DEADLINE_S)
    held += [asyncio.create_task(second.ask(MANIFEST, (bytes(1000),), timeout_s=DEADLINE_S))]
    await until(lambda: holding.started == 3, "three are held")
    with pytest.raises(QueueFull):
        await second.ask(MANIFEST, (b"x",), timeout_s=DEADLINE_S)
    assert await ping(second) == [b""]
    holding.release.set()
    await asyncio.gather(*held)
    assert await ping(first, 1, (bytes(2000),)) == [bytes(2000), b"x"]


async def test_requests_under_way_on_a_link_are_bounded(peers: Peers) -> None:
    holding = Holding()
    _, address = await peers.endpoint(holding, limits=AskLimits(tasks_per_asker=1000))
    link = peers.link(address)
    asks = [asyncio.create_task(link.ask(MANIFEST, timeout_s=DEADLINE_S)) for _ in range(MAX_OUTSTANDING)]
    await until(lambda: holding.started == MAX_OUTSTANDING, "all are asked")
    with pytest.raises(QueueFull, match="256 requests"):
        await link.ask(MANIFEST, timeout_s=DEADLINE_S)
    holding.release.set()
    await asyncio.gather(*asks)


async def test_a_stream_that_nobody_takes_fails_and_is_cancelled(peers: Peers) -> None:
    sent = 0
    cancelled = asyncio.Event()

    async def handle(_message: Ask, _payload: list[memoryview], respond: Responder) -> None:
        nonlocal sent
        try:
            while True:
                respond.send(Part(part_of((sent,))))
                sent += 1
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    _, address = await peers.endpoint(handle)
    stream = peers.link(address).stream(GENERATE, silence_s=DEADLINE_S)
    await anext(stream)
    await asyncio.wait_for(cancelled.wait(), DEADLINE_S)
    assert sent > MAX_BUFFERED
    with pytest.raises(WireError, match="more replies than could be taken"):
        async for _ in stream:
            pass


async def test_an_asker_that_does_not_read_big_replies_is_bounded_by_bytes(peers: Peers) -> None:
    errors: list[SwarmError] = []

    async def handle(message: Ask, payload: list[memoryview], respond: Responder) -> None:
        if isinstance(message, Ping):
            await pong(message, payload, respond)
            return
        try:
            for _ in range(100):
                respond.send(ManifestReply(), [bytes(4 << 20)])
        except PeerLost as error:
            errors.append(error)
            raise

    _, address = await peers.endpoint(handle, limits=AskLimits(unread_per_asker=32 << 20))
    dealer = peers.raw_dealer(address)
    await dealer.send_multipart([b"00000001", encode(MANIFEST)])
    await until(lambda: len(errors) == 1, "it is given up")
    assert "does not read" in str(errors[0])
    assert await ping(peers.link(address), 1) == [b"x"]


async def test_replying_to_an_asker_that_has_left_fails(peers: Peers) -> None:
    left, errors = asyncio.Event(), []

    async def handle(_message: Ask, _payload: list[memoryview], respond: Responder) -> None:
        await left.wait()
        try:
            while True:
                respond.send(KeepAlive())
                await asyncio.sleep(0.005)
        except PeerLost as error:
            errors.append(error)
            raise

    _, address = await peers.endpoint(handle)
    link = peers.link(address)
    waiting = asyncio.create_task(link.ask(MANIFEST, timeout_s=DEADLINE_S))
    await until(lambda: link.connected, "it is connected")
    await link.aclose()
    with pytest.raises(PeerLost, match="closed"):
        await waiting
    with pytest.raises(PeerLost, match="closed"):
        await link.ask(Ping(), timeout_s=1.0)
    left.set()
    await until(lambda: len(errors) == 1, "the sender notices")
    assert "is gone" in str(errors[0])


async def test_an_old_protocol_is_told_both_versions(peers: Peers) -> None:
    _, address = await peers.endpoint()
    dealer = peers.raw_dealer(address)
    await dealer.send_multipart([b"00000001", bytes([PROTOCOL + 1]) + encode(Ping())[1:]])
    request, frame = await asyncio.wait_for(dealer.recv_multipart(), DEADLINE_S)
    reply = decode(frame)
    assert request == b"00000001"
    assert isinstance(reply, Failure)
    assert f"version {PROTOCOL + 1} where {PROTOCOL} is spoken" in reply.message


async def test_frames_that_are_no_request_are_dropped_and_counted(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    server, address = await peers.endpoint()
    dealer = peers.raw_dealer(address)
    bad = [
        [b""],
        [b"short", encode(Ping())],
        [b"00000001"],
        [b"00000002", b""],
        [b"00000003", bytes([PROTOCOL]) + b"rubbish"],
        [b"00000004", encode(Pong())],
        [b"00000005", encode(Ping()), *[b""] * (MAX_FRAMES + 1)],
    ]
    for frames in bad:
        await dealer.send_multipart(frames)
    await dealer.send_multipart([b"00000006", encode(Cancel())])
    await dealer.send_multipart([b"00000007", encode(Ping())])
    assert await asyncio.wait_for(dealer.recv_multipart(), DEADLINE_S) == [b"00000007", encode(Pong()), b""]
    assert server.bad_messages == len(bad)
    assert sum("no request" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    "reply", [[b"rubbish"], [encode(Ping())], [], [encode(ManifestReply()), *[b""] * (MAX_FRAMES + 1)]]
)
async def test_a_reply_that_is_none_fails_its_request_alone(peers: Peers, reply: list[bytes]) -> None:
    server, address = await peers.endpoint(Holding())
    link = peers.link(address)

    async def handle(_message: Ask, _payload: list[memoryview], respond: Responder) -> None:
        asker, request = respond._asker, respond._request
        await server._router.send_multipart([asker, b"unknown!", b"rubbish"])
        await server._router.send_multipart([asker, request, *reply])

    good = server._handler
    server._handler = handle
    with pytest.raises(WireError):
        await link.ask(MANIFEST, timeout_s=DEADLINE_S)
    server._handler = good
    assert await ping(link, 1) == [b"x"]


async def test_news_reach_subscribers(peers: Peers) -> None:
    keys = new_node_keys()
    server, address = await peers.endpoint(keys=keys)
    heard: list[Gossip] = []
    link = peers.link(address, on_news=heard.append)
    link.subscribe(server.pub_port)
    node, sequence = node_id(keys.public), 0

    def heard_something() -> bool:
        nonlocal sequence
        server.publish(Gossip("0" * 16, 1, sequence, Alive(Load())))
        server._pub.send(b"rubbish", zmq.NOBLOCK)
        server.publish(Gossip(node, 1, sequence, Alive(Load(waiting=sequence))))
        sequence += 1
        return len(heard) >= 3

    await until(heard_something, "news come")
    assert {gossip.node for gossip in heard} == {node}
    numbers = [gossip.sequence for gossip in heard]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


async def test_news_are_refused_to_strangers(peers: Peers) -> None:
    keys = new_node_keys()
    server, address = await peers.endpoint(keys=keys)
    good: list[Gossip] = []
    bad: list[Gossip] = []
    peers.link(address, on_news=good.append).subscribe(server.pub_port)
    peers.link(address, on_news=bad.append, member=SwarmKey.new().member).subscribe(server.pub_port)

    def heard() -> bool:
        server.publish(Gossip(node_id(keys.public), 1, 1, Alive(Load())))
        return len(good) > 50

    await until(heard, "news come")
    assert bad == []


@pytest.mark.parametrize("port", [0, -1, 65536, 1 << 40])
async def test_a_port_of_news_that_is_none_is_refused(peers: Peers, port: int) -> None:
    _, address = await peers.endpoint()
    with pytest.raises(WireError, match="which is none"):
        peers.link(address).subscribe(port)


async def test_publishing_never_blocks(peers: Peers) -> None:
    server, address = await peers.endpoint()
    slow = peers.context.socket(zmq.SUB)
    slow.rcvhwm, slow.linger = 1, 0
    slow.curve_serverkey = address.key.encode()
    slow.curve_publickey = peers.key.member.public.encode()
    slow.curve_secretkey = peers.key.member.secret.encode()
    slow.subscribe(b"")
    slow.connect(f"tcp://{HOST}:{server.pub_port}")
    try:
        for n in range(20_000):
            server.publish(Gossip("0" * 16, 1, n, Alive(Load())))
        assert await ping(peers.link(address)) == [b""]
    finally:
        slow.close()


async def test_a_port_in_use_is_named_with_its_remedy(peers: Peers) -> None:
    _, address = await peers.endpoint()
    with pytest.raises(PortInUse, match=f"{address.port} on 127.0.0.1 is in use; .* --swarm-port"):
        await peers.endpoint(port=address.port)


async def test_a_host_that_is_not_ours_is_named(peers: Peers) -> None:
    endpoint = Endpoint(new_node_keys(), peers.key.member.public, pong)
    with pytest.raises(BadConfig, match=r"cannot listen on 192\.0\.2\.1"):
        await endpoint.listen(["192.0.2.1"], 0)
    await endpoint.aclose()


async def test_one_port_serves_all_hosts(peers: Peers) -> None:
    keys = new_node_keys()
    endpoint = Endpoint(keys, peers.key.member.public, pong)
    try:
        await endpoint.listen([HOST, "127.0.0.2"], 0)
        for host in (HOST, "127.0.0.2"):
            assert await ping(peers.link(Address(host, endpoint.port, keys.public)), 1) == [b"x"]
    finally:
        await endpoint.aclose()


async def test_closing_twice_is_closing_once_and_ends_tasks(peers: Peers) -> None:
    holding = Holding()
    server, address = await peers.endpoint(holding)
    link = peers.link(address)
    asked = asyncio.create_task(link.ask(MANIFEST, timeout_s=DEADLINE_S))
    await until(lambda: holding.started == 1, "it is asked")
    await server.aclose()
    await server.aclose()
    assert holding.cancelled == 1
    server.publish(Gossip("0" * 16, 1, 1, Alive(Load())))
    with pytest.raises(PeerLost):
        await asked
    await link.aclose()
    await link.aclose()


async def test_nothing_is_kept_of_askers_that_are_done(peers: Peers) -> None:
    server, address = await peers.endpoint()
    links = [peers.link(address) for _ in range(20)]
    await asyncio.gather(*(ping(link) for link in links))
    await until(lambda: not server._askers and server._n_tasks == 0, "it forgets")


# -- without tasks ---------------------------------------------------------------------------------------------------


class Later:
    """A `Beginner` that takes GetManifest and answers when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[Responder] = []

    def __call__(self, message: Ask, payload: list[memoryview], respond: Responder) -> bool:
        if not isinstance(message, GetManifest):
            return False
        self.waiting.append(respond)
        return True


async def test_a_request_without_a_task_is_answered_later_and_counts_until_then(peers: Peers) -> None:
    later = Later()
    server, address = await peers.endpoint(begin=later, limits=AskLimits(tasks_per_asker=2))
    link = peers.link(address)
    asked = [asyncio.create_task(link.ask(MANIFEST, [b"12345"], timeout_s=DEADLINE_S)) for _ in range(2)]
    await until(lambda: len(later.waiting) == 2, "both are there")
    assert (server._n_tasks, server._payload) == (2, 10)
    with pytest.raises(QueueFull, match="too many requests"):
        await link.ask(Ping(0), timeout_s=DEADLINE_S)
    for respond in later.waiting:
        respond.send(Pong(), [b"late"])
    assert [(reply, bytes(frames[0])) for reply, frames in await asyncio.gather(*asked)] == [(Pong(), b"late")] * 2
    assert (server._n_tasks, server._payload) == (0, 0)
    await ping(link)


async def test_a_cancel_of_a_request_without_a_task_leaves_it_to_end(peers: Peers) -> None:
    later = Later()
    server, address = await peers.endpoint(begin=later)
    link = peers.link(address)
    with pytest.raises(PeerTimeout):
        await link.ask(MANIFEST, [b"12345"], timeout_s=0.05)
    await until(lambda: server._n_tasks == 0, "its asker may have another instead")
    assert server._payload == 5, "what came beside it is still there"
    later.waiting[0].send(Pong())
    await ping(link)
    assert (server._n_tasks, server._payload) == (0, 0)
    assert not server._askers


class Ends:
    """What came of requests that were begun."""

    def __init__(self) -> None:
        self.got: list[tuple[object, list[bytes]]] = []

    def __call__(self, reply: Reply | SwarmError, frames: list[memoryview]) -> None:
        self.got.append((reply, [bytes(frame) for frame in frames]))


async def test_begun_requests_end_with_a_reply_or_an_error(peers: Peers) -> None:
    later = Later()
    server, address = await peers.endpoint(begin=later)
    link, ends = peers.link(address), Ends()
    link.begin(Ping(3), [b"a"], ends, timeout_s=DEADLINE_S)
    assert not ends.got, "never before `begin` has returned"
    await until(lambda: len(ends.got) == 1, "the reply")
    assert ends.got.pop() == (Pong(), [b"a", b"xxx"])
    link.begin(MANIFEST, [], ends, timeout_s=DEADLINE_S)
    await until(lambda: len(later.waiting) == 1, "it is there")
    later.waiting.pop().send(Failure("queue_full", "too much", 2.5))
    await until(lambda: len(ends.got) == 1, "the failure")
    error = ends.got.pop()[0]
    assert isinstance(error, QueueFull) and error.retry_after == 2.5
    link.begin(MANIFEST, [], ends, timeout_s=0.05)
    await until(lambda: len(ends.got) == 1, "the time-out")
    assert isinstance(ends.got.pop()[0], PeerTimeout)
    link.begin(MANIFEST, [], ends, timeout_s=DEADLINE_S)
    await server.aclose()
    await until(lambda: len(ends.got) == 1, "the loss")
    assert isinstance(ends.got.pop()[0], PeerLost)
    with pytest.raises(PeerLost):
        link.begin(MANIFEST, [], ends, timeout_s=DEADLINE_S)
    assert not ends.got and not link._inboxes


async def test_an_end_that_raises_does_not_keep_others_from_theirs(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    _, address = await peers.endpoint()
    link = peers.link(address)

    def fail(_reply: Reply | SwarmError, _frames: list[memoryview]) -> None:
        raise ZeroDivisionError

    link.begin(Ping(0), [], fail, timeout_s=DEADLINE_S)
    await ping(link)
    assert "could not be taken" in caplog.text
