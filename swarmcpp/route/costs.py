"""What a chain of layer ranges needs and yields: memory, tokens/s and TTFT. Pure functions of shapes and measured
times.

A stage [first, last) on one machine takes, for one row and for one tile of a prompt,

    pass  = layer_s * (bytes of its layers, and of the output head if it is the tail) / mean bytes of a layer
    tile  = prefill_layer_s * (last - first)

because a decode pass reads every weight once, while the head sees only the last row of a prompt. A hop takes half a
round trip and the transfer of its rows; ids go back from the tail to the head, so a chain of k > 1 stages has k hops.

`slots` streams over one chain are cut into M micro-batches. A pass of b rows takes h(b) = 1 + (b - 1) * ROW_SHARE times
that of one row, all stages work at once, and no micro-batch overtakes its own token, so

    cycle(M)  = max(M * h(slots / M) * slowest pass, h(slots / M) * all passes + hops)
    all tok/s = slots / min over M of cycle(M)
    one tok/s = 1 / (all passes + hops)
    TTFT      = all tiles + hops + (tiles of the prompt - 1) * max(slowest tile, slowest transfer of a tile's rows)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise, permutations
from typing import Final

from swarmcpp.core import TILE_ROWS
from swarmcpp.peers import NodeId
from swarmcpp.route.replicas import ROW_SHARE, SLOW_PASS_S

EMBEDDING_ROWS_BYTES: Final = 16 << 20
"""What the head keeps of the embedding, at most: the table is mapped, and only the rows of tokens are read."""

UNKNOWN_HOP_RTT_S: Final = 0.005
"""Between two machines of a chain whose link nobody measured: slow for a LAN, so that it never looks free."""

PROMPT_TOKENS: Final = 512
"""The prompt whose TTFT is told."""

LEAST_S: Final = 1e-6
MOST_S: Final = 60.0
"""Seconds of one layer outside these are taken for unknown."""

F32_BYTES: Final = 4
_ALL_SPLITS: Final = 64
"""Up to as many ways to cut a range into stages all are compared."""

_SLACK: Final = 1.15
_SLACK_LEVELS: Final = 10
_SEARCH_STEPS: Final = 7
"""Halvings of what is left between two such steps."""

_NEAR: Final = 1.02
"""An order that could be faster by less than this is not tried."""

MOST_PERMUTED: Final = 5
FEW_PERMUTED: Final = 3
"""Machines of a chain of which all orders are tried: where all groupings are compared, and in larger swarms."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as placement sees it, sizes in bytes. `head_bytes`: output head and final norm; `compute_buffer_bytes`:
    what an engine needs beside weights and KV, whatever its layers."""

    fingerprint: bytes
    n_layers: int
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    kv_bytes_per_token_layer: int
    n_embd: int
    ctx_size: int
    slots: int
    compute_buffer_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """A node that may hold layers. `memory`: bytes it may use, what it holds now included."""

    node: NodeId
    name: str
    memory: int
    layer_s: float = 0.0
    """Seconds that one layer takes for a decode pass of one row; 0: unknown, priced as SLOW_PASS_S."""
    prefill_layer_s: float = 0.0
    """Seconds that one layer takes for a tile of 64 prompt tokens; 0: unknown, priced likewise."""
    holds: tuple[tuple[int, int], ...] = ()
    """Ranges [first, last) that it holds or loads now; the first one is what it will keep, so the latest acquired."""
    link_s: float | Mapping[NodeId, float] = UNKNOWN_HOP_RTT_S
    """Round trips in seconds: one to everybody, or by peer."""
    bytes_per_s: float = 0.0
    """Rate of its link; 0: unknown, and transfers are not priced."""
    joined_at: float = 0.0
    """Orders the machines (then `node` does)."""

    @property
    def pass_s(self) -> float:
        """Seconds of one decode pass of one layer, never free."""
        return _priced(self.layer_s)

    @property
    def tile_s(self) -> float:
        """Seconds of one prompt tile of one layer, never free."""
        return _priced(self.prefill_layer_s)


@dataclass(frozen=True, slots=True)
class PlacedStage:
    """A range [first, last) on a machine, its memory in bytes, and the seconds of one decode pass of one row."""

    node: NodeId
    name: str
    first: int
    last: int
    n_bytes: int
    pass_s: float


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages that together cover the model; one stage is a replica. Formulas: the module."""

    stages: tuple[PlacedStage, ...]
    hops_s: float
    tps: float
    one_tps: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Spare:
    """A machine that gets nothing, and the reason in words."""

    node: NodeId
    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Who shall hold what. Without any pipeline the model cannot run: `partial` is what can be held of it all the same,
    `missing` the ranges that nobody can, and `missing_bytes` what machines would need to hold those."""

    shape: ModelShape
    pipelines: tuple[Pipeline, ...]
    spare: tuple[Spare, ...] = ()
    partial: tuple[PlacedStage, ...] = ()
    missing: tuple[tuple[int, int], ...] = ()
    missing_bytes: int = 0
    kept: bool = False
    """Whether machines keep what they hold although another layout would be faster, but not by enough."""

    @property
    def stages(self) -> tuple[PlacedStage, ...]:
        """All stages, those of pipelines first."""
        return tuple(stage for pipeline in self.pipelines for stage in pipeline.stages) + self.partial

    @property
    def tps(self) -> float:
        """Tokens/s of all pipelines together, each with all its slots in use."""
        return math.fsum(pipeline.tps for pipeline in self.pipelines)

    def wanted(self, node: NodeId) -> tuple[int, int] | None:
        """The range that `node` shall hold; None: nothing."""
        return next(((stage.first, stage.last) for stage in self.stages if stage.node == node), None)


def stage_bytes(shape: ModelShape, first: int, last: int, slots: int, ctx: int) -> int:
    """Bytes that a stage [first, last) needs: its layers, their KV for `slots` slots of `ctx` tokens, the buffers, the
    output head if it is the tail, and if it is the head the embedding's rows, EMBEDDING_ROWS_BYTES at most."""
    kv = (last - first) * slots * ctx * shape.kv_bytes_per_token_layer
    ends = shape.head_bytes if last == shape.n_layers else 0
    ends += min(shape.embedding_bytes, EMBEDDING_ROWS_BYTES) if first == 0 else 0
    return sum(shape.layer_bytes[first:last]) + kv + ends + shape.compute_buffer_bytes


def rtt_s(one: Machine, other: Machine) -> float:
    """Round trip between two machines: the longer one where both tell theirs."""
    told = [
        link.get(peer.node) if isinstance(link, Mapping) else link
        for link, peer in ((one.link_s, other), (other.link_s, one))
    ]
    return max((rtt for rtt in told if rtt is not None and 0 <= rtt < math.inf), default=UNKNOWN_HOP_RTT_S)


def _priced(seconds: float) -> float:
    # What peers tell may be anything; outside these bounds it is no measurement.
    return seconds if LEAST_S <= seconds <= MOST_S else SLOW_PASS_S


class Costs:
    """One model's costs by prefix sums, and the search for the ranges of an ordered chain. Immutable."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        mean = max(1.0, sum(shape.layer_bytes) / shape.n_layers)
        tail = [0] * (shape.n_layers - 1) + [shape.head_bytes]
        self._work = [0.0, *accumulate((n + head) / mean for n, head in zip(shape.layer_bytes, tail, strict=True))]
        kv = shape.slots * shape.ctx_size * shape.kv_bytes_per_token_layer
        self._memory = [0, *accumulate(n + kv + end for n, end in zip(shape.layer_bytes, tail, strict=True))]
        self._rows = min(shape.embedding_bytes, EMBEDDING_ROWS_BYTES)

    def bytes(self, first: int, last: int) -> int:
        """`stage_bytes` with the model's own slots and context."""
        rows = self._rows if first == 0 else 0
        return self._memory[last] - self._memory[first] + rows + self.shape.compute_buffer_bytes

    def pass_s(self, machine: Machine, first: int, last: int) -> float:
        """Seconds of one decode pass of one row through [first, last)."""
        return machine.pass_s * (self._work[last] - self._work[first])

    def reach(self, machine: Machine, first: int, limit_s: float = math.inf) -> int:
        """The last layer boundary up to which `machine` can hold layers from `first` with a pass of at most
        `limit_s`."""
        room = machine.memory - self.shape.compute_buffer_bytes - (self._rows if first == 0 else 0)
        last = bisect_right(self._memory, self._memory[first] + room) - 1
        if limit_s < math.inf:
            last = min(last, bisect_right(self._work, self._work[first] + limit_s / machine.pass_s + 1e-9) - 1)
        return last

    def tps(self, slowest_s: float, passes_s: float, hops_s: float) -> float:
        """Tokens/s of a chain with all slots in use; see the module."""
        slots, best = self.shape.slots, math.inf
        for batches in range(1, slots + 1):
            height = 1 + (slots / batches - 1) * ROW_SHARE
            busy, around = batches * height * slowest_s, height * passes_s + hops_s
            best = min(best, max(busy, around))
            if busy >= around:
                break
        return slots / best

    def hop_s(self, one: Machine, other: Machine, rows: int = 1) -> float:
        """Seconds from one machine to the next with `rows` rows."""
        return rtt_s(one, other) / 2 + self.transfer_s(one, other, rows)

    def transfer_s(self, one: Machine, other: Machine, rows: int) -> float:
        """Seconds that the rows take on the slower of two links."""
        rates = [machine.bytes_per_s for machine in (one, other) if machine.bytes_per_s > 0]
        return rows * self.shape.n_embd * F32_BYTES / min(rates) if rates else 0.0

    def hops(self, order: Sequence[Machine], rows: int = 1) -> float:
        """Seconds of all hops of a chain, the ids' way back included."""
        if len(order) < 2:
            return 0.0
        return math.fsum(self.hop_s(a, b, rows) for a, b in pairwise(order)) + rtt_s(order[-1], order[0]) / 2

    def pipeline(self, order: Sequence[Machine], bounds: Sequence[int]) -> Pipeline:
        """The chain in which order[i] holds [bounds[i], bounds[i + 1])."""
        stages = tuple(
            PlacedStage(m.node, m.name, first, last, self.bytes(first, last), self.pass_s(m, first, last))
            for m, (first, last) in zip(order, pairwise(bounds), strict=True)
        )
        passes = [stage.pass_s for stage in stages]
        tiles = [m.tile_s * (last - first) for m, (first, last) in zip(order, pairwise(bounds), strict=True)]
        sent = [self.transfer_s(a, b, TILE_ROWS) for a, b in pairwise(order)]
        more = -(-PROMPT_TOKENS // TILE_ROWS) - 1
        hops = self.hops(order)
        return Pipeline(
            stages,
            hops,
            self.tps(max(passes), math.fsum(passes), hops),
            1 / (math.fsum(passes) + hops),
            math.fsum(tiles) + self.hops(order, TILE_ROWS) + more * max(tiles + sent),
        )

    def fill(self, order: Sequence[Machine], first: int, last: int, limit_s: float = math.inf) -> list[int] | None:
        """Boundaries of a chain over [first, last) in which each machine takes as much as it can within memory and
        `limit_s`, and at least one layer; None when that does not cover the range."""
        bounds = [first]
        for left, machine in zip(range(len(order) - 1, -1, -1), order, strict=True):
            bounds.append(min(self.reach(machine, bounds[-1], limit_s), last - left))
            if bounds[-1] <= bounds[-2]:
                return None
        return bounds if bounds[-1] == last else None

    def split(self, order: Sequence[Machine], first: int, last: int) -> list[int] | None:
        """The fastest boundaries that were found for a chain in this order; None when none were.

        Where they are few, all are compared. Otherwise the slowest pass is made small, by steps of `_SLACK` and then by
        halving, and what was found on the way is compared: a little more of it lets faster machines take more.
        """
        hops, parts = self.hops(order), len(order)
        if math.comb(last - first - 1, parts - 1) <= _ALL_SPLITS:
            inner = combinations(range(first + 1, last), parts - 1)
            every: list[list[int]] = [[first, *cuts, last] for cuts in inner]
            found = [bounds for bounds in every if self._fits(order, bounds)]
        else:
            found = self._filled(order, first, last)
        return max(found, key=lambda bounds: self._rate(order, bounds, hops), default=None)

    def _filled(self, order: Sequence[Machine], first: int, last: int) -> list[list[int]]:
        low = (self._work[last] - self._work[first]) / math.fsum(1 / machine.pass_s for machine in order)
        found: list[list[int]] = []
        high = math.inf
        for limit in (*(low * _SLACK**level for level in range(1, _SLACK_LEVELS + 1)), math.inf):
            bounds = self.fill(order, first, last, limit)
            if bounds is not None and bounds not in found[-1:]:
                found.append(bounds)
                high = min(high, max(self._passes(order, bounds)))
        for _ in range(_SEARCH_STEPS if found else 0):
            middle = (low + high) / 2
            bounds = self.fill(order, first, last, middle)
            if bounds is None:
                low = middle
            else:
                found.append(bounds)
                high = max(self._passes(order, bounds))
        return found

    def _fits(self, order: Sequence[Machine], bounds: Sequence[int]) -> bool:
        return all(self.reach(m, a) >= b for m, (a, b) in zip(order, pairwise(bounds), strict=True))

    def _passes(self, order: Sequence[Machine], bounds: Sequence[int]) -> list[float]:
        return [self.pass_s(m, a, b) for m, (a, b) in zip(order, pairwise(bounds), strict=True)]

    def _rate(self, order: Sequence[Machine], bounds: Sequence[int], hops_s: float) -> float:
        passes = self._passes(order, bounds)
        return self.tps(max(passes), math.fsum(passes), hops_s)

    def best(self, machines: Sequence[Machine], permuted: int = FEW_PERMUTED) -> Pipeline | None:
        """The fastest chain of exactly these machines that was found; None when none was.

        All orders of up to `permuted` machines are tried.
        """
        if sum(m.memory for m in machines) < self._memory[-1] or len(machines) > self.shape.n_layers:
            return None
        found: tuple[float, tuple[Machine, ...], list[int]] | None = None
        n_layers, total = self.shape.n_layers, self._work[-1]
        fastest, even = min(m.pass_s for m in machines), math.fsum(1 / m.pass_s for m in machines)
        for order in _orders(machines, permuted):
            # No split of this order does better than even work at the pace of the fastest machine.
            bound = self.tps(total / even, total * fastest, self.hops(order))
            if found is not None and bound <= found[0] * _NEAR:
                continue
            bounds = self.split(order, 0, n_layers)
            if bounds is not None:
                tps = self._rate(order, bounds, self.hops(order))
                if found is None or tps > found[0] * (1 + 1e-9):
                    found = (tps, order, bounds)
        return None if found is None else self.pipeline(found[1], found[2])


def _orders(machines: Sequence[Machine], permuted: int) -> list[tuple[Machine, ...]]:
    """Orders of a chain that are tried: all of up to `permuted` machines; of more, the roomiest as the tail (it must
    have room for the output head) and the others behind one another by the shortest round trip from there."""
    if len(machines) <= permuted:
        return list(permutations(machines))
    return [_towards(max(machines, key=lambda m: m.memory), machines)]


def _towards(tail: Machine, machines: Sequence[Machine]) -> tuple[Machine, ...]:
    order, rest = [tail], [m for m in machines if m is not tail]
    while rest:
        order.append(min(rest, key=lambda m: rtt_s(m, order[-1])))
        rest.remove(order[-1])
    return tuple(reversed(order))
