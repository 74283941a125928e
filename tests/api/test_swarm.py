"""GET /swarm/status and /swarm/plan."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from fake_node import FakeNode, three_nodes, two_halves

from swarmcpp.status import from_json, plan_from_json


def test_the_status_is_told() -> None:
    with FakeNode(three_nodes()) as node, urllib.request.urlopen(f"{node.url}/swarm/status") as answer:
        assert answer.headers["Content-Type"] == "application/json"
        assert from_json(json.load(answer)) == three_nodes()


def test_the_plan_is_told_with_every_machine_that_is_named() -> None:
    with FakeNode(three_nodes()) as node:
        with urllib.request.urlopen(f"{node.url}/swarm/plan?with=16G&with=a%20b=2G") as answer:
            plan = plan_from_json(json.load(answer))
        assert plan == replace(two_halves(), added=("16G", "a b=2G"))
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{node.url}/swarm/plan?with=nobody")
        with refused.value as error:
            assert (error.code, json.load(error)["error"]["param"]) == (400, "with")


@pytest.mark.parametrize("path", ["status", "plan"])
def test_the_key_is_needed(path: str) -> None:
    with FakeNode(three_nodes(), api_key="sesame") as node:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{node.url}/swarm/{path}")
        refused.value.close()
        assert (refused.value.code, node.asked) == (401, 0)
