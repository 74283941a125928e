"""GET /swarm/status."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest
from fake_node import FakeNode, three_nodes

from swarmcpp.status import from_json


def test_the_status_is_told() -> None:
    with FakeNode(three_nodes()) as node, urllib.request.urlopen(f"{node.url}/swarm/status") as answer:
        assert answer.headers["Content-Type"] == "application/json"
        assert from_json(json.load(answer)) == three_nodes()


def test_the_key_is_needed() -> None:
    with FakeNode(three_nodes(), api_key="sesame") as node:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{node.url}/swarm/status")
        refused.value.close()
        assert (refused.value.code, node.asked) == (401, 0)
