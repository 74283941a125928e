"""When nodes load and unload layers: alone, and many with late views of one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_support import machine, shape

from swarmcpp.route.autoshard import (
    MAX_DOUBLINGS,
    TICKS,
    Acquire,
    Action,
    AutoShard,
    Drain,
    HeldStage,
    Nothing,
    Release,
    Resume,
    StageState,
    has_route,
)
from swarmcpp.route.placement import Machine, ModelShape, place

N_LAYERS = 8
Range = tuple[int, int]


def ready(node: str, first: int, last: int) -> HeldStage:
    return HeldStage(node, first, last, "ready")


def ticks(
    shard: AutoShard,
    wanted: Range | None,
    stages: Sequence[HeldStage],
    count: int = TICKS,
    *,
    fits: bool = True,
    idle: bool = True,
) -> list[Action]:
    return [shard.tick(wanted, stages, fits=fits, idle=idle) for _ in range(count)]


def test_it_moves_after_three_ticks_that_want_the_same() -> None:
    shard = AutoShard("aa", N_LAYERS)
    assert ticks(shard, (0, 4), [], 2) == [Nothing(), Nothing()]
    assert ticks(shard, (4, 8), []) == [Nothing(), Nothing(), Acquire(4, 8)]


def test_a_load_that_fails_is_tried_again_after_three_more() -> None:
    shard = AutoShard("aa", N_LAYERS)
    assert ticks(shard, (0, 4), [], 6)[3:] == [Nothing(), Nothing(), Acquire(0, 4)]


def test_it_acquires_then_drains_then_releases() -> None:
    shard, other = AutoShard("aa", N_LAYERS), ready("bb", 4, 8)
    old, new = ready("aa", 0, 8), ready("aa", 0, 4)
    assert ticks(shard, (0, 4), [old, other])[-1] == Acquire(0, 4)
    loading = [old, HeldStage("aa", 0, 4, "loading"), other]
    assert ticks(shard, (0, 4), loading, 5) == [Nothing()] * 5
    assert shard.tick((0, 4), [old, new, other], fits=True, idle=True) == Drain(0, 8)
    draining = [HeldStage("aa", 0, 8, "draining"), new, other]
    assert ticks(shard, (0, 4), draining, 5, idle=False) == [Nothing()] * 5
    assert shard.tick((0, 4), draining, fits=True, idle=True) == Release(0, 8)


def test_a_drained_range_waits_until_others_have_heard_of_it() -> None:
    shard = AutoShard("aa", N_LAYERS)
    stages = [ready("aa", 0, 8), ready("bb", 0, 8)]
    assert ticks(shard, None, stages)[-1] == Drain(0, 8)
    stages[0] = HeldStage("aa", 0, 8, "draining")
    assert ticks(shard, None, stages, TICKS + 1) == [*[Nothing()] * TICKS, Release(0, 8)]


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize(
    "others",
    [
        [],
        [ready("bb", 0, 6)],
        [HeldStage("bb", 0, 8, "loading")],
        [HeldStage("bb", 0, 8, "draining")],
        [ready("bb", 0, 5), ready("cc", 4, 8)],  # every layer, but no exact boundary
    ],
)
def test_the_last_replica_of_a_layer_is_kept(others: list[HeldStage], fits: bool) -> None:
    shard = AutoShard("aa", N_LAYERS)
    actions = ticks(shard, (0, 4), [ready("aa", 0, 8), *others], 20, fits=fits)
    assert not any(isinstance(action, Drain | Release) for action in actions)


def test_without_room_for_both_it_releases_first_if_others_hold_the_same() -> None:
    shard = AutoShard("aa", N_LAYERS)
    assert ticks(shard, (0, 4), [ready("aa", 0, 8), ready("bb", 0, 8)], fits=False)[-1] == Drain(0, 8)


def test_a_drain_is_undone_when_the_other_replica_dies_or_it_is_wanted_again() -> None:
    for wanted, others in ((None, []), ((0, 8), [ready("bb", 0, 8)])):
        shard = AutoShard("aa", N_LAYERS)
        assert ticks(shard, None, [ready("aa", 0, 8), ready("bb", 0, 8)])[-1] == Drain(0, 8)
        assert shard.tick(wanted, [HeldStage("aa", 0, 8, "draining"), *others], fits=True, idle=True) == Resume(0, 8)


def test_of_two_that_drain_the_same_the_least_id_goes_on() -> None:
    least, greater = AutoShard("aa", N_LAYERS), AutoShard("bb", N_LAYERS)
    both = [HeldStage("aa", 0, 8, "draining"), HeldStage("bb", 0, 8, "draining")]
    assert greater.tick(None, both, fits=True, idle=True) == Resume(0, 8)
    assert ticks(least, None, both, 9) == [Nothing()] * 9
    assert least.tick(None, [both[0], ready("bb", 0, 8)], fits=True, idle=True) == Release(0, 8)


def test_of_two_without_which_there_is_no_route_the_least_id_goes_on() -> None:
    """They hold parts of two different chains."""
    least, greater = AutoShard("aa", N_LAYERS), AutoShard("bb", N_LAYERS)
    chains = [
        *(ready("cc", 0, 3), HeldStage("aa", 3, 4, "draining"), ready("dd", 4, 8)),
        *(ready("ee", 0, 6), HeldStage("bb", 6, 8, "draining")),
    ]
    assert greater.tick(None, chains, fits=True, idle=True) == Resume(6, 8)
    assert least.tick(None, chains, fits=True, idle=True) == Nothing()


def test_a_node_whose_drain_was_undone_waits_longer_each_time() -> None:
    shard, stages = AutoShard("aa", N_LAYERS), [ready("aa", 0, 8), ready("bb", 0, 8)]
    alone, waits = [HeldStage("aa", 0, 8, "draining")], []
    for _ in range(12):
        waited = next(count for count in range(1, 100) if shard.tick(None, stages, fits=True, idle=True) == Drain(0, 8))
        waits.append(waited)
        assert shard.tick(None, alone, fits=True, idle=True) == Resume(0, 8)
    assert waits[0] == TICKS
    assert all(TICKS <= wait < TICKS + (TICKS << MAX_DOUBLINGS) for wait in waits)
    assert len(set(waits)) > 6


def test_one_waits_while_another_moves_the_same_layers() -> None:
    shard = AutoShard("aa", N_LAYERS)
    own, third = ready("aa", 0, 8), ready("cc", 0, 8)
    for state in ("loading", "draining"):
        moving = HeldStage("bb", 4, 8, state)  # type: ignore[arg-type]
        assert ticks(shard, None, [own, third, moving], 9) == [Nothing()] * 9
        assert ticks(shard, (2, 6), [own, third, moving], 9) == [Nothing()] * 9
    assert ticks(shard, None, [own, third])[-1] == Drain(0, 8)


# Many nodes -------------------------------------------------------------------------------------------------------


@dataclass
class SimNode:
    """A node that needs time to load and to drain; `held` in the order of acquiring."""

    shard: AutoShard
    machine: Machine
    load_ticks: int
    busy_ticks: int
    held: dict[Range, StageState] = field(default_factory=dict)
    left: dict[Range, int] = field(default_factory=dict)
    moves: int = 0

    def stages(self) -> list[HeldStage]:
        return [HeldStage(self.machine.node, *each, state) for each, state in self.held.items()]

    def act(self, action: Action) -> None:
        match action:
            case Acquire(first, last):
                self.held[first, last] = "loading"
                self.left[first, last] = self.load_ticks
            case Drain(first, last):
                self.held[first, last] = "draining"
                self.left[first, last] = self.busy_ticks
            case Resume(first, last):
                self.held[first, last] = "ready"
            case Release(first, last):
                assert self.held[first, last] == "draining"
                assert not self.left[first, last]
                del self.held[first, last]
        self.moves += not isinstance(action, Nothing)

    def pass_time(self) -> None:
        self.left = {each: max(0, ticks - 1) for each, ticks in self.left.items()}
        for each, state in self.held.items():
            if state == "loading" and not self.left[each]:
                self.held[each] = "ready"


# Many nodes see the same for many ticks.
placed = lru_cache(maxsize=1000)(place)


class Simulation:
    """Nodes that see one another `delays` ticks late, each with a plan of its own from what it sees, or one given."""

    def __init__(self, model: ModelShape, nodes: list[SimNode], delays: list[list[int]], fits: bool) -> None:
        self.model, self.nodes, self.delays, self.fits = model, nodes, delays, fits
        self.history = [self.now()]

    def now(self) -> list[list[HeldStage]]:
        return [node.stages() for node in self.nodes]

    def seen(self, by: int) -> list[list[HeldStage]]:
        late = [self.history[max(0, len(self.history) - 1 - delay)][i] for i, delay in enumerate(self.delays[by])]
        late[by] = self.nodes[by].stages()
        return late

    def planned(self, by: int, seen: list[list[HeldStage]]) -> Range | None:
        machines = []
        for node, stages in zip(self.nodes, seen, strict=True):
            kept = tuple((s.first, s.last) for s in reversed(stages) if s.state != "draining")
            machines.append(replace(node.machine, holds=kept))
        return placed(self.model, tuple(machines)).wanted(self.nodes[by].machine.node)

    def run(self, ticks: int, targets: list[Range | None] | None = None) -> int:
        """Ticks since the last move."""
        quiet = 0
        for _ in range(ticks):
            before = sum(node.moves for node in self.nodes)
            views = [self.seen(i) for i in range(len(self.nodes))]
            for i, (node, view) in enumerate(zip(self.nodes, views, strict=True)):
                wanted = targets[i] if targets is not None else self.planned(i, view)
                draining = [each for each, state in node.held.items() if state == "draining"]
                idle = all(not node.left[each] for each in draining)
                flat = [stage for stages in view for stage in stages]
                node.act(node.shard.tick(wanted, flat, fits=self.fits, idle=idle))
            for node in self.nodes:
                node.pass_time()
            self.history.append(self.now())
            loaded = [s for stages in self.history[-1] for s in stages if s.state != "loading"]
            assert has_route([HeldStage(s.node, s.first, s.last, "ready") for s in loaded], self.model.n_layers)
            quiet = 0 if sum(node.moves for node in self.nodes) > before else quiet + 1
        return quiet


@st.composite
def chains(draw: st.DrawFn, nodes: int) -> list[Range | None]:
    """A range for each of `nodes` so that some of them form a chain; the others hold anything or nothing."""
    length = draw(st.integers(1, min(nodes, 4)))
    inner = st.sets(st.integers(1, N_LAYERS - 1), min_size=length - 1, max_size=length - 1)
    edges = [0, *sorted(draw(inner)), N_LAYERS]
    ranges: list[Range | None] = list(pairwise(edges))
    for _ in range(nodes - length):
        first = draw(st.integers(0, N_LAYERS - 1))
        ranges.append(draw(st.sampled_from([None, (first, draw(st.integers(first + 1, N_LAYERS)))])))
    return draw(st.permutations(ranges))


@st.composite
def simulations(draw: st.DrawFn) -> Simulation:
    count = draw(st.integers(1, 6))
    held = draw(chains(count))
    nodes = []
    for number, each in enumerate(held):
        whom = machine(number, draw(st.floats(1.0, N_LAYERS)), ms=draw(st.sampled_from([5.0, 10.0, 20.0])))
        node = SimNode(AutoShard(whom.node, N_LAYERS), whom, draw(st.integers(1, 5)), draw(st.integers(0, 5)))
        node.held = {each: "ready"} if each else {}
        nodes.append(node)
    delay = st.lists(st.integers(0, TICKS - 1), min_size=count, max_size=count)
    delays = draw(st.lists(delay, min_size=count, max_size=count))
    return Simulation(shape(N_LAYERS), nodes, delays, draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(simulations(), st.data())
def test_nodes_reach_a_given_layout_and_lose_no_layer(simulation: Simulation, data: st.DataObject) -> None:
    targets = data.draw(chains(len(simulation.nodes)))
    assert simulation.run(150, targets) > 20
    assert max(node.moves for node in simulation.nodes) < 15
    if simulation.fits:
        assert [list(node.held) for node in simulation.nodes] == [[each] if each else [] for each in targets]


@settings(max_examples=10, deadline=None)
@given(simulations())
def test_nodes_that_each_plan_on_late_views_settle_and_lose_no_layer(simulation: Simulation) -> None:
    # Longer than any node waits after drains that were undone.
    assert simulation.run(500) > 120
    assert max(node.moves for node in simulation.nodes) < 20
