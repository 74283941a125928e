"""Which machine holds which layers. Pure: the same machines give the same placement, in any order.

1. A machine that can hold the whole model is a replica of its own.
2. The others form pipelines: each machine in one at most, contiguous ranges, every layer of a pipeline on one machine.
   Up to EXACT machines all ways to group them are compared (dynamic programming over subsets). Further ones come in the
   order in which they joined: each makes a pipeline faster, or forms a new one with machines that belong to none, or
   stays out, whichever gives most; from time to time all are grouped afresh and the better layout is taken.
3. A machine that makes nothing faster stays out.
4. What machines hold already stays, unless the new layout is faster by `gain`.

So the machine that joined last never lowers the tokens/s of a swarm that holds nothing yet, nor of up to EXACT_HELD
machines that hold a placement; of more, those that hold the same are paired anew, the fastest first. Between layouts
that differ by less than `gain` the one that is held wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from swarmcpp.peers import NodeId
from swarmcpp.route.costs import (
    FEW_PERMUTED,
    MOST_PERMUTED,
    Costs,
    Machine,
    ModelShape,
    Pipeline,
    PlacedStage,
    Placement,
    Spare,
)
from swarmcpp.route.placement_words import size

__all__ = ["Expected", "Placement", "expected", "place"]

GAIN: Final = 0.1
"""What another layout must win by before machines load other layers: measured rates differ by as much."""

EXACT: Final = 6
"""Machines of which all groupings are compared: 3**6 pairs of subsets, 64 chains to order."""

EXACT_HELD: Final = 8
"""The same where all hold something already: 3**8 pairs of subsets and nothing to order."""

AFRESH_EVERY: Final = 8
"""Grouping afresh is tried for each eighth machine."""

SLOWEST_TRIED: Final = 2
"""Pipelines, the slowest first, that a machine is tried in."""

_BETTER: Final = 1 + 1e-9
"""Less than that is rounding."""

Range = tuple[int, int]
Group = tuple[Machine, ...]


@dataclass(frozen=True, slots=True)
class Expected:
    """Tokens/s of one stream on the fastest pipeline and of all pipelines with all slots in use, and the least TTFT in
    seconds for a prompt of 512 tokens; zeros and infinity where the model cannot run. Formulas: route/costs.py."""

    one_tps: float
    all_tps: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class _Layout:
    pipelines: tuple[Pipeline, ...]
    idle: Group

    @property
    def tps(self) -> float:
        return math.fsum(pipeline.tps for pipeline in self.pipelines)


def expected(placement: Placement) -> Expected:
    """What `placement` yields."""
    return Expected(
        max((pipeline.one_tps for pipeline in placement.pipelines), default=0.0),
        placement.tps,
        min((pipeline.ttft_s for pipeline in placement.pipelines), default=math.inf),
    )


def place(shape: ModelShape, machines: Sequence[Machine], *, gain: float = GAIN) -> Placement:
    """Ranges for all machines; see the module. Six machines take up to 0.4 s, a hundred 0.7 s.

    A swarm that cannot hold the model gets a placement without pipelines that says what is missing.
    """
    costs, n_layers = Costs(shape), shape.n_layers
    ordered = list({m.node: m for m in sorted(machines, key=lambda m: (m.joined_at, m.node))}.values())
    whole = [m for m in ordered if costs.reach(m, 0) == n_layers]
    small = tuple(m for m in ordered if costs.reach(m, 0) < n_layers)
    replicas = tuple(costs.pipeline((m,), (0, n_layers)) for m in whole)
    search = _Search(costs, small)
    best, held = search.grow(small), search.keep(small)
    base = math.fsum(pipeline.tps for pipeline in replicas)
    kept = bool(held.pipelines) and best.tps + base < (held.tps + base) * (1 + gain)
    layout = held if kept else best
    pipelines = replicas + layout.pipelines
    if not pipelines:
        return _incomplete(costs, small, gain)
    spare = tuple(Spare(m.node, m.name, search.why_idle(m, layout, bool(replicas))) for m in layout.idle)
    return Placement(shape, pipelines, spare, kept=kept and best.tps > held.tps * _BETTER)


class _Search:
    """Groupings of machines that hold a part each; remembers the chains that it solved."""

    def __init__(self, costs: Costs, machines: Sequence[Machine]) -> None:
        self._costs = costs
        self._machines = {m.node: m for m in machines}
        self._solved: dict[tuple[NodeId, ...], Pipeline | None] = {}

    def chain(self, members: Group, permuted: int = FEW_PERMUTED) -> Pipeline | None:
        nodes = tuple(m.node for m in members)
        if nodes not in self._solved:
            self._solved[nodes] = self._costs.best(members, permuted)
        return self._solved[nodes]

    def grow(self, machines: Group) -> _Layout:
        """The best layout that was found for machines in the order in which they joined."""
        groups, idle = self._exact(machines[:EXACT], lambda members: self.chain(members, MOST_PERMUTED))
        best = self._layout(groups, idle)
        for count in range(EXACT + 1, len(machines) + 1):
            idle = (*idle, machines[count - 1])
            best = self._layout(groups, idle)
            ways = [self._with_one_more(groups, idle)]
            if count % AFRESH_EVERY == 0:
                ways.append(self._afresh(machines[:count]))
            for new_groups, new_idle in ways:
                layout = self._layout(new_groups, new_idle)
                if layout.tps > best.tps * _BETTER:
                    best, groups, idle = layout, new_groups, new_idle
        return best

    def _exact(self, machines: Group, chain: Callable[[Group], Pipeline | None]) -> tuple[list[Group], Group]:
        """The best groups of all: best(S) = max of best(S - first) and, over T in S with first, chain(T) + best(S -
        T)."""
        full = 1 << len(machines)
        best: list[tuple[float, tuple[Group, ...]]] = [(0.0, ())]
        for mask in range(1, full):
            lowest = mask & -mask
            top = best[mask ^ lowest]
            part = mask
            while part:
                if part & lowest:
                    members = tuple(m for i, m in enumerate(machines) if part >> i & 1)
                    pipeline, rest = chain(members), best[mask ^ part]
                    if pipeline is not None and pipeline.tps + rest[0] > top[0] * _BETTER:
                        top = (pipeline.tps + rest[0], (members, *rest[1]))
                part = (part - 1) & mask
            best.append(top)
        groups = list(best[-1][1])
        return groups, _without(machines, groups)

    def _with_one_more(self, groups: list[Group], idle: Group) -> tuple[list[Group], Group]:
        group = self._smallest(idle)
        return ([*groups, group], _without(idle, [group])) if group else (groups, idle)

    def _afresh(self, machines: Group) -> tuple[list[Group], Group]:
        groups: list[Group] = []
        while group := self._smallest(machines):
            groups.append(group)
            machines = _without(machines, [group])
        return groups, machines

    def _smallest(self, machines: Group) -> Group:
        """The fewest of the roomiest machines that hold the model, by the order of joining; () if all together do
        not."""
        roomy = sorted(machines, key=lambda m: (-m.memory, m.pass_s))
        for count in range(2, len(roomy) + 1):
            taken = {m.node for m in roomy[:count]}
            members = tuple(m for m in machines if m.node in taken)
            if self.chain(members) is not None:
                return members
        return ()

    def _layout(self, groups: Sequence[Group], idle: Group) -> _Layout:
        """Groups as pipelines; idle machines, the first to join first, go where they make one faster."""
        chains = [(group, pipeline) for group in groups if (pipeline := self.chain(group)) is not None]
        out: list[Machine] = []
        for machine in idle:
            gains = []
            for at in sorted(range(len(chains)), key=lambda at: (chains[at][1].tps, at))[:SLOWEST_TRIED]:
                group, pipeline = chains[at]
                faster = self.chain((*group, machine))
                if faster is not None and faster.tps > pipeline.tps * _BETTER:
                    gains.append((faster.tps - pipeline.tps, at, faster))
            if gains:
                _, at, faster = max(gains, key=lambda each: each[0])
                chains[at] = ((*chains[at][0], machine), faster)
            else:
                out.append(machine)
        return _Layout(tuple(pipeline for _, pipeline in chains), tuple(out))

    def keep(self, machines: Group) -> _Layout:
        """A layout in which all machines of pipelines keep what they hold; free ones fill gaps and form new
        pipelines."""
        holders = tuple(m for m in machines if m.holds)
        groups = self._exact(holders, self._as_held)[0] if len(holders) <= EXACT_HELD else []
        chains = [pipeline for group in groups if (pipeline := self._as_held(group)) is not None]
        rest = _without(machines, groups)
        while chain := self._held_chain(rest):
            order, bounds = chain
            chains.append(self._costs.pipeline(order, bounds))
            rest = _without(rest, [order])
        if not chains:
            return _Layout((), machines)
        grown = self.grow(rest)
        return _Layout((*chains, *grown.pipelines), grown.idle)

    def _as_held(self, machines: Group) -> Pipeline | None:
        """What they hold as a pipeline; None where that is not every layer once."""
        order = tuple(sorted(machines, key=lambda m: m.holds[0]))
        bounds = [0, *(m.holds[0][1] for m in order)]
        whole = bounds[-1] == self._costs.shape.n_layers
        whole = whole and all(m.holds[0] == held for m, held in zip(order, pairwise(bounds), strict=True))
        return self._costs.pipeline(order, bounds) if whole else None

    def _held_chain(self, machines: Group) -> tuple[Group, list[int]] | None:
        """A chain of what machines hold, with as few layers in gaps as possible; free machines fill the gaps."""
        n_layers = self._costs.shape.n_layers
        holders = [m for m in machines if m.holds and 0 <= m.holds[0][0] < m.holds[0][1] <= n_layers]
        free = tuple(m for m in machines if not m.holds)
        order: Group = ()
        bounds = [0]
        for last, holder in _fewest_gaps(self._costs, holders) if holders else ():
            part: tuple[Group, list[int]] | None = ((holder,), [bounds[-1], last]) if holder else None
            part = part or self._fill_gap(bounds[-1], last, free)
            if part is None:
                return None
            order, bounds, free = order + part[0], bounds + part[1][1:], _without(free, [part[0]])
        return (order, bounds) if any(m.holds for m in order) else None

    def _fill_gap(self, first: int, last: int, free: Group) -> tuple[Group, list[int]] | None:
        roomy = sorted(free, key=lambda m: (-m.memory, m.pass_s))[: last - first]
        for count in range(1, len(roomy) + 1):
            bounds = self._costs.split(roomy[:count], first, last)
            if bounds is not None:
                return tuple(roomy[:count]), bounds
        return None

    def why_idle(self, machine: Machine, layout: _Layout, replicas: bool) -> str:
        """Why `machine` has no part in `layout`, in words."""
        costs, n_layers = self._costs, self._costs.shape.n_layers
        if not any(costs.reach(machine, first) > first for first in range(n_layers)):
            need = min(costs.bytes(first, first + 1) for first in range(n_layers))
            return f"it has {size(machine.memory)} and the smallest stage of one layer needs {size(need)}"
        if not layout.pipelines:
            held = "is held whole by other machines" if replicas else "has no other machine"
            return f"the model {held}, and the machines that cannot hold it whole cannot hold it together either"
        slowest = min(layout.pipelines, key=lambda each: each.tps)
        group = tuple(self._machines[stage.node] for stage in slowest.stages)
        if len(group) >= n_layers:
            return "every layer has a machine of its own already"
        with_it = self.chain((*group, machine))
        if with_it is None:
            return "no order of the machines leaves it a range that fits into its memory"
        names = " and ".join(stage.name for stage in slowest.stages)
        if with_it.tps > slowest.tps * _BETTER:
            return (
                f"{names} and it would give {with_it.tps:.3g} tokens/s instead of {slowest.tps:.3g}, too little for "
                f"machines to load other layers"
            )
        slower = "slower" if with_it.tps < slowest.tps / _BETTER else "no faster"
        rates = f"adding it would make answers {slower}, {with_it.tps:.3g} tokens/s from {names} and it instead of "
        rates += f"{slowest.tps:.3g}, because"
        bottleneck = max(stage.pass_s for stage in slowest.stages)
        if machine.pass_s >= bottleneck:
            return f"{rates} one layer takes it {_ms(machine.pass_s)} a token and their slowest stage {_ms(bottleneck)}"
        return f"{rates} the links would take {_ms(with_it.hops_s)} a token and now take {_ms(slowest.hops_s)}"


def _fewest_gaps(costs: Costs, holders: Sequence[Machine]) -> list[tuple[int, Machine | None]]:
    """The way through all layers over held ranges, and gaps (None) of as few layers as possible: (end, who).

    Of several such ways the one with the least time of passes and hops: fast machines that are near go together.
    """
    ends = sorted({0, costs.shape.n_layers, *(edge for m in holders for edge in m.holds[0])})
    ways: dict[int, tuple[int, float, list[tuple[int, Machine | None]]]] = {0: (0, 0.0, [])}
    for before, end in pairwise(ends):
        gap, seconds, way = ways[before]
        # Gaps behind one another are one gap.
        merged = way[:-1] if way and way[-1][1] is None else way
        candidates = [(gap + end - before, seconds, [*merged, (end, None)])]
        for holder in holders:
            if holder.holds[0][1] == end:
                first = holder.holds[0][0]
                gap, seconds, way = ways[first]
                last_one = way[-1][1] if way else None
                hop = costs.hop_s(last_one, holder) if last_one is not None else 0.0
                candidates.append((gap, seconds + hop + costs.pass_s(holder, first, end), [*way, (end, holder)]))
        ways[end] = min(candidates, key=lambda each: each[:2])
    return ways[costs.shape.n_layers][2]


def _incomplete(costs: Costs, machines: Group, gain: float) -> Placement:
    """As many layers as can be held: what is held stays, unless starting from the first layer covers more by `gain`."""
    shape = costs.shape
    roomy = sorted(machines, key=lambda m: (-m.memory, m.pass_s))
    held: list[tuple[int, int, Machine]] = []
    for machine in machines:
        for first, last in machine.holds[:1]:
            if 0 <= first < last <= shape.n_layers and all(last <= a or b <= first for a, b, _ in held):
                held.append((first, last, machine))
    kept = _gaps_filled(costs, held, roomy)
    fresh = _gaps_filled(costs, [], roomy)
    stages = fresh if _layers(fresh) >= _layers(kept) * (1 + gain) else kept
    placed = tuple(PlacedStage(m.node, m.name, a, b, costs.bytes(a, b), costs.pass_s(m, a, b)) for a, b, m in stages)
    missing = tuple(_holes(stages, shape.n_layers))
    taken = {m.node for _, _, m in stages}
    why = "the model cannot be held yet, and no missing layer fits into its memory"
    return Placement(
        shape,
        (),
        tuple(Spare(m.node, m.name, why) for m in machines if m.node not in taken),
        placed,
        missing,
        sum(costs.bytes(first, last) for first, last in missing),
    )


def _gaps_filled(
    costs: Costs, held: list[tuple[int, int, Machine]], roomy: list[Machine]
) -> list[tuple[int, int, Machine]]:
    stages = list(held)
    for machine in roomy:
        if any(m is machine for _, _, m in stages):
            continue
        fits = [(a, min(b, costs.reach(machine, a))) for a, b in _holes(stages, costs.shape.n_layers)]
        first, last = max(fits, key=lambda each: (each[1] - each[0], -each[0]), default=(0, 0))
        if last > first:
            stages.append((first, last, machine))
    return sorted(stages, key=lambda stage: stage[:2])


def _holes(stages: Sequence[tuple[int, int, Machine]], n_layers: int) -> list[Range]:
    edges = [0, *(edge for a, b, _ in sorted(stages, key=lambda stage: stage[:2]) for edge in (a, b)), n_layers]
    return [(a, b) for at, (a, b) in enumerate(pairwise(edges)) if at % 2 == 0 and a < b]


def _layers(stages: Sequence[tuple[int, int, Machine]]) -> int:
    return sum(last - first for first, last, _ in stages)


def _without(machines: Group, groups: Sequence[Group]) -> Group:
    taken = {m.node for group in groups for m in group}
    return tuple(m for m in machines if m.node not in taken)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"
