"""What a lane decides: how its decoding sequences are cut into micro-batches, and how long a pass may take. Pure."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate, pairwise

from swarmcpp.route.passes import Curve, pass_s

LEAST_LIMIT_S = 3.0
UNKNOWN_LIMIT_S = 60.0
SLACK = 8.0
"""Times what is expected that a pass may take: other heads use the same stages."""

STAGE_PATIENCE = 1 / 6
"""How much longer a head waits for each stage: each hop has a limit of its own, of the same rule (pipeline/calls.py)
and so shorter, and names the node that is silent, which the head cannot know."""


def cut(members: Sequence[int], count: int) -> list[list[int]]:
    """`members` in `count` runs of neighbours, whose lengths differ by one at most. `count` is within their number."""
    base, more = divmod(len(members), count)
    borders = accumulate([base + (index < more) for index in range(count)], initial=0)
    return [list(members[begin:end]) for begin, end in pairwise(borders)]


def regroup(groups: Sequence[Sequence[int]], members: Sequence[int], wanted: int) -> list[list[int]]:
    """The micro-batches of `members` (slots that decode, ascending), `wanted` of them, from those so far.

    Always intervals of `members`: stages compute neighbours together, and a group with a stranger between its members
    takes 40% longer in every pass (measured). Who ended leaves, and who is new joins the group around
    it, or the smaller of those beside it. All are cut anew only when the number of groups changes or they have become
    uneven: a member that changes its group makes it wait for a pass of another.
    """
    if not members:
        return []
    wanted = max(1, min(wanted, len(members)))
    alive = set(members)
    kept = [left for group in groups if (left := [member for member in group if member in alive])]
    if len(kept) == wanted:
        for member in sorted(alive.difference(*kept)):
            # Of two that it lies between both keep their order; around it there is only one.
            at = bisect_right([group[0] for group in kept], member)
            beside = kept[max(0, at - 1) : at + 1]
            inside = at > 0 and member < kept[at - 1][-1]
            insort(kept[at - 1] if inside else min(beside, key=len), member)
        sizes = [len(group) for group in kept]
        if max(sizes) - min(sizes) <= 1:
            return kept
    return cut(members, wanted)


def expected_s(curves: Sequence[Curve], rows: int) -> float | None:
    """Seconds that a pass of `rows` rows computes on all stages together; None: some are not measured."""
    return sum(pass_s(curve, rows, 0) for curve in curves) if all(curves) else None


def limit_s(expected: float | None, stages: int) -> float:
    """Seconds after which a pass that is expected to take so long on `stages`, waiting included, counts as failed."""
    limit = UNKNOWN_LIMIT_S if expected is None else max(LEAST_LIMIT_S, SLACK * expected)
    return limit * (1 + STAGE_PATIENCE * stages)
