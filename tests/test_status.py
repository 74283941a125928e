"""The form in which a swarm's status travels: whatever comes is read, and within bounds."""

from __future__ import annotations

import json
from dataclasses import fields

from fake_node import three_nodes, two_halves
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.status import (
    MAX_NUMBER,
    MAX_ROWS,
    MAX_SENTENCE,
    MAX_TEXT,
    NodeRow,
    PlanRates,
    PlanRow,
    SwarmPlan,
    SwarmStatus,
    from_json,
    plan_from_json,
    to_json,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROW = st.fixed_dictionaries({}, optional={each.name: JSON for each in fields(NodeRow)})
STATUS = st.fixed_dictionaries(
    {}, optional={"nodes": st.lists(ROW | JSON, max_size=3) | JSON, "events": JSON, "requests": JSON, "node": JSON}
)
PLAN = st.fixed_dictionaries({}, optional={each.name: JSON for each in fields(SwarmPlan)})


def test_what_was_written_is_read() -> None:
    assert from_json(json.loads(json.dumps(to_json(three_nodes())))) == three_nodes()


def test_newer_and_older_nodes() -> None:
    read = from_json({"nodes": [{"name": "a", "gpu": True, "slots": 3}], "colour": "red", "swarm": "x"})
    assert read == SwarmStatus(swarm="x", nodes=(NodeRow(name="a", slots=3),))
    assert from_json({}) == SwarmStatus()


@given(STATUS)
def test_anything_is_read_as_rows_of_the_right_types(document: dict[str, object]) -> None:
    read = from_json(document)
    for node in read.nodes:
        for each in fields(NodeRow):
            value = getattr(node, each.name)
            assert type(value) is type(each.default)
            if isinstance(value, int | float):
                assert 0 <= value <= MAX_NUMBER
    assert from_json(json.loads(json.dumps(to_json(read)))) == read


def test_bounds() -> None:
    read = from_json(
        {
            "swarm": "x" * 10_000,
            "nodes": [{"name": "a\ud800", "slots": 10**400, "rtt_s": -1.0, "trust": float("nan"), "is_self": 1}] * 2000,
            "events": [7, {"text": "b", "age_s": True}],
        }
    )
    assert len(read.swarm) == MAX_TEXT and len(read.nodes) == MAX_ROWS and len(read.events) == 1
    assert read.nodes[0] == NodeRow(name="a?", slots=int(MAX_NUMBER), rtt_s=0.0, trust=0.0, is_self=False)
    assert read.events[0].age_s == 0.0


def test_a_plan_that_was_written_is_read() -> None:
    assert plan_from_json(json.loads(json.dumps(to_json(two_halves())))) == two_halves()


@given(PLAN)
def test_anything_is_read_as_a_plan(document: dict[str, object]) -> None:
    read = plan_from_json(document)
    for each in fields(SwarmPlan):
        assert type(getattr(read, each.name)) is type(getattr(SwarmPlan(), each.name))
    assert plan_from_json(json.loads(json.dumps(to_json(read)))) == read


def test_bounds_of_a_plan() -> None:
    read = plan_from_json(
        {"sentences": ["x" * 10_000, 7], "rates": {"one_tps": -1.0, "all_tps": 10**400}, "rows": [{"first": True}, 7]}
    )
    assert read.sentences == ("x" * MAX_SENTENCE,)
    assert (read.rates, read.rows) == (PlanRates(all_tps=MAX_NUMBER), (PlanRow(),))
