"""The simulated swarms of bench/parallax.py."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from bench import parallax
from bench.parallax import STREAMS, exhaustive, fastest, greedy, nearest, small_swarm, throughput


def test_greedy_chains_are_chains_and_none_is_cheaper_than_the_cheapest() -> None:
    rng = random.Random(1)
    worse = 0
    for _ in range(50):
        swarm = small_swarm(rng)
        best = exhaustive(swarm)
        assert swarm.cost(swarm.route()) == pytest.approx(swarm.cost(best), rel=0.01)
        for price in (nearest, fastest):
            chain = greedy(swarm, price)
            assert (chain[0].first, chain[-1].last) == (0, swarm.n_layers)
            assert all(before.last == after.first for before, after in pairwise(chain))
            assert swarm.cost(chain) >= swarm.cost(best)
            worse += swarm.cost(chain) > 1.01 * swarm.cost(best)
    assert worse


def test_many_streams_have_more_throughput_than_one() -> None:
    swarm = small_swarm(random.Random(2))
    assert throughput(swarm, STREAMS) > throughput(swarm, 1) > 0


def test_every_claim_holds_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in {"SMALL_SWARMS": 20, "LARGE_SWARMS": 2, "SIMULATIONS": 20, "SEARCHES": 1}.items():
        monkeypatch.setattr(parallax, name, count)
    for name, scenario in parallax.SCENARIOS.items():
        outcome = scenario(3)
        # The time of a search is for a quiet machine.
        assert name == "time" or all(verdict.holds for verdict in outcome.verdicts)
        assert all(outcome.figures[0].samples.values())
