"""The server side of a node: a ROUTER for requests of its peers and a PUB for its gossip, both under CURVE.

The node's own key pair is the server key of both sockets, so who connects knows whom it talks to. ZAP admits clients
that prove the member key of the swarm, and nobody else: of a stranger not one message is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import zmq
import zmq.asyncio
from zmq.utils import z85

from swarmcpp.core import Clock
from swarmcpp.errors import BadConfig, PeerLost, PortInUse, QueueFull, SwarmError, WireError
from swarmcpp.swarm.identity import KeyPair
from swarmcpp.wire.peers import MAX_FRAMES, MAX_MESSAGE, PROTOCOL, Ask, Cancel, Failure, Gossip, Reply, decode, encode

logger = logging.getLogger(__name__)

ID_BYTES: Final = 8
"""Of a request's id, the first frame of requests and replies."""

CURVE_OVERHEAD: Final = 64
"""Bytes by which CURVE may lengthen a frame (33 now): ZeroMQ compares what is on the wire with its size limit."""

HEARTBEAT_IVL_MS: Final = 1000
HEARTBEAT_TIMEOUT_MS: Final = 30_000
"""Long, because an answer waits behind the frame that is being sent: 8 MB take 13 s at 5 Mbit/s. It ends links to
processes that are stopped; links to machines that are gone end by UNACKED_MS."""

UNACKED_MS: Final = 5000
"""Something is under way at least every heartbeat; a peer whose TCP acknowledges nothing for so long is gone."""

HANDSHAKE_IVL_MS: Final = 5000
FAIRNESS: Final = 16
"""Messages in a row. Awaiting a message that is already there does not yield, and a flood must not stop the loop."""

_ZAP_DOMAIN = b"swarm"
_SEND_QUEUE = 1000
_NEWS_QUEUE = 512
_SUBSCRIPTION_BYTES = 4096
_BACKLOG = 512
_PORT_TRIES = 16
_LOG_EVERY_S = 10.0
_LINGER_MS = 500
"""Enough for the last news, that this node leaves, on a link that works."""

_MANY_ASKERS = 1024
"""From here on those that are idle are looked for: one that left with replies unread is not noticed otherwise."""

_TEXT = 1000
"""Characters of a Failure's message."""


@dataclass(frozen=True, slots=True)
class AskLimits:
    """Bounds of what peers can make an endpoint hold."""

    tasks: int = 1024
    tasks_per_asker: int = 256
    """As many as an honest link has under way: a pass that is refused fails all requests in it."""
    frame_bytes: int = MAX_MESSAGE
    """Of a request's frame; a longer one ends the connection."""
    payload_per_asker: int = 256 << 20
    """Bytes beside requests under way: 16 passes of 512 rows of 8,192 floats."""
    payload: int = 1 << 30
    unread_per_asker: int = 256 << 20
    """Payload bytes that are sent and have not left this node."""
    unread: int = 1 << 30


class Responder:
    """Replies to one request. Used on the event loop's thread."""

    def __init__(
        self,
        send: Callable[[bytes, bytes, Reply, Sequence[Any]], None],
        asker: bytes,
        request: bytes,
        on_reply: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_reply = on_reply
        self._send = send
        self._asker = asker
        self._request = request

    def send(self, reply: Reply, payload: Sequence[bytes | memoryview] = ()) -> None:
        """Queue a reply with its raw frames, which must not be changed any more.

        Raises PeerLost when the asker is gone or does not read, WireError when the reply is over a limit.
        """
        self._on_reply()
        self._send(self._asker, self._request, reply, payload)


Handler = Callable[[Ask, list[memoryview], Responder], Awaitable[None]]
"""Answers one request, in a task of its own: cancelled when the asker cancels. What it raises becomes a Failure."""

Beginner = Callable[[Ask, list[memoryview], Responder], bool]
"""Takes a request that needs no task, if it is one; whether it was. It replies once, then or later, and raises nothing.
A cancel does not end it."""


@dataclass(slots=True)
class _Asker:
    tasks: dict[bytes, asyncio.Task[None] | None] = field(default_factory=dict)
    """By request; None for one without a task."""
    payload: int = 0
    unread: deque[tuple[zmq.MessageTracker, int]] = field(default_factory=deque)

    def unread_bytes(self) -> int:
        """Bytes that ZeroMQ still holds for this asker. It sends in order, so the first to be freed is the first."""
        while self.unread and self.unread[0][0].done:
            self.unread.popleft()
        return sum(size for _, size in self.unread)

    @property
    def idle(self) -> bool:
        """Nothing is under way for it."""
        return not self.tasks and not self.unread_bytes()


async def received(socket: Any, *, copy: bool = True) -> AsyncIterator[list[Any]]:
    """The messages of a socket as they come, for ever; see FAIRNESS."""
    for count in itertools.count(1):
        yield await socket.recv_multipart(copy=copy)
        if count % FAIRNESS == 0:
            await asyncio.sleep(0)


def secure(socket: Any, keys: KeyPair, frame_bytes: int) -> None:
    """What holds for every socket of the swarm, on both sides: who it is, and the longest frame that it takes."""
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()
    socket.maxmsgsize = frame_bytes + CURVE_OVERHEAD
    socket.ipv6 = True
    socket.linger = 0
    socket.handshake_ivl = HANDSHAKE_IVL_MS
    socket.heartbeat_ivl = HEARTBEAT_IVL_MS
    socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    socket.setsockopt(zmq.TCP_MAXRT, UNACKED_MS)


def tcp(host: str, port: int) -> str:
    """ZeroMQ's name of an address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class Endpoint:
    """A node's listening sockets. Every method runs on the event loop of `listen`."""

    def __init__(
        self,
        keys: KeyPair,
        member_public: str,
        handler: Handler,
        *,
        begin: Beginner = lambda _ask, _payload, _respond: False,
        limits: AskLimits | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._keys = keys
        self._begin = begin
        self._member = z85.decode(member_public.encode())
        self._handler = handler
        self._limits = limits or AskLimits()
        self._clock = clock
        # ZAP is found by a name within its context: one context for each endpoint.
        self._context = zmq.asyncio.Context(io_threads=1)
        self._zap: Any = None
        self._router: Any = None
        self._pub: Any = None
        self._loops: list[asyncio.Task[None]] = []
        self._askers: dict[bytes, _Asker] = {}
        self._n_tasks = 0
        self._payload = 0
        self._logged = -_LOG_EVERY_S
        self._closed = False
        self.port = 0
        self.pub_port = 0
        self.bad_messages = 0
        """Messages that were none, so far."""

    async def listen(self, hosts: Sequence[str], port: int) -> None:
        """Listen on every host at one port (0: any that is free), and publish at the next one or any.

        Raises PortInUse, and BadConfig for a host that is none of this machine.
        """
        self._zap = self._context.socket(zmq.REP)
        # Before the others: a socket with a ZAP domain and no handler refuses everybody.
        self._zap.bind("inproc://zeromq.zap.01")
        self._router = self._server(zmq.ROUTER, self._limits.frame_bytes, _SEND_QUEUE)
        self._router.router_mandatory = True
        self._pub = self._server(zmq.PUB, _SUBSCRIPTION_BYTES, _NEWS_QUEUE)
        self.port = _bind(self._router, hosts, port)
        try:
            self.pub_port = _bind(self._pub, hosts, self.port + 1 if self.port < 65535 else 0)
        except PortInUse:
            self.pub_port = _bind(self._pub, hosts, 0)
        for work in (self._admit(), self._receive()):
            self._loops.append(asyncio.create_task(work))

    def _server(self, kind: int, frame_bytes: int, queue: int) -> Any:
        socket = self._context.socket(kind)
        secure(socket, self._keys, frame_bytes)
        socket.curve_server = True
        socket.zap_domain = _ZAP_DOMAIN
        # Without this a ZAP handler that is gone would admit everybody.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.sndhwm = socket.rcvhwm = queue
        socket.backlog = _BACKLOG
        return socket

    def publish(self, gossip: Gossip) -> None:
        """Send news to all who listen; those who are too slow lose it. Raises WireError when it is too long."""
        if self._pub is not None and not self._closed:
            self._pub.send(encode(gossip), zmq.NOBLOCK)

    async def aclose(self) -> None:
        """Cancel what is being answered and close the sockets; takes half a second at most."""
        if self._closed:
            return
        self._closed = True
        tasks = [*self._loops, *(task for asker in self._askers.values() for task in asker.tasks.values() if task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for socket, linger in ((self._zap, 0), (self._router, 0), (self._pub, _LINGER_MS)):
            if socket is not None:
                socket.close(linger=linger)
        # It blocks for as long as the news linger.
        await asyncio.to_thread(self._context.term)

    # -- admission -----------------------------------------------------------------------------------------------

    async def _admit(self) -> None:
        """Answer ZAP requests (RFC 27); they come from this process's own ZeroMQ."""
        async for version, request, domain, _address, _identity, mechanism, *credentials in received(self._zap):
            known = (domain, mechanism, credentials) == (_ZAP_DOMAIN, b"CURVE", [self._member])
            status = (b"200", b"OK") if known else (b"400", b"the key is not accepted")
            await self._zap.send_multipart([version, request, *status, b"", b""])

    # -- requests ------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        async for asker, *frames in received(self._router, copy=False):
            try:
                self._accept(asker.bytes, frames)
            except WireError as error:
                self._drop(error)
            except PeerLost:
                # It did not wait for the reply that it is refused.
                pass
            except Exception:
                logger.exception("a request could not be taken")

    def _drop(self, error: WireError) -> None:
        self.bad_messages += 1
        if self._clock() - self._logged >= _LOG_EVERY_S:
            self._logged = self._clock()
            logger.warning("a peer sent what is no request (%d so far): %s", self.bad_messages, error)

    def _accept(self, asker: bytes, frames: list[zmq.Frame]) -> None:
        """Start the task of one request. Raises WireError when it is none, PeerLost when a refusal cannot be sent."""
        if not 2 <= len(frames) <= MAX_FRAMES + 2 or len(frames[0]) != ID_BYTES:
            raise WireError(f"{len(frames)} frames are no request")
        request = frames[0].bytes
        try:
            message = decode(frames[1].bytes)
        except WireError as error:
            if len(frames[1]) and frames[1].buffer[0] != PROTOCOL:
                self._send(asker, request, Failure(error.code, str(error)))
            raise
        known = self._askers.get(asker)
        if isinstance(message, Cancel):
            if known and request in known.tasks:
                task = known.tasks[request]
                if task:
                    task.cancel()
                else:
                    # It goes on, but its asker may have another instead. What came beside it counts until the reply.
                    del known.tasks[request]
                    self._n_tasks -= 1
            return
        if not isinstance(message, Ask):
            raise WireError(f"a {type(message).__name__} is no request")
        if known and request in known.tasks:
            raise WireError("the id of a request is in use")
        size = sum(len(frame) for frame in frames[2:])
        if self._is_full(known or _Asker(), size):
            full = "too many requests are under way at this node; try again later"
            self._send(asker, request, Failure(QueueFull.code, full, 1.0))
            return
        self._start(asker, request, message, [frame.buffer for frame in frames[2:]], size)

    def _is_full(self, known: _Asker, size: int) -> bool:
        limits = self._limits
        return (
            self._n_tasks >= limits.tasks
            or len(known.tasks) >= limits.tasks_per_asker
            or self._payload + size > limits.payload
            or known.payload + size > limits.payload_per_asker
        )

    def _start(self, asker: bytes, request: bytes, message: Ask, payload: list[memoryview], size: int) -> None:
        if len(self._askers) >= _MANY_ASKERS:
            for idle in [each for each, known in self._askers.items() if known.idle]:
                del self._askers[idle]
        known = self._askers.setdefault(asker, _Asker())
        known.tasks[request] = None
        self._n_tasks += 1
        self._payload += size
        known.payload += size

        over = False

        def end(_: object = None) -> None:
            nonlocal over
            if over:
                return
            over = True
            self._payload -= size
            known.payload -= size
            if request in known.tasks:
                del known.tasks[request]
                self._n_tasks -= 1
            if known.idle and self._askers.get(asker) is known:
                del self._askers[asker]

        if self._begin(message, payload, Responder(self._send, asker, request, end)):
            return
        task = known.tasks[request] = asyncio.create_task(
            self._answer(message, payload, Responder(self._send, asker, request))
        )
        task.add_done_callback(end)

    async def _answer(self, message: Ask, payload: list[memoryview], responder: Responder) -> None:
        try:
            await self._handler(message, payload, responder)
        except SwarmError as error:
            failure = Failure(error.code, _line(str(error)), getattr(error, "retry_after", 0.0))
        except Exception:
            logger.exception("a %s could not be answered", type(message).__name__)
            failure = Failure(SwarmError.code, "the peer failed to answer; its log says why")
        else:
            return
        # Nobody is there to be told when the asker itself is what was lost.
        with contextlib.suppress(PeerLost):
            responder.send(failure)

    def _send(self, asker: bytes, request: bytes, reply: Reply, payload: Sequence[bytes | memoryview] = ()) -> None:
        if len(payload) > MAX_FRAMES:
            raise WireError(f"{len(payload)} frames beside a reply exceed the limit of {MAX_FRAMES}")
        if self._closed:
            raise PeerLost("this node's swarm port is closed")
        size = sum(memoryview(frame).nbytes for frame in payload)
        known = self._askers.get(asker)
        if known and size:
            total = sum(each.unread_bytes() for each in self._askers.values())
            if known.unread_bytes() + size > self._limits.unread_per_asker or total + size > self._limits.unread:
                raise PeerLost("the asker does not read its replies")
        beside = [zmq.Frame(frame, copy=False, track=True) for frame in payload]
        sent = self._router.send_multipart([asker, request, encode(reply), *beside], zmq.NOBLOCK, copy=False)
        # The future is done at once: NOBLOCK forbids queueing in pyzmq.
        if error := sent.exception():
            reason = "does not read its replies" if isinstance(error, zmq.Again) else "is gone"
            raise PeerLost(f"the asker {reason}") from error
        if known:
            known.unread.extend((frame.tracker, len(frame)) for frame in beside if frame.tracker is not None)


def _line(text: str) -> str:
    # A lone surrogate (part of a file name, say) cannot be sent.
    return text.encode("utf-8", "replace").decode()[:_TEXT]


def _bind(socket: Any, hosts: Sequence[str], port: int) -> int:
    """Bind to one port on all hosts; the port. Raises PortInUse and BadConfig, and then nothing is bound."""
    for last in range(1, _PORT_TRIES + 1):
        chosen = port
        bound: list[str] = []
        for host in hosts:
            try:
                socket.bind(tcp(host, chosen))
            except zmq.ZMQError as error:
                for address in bound:
                    socket.unbind(address)
                if error.errno != errno.EADDRINUSE:
                    raise BadConfig(
                        f"cannot listen on {host} port {chosen}: {error.strerror}; choose another address"
                    ) from error
                if port or last == _PORT_TRIES:
                    raise PortInUse(f"port {chosen} on {host} is in use; choose another with --swarm-port") from error
                break
            bound.append(socket.last_endpoint.decode())
            chosen = chosen or int(bound[0].rpartition(":")[2])
        else:
            return chosen
    raise PortInUse("no port is free on all addresses")
