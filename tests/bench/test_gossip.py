"""The simulated swarm."""

from __future__ import annotations

from bench.gossip import MAX_IN_BYTES_S, outcome, simulate


def test_a_small_swarm_agrees_and_a_death_is_noticed() -> None:
    found = simulate(6, seed=1)
    assert found.right
    assert found.false_alarms == 0
    assert len(found.suspected_s) == len(found.gone_s) == 5
    assert 2 <= min(found.suspected_s) <= max(found.suspected_s) <= 5
    assert 9 <= min(found.gone_s) <= max(found.gone_s) <= 12
    assert found.news_s
    # A batch of 0.2 s and a link of at most 5 ms; only lost news take longer.
    assert 0.2 <= sorted(found.news_s)[0] <= 0.206
    result = outcome({"6 nodes": found})
    assert all(verdict.holds for verdict in result.verdicts)
    assert 0 < result.figures[1].median("6 nodes") < MAX_IN_BYTES_S


def test_the_same_seed_gives_the_same_swarm() -> None:
    assert simulate(4, seed=2) == simulate(4, seed=2)
