"""How long to wait for a pass, and for whom. Pure.

The head says with each pass how long it waits, and each node that sends it on waits for a share of what is left. So
whoever is next to a silent stage gives up before all behind it, and names that stage, however little is known of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from swarmcpp.route.passes import Curve, pass_s

LEAST_S: Final = 3.0
"""The shortest limit: a machine that swaps or whose link stalls for a moment is not lost."""

UNKNOWN_S: Final = 60.0
"""The limit of passes of which nothing is known: the first one reads all weights from a cold disk."""

MOST_S: Final = 3600.0
"""The longest limit that a node takes from another one."""

SLACK: Final = 8.0
"""Times what is expected that a pass may take: other heads use the same stages."""

STAGES: Final = 6
"""Of so many stages as much longer is waited as of none: what each hop's limit is shorter than that before it."""

FADING: Final = 0.9
"""Of what the longest pass lately counts, at each later one. A long one counts at once: queues come and go."""


def expected_s(curves: Sequence[Curve], rows: int) -> float | None:
    """Seconds that a pass of `rows` rows computes on all stages together; None: some are not measured."""
    return sum(pass_s(curve, rows, 0) for curve in curves) if all(curves) else None


def limit_s(expected: float | None, stages: int) -> float:
    """Seconds after which a head gives up a pass through `stages` that is expected to take so long, queues included."""
    limit = UNKNOWN_S if expected is None else max(LEAST_S, SLACK * expected)
    return min(MOST_S, limit * (STAGES + stages) / STAGES)


def hop_s(limit: float, stages: int) -> float:
    """Seconds that a hop waits for a pass through `stages`, where who asked for it waits `limit` from now on."""
    return limit * (STAGES + stages - 1) / (STAGES + stages)
