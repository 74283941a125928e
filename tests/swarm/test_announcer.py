"""What a node publishes, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gossip_support import OTHER, PEER, ROOT, block_id, capability
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.peers import CacheHits, Load, ObservedLatency, StageOffer
from swarmcpp.swarm.announcer import Announcer, heartbeat_s
from swarmcpp.swarm.holders import Holders
from swarmcpp.testing import FakeClock
from swarmcpp.wire.peers import MAX_IDS, Alive, Gossip, Leaving, NodeCapability, PrefixCacheAnnounce, decode, encode

A, B, C = (block_id(number) for number in range(3))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(50.0)


@pytest.fixture
def announcer(clock: FakeClock) -> Announcer:
    """One that has introduced itself."""
    made = Announcer(PEER, 3, clock)
    made.capability(capability(boot=3))
    [first] = made.poll()
    assert isinstance(first.news, NodeCapability)
    return made


def run(announcer: Announcer, clock: FakeClock, seconds: float) -> list[tuple[float, Gossip]]:
    """Everything published in the next seconds, with its time, by a caller that wakes only when something is due."""
    end, said = clock.now + seconds, []
    while announcer.next_due() <= end:
        clock.now = max(clock.now, announcer.next_due())
        news = announcer.poll()
        assert news, "next_due promised something"
        said += [(clock.now, each) for each in news]
    clock.now = end
    return said


def test_the_heartbeat_keeps_inbound_gossip_bounded() -> None:
    assert [heartbeat_s(n) for n in (1, 2, 16, 32, 200)] == [1.0, 1.0, 1.0, 2.0, 12.5]
    assert all((n - 1) / heartbeat_s(n) <= 16 for n in range(1, 1025))


def test_a_node_introduces_itself_at_once_then_beats(announcer: Announcer, clock: FakeClock) -> None:
    assert announcer.poll() == []
    said = run(announcer, clock, 5.0)
    assert [at for at, _ in said] == [51.0, 52.0, 53.0, 54.0, 55.0]
    assert all(isinstance(gossip.news, Alive) for _, gossip in said)
    assert [(gossip.node, gossip.boot, gossip.sequence) for _, gossip in said] == [(PEER, 3, n) for n in range(2, 7)]
    assert announcer.sequence == 6
    announcer.n_nodes = 200
    assert len(run(announcer, clock, 125.0)) == 10


def test_nothing_is_said_before_there_is_something_to_say(clock: FakeClock) -> None:
    announcer = Announcer(PEER, 1, clock)
    assert announcer.poll() == []
    assert announcer.next_due() == float("inf")
    announcer.load(Load(waiting=1))
    announcer.blocks_changed(ROOT)
    assert announcer.poll() == []
    announcer.blocks_changed(ROOT, (A,))
    assert len(run(announcer, clock, 10.0)) == 1


def test_changes_that_matter_are_told_in_full_and_at_once(announcer: Announcer, clock: FakeClock) -> None:
    clock.advance(0.5)
    announcer.capability(capability(boot=3, state="restarting"))
    [gossip] = announcer.poll()
    assert isinstance(gossip.news, NodeCapability)
    assert gossip.news.capability.state == "restarting"
    assert gossip.news.capability.sequence == gossip.sequence == 2
    assert gossip.news.capability.heartbeat_s == 1.0
    assert announcer.poll() == []


def test_figures_that_change_all_the_time_wait_for_the_regular_capability(
    announcer: Announcer, clock: FakeClock
) -> None:
    quiet = capability(
        boot=3,
        hits=CacheHits(slot=9),
        memory_free=1,
        blocks=7,
        observed_latencies=(ObservedLatency(OTHER, 9.0),),
        load=Load(decode_tps=5.0),
    )
    announcer.capability(quiet)
    said = run(announcer, clock, 11.0)
    full = [(at, gossip.news.capability) for at, gossip in said if isinstance(gossip.news, NodeCapability)]
    assert [at for at, _ in full] == [60.0]
    assert replace(full[0][1], sequence=0) == quiet
    assert len(said) == 11, "a capability is a heartbeat too"
    beats = [gossip.news.load.decode_tps for _, gossip in said if isinstance(gossip.news, Alive)]
    assert set(beats) == {5.0}


def test_stages_are_told_at_once_and_their_times_with_the_regular_capability(
    announcer: Announcer, clock: FakeClock
) -> None:
    stage = StageOffer(
        model="tiny",
        fingerprint=b"f" * 32,
        first=0,
        last=8,
        n_layers=24,
        ctx_size=4096,
        slots=4,
        free=4,
        pass_s=((1, 0.1),),
    )
    clock.advance(0.5)
    for told in (stage, replace(stage, free=3)):
        announcer.capability(capability(boot=3, stages=(told,)))
        [gossip] = announcer.poll()
        assert isinstance(gossip.news, NodeCapability)
        assert gossip.news.capability.stages == (told,)
        clock.advance(0.5)
    announcer.capability(capability(boot=3, stages=(replace(stage, free=3, pass_s=((1, 0.2),)),)))
    assert announcer.poll() == []


def test_load_is_told_early_but_four_times_a_second_at_most(announcer: Announcer, clock: FakeClock) -> None:
    clock.advance(0.6)
    announcer.load(Load(slots_busy=1))
    assert [type(each.news) for each in announcer.poll()] == [Alive]
    announcer.load(Load(slots_busy=1, decode_tps=9.0))
    assert announcer.next_due() == clock.now + 1.0, "a rate alone does not hurry"
    said = []
    for step in range(100):
        announcer.load(Load(slots_busy=step % 3, waiting=step))
        clock.advance(0.02)
        said += announcer.poll()
    assert 7 <= len(said) <= 8
    announcer.n_nodes = 64
    for step in range(100):
        announcer.load(Load(slots_busy=step % 3, waiting=step))
        clock.advance(0.02)
        said += announcer.poll()
    assert len(said) <= 11, "the bound on inbound gossip holds for hurried messages too"


def test_blocks_are_batched_and_the_last_change_of_each_counts(announcer: Announcer, clock: FakeClock) -> None:
    announcer.blocks_changed(ROOT, (A, B))
    clock.advance(0.1)
    announcer.blocks_changed(ROOT, (C,), (A,))
    assert announcer.poll() == []
    assert announcer.next_due() == pytest.approx(50.2)
    clock.advance(0.1)
    [gossip] = announcer.poll()
    assert gossip.news == PrefixCacheAnnounce(ROOT, added=(B, C), dropped=(A,))
    announcer.blocks_changed(ROOT, (), (B,))
    announcer.blocks_changed(ROOT, (B,))
    announcer.blocks_changed(b"x" * 32, (A,), (A,))
    clock.advance(0.2)
    assert [each.news for each in announcer.poll()] == [
        PrefixCacheAnnounce(ROOT, added=(B,)),
        PrefixCacheAnnounce(b"x" * 32, added=(A,)),
    ]


def test_many_blocks_go_in_messages_that_the_wire_takes(announcer: Announcer, clock: FakeClock) -> None:
    lost = tuple(block_id(number) for number in range(5000))
    gained = tuple(block_id(number) for number in range(5000, 9000))
    announcer.blocks_changed(ROOT, gained, lost)
    clock.advance(0.2)
    index = Holders()
    index.hear(Gossip(PEER, 3, 1, PrefixCacheAnnounce(ROOT, added=lost[:MAX_IDS])))
    said = [decode(encode(each)) for each in announcer.poll()]
    assert len(said) == 3
    for each in said:
        assert isinstance(each, Gossip)
        assert isinstance(each.news, PrefixCacheAnnounce)
        assert len(each.news.added) + len(each.news.dropped) <= MAX_IDS
        index.hear(each)
    assert len(index.holders(ROOT, gained)) == 4000
    assert index.count(PEER) == 4000


def test_leaving_is_the_last_word(announcer: Announcer) -> None:
    assert announcer.leave() == [Gossip(PEER, 3, 2, Leaving())]


def test_a_welcome_carries_the_sequence_that_gossip_goes_on_from(announcer: Announcer) -> None:
    announcer.n_nodes = 32
    said = announcer.stamped(capability(boot=3))
    assert (said.sequence, said.heartbeat_s) == (1, 2.0)


CHANGES = st.lists(
    st.tuples(
        st.floats(0.0, 0.5),
        st.sets(st.integers(0, 9), max_size=4),
        st.sets(st.integers(0, 9), max_size=4),
        st.booleans(),
    ),
    max_size=40,
)


@given(CHANGES)
def test_who_hears_everything_knows_everything(changes: list[tuple[float, set[int], set[int], bool]]) -> None:
    clock, index, truth = FakeClock(), Holders(), set[bytes]()
    announcer = Announcer(PEER, 1, clock)
    announcer.capability(capability())
    sequence = 0
    for pause, added, dropped, other_load in changes:
        lost, gained = {block_id(each) for each in dropped}, {block_id(each) for each in added}
        truth = (truth - lost) | gained
        announcer.blocks_changed(ROOT, gained, lost)
        announcer.load(Load(waiting=int(other_load)))
        clock.advance(pause)
        for gossip in announcer.poll():
            sequence += 1
            assert gossip.sequence == sequence
            index.hear(gossip)
    clock.advance(0.25)
    for gossip in announcer.poll():
        index.hear(gossip)
    assert {each for each in map(block_id, range(10)) if index.holders(ROOT, (each,))} == truth
