"""The mesh: a node's links to all others of its swarm, and what it knows of them.

Every node dials every other one: its requests and subscriptions go out on its own links, so the news that it believes
comes from whom it dialled and who proved a key there. Addresses come from the join token, from mDNS, from peers that
say hello and from peers of peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from swarmcpp.core import Clock
from swarmcpp.errors import BadRequest, IdentityTaken, SwarmError, WireError
from swarmcpp.peers import Address, Capability, NodeId
from swarmcpp.swarm.announcer import Announcer
from swarmcpp.swarm.dialling import HELLO_TIMEOUT_S, Dialler
from swarmcpp.swarm.endpoint import Endpoint, Responder
from swarmcpp.swarm.holders import Holders
from swarmcpp.swarm.identity import SwarmKey
from swarmcpp.swarm.links import LinkBook, probe
from swarmcpp.swarm.membership import Change, Heard, Membership, PeerView, Status, check_capability
from swarmcpp.swarm.peerlink import PeerLink
from swarmcpp.swarm.store import Identity
from swarmcpp.wire.peers import (
    PROTOCOL,
    Ask,
    AskStage,
    BlockPage,
    CloseSequence,
    FetchBlocks,
    Generate,
    GetChunk,
    GetManifest,
    Gossip,
    Hello,
    ListBlocks,
    OfferBlocks,
    OpenSequence,
    Ping,
    Pong,
    ResumeSequence,
    RunStage,
    StoreSequence,
    Welcome,
)

logger = logging.getLogger(__name__)

PROBE_EVERY_S = 10.0
EXCHANGE_S = (1.0, 10.0)
"""Between questions for peers of peers, in the first seconds of a node and afterwards."""

MAX_PAGES = 1000
MAX_EVENTS = 100
ANNOUNCED_PEERS = 64
"""Addresses in a Welcome: any of them leads to the rest."""


class PeerService(Protocol):
    """What a node does for its peers, beside being there."""

    def capability(self) -> Capability:
        """What it says of itself now."""

    async def generate(self, message: Generate, respond: Responder) -> None:
        """Run a request; sends its replies."""

    async def fetch_blocks(self, message: FetchBlocks, respond: Responder) -> None:
        """Send blocks."""

    async def list_blocks(self, message: ListBlocks, respond: Responder) -> None:
        """Send a page of block ids."""

    async def model_file(self, message: GetManifest | GetChunk, respond: Responder) -> None:
        """Send a manifest or a chunk of a model's files."""

    async def stage(self, message: AskStage, respond: Responder) -> None:
        """Do what a head, or the stage before, asks of a stage of this node, but for passes."""

    def begin_pass(self, message: RunStage, payload: list[memoryview], respond: Responder) -> None:
        """Begin a pass of a stage of this node, and answer it later. Raises nothing."""


class Mesh:
    """One node's place in its swarm. Every method runs on the event loop of `start`."""

    def __init__(
        self,
        key: SwarmKey,
        identity: Identity,
        services: PeerService,
        *,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._identity = identity
        self._services = services
        self._clock = clock
        self._sleep = sleep
        self._tasks: set[asyncio.Task[None]] = set()
        self._met: set[tuple[str, int]] = set()
        self._learning: dict[NodeId, bool] = {}
        """Peers that are being listed; True: once more afterwards."""
        self._closed = False
        self.endpoint = Endpoint(identity.keys, key.member.public, self._handle, begin=self._begin)
        self.membership = Membership(identity.node_id, identity.boot, clock)
        self.announcer = Announcer(identity.node_id, identity.boot, clock)
        self.holders = Holders()
        self.links = LinkBook(clock)
        self.events: deque[tuple[float, str]] = deque(maxlen=MAX_EVENTS)
        """(clock, what happened), newest last."""
        self.changed = asyncio.Event()
        """Set whenever something of the swarm changed."""
        self.twin: Address | None = None
        """Where another node with this node's identity is."""
        self._dialler = Dialler(key, identity.keys.public, self, sleep)
        self.dial, self.refusals = self._dialler.dial, self._dialler.refusals
        self.caller, self.callers = self._dialler.caller, self._dialler.callers

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to gossip; the endpoint must be listening."""
        self._spawn(self._gossip(), "gossip")
        self._spawn(self._watch(), "membership")

    async def close(self) -> None:
        """Say that this node leaves, and close every link."""
        if self._closed:
            return
        self._closed = True
        for gossip in self.announcer.leave():
            self.endpoint.publish(gossip)
        for task in (*self._tasks, *self._dialler.tasks()):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._dialler.aclose()
        await self.endpoint.aclose()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("the swarm's %s task failed", task.get_name(), exc_info=error)

    def _capability(self) -> Capability:
        return self.announcer.stamped(self._services.capability())

    def hello(self) -> Hello:
        """What this node says of itself when it meets another one."""
        return Hello(PROTOCOL, PROTOCOL, self._capability())

    def note(self, text: str) -> None:
        """Remember an event for `status`, and log it."""
        logger.info("swarm: %s", text)
        self.events.append((self._clock(), text))
        self.changed.set()

    # -- peers ---------------------------------------------------------------------------------------------------

    def name(self, node: NodeId) -> str:
        """What a node calls itself; its id when that is not known."""
        view = self.membership.get(node)
        return view.capability.name if view and view.capability.name else node

    def addresses(self) -> tuple[Address, ...]:
        """Addresses of greeted peers, to be remembered and told to others."""
        return tuple(link.address for link in self.callers().values())

    def met_self(self, addresses: Sequence[Address]) -> None:
        """Somebody announces this node's own key: this node under another address, or a copy of its identity."""
        own = {(address.host, address.port) for address in self._capability().addresses}
        for address in addresses:
            if (address.host, address.port) not in own | self._met:
                self._met.add((address.host, address.port))
                self._spawn(self._ask_twin(address), "twin")

    async def _ask_twin(self, address: Address) -> None:
        link = self._dialler.link(address)
        try:
            await link.ask(self.hello(), timeout_s=HELLO_TIMEOUT_S)
        except IdentityTaken:
            self.twin = address
            self.note(f"the node at {address} has this node's identity")
        except SwarmError:
            pass
        finally:
            await link.aclose()

    def greeted(self, address: Address, capability: Capability) -> None:
        """The node at `address` answers a hello. Raises WireError when it is this one."""
        heard = self.membership.welcome(capability)
        if heard in (Heard.OWN, Heard.REPLAY):
            raise WireError(f"{address} is this node itself")
        if heard is Heard.NEW:
            self.holders.forget(capability.node)
            self.note(f"{capability.name or capability.node} is in the swarm")
        self._learn_soon(capability.node)

    def lost(self, node: NodeId) -> None:
        """The link to a node is lost."""
        self.membership.lost(node)

    def _learn_soon(self, node: NodeId) -> None:
        """Measure the link and list the peer's blocks, unless that is going on: then once more after it."""
        if node in self._learning:
            self._learning[node] = True
            return
        self._learning[node] = False
        self._spawn(self._learn(node), "resync")

    async def _learn(self, node: NodeId) -> None:
        try:
            while link := self.caller(node):
                self._learning[node] = False
                await probe(self.links, node, link)
                view = self.membership.get(node)
                for offer in view.capability.models if view else ():
                    if offer.token_bytes:
                        await self._list_blocks(link, node, offer.root)
                if not self._learning[node]:
                    return
        finally:
            self._learning.pop(node, None)

    async def _list_blocks(self, link: PeerLink, node: NodeId, root: bytes) -> None:
        """All block ids of a peer, in pages. What cannot be had now is asked for at the next gap in its news."""
        after: bytes | None = b""
        with contextlib.suppress(SwarmError):
            for _ in range(MAX_PAGES):
                page, _ = await link.ask(ListBlocks(root, after or b""), timeout_s=HELLO_TIMEOUT_S)
                if not isinstance(page, BlockPage):
                    return
                after = self.holders.page(node, root, page, after or b"")
                if after is None:
                    return

    # -- what peers say ------------------------------------------------------------------------------------------

    def hear(self, gossip: Gossip) -> None:
        """News from the socket of the node that it is about; PeerLink has checked that."""
        before = self.membership.get(gossip.node)
        try:
            heard = self.membership.hear(gossip)
        except WireError as error:
            logger.debug("news of %s is refused: %s", gossip.node, error)
            return
        if heard not in (Heard.NEWS, Heard.GAP):
            if heard is Heard.UNKNOWN:
                self._dialler.greet_again(gossip.node)
            return
        self.holders.hear(gossip)
        if heard is Heard.GAP or _roots(before) != _roots(self.membership.get(gossip.node)):
            self._learn_soon(gossip.node)
        self.changed.set()

    def _begin(self, ask: Ask, payload: list[memoryview], respond: Responder) -> bool:
        if isinstance(ask, RunStage):
            self._services.begin_pass(ask, payload, respond)
            return True
        return False

    async def _handle(self, ask: Ask, payload: list[memoryview], respond: Responder) -> None:
        """Answer one request of a member."""
        match ask:
            case Hello():
                respond.send(self._welcome(ask))
            case Ping(reply_bytes=count):
                respond.send(Pong(), (bytes(count),) if count else ())
            case Generate():
                await self._services.generate(ask, respond)
            case FetchBlocks():
                await self._services.fetch_blocks(ask, respond)
            case ListBlocks():
                await self._services.list_blocks(ask, respond)
            case GetManifest() | GetChunk():
                await self._services.model_file(ask, respond)
            case OpenSequence() | ResumeSequence() | StoreSequence() | CloseSequence() | OfferBlocks():
                await self._services.stage(ask, respond)
            case _:
                raise BadRequest(f"{type(ask).__name__} is no request that can be answered")

    def _welcome(self, hello: Hello) -> Welcome:
        if not hello.lowest <= PROTOCOL <= hello.highest:
            raise WireError(
                f"this node speaks protocol {PROTOCOL}, you speak {hello.lowest} to {hello.highest}; "
                f"run the same swarmcpp on both sides"
            )
        capability = check_capability(hello.capability)
        if capability.node == self._identity.node_id and capability.boot != self._identity.boot:
            raise IdentityTaken(f"another node has the identity {capability.node}; take a new one")
        if capability.node != self._identity.node_id:
            self._dialler.expect(capability)
        return Welcome(PROTOCOL, self._capability(), self.addresses()[:ANNOUNCED_PEERS])

    # -- clockwork -----------------------------------------------------------------------------------------------

    async def _gossip(self) -> None:
        """Publish what is due."""
        while True:
            self.announcer.n_nodes = 1 + len(self.callers())
            for gossip in self.announcer.poll():
                self.endpoint.publish(gossip)
            await self._sleep(max(0.02, min(0.25, self.announcer.next_due() - self._clock())))

    async def _watch(self) -> None:
        """Suspect, bury, and from time to time measure links again and ask for more peers."""
        begun = probed = self._clock()
        exchange_at = begun + EXCHANGE_S[0]
        while True:
            await self._sleep(0.5)
            for change in self.membership.tick():
                self._on_change(change)
            if self._clock() - probed >= PROBE_EVERY_S:
                probed = self._clock()
                for node, link in self.callers().items():
                    await probe(self.links, node, link)
            if self._clock() >= exchange_at:
                # Soon at first: nodes that come at one time are not in the Welcomes that they get.
                exchange_at = self._clock() + EXCHANGE_S[self._clock() - begun >= EXCHANGE_S[1]]
                await self._exchange()

    async def _exchange(self) -> None:
        """Ask one peer whom it knows by now, and dial those."""
        links = list(self.callers().values())
        if not links:
            return
        with contextlib.suppress(SwarmError):
            reply, _ = await random.choice(links).ask(self.hello(), timeout_s=HELLO_TIMEOUT_S)
            for address in reply.peers if isinstance(reply, Welcome) else ():
                self.dial((address,))

    def _on_change(self, change: Change) -> None:
        self.note(f"{change.name or change.node} is {change.status}")
        if change.status is Status.GONE:
            self.holders.forget(change.node)
            self.links.forget(change.node)


def _roots(view: PeerView | None) -> set[bytes]:
    return {offer.root for offer in view.capability.models} if view else set()
