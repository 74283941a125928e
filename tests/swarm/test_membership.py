"""Who is thought to be in the swarm, from what is heard and from silence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from gossip_support import OTHER, OWN, PEER, ROOT, capability, offer
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.errors import PeerError, WireError
from swarmcpp.peers import Address, CacheHits, Capability, Load, ObservedLatency, StageOffer
from swarmcpp.swarm.announcer import heartbeat_s
from swarmcpp.swarm.membership import MAX_PEERS, Heard, Membership, Status, check_capability
from swarmcpp.testing import FakeClock
from swarmcpp.wire.peers import Alive, Gossip, Leaving, NodeCapability, PrefixCacheAnnounce


def alive(sequence: int, node: str = PEER, boot: int = 1, **load: Any) -> Gossip:
    return Gossip(node, boot, sequence, Alive(Load(**load)))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1000.0)


@pytest.fixture
def members(clock: FakeClock) -> Membership:
    return Membership(OWN, 7, clock)


def status(members: Membership, node: str = PEER) -> Status:
    view = members.get(node)
    assert view is not None
    return view.status


def tick_for(members: Membership, clock: FakeClock, seconds: float, step: float = 1.0) -> list[tuple[str, Status]]:
    changes = []
    for _ in range(round(seconds / step)):
        clock.advance(step)
        changes += [(change.node, change.status) for change in members.tick()]
    return changes


def test_news_updates_the_view_and_says_how_old_it_is(members: Membership, clock: FakeClock) -> None:
    assert members.welcome(capability()) is Heard.NEW
    assert members.hear(alive(1, slots_busy=3, decode_tps=20.0)) is Heard.NEWS
    clock.advance(0.5)
    view = members.get(PEER)
    assert view is not None
    assert (view.capability.load.slots_busy, view.capability.load.decode_tps, view.heard_s) == (3, 20.0, 0.5)
    assert members.peers() == (view,)
    assert members.hear(Gossip(PEER, 1, 2, NodeCapability(capability(state="failed", sequence=2)))) is Heard.NEWS
    assert members.peers()[0].capability.state == "failed"
    assert members.n_nodes == 2


def test_replay_gap_stale_unknown_and_own_are_told_apart(members: Membership) -> None:
    assert members.hear(alive(1)) is Heard.UNKNOWN
    members.welcome(capability(boot=2, sequence=4))
    assert members.hear(alive(4, boot=2)) is Heard.REPLAY, "the welcome already told it"
    assert members.hear(alive(5, boot=2, waiting=1)) is Heard.NEWS
    assert members.hear(alive(5, boot=2, waiting=9)) is Heard.REPLAY
    assert members.hear(alive(3, boot=2, waiting=9)) is Heard.REPLAY
    assert members.hear(alive(99, boot=1, waiting=9)) is Heard.STALE
    assert members.peers()[0].capability.load.waiting == 1
    assert members.hear(alive(8, boot=2, waiting=2)) is Heard.GAP
    assert members.peers()[0].capability.load.waiting == 2
    assert members.hear(alive(9, boot=2)) is Heard.NEWS
    assert members.hear(alive(1, boot=3)) is Heard.UNKNOWN, "another life has to be greeted"
    assert members.hear(alive(1, OWN, boot=7)) is Heard.REPLAY
    assert members.hear(alive(1, OWN, boot=8)) is Heard.OWN
    assert members.welcome(capability(OWN, boot=8)) is Heard.OWN
    assert members.welcome(capability(boot=1)) is Heard.STALE


def test_a_late_welcome_does_not_undo_news(members: Membership) -> None:
    members.welcome(capability())
    members.hear(alive(1, waiting=1))
    members.hear(alive(2, waiting=5))
    assert members.welcome(capability(sequence=1, load=Load(waiting=1))) is Heard.NEWS
    assert members.peers()[0].capability.load.waiting == 5
    assert members.welcome(capability(sequence=4, load=Load(waiting=8))) is Heard.NEWS
    assert members.hear(alive(3, waiting=7)) is Heard.NEWS, "gossip that the welcome overtook is still to be applied"
    assert members.peers()[0].capability.load.waiting == 8


def test_silence_makes_suspect_then_gone_then_forgotten(members: Membership, clock: FakeClock) -> None:
    members.welcome(capability())
    assert tick_for(members, clock, 3.0) == []
    assert tick_for(members, clock, 1.0) == [(PEER, Status.SUSPECT)]
    assert members.n_nodes == 2
    assert tick_for(members, clock, 6.0) == []
    assert tick_for(members, clock, 1.0) == [(PEER, Status.GONE)]
    assert members.n_nodes == 1
    assert tick_for(members, clock, 600.0, 2.0) == []
    assert status(members) is Status.GONE
    assert tick_for(members, clock, 2.0) == []
    assert members.peers() == ()


def test_a_node_that_returns_is_itself_again(members: Membership, clock: FakeClock) -> None:
    members.welcome(capability())
    members.hear(alive(1))
    tick_for(members, clock, 5.0)
    assert members.hear(alive(2)) is Heard.NEWS
    assert tick_for(members, clock, 1.0) == [(PEER, Status.ALIVE)]
    tick_for(members, clock, 11.0)
    assert status(members) is Status.GONE
    assert members.hear(alive(3)) is Heard.GAP, "its blocks were forgotten with it"
    assert status(members) is Status.ALIVE
    tick_for(members, clock, 12.0)
    assert members.welcome(capability(sequence=3)) is Heard.NEW
    tick_for(members, clock, 12.0)
    assert members.welcome(capability(boot=2, name="again")) is Heard.NEW
    assert [change.name for change in members.tick()] == ["again"]
    assert members.hear(alive(1, boot=2)) is Heard.NEWS, "sequences begin again with a boot"


def test_leaving_ends_a_life_at_once(members: Membership, clock: FakeClock) -> None:
    members.welcome(capability())
    assert members.hear(Gossip(PEER, 1, 1, Leaving())) is Heard.NEWS
    assert status(members) is Status.GONE
    assert [change.status for change in members.tick()] == [Status.GONE]
    assert members.hear(alive(2)) is Heard.STALE
    assert members.welcome(capability(sequence=9)) is Heard.STALE, "a Welcome that was under way"
    assert members.welcome(capability(boot=2)) is Heard.NEW
    assert status(members) is Status.ALIVE


def test_a_broken_link_makes_suspect_until_the_node_speaks(members: Membership) -> None:
    members.welcome(capability())
    members.lost(PEER)
    members.lost(OTHER)
    assert [change.status for change in members.tick()] == [Status.SUSPECT]
    members.hear(alive(1))
    assert [change.status for change in members.tick()] == [Status.ALIVE]


def test_waking_up_after_hours_condemns_nobody(members: Membership, clock: FakeClock) -> None:
    members.welcome(capability())
    members.welcome(capability(OTHER))
    members.hear(Gossip(OTHER, 1, 1, Leaving()))
    tick_for(members, clock, 1.0)
    clock.advance(8 * 3600.0)
    assert members.tick() == ()
    assert status(members) is Status.ALIVE
    assert tick_for(members, clock, 3.0) == []
    assert tick_for(members, clock, 1.0) == [(PEER, Status.SUSPECT)], "but silence since then counts"


def test_patience_follows_the_size_of_the_swarm(members: Membership, clock: FakeClock) -> None:
    for number in range(63):
        members.welcome(capability(f"{number:016x}"))
    assert members.n_nodes == 64
    assert tick_for(members, clock, 12.0) == []
    assert len(tick_for(members, clock, 1.0)) == 63


def test_a_joiner_that_knows_few_is_as_patient_as_its_peers_are_slow(members: Membership, clock: FakeClock) -> None:
    members.welcome(capability(heartbeat_s=heartbeat_s(200)))
    assert tick_for(members, clock, 37.0) == []
    assert tick_for(members, clock, 1.0) == [(PEER, Status.SUSPECT)]


def test_the_number_of_peers_is_bounded_and_gone_ones_make_room(members: Membership) -> None:
    for number in range(0x1000, 0x1000 + MAX_PEERS):
        members.welcome(capability(f"{number:016x}"))
    with pytest.raises(PeerError, match="1024 other nodes"):
        members.welcome(capability("f" * 16))
    assert members.get("f" * 16) is None
    members.hear(Gossip(f"{0x1005:016x}", 1, 1, Leaving()))
    assert members.welcome(capability("f" * 16)) is Heard.NEW
    assert members.get(f"{0x1005:016x}") is None


def test_nonsense_is_refused_and_counts_as_lost(members: Membership) -> None:
    members.welcome(capability())
    with pytest.raises(WireError, match="decode_tps"):
        members.hear(alive(1, decode_tps=math.nan))
    with pytest.raises(WireError, match="another node"):
        members.hear(Gossip(PEER, 1, 1, NodeCapability(capability(OTHER))))
    assert members.peers()[0].capability.load == Load()
    assert members.hear(alive(2)) is Heard.GAP


ADDRESS = Address("192.0.2.1", 17610, "k" * 40)
STAGE = StageOffer(
    model="tiny",
    fingerprint=b"f" * 32,
    first=8,
    last=24,
    n_layers=24,
    ctx_size=4096,
    slots=4,
    free=2,
    pass_s=((1, 0.05), (16, 0.2), (512, 3.0)),
)


@pytest.mark.parametrize(
    "changes",
    [
        {"node": "xyz"},
        {"node": PEER.upper()},
        {"node": PEER + "\n"},
        {"boot": -1},
        {"cores": -1},
        {"memory_free": 2**63},
        {"blocks": -5},
        {"pub_port": 70000},
        {"sequence": -1},
        {"heartbeat_s": 0.0},
        {"heartbeat_s": 1e6},
        {"heartbeat_s": math.nan},
        {"load": Load(waiting=-1)},
        {"load": Load(ttft_s=math.inf)},
        {"load": Load(decode_tps=math.nan)},
        {"hits": CacheHits(peer=-1)},
        {"addresses": (replace(ADDRESS, port=0),)},
        {"addresses": (replace(ADDRESS, port=65536),)},
        {"addresses": (replace(ADDRESS, host=""),)},
        {"addresses": (replace(ADDRESS, host="h" * 300),)},
        {"addresses": (replace(ADDRESS, key="k"),)},
        {"observed_latencies": (ObservedLatency(OTHER, -1.0),)},
        {"observed_latencies": (ObservedLatency(OTHER, 1.0, math.inf),)},
        {"observed_latencies": (ObservedLatency("me", 1.0),)},
        {"models": (offer(first=5, last=5),)},
        {"models": (offer(first=-1),)},
        {"models": (offer(last=25),)},
        {"models": (offer(fingerprint=b"f"),)},
        {"models": (offer(root=b""),)},
        {"models": (offer(id=""),)},
        {"models": (offer(id="m" * 201),)},
        {"models": (offer(ctx_size=-1),)},
        {"stages": (replace(STAGE, fingerprint=b"f"),)},
        {"stages": (replace(STAGE, model=""),)},
        {"stages": (replace(STAGE, model="m" * 201),)},
        {"stages": (replace(STAGE, first=-1),)},
        {"stages": (replace(STAGE, first=24),)},
        {"stages": (replace(STAGE, last=25),)},
        {"stages": (replace(STAGE, n_layers=10_001),)},
        {"stages": (replace(STAGE, ctx_size=-1),)},
        {"stages": (replace(STAGE, free=5),)},
        {"stages": (replace(STAGE, free=-1),)},
        {"stages": (replace(STAGE, slots=1025),)},
        {"stages": (replace(STAGE, pass_s=((0, 1.0),)),)},
        {"stages": (replace(STAGE, pass_s=((513, 1.0),)),)},
        {"stages": (replace(STAGE, pass_s=((8, 1.0), (8, 2.0))),)},
        {"stages": (replace(STAGE, pass_s=((8, 1.0), (4, 2.0))),)},
        {"stages": (replace(STAGE, pass_s=((8, 0.0),)),)},
        {"stages": (replace(STAGE, pass_s=((8, -1.0),)),)},
        {"stages": (replace(STAGE, pass_s=((8, math.nan),)),)},
        {"stages": (replace(STAGE, pass_s=((8, math.inf),)),)},
        {"stages": (STAGE, replace(STAGE, n_layers=0))},
    ],
)
def test_capabilities_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        check_capability(capability(**changes))
    assert "\n" not in str(caught.value)


def test_capabilities_are_cut_to_their_limits() -> None:
    assert check_capability(capability()) == capability()
    checked = check_capability(
        capability(
            name="evil\x1b[31m\nname " + "n" * 500,
            cpu="c" * 500,
            version="v" * 500,
            addresses=(ADDRESS,) * 50,
            models=(offer(description="d" * 5000, root=b"", token_bytes=0),) * 100,
            observed_latencies=(ObservedLatency(OTHER, 0.1),) * 100,
            stages=(STAGE, replace(STAGE, pass_s=tuple((rows, 0.1) for rows in range(1, 33)))) * 8,
        )
    )
    assert checked.name.startswith("evil[31m name n")
    assert (len(checked.name), len(checked.cpu), len(checked.version)) == (64, 200, 64)
    assert (len(checked.addresses), len(checked.models), len(checked.observed_latencies)) == (16, 64, 32)
    assert len(checked.models[0].description) == 200
    assert len(checked.stages) == 8
    assert checked.stages[0] == STAGE
    assert [rows for rows, _ in checked.stages[1].pass_s] == list(range(1, 17))


NODES = (PEER, OTHER)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["say", "say", "say", "full", "leave", "restart", "deliver", "deliver", "deliver", "tick"]),
        st.sampled_from(NODES),
        st.integers(0, 30),
    ),
    max_size=80,
)


@given(STEPS)
def test_views_are_never_older_than_what_was_heard(steps: list[tuple[str, str, int]]) -> None:
    """Messages of two nodes arrive late, never, twice and out of order; `waiting` counts what a node said."""
    clock = FakeClock()
    members = Membership(OWN, 1, clock)
    boots, sequences = dict.fromkeys(NODES, 1), dict.fromkeys(NODES, 0)
    sent: dict[str, list[Gossip | Capability]] = {node: [] for node in NODES}
    heard: dict[str, tuple[int, int]] = {}
    left: set[tuple[str, int]] = set()
    for kind, node, number in steps:
        if kind == "tick":
            clock.advance(number)
            members.tick()
        elif kind == "restart":
            boots[node], sequences[node] = boots[node] + 1, 0
        elif kind != "deliver":
            sequences[node] += 1
            full = capability(node, boots[node], load=Load(waiting=sequences[node]), sequence=sequences[node])
            news = {"say": Alive(full.load), "full": NodeCapability(full), "leave": Leaving()}[kind]
            sent[node] += [Gossip(node, boots[node], sequences[node], news), full]
        elif sent[node]:
            message = sent[node][number % len(sent[node])]
            fresh = _deliver(members, message, heard.get(node, (0, 0)), left)
            if fresh:
                heard[node] = max(heard.get(node, (0, 0)), fresh)
        _check_views(members, heard, left)


def _deliver(
    members: Membership, message: Gossip | Capability, newest: tuple[int, int], left: set[tuple[str, int]]
) -> tuple[int, int] | None:
    """(boot, sequence) of what the view has to reflect from now on."""
    over = (message.node, message.boot) in left
    if isinstance(message, Capability):
        answer = members.welcome(message)
        assert (answer is Heard.STALE) == (message.boot < newest[0] or over)
        return (message.boot, message.sequence) if answer in (Heard.NEW, Heard.NEWS) else None
    answer = members.hear(message)
    if message.boot > newest[0]:
        assert answer is Heard.UNKNOWN or members.get(message.node) is not None
    if message.boot < newest[0]:
        assert answer in (Heard.STALE, Heard.UNKNOWN)
    if answer not in (Heard.NEWS, Heard.GAP):
        return None
    if isinstance(message.news, Leaving):
        left.add((message.node, message.boot))
        return None
    return (message.boot, message.sequence)


def _check_views(members: Membership, heard: dict[str, tuple[int, int]], left: set[tuple[str, int]]) -> None:
    for view in members.peers():
        node, boot = view.capability.node, view.capability.boot
        assert (boot, view.capability.load.waiting) == heard[node]
        assert view.heard_s >= 0
        if (node, boot) in left:
            assert view.status is Status.GONE
    assert members.n_nodes <= 1 + len(NODES)


def test_announcements_keep_a_node_alive(members: Membership, clock: FakeClock) -> None:
    members.welcome(capability())
    for sequence in range(1, 20):
        clock.advance(1.0)
        assert members.hear(Gossip(PEER, 1, sequence, PrefixCacheAnnounce(ROOT))) is Heard.NEWS
        assert members.tick() == ()
