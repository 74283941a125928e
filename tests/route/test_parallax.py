"""The route that finishes a request first."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcpp.peers import ObservedLatency
from swarmcpp.route.parallax import (
    DEFAULT_LINK,
    Link,
    Route,
    Stage,
    Work,
    chain_exists,
    cost,
    find_route,
    known_links,
    missing_layers,
)
from swarmcpp.route.passes import Curve, sound_curve

Links = dict[tuple[str, str], Link]
HEAD = "head"
N_LAYERS = 12
LAN = Link(0.001, 1e8)
ONE_PASS = Work(row_bytes=1000)


def flat(seconds: float) -> Curve:
    return ((1, seconds), (512, seconds))


def route(
    *stages: Stage, links: Links | None = None, default: Link = LAN, work: Work = ONE_PASS, n_layers: int = N_LAYERS
) -> Route | None:
    return find_route(stages, n_layers, HEAD, links or {}, default, work)


def nodes(found: Route | None) -> list[str]:
    return [stage.node for stage in found.stages] if found else []


def chains(stages: Sequence[Stage], at: int = 0) -> Iterator[tuple[Stage, ...]]:
    if at == N_LAYERS:
        yield ()
    for stage in stages:
        if stage.first == at and stage.slots_free:
            for rest in chains(stages, stage.last):
                yield (stage, *rest)


NODES = [HEAD, *(f"n{index}" for index in range(7))]
curves = st.lists(st.tuples(st.sampled_from([1, 2, 16, 64, 128]), st.floats(1e-4, 1.0)), max_size=5).map(sound_curve)
ranges = st.lists(st.sampled_from([0, 3, 6, 9, 12]), min_size=2, max_size=2, unique=True).map(sorted)
some_stages = st.builds(
    lambda node, layers, **rest: Stage(node, *layers, **rest),
    node=st.sampled_from(NODES),
    layers=ranges,
    pass_s=curves,
    queue_s=st.sampled_from([0.0, 0.0, 0.5]),
    slots_free=st.sampled_from([0, 1, 4, 4]),
    streams=st.integers(0, 8),
)
some_links = st.builds(Link, st.floats(0, 0.3), st.sampled_from([0.0, 1e5, 1e6, 1e8]))
pairs = st.tuples(st.sampled_from(NODES), st.sampled_from(NODES)).filter(lambda pair: pair[0] != pair[1])
tables = st.dictionaries(pairs, some_links, max_size=30)
works = st.builds(
    Work,
    row_bytes=st.sampled_from([256, 8192]),
    prompt_tokens=st.integers(0, 3000),
    passes=st.integers(1, 300),
    rows=st.integers(1, 4),
)
swarms = st.lists(some_stages, max_size=12)


@settings(max_examples=300)
@given(swarms, tables, some_links, works)
def test_no_chain_is_cheaper(stages: list[Stage], links: Links, default: Link, work: Work) -> None:
    found = route(*stages, links=links, default=default, work=work)
    every = [cost(chain, HEAD, links, default, work) for chain in chains(stages)]
    assert (found is None) == (not every)
    if found:
        assert found.seconds == cost(found.stages, HEAD, links, default, work)
        assert found.seconds <= min(every) * (1 + 1e-9)
        assert found.stages in set(chains(stages))


@given(swarms, tables, some_links, works, st.randoms())
def test_order_does_not_matter(
    stages: list[Stage], links: Links, default: Link, work: Work, shuffler: random.Random
) -> None:
    other = dict(shuffler.sample(list(links.items()), len(links)))
    shuffled = shuffler.sample(stages, len(stages))
    assert route(*shuffled, links=other, default=default, work=work) == route(
        *stages, links=links, default=default, work=work
    )


@given(swarms, tables, some_links, works, some_stages, some_links)
def test_another_node_never_makes_a_route_slower(
    stages: list[Stage], links: Links, default: Link, work: Work, added: Stage, its_link: Link
) -> None:
    before = route(*stages, links=links, default=default, work=work)
    more = links | {pair: its_link for node in NODES for pair in ((node, "new"), ("new", node))}
    after = route(*stages, replace(added, node="new"), links=more, default=default, work=work)
    if before:
        assert after is not None
        assert after.seconds <= before.seconds * (1 + 1e-9)


def test_the_parts_of_the_price_of_a_decode_pass() -> None:
    one = Stage("a", 0, 6, flat(0.010), queue_s=0.5, name="alpha")
    two = Stage("b", 6, 12, flat(0.020))
    links = {(HEAD, "a"): Link(0.002, 1e6), ("a", "b"): Link(0.004, 2e6), ("b", HEAD): Link(0.006, 1.0)}
    found = route(one, two, links=links, work=Work(row_bytes=1000, passes=10, rows=2))
    assert found is not None
    # Ids on the way home weigh nothing.
    lap_s = (0.001 + 2000 / 1e6) + 0.010 + (0.002 + 2000 / 2e6) + 0.020 + 0.003
    assert found.seconds == pytest.approx(0.5 + 10 * lap_s)
    assert found.why == f"alpha 0-6, b 6-12: {found.seconds:.2f} s (queue 0.50, links 0.09), best of 2 stages"


def test_chunks_of_a_prompt_follow_one_another() -> None:
    one, two = Stage(HEAD, 0, 6, flat(0.1)), Stage(HEAD, 6, 12, flat(0.3))
    found = route(one, two, work=Work(row_bytes=1000, prompt_tokens=1280, passes=0))
    assert found is not None
    assert found.seconds == pytest.approx(0.1 + 10 * 0.3)
    # One chunk, no larger than the prompt: nothing follows it.
    short = Work(row_bytes=1000, prompt_tokens=50, passes=0)
    assert cost([replace(two, node="a")], HEAD, {}, Link(0.02, 1e5), short) == pytest.approx(0.3 + 0.02 + 50_000 / 1e5)
    # 128 rows take longer over this link than through the stage.
    slow = cost([replace(two, node="a")], HEAD, {}, Link(0.0, 1e5), Work(1000, 1280, passes=0))
    assert slow == pytest.approx(0.3 + 10 * 128_000 / 1e5)


def test_the_widest_place_counts_against_the_shortest_lap() -> None:
    quick = [Stage("a", 0, 1, flat(0.1)), Stage("a", 1, 12, flat(1.0))]
    even = [Stage("b", 0, 6, flat(0.6)), Stage("b", 6, 12, flat(0.6))]
    assert nodes(route(*quick, *even, work=Work(1000, 128, passes=0))) == ["a", "a"]
    assert nodes(route(*quick, *even, work=Work(1000, 1280, passes=0))) == ["b", "b"]


def test_unknown_passes_cost_25_ms_a_layer() -> None:
    assert cost([Stage(HEAD, 0, 12)], HEAD, {}, LAN, ONE_PASS) == pytest.approx(12 * 0.025)
    assert nodes(route(Stage("a", 0, 12), Stage("b", 0, 12, flat(0.29)))) == ["b"]
    assert nodes(route(Stage("a", 0, 12), Stage("b", 0, 12, flat(0.31)))) == ["a"]


def test_a_small_near_node_beats_a_large_slow_one() -> None:
    large = Stage("large", 0, 12, flat(0.060))
    small = [Stage("near", 0, 6, flat(0.015)), Stage("next", 6, 12, flat(0.015))]
    assert nodes(route(large, *small)) == ["near", "next"]
    far = {(a, b): Link(0.08, 1e8) for a, b in itertools.permutations([HEAD, "near", "next"], 2)}
    assert nodes(route(large, *small, links=far)) == ["large"]


def test_streams_of_others_make_a_stage_slower() -> None:
    growing = ((1, 0.010), (2, 0.012), (9, 0.030))
    busy, idle = Stage("a", 0, 12, growing, streams=8), Stage("b", 0, 12, growing, streams=1)
    found = route(busy, idle, default=Link(0.0, 1e9))
    assert nodes(found) == ["b"]
    assert found is not None and found.seconds == pytest.approx(0.012, abs=1e-5)


def test_an_unknown_link_is_the_default_one_and_a_known_one_is_what_it_is() -> None:
    stages = [Stage("a", 0, 6, flat(0.01)), Stage("b", 6, 12, flat(0.02)), Stage("c", 6, 12, flat(0.03))]
    assert nodes(route(*stages)) == ["a", "b"]
    assert nodes(route(*stages, links={("a", "b"): Link(0.1, 1e8)})) == ["a", "c"]
    assert nodes(route(*stages, links={("a", "c"): Link(0.0, 1e8)}, default=Link(0.1, 1e8))) == ["a", "c"]
    # The rate of a known link may be unknown: the default's, here a second for each row.
    assert cost(stages[:2], HEAD, {("a", "b"): Link(0.0)}, Link(0.0, 1000.0), ONE_PASS) == pytest.approx(2.03)


def test_a_node_runs_two_stages_of_a_route_only_if_it_hosts_them() -> None:
    twice = [Stage("a", 0, 6, flat(0.01)), Stage("a", 6, 12, flat(0.01))]
    between = Stage("b", 6, 12, flat(0.01))
    # Nothing travels between two stages of one node.
    assert nodes(route(*twice, between)) == ["a", "a"]
    assert nodes(route(twice[0], between)) == ["a", "b"]
    assert route(twice[0]) is None


def test_what_is_left_out() -> None:
    fast, slow = Stage("a", 0, 12, flat(0.01)), Stage("b", 0, 12, flat(0.02))
    assert nodes(find_route([fast, slow], 12, HEAD, {}, LAN, ONE_PASS, frozenset({"a"}))) == ["b"]
    assert find_route([fast, slow], 12, HEAD, {}, LAN, ONE_PASS, frozenset({"a", "b"})) is None
    assert nodes(route(replace(fast, slots_free=0), slow)) == ["b"]
    assert route(Stage("a", 0, 2**62), Stage("a", -5, 12), Stage("a", 12, 12), Stage("a", 12, 0)) is None
    assert route(fast, n_layers=0) is None


def test_which_layers_are_missing() -> None:
    def stages(*layers: tuple[int, int]) -> list[Stage]:
        return [Stage(f"n{index}", *each) for index, each in enumerate(layers)]

    assert missing_layers([], 12) == [(0, 12)]
    assert missing_layers(stages((2, 4), (3, 5), (9, 11)), 12) == [(0, 2), (5, 9), (11, 12)]
    assert missing_layers(stages((0, 20), (-1, 12)), 12) == [(0, 12)]
    overlapping = stages((0, 8), (4, 12))
    assert missing_layers(overlapping, 12) == []
    assert not chain_exists(overlapping, 12)
    assert chain_exists(stages((8, 12), (0, 8)), 12)


@given(swarms)
def test_layers_are_missing_or_a_chain_exists_or_ranges_do_not_meet(stages: list[Stage]) -> None:
    free = [replace(stage, slots_free=1) for stage in stages]
    assert chain_exists(free, N_LAYERS) == bool(list(chains(free))) == (route(*free) is not None)
    covered = {layer for stage in free for layer in range(stage.first, stage.last)}
    gaps = {layer for first, last in missing_layers(free, N_LAYERS) for layer in range(first, last)}
    assert gaps == set(range(N_LAYERS)) - covered


anything = st.floats(allow_nan=True, allow_infinity=True)


@given(
    st.lists(st.builds(replace, some_stages, queue_s=anything), max_size=8),
    st.dictionaries(pairs, st.builds(Link, anything, anything.filter(bool)), max_size=12),
)
def test_numbers_that_are_none_end_in_some_route_or_in_none(stages: list[Stage], links: Links) -> None:
    found = route(*stages, links=links, work=Work(1000, 500, 10))
    assert found is None or found.stages in set(chains(stages))


def test_curves_made_to_need_many_searches_do_not_stall_a_node() -> None:
    # Each stage is a little wider and a little cheaper than the one before.
    stages = [
        Stage(f"{index:04}", 0, 12, ((1, (2000 - index) * 1e-3), (128, 2.0 + index * 1e-5))) for index in range(1000)
    ]
    begin = time.process_time()
    found = route(*stages, work=Work(1000, 12_800, 1))
    assert found is not None
    assert time.process_time() - begin < 2


def test_a_thousand_nodes_take_milliseconds() -> None:
    generator = random.Random(1)
    stages = []
    for index in range(1000):
        first = generator.randrange(0, 80, 8)
        stages.append(Stage(f"{index:04}", first, first + 8, ((1, generator.uniform(0.01, 0.1)),)))
    names = [stage.node for stage in stages]
    links = {
        (name, other): Link(generator.uniform(0, 0.05), 1e7) for name in names for other in generator.sample(names, 32)
    }
    begin = time.process_time()
    assert route(*stages, links=links, work=Work(8192, 2048, 256), n_layers=80) is not None
    # About 20 ms; the bound only tells linear from quadratic. bench/parallax.py holds it to 50.
    assert time.process_time() - begin < 0.5


def test_own_links_go_before_what_others_tell() -> None:
    links = known_links(
        HEAD,
        [ObservedLatency("a", 0.002, 1e6), ObservedLatency("b", math.nan), ObservedLatency("c", 0.001, -1.0)],
        {
            "a": (ObservedLatency(HEAD, 0.0, 1e12), ObservedLatency("b", 0.010, 2e6)),
            "b": (ObservedLatency("a", 0.020, 3e6), ObservedLatency("c", math.inf, 1e6)),
            HEAD: (ObservedLatency("a", 0.0, 1e12),),
        },
    )
    assert links == {
        (HEAD, "a"): Link(0.002, 1e6),
        ("a", HEAD): Link(0.002, 1e6),
        # Of both ends, the one that receives knows the rate.
        ("b", "a"): Link(0.010, 2e6),
        ("a", "b"): Link(0.020, 3e6),
    }


def test_one_word_serves_both_ways_and_nobody_tells_too_much() -> None:
    told = tuple(ObservedLatency(f"{index:03}", 0.001) for index in range(100))
    links = known_links(HEAD, [], {"a": told})
    assert len(links) == 2 * 32
    assert links["a", "000"] == links["000", "a"] == Link(0.001)


def test_the_default_link_is_slow() -> None:
    assert cost([Stage("a", 0, 12, flat(0.01))], HEAD, {}, DEFAULT_LINK, ONE_PASS) == pytest.approx(0.01 + 0.1 + 0.008)
