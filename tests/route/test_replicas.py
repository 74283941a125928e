"""Where a request finishes first."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.peers import Load
from swarmcpp.route.replicas import EXPIRY_S, TIE_S, TIE_SHARE, Choice, DelegationRates, Rates, Replica, choose
from swarmcpp.testing import FakeClock

N_LAYERS = 24
TOKEN_BYTES = 12_288
GIGABIT = 125e6
IDLE = Load(prefill_tps=200.0, decode_tps=20.0)
LOCAL = Replica("00", "", slots=4, queue_size=8, load=IDLE)
PEER = Replica("aa", "box", slots=4, queue_size=8, load=IDLE, rtt_s=0.001, bytes_per_s=GIGABIT)


def pick(*replicas: Replica, prompt: int = 640, max_tokens: int = 100, token_bytes: int = 0) -> Choice:
    choice = choose(replicas, prompt, max_tokens, n_layers=N_LAYERS, token_bytes=token_bytes)
    assert choice is not None
    return choice


def with_load(replica: Replica, **changes: float) -> Replica:
    return replace(replica, load=replace(replica.load, **changes))


def test_an_idle_node_keeps_its_requests() -> None:
    choice = pick(PEER, LOCAL)
    assert choice.replica == LOCAL
    # 640 tokens at 200/s, then 100 tokens at 20/s.
    assert choice.finish_s == pytest.approx(640 / 200 + 100 / 20)
    assert choice.why.startswith("local 8.20 s (wait 0.00, backlog 0.00, prompt 3.20, answer 5.00, rtt 0.000); next")


def test_a_busy_node_sends_them_away() -> None:
    assert pick(replace(LOCAL, outstanding=1), PEER).replica == PEER


def test_heads_over_the_same_stages_do_not_share_out_their_requests() -> None:
    busy = replace(LOCAL, outstanding=3, pipeline=True)
    head, whole = replace(PEER, pipeline=True), replace(PEER, node="bb", name="whole")
    assert pick(busy, head).replica == busy
    assert pick(busy, head, whole).replica == whole
    assert pick(replace(busy, outstanding=12), head).replica == head, "a full one does"
    assert pick(replace(LOCAL, outstanding=3), head).replica == head, "an engine of its own is something else"


@pytest.mark.parametrize(("peer_tps", "chosen"), [(21.9, LOCAL), (22.4, PEER)])
def test_a_near_tie_stays_here(peer_tps: float, chosen: Replica) -> None:
    peer = with_load(PEER, decode_tps=peer_tps)
    assert pick(LOCAL, peer, prompt=1, max_tokens=200).replica.node == chosen.node


def test_fifty_milliseconds_are_a_tie_for_short_requests() -> None:
    peer = with_load(PEER, decode_tps=40.0)
    assert pick(LOCAL, peer, prompt=1, max_tokens=1).replica == LOCAL


def test_requests_go_where_their_prefix_is_warm() -> None:
    peer = replace(PEER, warm_tokens=576)
    choice = pick(LOCAL, peer)
    assert choice.replica == peer
    assert choice.finish_s == pytest.approx(64 / 200 + 5 + 0.001)


def test_blocks_come_here_where_the_link_is_fast() -> None:
    peer = replace(PEER, warm_tokens=576)
    choice = pick(LOCAL, with_load(peer, slots_busy=2, decode_tps=30.0), token_bytes=TOKEN_BYTES)
    assert choice.replica == LOCAL
    assert "shipped" in choice.why
    shipped = 576 * TOKEN_BYTES / GIGABIT + 0.001
    assert choice.finish_s == pytest.approx(shipped + 64 / 200 + 5)


def test_nothing_is_shipped_over_a_slow_or_unknown_link() -> None:
    for rate in (0.0, 64 * 1024):
        peer = replace(PEER, warm_tokens=576, bytes_per_s=rate)
        assert pick(LOCAL, peer, token_bytes=TOKEN_BYTES).replica == peer


def test_waiting_counts_by_the_requests_that_must_leave_first() -> None:
    busy = with_load(LOCAL, slots_busy=4, waiting=3, decode_tps=40.0)
    # Four streams at 40 tokens/s: 100 ms a step. Four of them leave every 256 steps, and four must before this one.
    assert pick(busy, prompt=200, max_tokens=10).finish_s == pytest.approx(4 * 256 * 0.1 / 4 + 1 + 10 * 0.1)


def test_full_queues_are_left_out() -> None:
    full = replace(PEER, load=replace(IDLE, slots_busy=4, waiting=8))
    almost = replace(PEER, load=replace(IDLE, slots_busy=4, waiting=7))
    assert pick(LOCAL, full).replica == LOCAL
    assert choose([full], 10, 10, n_layers=N_LAYERS) is None
    assert choose([almost], 10, 10, n_layers=N_LAYERS) is not None
    assert choose([replace(almost, outstanding=1)], 10, 10, n_layers=N_LAYERS) is None
    assert choose([replace(PEER, slots=0)], 10, 10, n_layers=N_LAYERS) is None
    assert choose([], 10, 10, n_layers=N_LAYERS) is None


def test_unknown_rates_are_those_of_the_slowest_other() -> None:
    unknown = Replica("bb", "new", slots=4, queue_size=8, load=Load())
    slow = with_load(PEER, prefill_tps=50.0, decode_tps=5.0)
    assert pick(unknown, LOCAL, slow).replica == LOCAL
    assert pick(unknown, slow, prompt=50, max_tokens=5).finish_s == pytest.approx(1 + 1)


def test_without_any_rate_a_layer_takes_25_ms() -> None:
    unknown = Replica("bb", "new", slots=4, queue_size=8, load=Load())
    # A pass over 24 layers takes 0.6 s: one for 64 prompt tokens, one for each token of the answer.
    assert pick(unknown, prompt=128, max_tokens=10).finish_s == pytest.approx(2 * 0.6 + 10 * 0.6)


def test_own_samples_go_before_what_a_peer_tells() -> None:
    boaster = with_load(PEER, decode_tps=1e9, prefill_tps=1e9)
    assert pick(LOCAL, boaster).replica == boaster
    assert pick(LOCAL, replace(boaster, own_rates=Rates(100.0, 10.0))).replica == LOCAL


def test_an_answer_is_expected_to_be_no_longer_than_usual() -> None:
    assert pick(LOCAL, prompt=1, max_tokens=100_000).finish_s == pytest.approx(256 / 20, abs=0.1)
    told = choose([LOCAL], 1, 100_000, n_layers=N_LAYERS, expected_tokens=1000)
    assert told is not None
    assert told.finish_s == pytest.approx(1000 / 20, abs=0.1)


def swarms(tps: st.SearchStrategy[float]) -> st.SearchStrategy[list[Replica]]:
    """Up to six replicas whose own rates are `tps`; the first is this node's."""
    replicas = st.builds(
        Replica,
        node=st.just(""),
        name=st.just(""),
        slots=st.just(4),
        queue_size=st.integers(0, 12),
        load=st.builds(
            Load,
            slots_busy=st.integers(0, 4),
            waiting=st.integers(0, 12),
            prefill_tps=st.floats(0.0, 1e6),
            decode_tps=st.floats(0.0, 1e6),
        ),
        outstanding=st.integers(0, 6),
        warm_tokens=st.integers(0, 3000),
        own_rates=st.builds(Rates, tps, tps),
        rtt_s=st.floats(0.0, 1.0),
        bytes_per_s=st.floats(0.0, 1e9),
    )

    def named(found: list[Replica]) -> list[Replica]:
        peers = [replace(each, node=f"{index:02}", name=f"n{index}") for index, each in enumerate(found)]
        return [replace(peers[0], name="", rtt_s=0.0), *peers[1:]]

    return st.lists(replicas, min_size=1, max_size=6).map(named)


prompts = st.integers(1, 4000)
answers = st.integers(1, 1000)
sizes = st.sampled_from([0, TOKEN_BYTES])


@given(swarms(st.floats(0.0, 1e6)), prompts, answers, sizes, st.randoms())
def test_the_order_of_replicas_does_not_matter(
    swarm: list[Replica], prompt: int, max_tokens: int, token_bytes: int, shuffler: random.Random
) -> None:
    choice = choose(swarm, prompt, max_tokens, n_layers=N_LAYERS, token_bytes=token_bytes)
    shuffled = shuffler.sample(swarm, len(swarm))
    assert choose(shuffled, prompt, max_tokens, n_layers=N_LAYERS, token_bytes=token_bytes) == choice
    if choice is None:
        assert all(each.full for each in swarm)
    else:
        assert not choice.replica.full
        assert math.isfinite(choice.finish_s)
        assert choice.finish_s > 0


def dominates(one: Replica, other: Replica) -> bool:
    """Whether `one` is nearer than `other` and nowhere worse."""
    as_good = (
        one.ahead <= other.ahead,
        one.warm_tokens >= other.warm_tokens,
        one.own_rates.prefill_tps >= other.own_rates.prefill_tps,
        one.own_rates.decode_tps >= other.own_rates.decode_tps,
        not one.name or one.bytes_per_s >= other.bytes_per_s,
    )
    return not one.full and all(as_good) and one.rtt_s < other.rtt_s - 1e-6


@given(swarms(st.floats(1.0, 1e4)), prompts, answers, sizes)
def test_a_dominated_replica_is_never_chosen(
    swarm: list[Replica], prompt: int, max_tokens: int, token_bytes: int
) -> None:
    # Copies that are nearer, or domination would be rare.
    swarm += [replace(each, node=each.node + "b", rtt_s=each.rtt_s / 2) for each in swarm if each.name]
    choice = choose(swarm, prompt, max_tokens, n_layers=N_LAYERS, token_bytes=token_bytes)
    if choice is None:
        return
    if choice.replica.name:
        assert not any(dominates(each, choice.replica) for each in swarm)
        return
    without = choose(swarm[1:], prompt, max_tokens, n_layers=N_LAYERS, token_bytes=token_bytes)
    assert without is None or choice.finish_s <= without.finish_s + max(TIE_S, TIE_SHARE * without.finish_s) + 1e-9


def test_a_thousand_replicas_take_milliseconds() -> None:
    generator = random.Random(1)
    swarm = [
        replace(
            PEER,
            node=f"{index:04}",
            name=f"n{index}",
            warm_tokens=generator.randrange(640),
            load=Load(generator.randrange(4), 0, generator.uniform(50, 500), generator.uniform(5, 50)),
        )
        for index in range(1000)
    ]
    begin = time.thread_time()
    pick(LOCAL, *swarm, token_bytes=TOKEN_BYTES)
    # About 10 ms; the bound only tells linear from quadratic.
    assert time.thread_time() - begin < 0.5


def test_delegation_rates() -> None:
    clock = FakeClock()
    book = DelegationRates(clock)

    def add(streams: int = 1) -> None:
        clock.advance(10)
        book.add("aa", computed_tokens=200, prefill_s=2.0, tokens=40, decode_s=4.0, streams=streams)

    book.add("aa", computed_tokens=1, prefill_s=100.0, tokens=1, decode_s=100.0, streams=1)
    assert book.rates("aa") == Rates()
    add()
    assert book.rates("aa") == Rates(100.0, 10.0)
    assert book.rates("bb") == Rates()
    # Slower because others decoded beside it: alone it would have had 40 * (1 + 5 * 0.2) tokens in that time.
    for _ in range(60):
        add(streams=6)
    assert book.rates("aa").decode_tps == pytest.approx(20.0, rel=0.01)
    clock.advance(EXPIRY_S + 1)
    assert book.rates("aa") == Rates()
    # Cold again.
    add()
    assert book.rates("aa") == Rates()
    add()
    assert book.rates("aa") == Rates(100.0, 10.0)


def test_samples_without_time_tell_nothing() -> None:
    book = DelegationRates(FakeClock())
    for _ in range(2):
        book.add("aa", computed_tokens=0, prefill_s=0.0, tokens=0, decode_s=0.0, streams=0)
    assert book.rates("aa") == Rates()


def test_prompts_that_wait_there_count() -> None:
    local = Replica("00", "", slots=8, queue_size=8, load=replace(IDLE, slots_busy=1, backlog=512))
    peer = Replica("bb", "box", slots=8, queue_size=8, load=IDLE, rtt_s=0.001)
    choice = choose([local, peer], 512, 64, n_layers=24)
    assert choice is not None and choice.replica is peer
    sent = replace(peer, outstanding=2, outstanding_tokens=1024)
    choice = choose([local, sent], 512, 64, n_layers=24)
    assert choice is not None and choice.replica is local
