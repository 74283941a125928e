"""How the decoding sequences of a lane are cut into micro-batches. Pure."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate, pairwise


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
