"""Node and engine link over real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_support import part_of

from swarmcpp.core import EngineStats
from swarmcpp.errors import EngineFailed, WireError
from swarmcpp.supervisor import framing as module
from swarmcpp.supervisor import nodelink, workerlink
from swarmcpp.supervisor.nodelink import NodeLink
from swarmcpp.supervisor.workerlink import WorkerLink
from swarmcpp.wire.engine import MAX_FRAME, MAX_TENSOR, Cancel, Fault, LoadProgress, StepOut, Stop, TokenOut, encode

DEADLINE_S = 60.0


class Node:
    """A node's end with what it has received."""

    def __init__(self) -> None:
        self.link = NodeLink()
        self.got: asyncio.Queue[tuple[Any, bytes | None]] = asyncio.Queue()
        self.link.start(lambda message, frame: self.got.put_nowait((message, frame)))
        self.ticket, self.send, self.close = self.link.ticket, self.link.send, self.link.close

    async def receive_both(self) -> tuple[Any, bytes | None]:
        return await asyncio.wait_for(self.got.get(), DEADLINE_S)

    async def receive(self) -> Any:
        return (await self.receive_both())[0]

    async def end(self) -> Exception | None:
        """Why no message comes any more."""
        await asyncio.wait({self.link.ended}, timeout=DEADLINE_S)
        error = self.link.ended.exception()
        assert error is None or isinstance(error, Exception)
        return error


def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a platform without Unix sockets."""
    monkeypatch.setattr(NodeLink, "_unix_path", lambda _: None)


@pytest.fixture(params=["unix", "tcp"])
async def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    if request.param == "tcp":
        over_tcp(monkeypatch)
    elif not hasattr(socket, "AF_UNIX"):
        pytest.skip("no Unix sockets here")
    node = Node()
    assert node.ticket["endpoint"].startswith(request.param)
    yield node
    node.close()


@contextmanager
def connected(node: Node) -> Iterator[WorkerLink]:
    worker = WorkerLink(node.ticket)
    try:
        yield worker
    finally:
        # Its node's loop is this thread's.
        worker.close(linger_s=0)


async def greet(node: Node, worker: WorkerLink) -> None:
    """After the engine's first message the node can send."""
    worker.send(LoadProgress(0.0))
    assert await node.receive() == LoadProgress(0.0)


async def heard(worker: WorkerLink, timeout_s: float = DEADLINE_S) -> Any:
    """The engine's next message; the node's loop runs meanwhile."""
    return await asyncio.to_thread(worker.receive, timeout_s)


async def test_messages_go_both_ways_in_order(node: Node) -> None:
    with connected(node) as worker:
        await greet(node, worker)
        for serial in range(500):
            node.send(Cancel(serial))
        for serial in range(500):
            assert await heard(worker) == Cancel(serial)
        steps = [StepOut((TokenOut(1, part_of((token,))),), EngineStats(1, 1, 0)) for token in range(500)]

        def send_all() -> None:
            for step in steps:
                worker.send(step)

        sending = asyncio.create_task(asyncio.to_thread(send_all))
        for step in steps:
            assert await node.receive() == step
        await sending


async def test_the_engine_can_watch_instead_of_sleeping(node: Node) -> None:
    with connected(node) as worker:
        await greet(node, worker)
        assert await asyncio.to_thread(worker.receive, 0.0, 0.01) is None
        waiting = asyncio.create_task(asyncio.to_thread(worker.receive, 0.0, DEADLINE_S))
        await asyncio.sleep(0)
        node.send(Cancel(1))
        assert await waiting == Cancel(1)
        node.close()
        assert await asyncio.to_thread(worker.receive, DEADLINE_S, DEADLINE_S) == Stop()


async def test_a_large_message_passes(node: Node) -> None:
    with connected(node) as worker:
        await greet(node, worker)
        fault = Fault("x", "y" * (MAX_FRAME - 100))
        sending = asyncio.create_task(asyncio.to_thread(worker.send, fault))
        assert await node.receive() == fault
        await sending


async def test_a_frame_travels_beside_its_message(node: Node) -> None:
    with connected(node) as worker:
        await greet(node, worker)
        rows = bytes(range(256)) * (MAX_TENSOR // 256)
        node.send(Cancel(1), memoryview(rows))
        node.send(Cancel(2), b"")
        node.send(Cancel(3))
        for serial, frame in ((1, rows), (2, b""), (3, None)):
            assert await heard(worker) == Cancel(serial)
            assert worker.frame == frame
        sending = asyncio.create_task(asyncio.to_thread(worker.send, LoadProgress(0.5), bytearray(rows)))
        assert await node.receive_both() == (LoadProgress(0.5), rows)
        await sending
        worker.send(LoadProgress(0.7), b"")
        worker.send(LoadProgress(1.0))
        assert await node.receive_both() == (LoadProgress(0.7), b"")
        assert await node.receive_both() == (LoadProgress(1.0), None)


async def test_a_frame_that_came_is_copied_once_more() -> None:
    link = NodeLink()
    got: list[tuple[object, bytes | None]] = []
    link.start(lambda message, frame: got.append((message, frame)))
    stream, frame, message = nodelink._Stream(link), bytes(8 << 20), encode(Cancel(1))
    stream._admitted = True
    data = b"".join((module.HEADER.pack(len(message), len(frame)), message, frame))
    tracemalloc.start()
    stream.data_received(data)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    link.close()
    assert got == [(Cancel(1), frame)] and not stream._buffer
    assert most < 2.5 * len(frame), "the buffer, and the frame"


async def test_a_longer_frame_is_refused_before_it_is_sent(node: Node) -> None:
    with connected(node) as worker:
        await greet(node, worker)
        for send in (lambda frame: node.send(Stop(), frame), lambda frame: worker.send(LoadProgress(0.1), frame)):
            with pytest.raises(WireError, match=f"{MAX_TENSOR + 1} bytes beside a message"):
                send(bytes(MAX_TENSOR + 1))
        worker.send(LoadProgress(1.0))
        assert await node.receive() == LoadProgress(1.0)


@pytest.mark.parametrize("header", [(MAX_FRAME + 1, 0), (1, MAX_TENSOR + 1)])
async def test_a_length_over_the_limit_ends_the_link_before_its_bytes_are_kept(
    node: Node, header: tuple[int, int]
) -> None:
    with connected(node) as worker:
        await greet(node, worker)
        worker._socket.sendall(module.HEADER.pack(*header))
        error = await node.end()
        assert isinstance(error, WireError) and str(max(header)) in str(error)
        assert node.link._transport is not None
        node.link._transport.write(module.HEADER.pack(*header))
        with pytest.raises(WireError, match=str(max(header))):
            await heard(worker)


async def test_an_empty_inbox_is_none(node: Node) -> None:
    with connected(node) as worker:
        assert worker.receive(0.0) is None
        assert worker.receive(0.01) is None


async def test_a_waiting_engine_wakes_for_a_message(node: Node) -> None:
    got: list[Any] = []
    with connected(node) as worker:
        await greet(node, worker)
        thread = threading.Thread(target=lambda: got.append(worker.receive(DEADLINE_S)))
        thread.start()
        node.send(Stop())
        await asyncio.to_thread(thread.join, DEADLINE_S)
    assert got == [Stop()]


async def test_a_message_that_comes_in_pieces_is_put_together(node: Node) -> None:
    with connected(node) as worker:
        await greet(node, worker)
        message = encode(Fault("x", "y" * 100))
        data = module.HEADER.pack(len(message), 3) + message + b"abc"
        for byte in data:
            worker._socket.sendall(bytes((byte,)))
            await asyncio.sleep(0)
        assert await node.receive_both() == (Fault("x", "y" * 100), b"abc")
        assert node.link._transport is not None
        message = encode(Cancel(7))
        waiting = asyncio.create_task(heard(worker))
        for piece in (module.HEADER.pack(len(message), 2), message[:1], message[1:] + b"d", b"e"):
            node.link._transport.write(piece)
            await asyncio.sleep(0.01)
        assert await waiting == Cancel(7)
        assert worker.frame == b"de"


async def test_what_is_no_message_ends_the_link_and_nothing_after_it_is_taken(node: Node) -> None:
    """A node ends such an engine; an engine ends with the error."""
    with connected(node) as worker:
        await greet(node, worker)
        for data in (b"rubbish", encode(LoadProgress(1.0))):
            worker._socket.sendall(module.HEADER.pack(len(data), module._NO_FRAME) + data)
        assert isinstance(await node.end(), WireError)
        assert node.got.empty()
        assert node.link._transport is not None
        node.link._transport.write(module.HEADER.pack(7, module._NO_FRAME) + b"rubbish")
        node.send(Stop())
        with pytest.raises(WireError):
            await heard(worker)
        assert await heard(worker) == Stop()


async def test_an_error_of_whoever_takes_messages_ends_the_link() -> None:
    link = NodeLink()

    def refuse(message: object, _frame: object) -> None:
        raise WireError(f"{message} makes no sense")

    link.start(refuse)
    worker = WorkerLink(link.ticket)
    worker.send(LoadProgress(0.25))
    await asyncio.wait({link.ended}, timeout=DEADLINE_S)
    assert "0.25" in str(link.ended.exception())
    worker.close(linger_s=0)
    link.close()


async def test_sending_to_nobody_fails_at_once(node: Node) -> None:
    with pytest.raises(EngineFailed, match="does not read"):
        node.send(Stop())


async def test_an_engine_that_stops_reading_is_noticed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is bounded: sends fail instead of filling the memory."""
    monkeypatch.setattr(nodelink, "MAX_UNSENT", 4 << 20)
    with connected(node) as worker:
        await greet(node, worker)
        fault = Fault("x", "y" * 60_000)
        with pytest.raises(EngineFailed):
            for _ in range(1000):
                node.send(fault)  # type: ignore[arg-type]


async def test_what_was_sent_before_closing_arrives(node: Node) -> None:
    """An engine's last words: it reports a fault, closes and exits."""
    with connected(node) as worker:
        worker.send(Fault("bad_model", "no such file"))
    assert await node.receive() == Fault("bad_model", "no such file")
    assert await node.end() is None
    with pytest.raises(EngineFailed):
        node.send(Stop())


async def test_closing_the_node_leaves_nothing_behind(node: Node) -> None:
    other = Node()
    directory = Path(other.link._directory.name) if other.link._directory else None
    with connected(other) as worker:
        await greet(other, worker)
        other.close()
        assert await heard(worker) == Stop()
    assert directory is None or not directory.exists()


async def test_every_incarnation_has_its_own_endpoint_and_secret(node: Node) -> None:
    other = Node()
    try:
        assert other.ticket["endpoint"] != node.ticket["endpoint"]
        assert other.ticket["secret"] != node.ticket["secret"]
    finally:
        other.close()


async def test_without_the_secret_nothing_gets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TCP anybody on this machine can connect, so only who has the ticket is heard."""
    over_tcp(monkeypatch)
    node = Node()
    wrong = {**node.ticket, "secret": "00" * 32}
    strangers = [WorkerLink(wrong), socket.create_connection(("127.0.0.1", int(node.ticket["endpoint"][4:])))]
    try:
        strangers[0].send(Fault("x", "let me in"))  # type: ignore[union-attr]
        with connected(node) as worker:
            worker.send(LoadProgress(0.5))
            assert await node.receive() == LoadProgress(0.5)
            assert await heard(strangers[0]) == Stop()  # type: ignore[arg-type]
            assert node.got.empty()
            assert await asyncio.to_thread(strangers[1].recv, 1) == b"", "one that says nothing is sent away, too"  # type: ignore[union-attr]
            # Nobody else is let in once the engine is there.
            with pytest.raises(ConnectionRefusedError):
                WorkerLink(node.ticket)
    finally:
        strangers[0].close(linger_s=0)  # type: ignore[call-arg]
        strangers[1].close()
        node.close()


async def test_last_words_arrive_though_the_node_writes_meanwhile(node: Node) -> None:
    """A Run that crosses the Fault of an engine must not cost the Fault."""
    worker = WorkerLink(node.ticket)
    await greet(node, worker)
    worker.send(Fault("decode_failed", "no more"))
    closing = threading.Thread(target=worker.close)
    closing.start()
    # Until it has said its last; this thread's loop has read nothing of it yet.
    while worker._socket.fileno() >= 0 and worker._socket.gettimeout() != workerlink.LINGER_S:
        closing.join(0.001)
    node.send(Cancel(1), bytes(1 << 20))
    node.send(Cancel(2))
    assert await node.receive() == Fault("decode_failed", "no more")
    assert await node.end() is None
    await asyncio.to_thread(closing.join, DEADLINE_S)


async def test_a_connection_that_fails_does_not_keep_the_engine_out(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    accept, failures = loop.sock_accept, 2

    async def flaky(listener: socket.socket) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError("no file is free")
        return await accept(listener)

    monkeypatch.setattr(loop, "sock_accept", flaky)
    node = Node()
    with connected(node) as worker:
        await greet(node, worker)
    node.close()
    assert not failures
