"""Who is in the swarm, from what the nodes say and how long they have been silent. Pure; the clock is injected.

Every node subscribes to every other, and news of a node comes only over that node's own authenticated socket: the
caller checks that `gossip.node` is whom it subscribed to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any, Final

from swarmcpp.core import Clock
from swarmcpp.errors import PeerError, WireError
from swarmcpp.peers import Capability, Load, ModelOffer, NodeId, StageOffer
from swarmcpp.swarm.announcer import heartbeat_s
from swarmcpp.telemetry import printable
from swarmcpp.wire.peers import MAX_PARTS, Alive, Gossip, Leaving, NodeCapability

SUSPECT_BEATS: Final = 3
GONE_BEATS: Final = 10
FORGET_S: Final = 600.0
"""How long a gone node is kept, for its name."""

MAX_PEERS: Final = 1024
MAX_ADDRESSES: Final = 16
MAX_MODELS: Final = 64
MAX_LATENCIES: Final = 32
MAX_STAGES: Final = 8
MAX_PASS_TIMES: Final = 16
MAX_LAYERS: Final = 10_000
MAX_SEQUENCES: Final = 1024
"""Of one stage."""

MAX_NAME: Final = 64
MAX_TEXT: Final = 200
"""Characters of any other text."""

MAX_HOST: Final = 255
KEY_CHARS: Final = 40
DIGEST_BYTES: Final = 32
MAX_AMOUNT: Final = 2**53
"""Of any number that a node says: what JSON and floats carry exactly, and sums of which overflow nothing."""

_NODE_ID = re.compile("[0-9a-f]{16}")


class Status(StrEnum):
    """What is thought of a peer."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    GONE = "gone"


class Heard(StrEnum):
    """What a piece of news was, and so what the caller has to do."""

    NEW = "new"
    """A node, or a life of it, that was not known or was gone: forget its blocks, then list them."""
    NEWS = "news"
    """The next one of a known node."""
    GAP = "gap"
    """News, but some before it were lost: list its blocks again (one listing at a time)."""
    REPLAY = "replay"
    """Heard before: ignored. Also what this node said itself."""
    STALE = "stale boot"
    """From a life of the node that is over: ignored."""
    OWN = "own"
    """Of this node's id but another boot: two nodes run with one identity."""
    UNKNOWN = "unknown"
    """Of a node, or a life of it, that has not said what it is: say Hello. Ignored until then."""


@dataclass(frozen=True, slots=True)
class PeerView:
    """A peer as it is known now. `capability` has the newest load; last heard of `heard_s` ago."""

    capability: Capability
    status: Status
    heard_s: float


@dataclass(frozen=True, slots=True)
class Change:
    """A peer's status is another than at the last tick."""

    node: NodeId
    name: str
    status: Status


@dataclass(slots=True)
class _Peer:
    capability: Capability
    load: Load
    heard_at: float
    sequence: int
    """Of the last gossip."""
    said: int
    """Sequence of the newest capability or load, which a Welcome may bring before the gossip."""
    status: Status = Status.ALIVE
    told: Status = Status.ALIVE
    """As of the last tick."""
    gone_at: float = 0.0
    left: bool = False


class Membership:
    """The peers of node `own`, which runs for the `boot`th time. Used by one thread."""

    def __init__(self, own: NodeId, boot: int, clock: Clock) -> None:
        self._own = own
        self._boot = boot
        self._clock = clock
        self._peers: dict[NodeId, _Peer] = {}
        self._ticked_at = self._awake_at = clock()

    @property
    def n_nodes(self) -> int:
        """Nodes of the swarm that are not gone, this one included."""
        return 1 + sum(peer.status is not Status.GONE for peer in self._peers.values())

    def peers(self) -> tuple[PeerView, ...]:
        """All known peers, gone ones too, in the order of their ids."""
        now = self._clock()
        return tuple(_view(peer, now) for _, peer in sorted(self._peers.items()))

    def get(self, node: NodeId) -> PeerView | None:
        """One peer; None when it is not known."""
        peer = self._peers.get(node)
        return None if peer is None else _view(peer, self._clock())

    def is_alive(self, node: NodeId) -> bool:
        """Whether a peer is known and still gives news of itself."""
        peer = self._peers.get(node)
        return peer is not None and peer.status is Status.ALIVE

    def welcome(self, capability: Capability) -> Heard:
        """Take what a node said of itself in its Hello or Welcome: NEW, NEWS, STALE, REPLAY or OWN.

        Raises WireError when it is nonsense, PeerError when the swarm is full.
        """
        capability = check_capability(capability)
        node, boot = capability.node, capability.boot
        if node == self._own:
            return Heard.REPLAY if boot == self._boot else Heard.OWN
        peer = self._peers.get(node)
        if peer is None or boot > peer.capability.boot:
            if peer is None:
                self._make_room()
            now, sequence = self._clock(), capability.sequence
            told = Status.ALIVE if peer is None else peer.told
            self._peers[node] = _Peer(capability, capability.load, now, sequence, sequence, told=told)
            return Heard.NEW
        if boot < peer.capability.boot or peer.left:
            return Heard.STALE
        if capability.sequence >= peer.said:
            peer.capability, peer.load, peer.said = capability, capability.load, capability.sequence
        return Heard.NEW if self._revive(peer) else Heard.NEWS

    def hear(self, gossip: Gossip) -> Heard:
        """Take a piece of gossip: anything but NEW.

        Raises WireError when it is nonsense; it then counts as lost. A Leaving makes its node gone at once.
        """
        if gossip.node == self._own:
            return Heard.REPLAY if gossip.boot == self._boot else Heard.OWN
        peer = self._peers.get(gossip.node)
        if peer is None or gossip.boot > peer.capability.boot:
            return Heard.UNKNOWN
        if gossip.boot < peer.capability.boot or peer.left:
            return Heard.STALE
        if gossip.sequence <= peer.sequence:
            return Heard.REPLAY
        self._take(peer, gossip)
        gap = gossip.sequence != peer.sequence + 1
        peer.sequence = gossip.sequence
        # The blocks of a node that was gone are forgotten, even if none of its news is missing.
        return Heard.GAP if self._revive(peer) or gap else Heard.NEWS

    def lost(self, node: NodeId) -> None:
        """The link to `node` broke: suspect it until it is heard of again."""
        peer = self._peers.get(node)
        if peer is not None and peer.status is Status.ALIVE:
            peer.status = Status.SUSPECT

    def tick(self) -> tuple[Change, ...]:
        """Judge the silence of all peers; call it about every heartbeat. Each change of a status is told once."""
        now, beat = self._clock(), heartbeat_s(self.n_nodes)
        if now - self._ticked_at > SUSPECT_BEATS * beat:
            # This node itself was asleep and heard nobody: that says nothing about the others.
            self._awake_at = now
        self._ticked_at = now
        changes = []
        for node, peer in list(self._peers.items()):
            self._judge(peer, now, beat)
            if peer.status is not peer.told:
                peer.told = peer.status
                changes.append(Change(node, peer.capability.name, peer.status))
            if peer.status is Status.GONE and now - peer.gone_at > FORGET_S:
                del self._peers[node]
        return tuple(changes)

    def _judge(self, peer: _Peer, now: float, beat: float) -> None:
        if peer.status is Status.GONE:
            return
        # A node that knows of more nodes than this one does speaks more rarely.
        beat = max(beat, peer.capability.heartbeat_s)
        silence = now - max(peer.heard_at, self._awake_at)
        if silence > GONE_BEATS * beat:
            peer.status, peer.gone_at = Status.GONE, now
        elif silence > SUSPECT_BEATS * beat:
            peer.status = Status.SUSPECT

    def _take(self, peer: _Peer, gossip: Gossip) -> None:
        news = gossip.news
        if isinstance(news, NodeCapability):
            capability = check_capability(news.capability)
            if (capability.node, capability.boot) != (gossip.node, gossip.boot):
                raise WireError(f"node {gossip.node} sent the capability of another node; it is ignored")
            if gossip.sequence > peer.said:
                peer.capability, peer.load, peer.said = capability, capability.load, gossip.sequence
        elif isinstance(news, Alive):
            _check_amounts(gossip.node, news.load)
            if gossip.sequence > peer.said:
                peer.load, peer.said = news.load, gossip.sequence
        elif isinstance(news, Leaving):
            peer.left = True

    def _revive(self, peer: _Peer) -> bool:
        """The peer was heard of now; whether it was gone."""
        peer.heard_at = self._clock()
        was_gone = peer.status is Status.GONE
        peer.status = Status.ALIVE
        if peer.left:
            peer.status, peer.gone_at = Status.GONE, peer.heard_at
        return was_gone

    def _make_room(self) -> None:
        if len(self._peers) < MAX_PEERS:
            return
        gone = [(peer.gone_at, node) for node, peer in self._peers.items() if peer.status is Status.GONE]
        if not gone:
            raise PeerError(f"the swarm has {MAX_PEERS} other nodes, as many as one node keeps; no more can join")
        del self._peers[min(gone)[1]]


def check_capability(capability: Capability) -> Capability:
    """`capability` with texts and lists cut to their limits, if it makes sense; of lists the first entries stay.

    Raises WireError for numbers that are negative, not finite or huge, layer ranges and times of passes out of order,
    digests, keys and node ids of a wrong shape.
    """
    node = capability.node
    if not _NODE_ID.fullmatch(node):
        raise WireError(f"{node[:MAX_NAME]!r} is no node id (16 hex digits); its news is ignored")
    kept = replace(
        capability,
        name=_line(capability.name, MAX_NAME),
        version=_line(capability.version, MAX_NAME),
        cpu=_line(capability.cpu, MAX_TEXT),
        addresses=capability.addresses[:MAX_ADDRESSES],
        models=tuple(_check_model(node, model) for model in capability.models[:MAX_MODELS]),
        observed_latencies=capability.observed_latencies[:MAX_LATENCIES],
        stages=tuple(_check_stage(node, stage) for stage in capability.stages[:MAX_STAGES]),
    )
    offers = (*kept.models, *kept.stages)
    _check_amounts(node, kept, kept.load, kept.hits, *kept.addresses, *offers, *kept.observed_latencies)
    if not all(_NODE_ID.fullmatch(each.peer) for each in kept.observed_latencies):
        raise _nonsense(node, "measured a link to what is no node id (16 hex digits)")
    for address in kept.addresses:
        if not 0 < len(address.host) <= MAX_HOST or len(address.key) != KEY_CHARS or not 0 < address.port < 65536:
            form = f"host of 1 to {MAX_HOST} characters, port of 1 to 65535, key of {KEY_CHARS} characters"
            raise _nonsense(node, f"has an address that is none ({form})")
    longest = heartbeat_s(MAX_PEERS + 1)
    if not 0 < kept.heartbeat_s <= longest or kept.pub_port > 65535:
        said = f"has a heartbeat of {kept.heartbeat_s} s and gossip port {kept.pub_port}"
        raise _nonsense(node, f"{said}, outside 0..{longest:g} s and 0..65535")
    return kept


def _check_model(node: NodeId, model: ModelOffer) -> ModelOffer:
    if not 0 <= model.first < model.last <= model.n_layers:
        raise _nonsense(node, f"offers layers {model.first} to {model.last} of {model.n_layers}")
    roots = (DIGEST_BYTES,) if model.token_bytes else (0, DIGEST_BYTES)
    if len(model.fingerprint) != DIGEST_BYTES or len(model.root) not in roots:
        sizes = f"a fingerprint of {len(model.fingerprint)} and a root of {len(model.root)} bytes"
        raise _nonsense(node, f"offers a model with {sizes} instead of {DIGEST_BYTES}")
    # A model is asked for by its id: a shortened one would be another model's.
    if not 0 < len(model.id) <= MAX_TEXT:
        raise _nonsense(node, f"offers a model whose id is not 1 to {MAX_TEXT} characters")
    architecture, description = _line(model.architecture, MAX_NAME), _line(model.description, MAX_TEXT)
    return replace(model, architecture=architecture, description=description)


def _check_stage(node: NodeId, stage: StageOffer) -> StageOffer:
    if not 0 <= stage.first < stage.last <= stage.n_layers <= MAX_LAYERS or len(stage.fingerprint) != DIGEST_BYTES:
        layers = f"layers {stage.first} to {stage.last} of {stage.n_layers} (at most {MAX_LAYERS})"
        digest = f"a fingerprint of {len(stage.fingerprint)} bytes ({DIGEST_BYTES})"
        raise _nonsense(node, f"has a stage of {layers} and {digest}")
    if not 0 < len(stage.model) <= MAX_TEXT:
        raise _nonsense(node, f"has a stage of a model whose id is not 1 to {MAX_TEXT} characters")
    if not 0 <= stage.free <= stage.slots <= MAX_SEQUENCES:
        free = f"{stage.free} of {stage.slots} sequences free (at most {MAX_SEQUENCES})"
        raise _nonsense(node, f"has a stage with {free}")
    times = stage.pass_s[:MAX_PASS_TIMES]
    rows = [n_rows for n_rows, _ in times]
    rising = all(low < high for low, high in pairwise((0, *rows, MAX_PARTS + 1)))
    if not rising or not all(0 < seconds <= MAX_AMOUNT for _, seconds in times):
        form = f"rising rows of 1 to {MAX_PARTS}, seconds above 0"
        raise _nonsense(node, f"has a stage with times of passes that are none ({form})")
    return replace(stage, pass_s=times)


def _check_amounts(node: NodeId, *parts: Any) -> None:
    """Raise WireError unless every number in the dataclasses `parts` is in 0..MAX_AMOUNT, which NaN is not."""
    for part in parts:
        for name in (each.name for each in fields(part)):
            value = getattr(part, name)
            if isinstance(value, int | float) and not 0 <= value <= MAX_AMOUNT:
                raise _nonsense(node, f"says {name} = {value}, outside 0..{MAX_AMOUNT}")


def _nonsense(node: NodeId, what: str) -> WireError:
    return WireError(f"node {node} {what}; its news is ignored")


def _line(text: str, limit: int) -> str:
    """At most `limit` characters in one line that cannot steer a terminal."""
    return " ".join(printable(text).split())[:limit]


def _view(peer: _Peer, now: float) -> PeerView:
    return PeerView(replace(peer.capability, load=peer.load), peer.status, max(0.0, now - peer.heard_at))
