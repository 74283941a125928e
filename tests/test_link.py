"""Node and engine link over real sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from swarmcpp.core import EngineStats
from swarmcpp.errors import EngineFailed, WireError
from swarmcpp.swarm import link as module
from swarmcpp.swarm.link import NodeLink, WorkerLink
from swarmcpp.wire import MAX_FRAME, MAX_TENSOR, Cancel, Fault, LoadProgress, StepOut, Stop, TokenOut, encode

DEADLINE_S = 10.0


@pytest.fixture(params=["ipc", "curve"])
async def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NodeLink]:
    """The node's end, over a Unix socket and as on a platform without them."""
    if request.param == "curve":
        monkeypatch.setattr(module.zmq, "has", lambda capability: False)
    elif not zmq.has("ipc"):
        pytest.skip("no Unix sockets here")
    link = NodeLink()
    yield link
    link.close()


@contextmanager
def connected(node: NodeLink) -> Iterator[WorkerLink]:
    worker = WorkerLink(node.ticket)
    try:
        yield worker
    finally:
        worker.close()


async def receive(node: NodeLink) -> Any:
    return await asyncio.wait_for(node.receive(), DEADLINE_S)


async def greet(node: NodeLink, worker: WorkerLink) -> None:
    """After the engine's first message the node can send."""
    worker.send(LoadProgress(0.0))
    assert await receive(node) == LoadProgress(0.0)


async def test_messages_go_both_ways_in_order(node: NodeLink) -> None:
    with connected(node) as worker:
        await greet(node, worker)
        for serial in range(500):
            node.send(Cancel(serial))
        for serial in range(500):
            assert worker.receive(DEADLINE_S) == Cancel(serial)
        steps = [StepOut((TokenOut(1, token),), EngineStats(1, 1, 0)) for token in range(500)]
        for step in steps:
            worker.send(step)
        for step in steps:
            assert await receive(node) == step


async def test_a_large_message_passes(node: NodeLink) -> None:
    with connected(node) as worker:
        fault = Fault("x", "y" * (MAX_FRAME - 100))
        worker.send(fault)
        assert await receive(node) == fault


async def test_a_frame_travels_beside_its_message(node: NodeLink) -> None:
    with connected(node) as worker:
        await greet(node, worker)
        rows = bytes(range(256)) * (MAX_TENSOR // 256)
        node.send(Cancel(1), memoryview(rows))
        node.send(Cancel(2), b"")
        node.send(Cancel(3))
        for serial, frame in ((1, rows), (2, b""), (3, None)):
            assert worker.receive(DEADLINE_S) == Cancel(serial)
            assert worker.frame == frame
        worker.send(LoadProgress(0.5), bytearray(rows))
        worker.send(LoadProgress(1.0))
        for fraction, frame in ((0.5, rows), (1.0, None)):
            assert await receive(node) == LoadProgress(fraction)
            assert node.frame == frame


async def test_one_frame_of_its_limit_is_the_most(node: NodeLink) -> None:
    with connected(node) as worker:
        await greet(node, worker)
        for send in (lambda frame: node.send(Stop(), frame), lambda frame: worker.send(LoadProgress(0.1), frame)):
            with pytest.raises(WireError, match=f"{MAX_TENSOR + 1} bytes beside a message"):
                send(bytes(MAX_TENSOR + 1))
        worker._socket.send_multipart([encode(LoadProgress(0.2))] * 3)
        with pytest.raises(WireError, match="3 frames"):
            await receive(node)
        worker.send(LoadProgress(1.0))
        assert await receive(node) == LoadProgress(1.0)


async def test_an_empty_inbox_is_none(node: NodeLink) -> None:
    with connected(node) as worker:
        assert worker.receive(0.0) is None
        assert worker.receive(0.01) is None


async def test_a_waiting_engine_wakes_for_a_message(node: NodeLink) -> None:
    got: list[Any] = []
    with connected(node) as worker:
        await greet(node, worker)
        thread = threading.Thread(target=lambda: got.append(worker.receive(DEADLINE_S)))
        thread.start()
        node.send(Stop())
        await asyncio.to_thread(thread.join, DEADLINE_S)
    assert got == [Stop()]


async def test_a_bad_frame_is_a_wire_error_and_the_next_one_is_read(node: NodeLink) -> None:
    with connected(node) as worker:
        await greet(node, worker)
        worker._socket.send(b"rubbish")
        worker._socket.send(b"")
        worker.send(LoadProgress(1.0))
        for _ in range(2):
            with pytest.raises(WireError):
                await receive(node)
        assert await receive(node) == LoadProgress(1.0)
        await node._socket.send(b"rubbish")
        node.send(Stop())
        with pytest.raises(WireError):
            worker.receive(DEADLINE_S)
        assert worker.receive(DEADLINE_S) == Stop()


async def test_sending_to_nobody_fails_at_once(node: NodeLink) -> None:
    with pytest.raises(EngineFailed, match="does not read"):
        node.send(Stop())


async def test_an_engine_that_stops_reading_is_noticed(node: NodeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is bounded: sends fail instead of filling the memory."""
    with connected(node) as worker:
        await greet(node, worker)
        fault = Fault("x", "y" * 60_000)
        with pytest.raises(EngineFailed):
            for _ in range(100_000):
                node.send(fault)  # type: ignore[arg-type]


async def test_what_was_sent_before_closing_arrives(node: NodeLink) -> None:
    """An engine's last words: it reports a fault, closes and exits."""
    with connected(node) as worker:
        worker.send(Fault("bad_model", "no such file"))
    assert await receive(node) == Fault("bad_model", "no such file")


async def test_closing_the_node_leaves_nothing_behind(node: NodeLink) -> None:
    other = NodeLink()
    directory = Path(other._directory.name) if other._directory else None
    with connected(other) as worker:
        await greet(other, worker)
        other.close()
        assert worker.receive(0.05) is None
    assert directory is None or not directory.exists()


async def test_every_incarnation_has_its_own_endpoint(node: NodeLink) -> None:
    other = NodeLink()
    try:
        assert other.ticket["endpoint"] != node.ticket["endpoint"]
    finally:
        other.close()


@pytest.mark.skipif(not hasattr(zmq, "CURVE_SERVERKEY"), reason="needs CURVE")
async def test_without_the_key_nothing_gets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TCP anybody on this machine can connect, so only who has the ticket is heard."""
    monkeypatch.setattr(module.zmq, "has", lambda capability: False)
    node = NodeLink()
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.linger = 0
    try:
        stranger.connect(node.ticket["endpoint"])
        stranger.send(encode(Fault("x", "let me in")))
        with connected(node) as worker:
            worker.send(LoadProgress(0.5))
            assert await receive(node) == LoadProgress(0.5)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(node.receive(), 0.2)
    finally:
        stranger.close()
        context.term()
        node.close()
