"""The client side of a link: requests to one peer and its news. Satisfies `Caller`.

Every connection has a DEALER socket of its own. ZeroMQ would reconnect by itself after most failures, but for ever
gives up after a refused key or a protocol error; and what was queued for a dead connection must not reach the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import zmq
import zmq.asyncio

from swarmcpp.errors import PeerLost, PeerTimeout, QueueFull, SwarmError, WireError, revive
from swarmcpp.peers import Address
from swarmcpp.swarm.endpoint import ID_BYTES, received, secure, tcp
from swarmcpp.swarm.identity import KeyPair, node_id
from swarmcpp.wire.peers import (
    MAX_FRAMES,
    MAX_MESSAGE,
    MAX_PAYLOAD,
    Ask,
    AskDone,
    Cancel,
    Failure,
    Gossip,
    KeepAlive,
    Part,
    Reply,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

MAX_OUTSTANDING: Final = 256
MAX_BUFFERED: Final = 1024
"""Replies of one stream that nobody has taken yet."""

MAX_BUFFERED_BYTES: Final = 16 << 20
RECONNECT_S: Final = (0.1, 2.0)
"""The first pause before a new connection, doubled up to the last."""

CONNECT_S: Final = 6.0
"""From dialling to the end of the handshake; the handshake alone has 5 s."""

_MAX_RETRY_AFTER_S = 3600.0
_SEND_QUEUE = 1000
_RECEIVE_QUEUE = 64
_NEWS_QUEUE = 1000
_EVENT = struct.Struct("=Hi")
_NO_KEY = "the swarm key is not accepted there"
_OTHER_NODE = "another node answers there, or something that is none"
_ENDS = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: _NO_KEY,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: _OTHER_NODE,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: _OTHER_NODE,
    zmq.EVENT_DISCONNECTED: "the connection broke",
    zmq.EVENT_CLOSED: "nobody listens there",
}
"""What a monitor event says about why a connection is over."""


@dataclass(slots=True)
class _Inbox:
    """What came for a stream: replies, then perhaps the error that ends it."""

    items: asyncio.Queue[tuple[Reply, int] | SwarmError] = field(default_factory=asyncio.Queue)
    n_bytes: int = 0

    async def take(self, timeout_s: float) -> Reply:
        """The next reply. Raises TimeoutError, or the error that ended the request, which may be a Failure."""
        async with asyncio.timeout(timeout_s):
            item = await self.items.get()
        if isinstance(item, SwarmError):
            raise item
        reply, size = item
        self.n_bytes -= size
        if isinstance(reply, Failure):
            raise _revived(reply)
        return reply


@dataclass(slots=True)
class _Call:
    """A request with one reply."""

    done: AskDone
    timer: asyncio.TimerHandle

    def end(self, reply: Reply | SwarmError, payload: list[memoryview]) -> None:
        """Give it its end."""
        self.timer.cancel()
        self.done(_revived(reply) if isinstance(reply, Failure) else reply, payload)


def _revived(failure: Failure) -> SwarmError:
    error = revive(failure.code, failure.message)
    if isinstance(error, QueueFull) and 0.0 < failure.retry_after <= _MAX_RETRY_AFTER_S:
        error.retry_after = failure.retry_after
    return error


class PeerLink:
    """One peer's requests and news, for as long as it is wanted; it connects again by itself.

    Used on the event loop's thread, where it must be made. `on_news` gets news of that very peer; `on_lost` is called
    when a connection that worked is over.
    """

    def __init__(
        self,
        address: Address,
        member: KeyPair,
        *,
        context: zmq.asyncio.Context,
        on_news: Callable[[Gossip], None],
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.address = address
        self.connected = False
        self.refusal = ""
        """Why the last handshake failed; empty when none did since one succeeded."""
        self._member = member
        self._context = context
        self._on_news = on_news
        self._on_lost = on_lost
        self._node = node_id(address.key)
        self._ids = itertools.count()
        self._inboxes: dict[bytes, _Inbox | _Call] = {}
        self._reason = ""
        self._sub: Any = None
        self._hearing: asyncio.Task[None] | None = None
        self._dealer: Any = None
        self._monitor: Any = None
        self._dial()
        self._keeping = asyncio.create_task(self._keep(), name=f"link {address}")

    # -- requests ------------------------------------------------------------------------------------------------

    async def ask(
        self, message: Ask, payload: Sequence[bytes | memoryview] = (), *, timeout_s: float
    ) -> tuple[Reply, list[memoryview]]:
        """See `Caller`. Between two connections it raises PeerLost at once."""
        future: asyncio.Future[tuple[Reply, list[memoryview]]] = asyncio.get_running_loop().create_future()

        def done(reply: Reply | SwarmError, frames: list[memoryview]) -> None:
            if future.done():
                return
            if isinstance(reply, SwarmError):
                future.set_exception(reply)
            else:
                future.set_result((reply, frames))

        request = self._call(message, payload, done, timeout_s)
        try:
            return await future
        finally:
            # Cancelled, perhaps.
            self._abandon(request)

    def begin(self, message: Ask, payload: Sequence[bytes | memoryview], done: AskDone, *, timeout_s: float) -> None:
        """See `Caller`."""
        self._call(message, payload, done, timeout_s)

    def _call(self, message: Ask, payload: Sequence[bytes | memoryview], done: AskDone, timeout_s: float) -> bytes:
        request = self._open(message, payload)
        timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, request, timeout_s)
        self._inboxes[request] = _Call(done, timer)
        return request

    def _expire(self, request: bytes, timeout_s: float) -> None:
        call = self._inboxes.get(request)
        if isinstance(call, _Call):
            self._close(request)
            call.end(PeerTimeout(f"{self.address} did not answer within {timeout_s:g} s"), [])

    def _abandon(self, request: bytes) -> None:
        """Nobody waits for the end of a call any more."""
        call = self._inboxes.get(request)
        if isinstance(call, _Call):
            call.timer.cancel()
            self._close(request)

    async def stream(self, message: Ask, *, silence_s: float) -> AsyncGenerator[Reply, None]:
        """See `Caller`. The last reply is the first that is neither KeepAlive nor a Part without `finish`."""
        request = self._open(message, ())
        inbox = self._inboxes[request] = _Inbox()
        try:
            while True:
                reply = await inbox.take(silence_s)
                if not _goes_on(reply):
                    self._inboxes.pop(request, None)
                    yield reply
                    return
                yield reply
        except TimeoutError:
            raise PeerTimeout(f"{self.address} was silent for {silence_s:g} s") from None
        finally:
            self._close(request)

    def _open(self, message: Ask, payload: Sequence[bytes | memoryview]) -> bytes:
        """Send a request; its id."""
        if len(self._inboxes) >= MAX_OUTSTANDING:
            raise QueueFull(f"{MAX_OUTSTANDING} requests to {self.address} are under way", retry_after=1.0)
        request = next(self._ids).to_bytes(ID_BYTES)
        self._send([request, encode(message), *payload])
        return request

    def _close(self, request: bytes) -> None:
        """Forget a request; if it has not ended, the peer is told."""
        if self._inboxes.pop(request, None) is not None:
            with contextlib.suppress(PeerLost):
                self._send([request, encode(Cancel())])

    def _send(self, frames: Sequence[bytes | memoryview]) -> None:
        if self._dealer is None:
            raise PeerLost(f"there is no link to {self.address}: {self._reason}")
        # The future is done at once: NOBLOCK forbids queueing in pyzmq.
        if error := self._dealer.send_multipart(frames, zmq.NOBLOCK, copy=False).exception():
            raise PeerLost(f"{self.address} does not read its requests") from error

    def _deliver(self, frames: list[zmq.Frame]) -> None:
        inbox = self._inboxes.get(request := frames[0].bytes)
        if inbox is None:
            return
        try:
            if not 2 <= len(frames) <= MAX_FRAMES + 2:
                raise WireError(f"{self.address} sent a reply of {len(frames)} frames")
            reply = decode(frames[1].bytes)
            if not isinstance(reply, Reply):
                raise WireError(f"{self.address} replied with a {type(reply).__name__}")
        except WireError as error:
            self._close(request)
            self._end(inbox, error)
            return
        if isinstance(inbox, _Call):
            del self._inboxes[request]
            self._end(inbox, reply, [frame.buffer for frame in frames[2:]])
            return
        size = sum(len(frame) for frame in frames)
        if inbox.items.qsize() >= MAX_BUFFERED or inbox.n_bytes + size > MAX_BUFFERED_BYTES:
            self._close(request)
            inbox.items.put_nowait(WireError(f"{self.address} sent more replies than could be taken"))
            return
        inbox.n_bytes += size
        # Nothing of a stream uses payload, and held frames would not be bounded by their messages.
        inbox.items.put_nowait((reply, size))
        if not _goes_on(reply):
            del self._inboxes[request]

    def _end(self, inbox: _Inbox | _Call, end: Reply | SwarmError, payload: list[memoryview] | None = None) -> None:
        if isinstance(inbox, _Inbox):
            assert isinstance(end, SwarmError)
            inbox.items.put_nowait(end)
            return
        try:
            inbox.end(end, payload or [])
        except Exception:
            # What comes for others must still be read.
            logger.exception("the end of a request to %s could not be taken", self.address)

    # -- connection ----------------------------------------------------------------------------------------------

    def _client(self, kind: int, frame_bytes: int, receive_queue: int) -> Any:
        socket = self._context.socket(kind)
        secure(socket, self._member, frame_bytes)
        socket.curve_serverkey = self.address.key.encode()
        socket.sndhwm, socket.rcvhwm = _SEND_QUEUE, receive_queue
        return socket

    def _dial(self) -> None:
        """Begin a connection; requests may be sent from now on. Without a socket afterwards, `_reason` says why."""
        self._reason = "nobody answers there"
        dealer = self._client(zmq.DEALER, max(MAX_MESSAGE, MAX_PAYLOAD), _RECEIVE_QUEUE)
        dealer.reconnect_ivl = -1
        self._dealer, self._monitor = dealer, dealer.get_monitor_socket()
        try:
            dealer.connect(tcp(self.address.host, self.address.port))
        except zmq.ZMQError as error:
            self._hang_up()
            self._reason = f"it cannot be dialled ({error.strerror})"

    def _hang_up(self) -> None:
        if self._dealer is not None:
            self._dealer.disable_monitor()
            self._monitor.close(linger=0)
            self._dealer.close(linger=0)
        self._dealer = self._monitor = None

    async def _keep(self) -> None:
        """Connect, again and again."""
        pause = RECONNECT_S[0]
        while True:
            worked = False
            try:
                worked = await self._connection()
            except Exception:
                logger.exception("the link to %s failed", self.address)
                self._reason = "it failed on this side"
            self._hang_up()
            self._fail_all()
            if worked:
                self._on_lost()
            await asyncio.sleep(pause)
            pause = RECONNECT_S[0] if worked else min(2 * pause, RECONNECT_S[1])
            self._dial()

    async def _connection(self) -> bool:
        """Live through one connection; whether it came about. Its end is explained in `_reason`."""
        reading: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(CONNECT_S) as deadline:
                while self._dealer is not None:
                    event, _ = _EVENT.unpack((await self._monitor.recv_multipart())[0])
                    if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                        deadline.reschedule(None)
                        self.connected, self.refusal = True, ""
                        reading = asyncio.create_task(self._read(self._dealer), name=f"replies of {self.address}")
                    elif event in _ENDS:
                        self._reason = _ENDS[event]
                        if self._reason in (_NO_KEY, _OTHER_NODE):
                            self.refusal = self._reason
                        break
        except TimeoutError:
            pass
        finally:
            self.connected = False
            if reading:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
                self._drain(self._dealer)
        return reading is not None

    async def _read(self, dealer: Any) -> None:
        try:
            async for frames in received(dealer, copy=False):
                self._deliver(frames)
        except Exception:
            logger.exception("replies of %s cannot be read", self.address)

    def _drain(self, dealer: Any) -> None:
        """Deliver what had come before the connection broke."""
        for _ in range(_RECEIVE_QUEUE):
            got = dealer.recv_multipart(zmq.NOBLOCK, copy=False)
            if got.exception():
                return
            self._deliver(got.result())

    def _fail_all(self) -> None:
        inboxes, self._inboxes = self._inboxes, {}
        for inbox in inboxes.values():
            self._end(inbox, PeerLost(f"{self.address} is lost: {self._reason}"))

    async def aclose(self) -> None:
        """End the link; every request under way fails as PeerLost."""
        self._reason = "the link was closed"
        tasks = [task for task in (self._keeping, self._hearing) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._reason = "the link was closed"
        self._hang_up()
        if self._sub is not None:
            self._sub.close(linger=0)
        self._sub = None
        self._fail_all()

    # -- news ----------------------------------------------------------------------------------------------------

    def subscribe(self, pub_port: int) -> None:
        """Hear the peer's news from that port, and no more from an earlier one. Raises WireError when it is none."""
        if not 0 < pub_port < 65536:
            raise WireError(f"{self.address} says that its news are at port {pub_port}, which is none")
        if self._hearing:
            self._hearing.cancel()
        if self._sub is not None:
            self._sub.close(linger=0)
        self._sub = self._client(zmq.SUB, MAX_MESSAGE, _NEWS_QUEUE)
        self._sub.reconnect_ivl, self._sub.reconnect_ivl_max = (int(1000 * s) for s in RECONNECT_S)
        self._sub.subscribe(b"")
        self._sub.connect(tcp(self.address.host, pub_port))
        self._hearing = asyncio.create_task(self._hear(self._sub), name=f"news of {self.address}")

    async def _hear(self, sub: Any) -> None:
        try:
            async for frames in received(sub):
                with contextlib.suppress(WireError):
                    news = decode(frames[0])
                    if len(frames) == 1 and isinstance(news, Gossip) and news.node == self._node:
                        self._on_news(news)
        except Exception:
            logger.exception("news of %s cannot be heard", self.address)


def _goes_on(reply: Reply) -> bool:
    return isinstance(reply, KeepAlive) or (isinstance(reply, Part) and reply.part.finish is None)
