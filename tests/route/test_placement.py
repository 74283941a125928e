"""Who holds which layers: the rules, and the search against all possibilities."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_support import MB, machine, shape

from swarmcpp.route.costs import Machine, ModelShape, Placement, stage_bytes
from swarmcpp.route.placement import expected, place

RTTS_MS = [0.0, 0.5, 5.0, 40.0]


@st.composite
def swarms(draw: st.DrawFn, most: int = 5) -> tuple[ModelShape, list[Machine]]:
    n_layers = draw(st.integers(1, 8))
    model = shape(
        n_layers,
        layer_bytes=tuple(draw(st.sampled_from([80, 100, 130])) * MB for _ in range(n_layers)),
        head=draw(st.sampled_from([0, 150 * MB])),
        slots=draw(st.sampled_from([1, 2, 4, 8])),
        compute_buffer_bytes=draw(st.sampled_from([0, 40 * MB])),
    )
    machines = [
        machine(
            number,
            draw(st.floats(0.5, n_layers + 3)),
            ms=draw(st.sampled_from([0.0, 5.0, 10.0, 13.0, 60.0])),
            rtt_ms=draw(st.sampled_from(RTTS_MS)),
        )
        for number in range(draw(st.integers(1, most)))
    ]
    return model, machines


def passes(model: ModelShape, machines: Sequence[Machine], bounds: Sequence[int]) -> list[float]:
    """As documented: layer_s by bytes, the head's with the tail's."""
    mean = sum(model.layer_bytes) / model.n_layers
    weights = [sum(model.layer_bytes[a:b]) + model.head_bytes * (b == model.n_layers) for a, b in pairwise(bounds)]
    return [(m.layer_s or 0.025) * weight / mean for m, weight in zip(machines, weights, strict=True)]


def tokens_per_s(model: ModelShape, order: Sequence[Machine], bounds: Sequence[int]) -> float:
    """All tokens/s of a chain as documented, or 0 where it does not fit."""
    for m, (a, b) in zip(order, pairwise(bounds), strict=True):
        if stage_bytes(model, a, b, model.slots, model.ctx_size) > m.memory:
            return 0.0
    times = passes(model, order, bounds)
    rtts = [max(float(a.link_s), float(b.link_s)) for a, b in pairwise([*order, order[0]])]  # type: ignore[arg-type]
    hops = sum(rtts) / 2 if len(order) > 1 else 0.0
    cycles = []
    for batches in range(1, model.slots + 1):
        height = 1 + (model.slots / batches - 1) * 0.2
        cycles.append(max(batches * height * max(times), height * sum(times) + hops))
    return model.slots / min(cycles)


def compositions(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    for cuts in combinations(range(1, n), parts - 1):
        yield 0, *cuts, n


def exhaustive(model: ModelShape, machines: Sequence[Machine]) -> float:
    """The best sum of tokens/s over all groupings, orders and boundaries of machines that hold a part each."""
    whole = [m for m in machines if tokens_per_s(model, [m], (0, model.n_layers)) > 0]
    small = [m for m in machines if m not in whole]
    chain = [0.0] * (1 << len(small))
    for mask in range(1, len(chain)):
        members = [m for i, m in enumerate(small) if mask >> i & 1]
        if len(members) <= model.n_layers and sum(m.memory for m in members) >= sum(model.layer_bytes):
            chain[mask] = max(
                tokens_per_s(model, order, bounds)
                for order in permutations(members)
                for bounds in compositions(model.n_layers, len(members))
            )
    best = chain[:]
    for mask in range(1, len(chain)):
        part = mask
        while part:
            best[mask] = max(best[mask], best[part] + best[mask ^ part] if part != mask else chain[mask])
            part = (part - 1) & mask
    return best[-1] + sum(tokens_per_s(model, [m], (0, model.n_layers)) for m in whole)


def settled(placement: Placement, machines: Sequence[Machine]) -> list[Machine]:
    """The machines once they hold what `placement` wants."""
    wanted = {m.node: placement.wanted(m.node) for m in machines}
    return [replace(m, holds=(held,) if (held := wanted[m.node]) else ()) for m in machines]


def check(placement: Placement, model: ModelShape, machines: Sequence[Machine]) -> None:
    by_node = {m.node: m for m in machines}
    stages = placement.stages
    told = [each.node for each in (*stages, *placement.spare)]
    assert sorted(told) == sorted(by_node)
    for stage in stages:
        assert 0 <= stage.first < stage.last <= model.n_layers
        need = stage_bytes(model, stage.first, stage.last, model.slots, model.ctx_size)
        assert stage.n_bytes == need <= by_node[stage.node].memory
    for pipeline in placement.pipelines:
        edges = [(stage.first, stage.last) for stage in pipeline.stages]
        assert edges[0][0] == 0
        assert edges[-1][1] == model.n_layers
        assert all(one[1] == other[0] for one, other in pairwise(edges))
    if not placement.pipelines:
        covered = {n for s in stages for n in range(s.first, s.last)}
        absent = {n for first, last in placement.missing for n in range(first, last)}
        assert covered | absent == set(range(model.n_layers))
        assert not covered & absent
        assert placement.missing
        assert placement.missing_bytes > 0


def test_bytes_of_a_stage() -> None:
    model = shape(4, head=7, kv_bytes_per_token_layer=10, compute_buffer_bytes=5, embedding_bytes=10**12, layer=100)
    assert stage_bytes(model, 1, 3, slots=2, ctx=50) == 2 * 100 + 2 * 2 * 50 * 10 + 5
    assert stage_bytes(model, 1, 4, slots=2, ctx=50) == 3 * 100 + 3 * 2 * 50 * 10 + 5 + 7
    assert stage_bytes(model, 0, 1, slots=2, ctx=50) == 100 + 2 * 50 * 10 + 5 + (16 << 20)


def test_what_one_machine_can_hold_is_not_split() -> None:
    placement = place(shape(), [machine(0, 8), machine(1, 9), machine(2, 5)])
    assert [[(s.name, s.first, s.last) for s in p.stages] for p in placement.pipelines] == [
        [("m0", 0, 8)],
        [("m1", 0, 8)],
    ]
    assert [spare.name for spare in placement.spare] == ["m2"]


def test_two_halves_and_what_they_yield() -> None:
    placement = place(shape(slots=1), [machine(0, 5, rtt_ms=4), machine(1, 5, rtt_ms=4)])
    # 8 layers of 10 ms and two hops of 2 ms.
    assert expected(placement).one_tps == pytest.approx(1 / 0.084)
    assert expected(placement).all_tps == pytest.approx(1 / 0.084)
    # 512 tokens are 8 tiles: the first one through all layers, 7 more behind the slower stage.
    first, second = (s.last - s.first for s in placement.pipelines[0].stages)
    assert expected(placement).ttft_s == pytest.approx(0.084 + 7 * 0.010 * max(first, second))


def test_streams_keep_both_halves_at_work() -> None:
    one = place(shape(slots=8), [machine(0, 8)])
    two = place(shape(slots=8), [machine(0, 4), machine(1, 4)])
    # A step of 8 streams takes 2.4 times that of one; two micro-batches of 4 take 1.6 times, half the layers each.
    assert expected(one).all_tps == pytest.approx(8 / (2.4 * 0.080))
    assert expected(two).all_tps == pytest.approx(8 / (2 * 1.6 * 0.040))


def test_faster_machines_hold_more_as_far_as_memory_goes() -> None:
    placement = place(shape(12), [machine(0, 11, ms=10), machine(1, 11, ms=20)])
    lengths = {s.name: s.last - s.first for s in placement.stages}
    assert lengths == {"m0": 8, "m1": 4}
    placement = place(shape(12), [machine(0, 7, ms=10), machine(1, 11, ms=20)])
    assert {s.name: s.last - s.first for s in placement.stages} == {"m0": 7, "m1": 5}


def test_the_output_head_counts_in_memory_and_time() -> None:
    placement = place(shape(12, head=400 * MB), [machine(0, 11), machine(1, 11)])
    assert [s.last - s.first for s in placement.pipelines[0].stages] == [8, 4]
    # Only m0 has room for the head.
    placement = place(shape(4, head=400 * MB), [machine(0, 6), machine(1, 3)])
    assert [s.name for s in placement.pipelines[0].stages] == ["m1", "m0"]


def test_an_unknown_machine_is_slow_and_not_free() -> None:
    known, unknown = machine(0, 8, ms=25), machine(1, 8, ms=0)
    assert expected(place(shape(), [known])) == expected(place(shape(), [unknown]))


@pytest.mark.parametrize("odd", [math.nan, math.inf, -1.0, 1e-300])
def test_odd_figures_of_a_peer_are_taken_for_unknown(odd: float) -> None:
    model, good = shape(), [machine(0, 5), machine(1, 5)]
    bad = machine(2, 5, layer_s=odd, prefill_layer_s=odd, link_s=odd, holds=((-3, 99), (5, 2)), memory=10**30)
    placement = place(model, [*good, bad])
    check(placement, model, [*good, bad])
    assert math.isfinite(expected(placement).all_tps)


def test_a_layer_that_would_be_slower_than_the_slowest_stage_stays_out() -> None:
    machines = [machine(0, 4), machine(1, 4), machine(2, 2, ms=200)]
    placement = place(shape(), machines)
    assert [spare.name for spare in placement.spare] == ["m2"]
    assert "slower" in placement.spare[0].why
    assert "200 ms" in placement.spare[0].why


def test_a_far_machine_stays_out() -> None:
    machines = [machine(0, 4), machine(1, 4), machine(2, 4, rtt_ms=2000)]
    placement = place(shape(slots=2), machines)
    assert [spare.name for spare in placement.spare] == ["m2"]
    assert "links" in placement.spare[0].why


def test_links_by_peer_decide_who_works_with_whom() -> None:
    nodes = [machine(number, 4) for number in range(4)]
    near = {0: 2, 2: 0, 1: 3, 3: 1}
    linked = [
        replace(m, link_s={o.node: 0.0001 if near[i] == j else 0.3 for j, o in enumerate(nodes) if j != i})
        for i, m in enumerate(nodes)
    ]
    groups = [{s.name for s in p.stages} for p in place(shape(slots=2), linked).pipelines]
    assert sorted(map(sorted, groups)) == [["m0", "m2"], ["m1", "m3"]]


def test_what_is_missing_is_told_and_as_much_as_possible_is_placed() -> None:
    model = shape(compute_buffer_bytes=10 * MB)
    machines = [machine(0, 3.1), machine(1, 2.1)]
    placement = place(model, machines)
    check(placement, model, machines)
    assert [(s.name, s.first, s.last) for s in placement.partial] == [("m0", 0, 3), ("m1", 3, 5)]
    assert placement.missing == ((5, 8),)
    assert placement.missing_bytes == 310 * MB
    assert expected(placement).all_tps == 0
    assert expected(placement).ttft_s == math.inf
    enough = [*settled(placement, machines), machine(2, 0, memory=placement.missing_bytes)]
    assert place(model, enough).pipelines


def test_a_hole_that_a_machine_left_is_filled_by_one_that_comes() -> None:
    machines = [machine(0, 4, holds=((4, 8),))]
    placement = place(shape(), machines)
    assert placement.missing == ((0, 4),)
    assert [(s.first, s.last) for s in placement.partial] == [(4, 8)]
    placement = place(shape(), [*machines, machine(1, 4)])
    assert placement.wanted(machines[0].node) == (4, 8)
    assert placement.wanted(machine(1, 4).node) == (0, 4)


def test_machines_keep_what_they_hold_for_less_than_a_tenth() -> None:
    model = shape(20, slots=8)
    before = [machine(0, 15, holds=((0, 10),)), machine(1, 15, holds=((10, 20),))]
    kept = place(model, [before[0], replace(before[1], layer_s=0.0115)])
    assert kept.wanted(before[0].node) == (0, 10)
    assert kept.kept
    moved = place(model, [before[0], replace(before[1], layer_s=0.02)])
    assert moved.wanted(before[0].node) != (0, 10)
    assert not moved.kept
    uneven = [before[0], replace(before[1], layer_s=0.013)]
    assert place(model, uneven, gain=0.0).tps > place(model, uneven, gain=9.0).tps


@settings(max_examples=60, deadline=None)
@given(swarms())
def test_the_search_comes_within_5_percent_of_all_possibilities(swarm: tuple[ModelShape, list[Machine]]) -> None:
    model, machines = swarm
    placement = place(model, machines)
    check(placement, model, machines)
    best = exhaustive(model, machines)
    assert placement.tps <= best * (1 + 1e-9)
    assert placement.tps >= best * 0.95


@settings(max_examples=25, deadline=None)
@given(swarms(most=6))
def test_a_machine_more_never_lowers_throughput(swarm: tuple[ModelShape, list[Machine]]) -> None:
    model, machines = swarm
    for left_out in machines:
        fewer = place(model, [m for m in machines if m is not left_out])
        assert place(model, machines).tps >= fewer.tps * (1 - 1e-9)


@settings(max_examples=15, deadline=None)
@given(swarms(most=14))
def test_the_newest_machine_never_lowers_throughput(swarm: tuple[ModelShape, list[Machine]]) -> None:
    model, machines = swarm
    rates = [place(model, machines[:count]).tps for count in range(1, len(machines) + 1)]
    assert all(after >= before * (1 - 1e-9) for before, after in pairwise(rates))


@settings(max_examples=30, deadline=None)
@given(swarms(most=8), st.randoms(use_true_random=False))
def test_a_settled_swarm_stays_whatever_the_order_and_gains_by_who_joins(
    swarm: tuple[ModelShape, list[Machine]], random: object
) -> None:
    model, machines = swarm
    placement = place(model, machines)
    check(placement, model, machines)
    shuffled = sorted(machines, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert place(model, shuffled) == placement
    held = settled(placement, machines)
    again = place(model, held)
    check(again, model, machines)
    assert {(s.node, s.first, s.last) for s in again.stages} == {(s.node, s.first, s.last) for s in placement.stages}
    more = [*held, machine(99, 3, ms=12.0)]
    assert place(model, more).tps >= placement.tps * (1 - 1e-9)


def test_machines_that_hold_the_same_are_paired_as_well_as_they_were() -> None:
    """Taken greedily, the fastest chain first, these would lose 1.8% when another machine comes."""
    model = shape(
        6, layer_bytes=tuple(each * MB for each in (130, 100, 130, 80, 130, 130)), compute_buffer_bytes=40 * MB
    )
    rooms = ((1.7, 5, 40), (6.1, 13, 40), (1.9, 0, 5), (0.7, 0, 0.5), (4.5, 13, 40), (2.5, 10, 0))
    machines = [machine(number, layers, ms=ms, rtt_ms=rtt) for number, (layers, ms, rtt) in enumerate(rooms)]
    placement = place(model, machines)
    assert len(placement.pipelines) > 1
    more = [*settled(placement, machines), machine(99, 3, ms=12.0)]
    assert place(model, more).tps >= placement.tps * (1 - 1e-9)


def test_a_hundred_machines_are_placed_fast() -> None:
    model = shape(80, slots=8)
    machines = [machine(n, 5 + n * 7 % 31, ms=2.0 + n * 13 % 17, rtt_ms=0.5) for n in range(100)]
    begun = time.process_time()
    placement = place(model, machines)
    assert time.process_time() - begun < 4
    check(placement, model, machines)
    # As many pipelines as their memory is times the model's, but for what cannot be cut finely enough.
    assert len(placement.pipelines) >= sum(m.memory for m in machines) / (80 * 100 * MB) * 0.7


def test_machines_that_hold_the_same_do_not_make_the_search_explode() -> None:
    held = [machine(n, 8, holds=((n % 10 * 4, n % 10 * 4 + 4),)) for n in range(100) if n % 10 != 9]
    begun = time.process_time()
    check(place(shape(40), held), shape(40), held)
    assert time.process_time() - begun < 4
