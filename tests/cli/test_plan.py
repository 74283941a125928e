"""`plan` against a real API server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from fake_node import FakeNode, three_nodes, two_halves
from typer.testing import CliRunner

from swarmcpp.cli import app
from swarmcpp.errors import BadRequest, StartupError, Unauthorized
from swarmcpp.status import plan_from_json


@pytest.fixture
def node() -> Iterator[FakeNode]:
    with FakeNode(three_nodes()) as running:
        yield running


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def test_the_sentences_are_printed(node: FakeNode) -> None:
    assert run("--url", node.url).splitlines() == ["big: 24 layers, 4 slots of 4096 tokens", *two_halves().sentences]


def test_machines_to_add_reach_the_node_as_they_were_typed(node: FakeNode) -> None:
    out = run("--url", node.url, "--with", "16G", "--with", "a&b c=2G")
    assert out.startswith("big: 24 layers, 4 slots of 4096 tokens, with 16G, a&b c=2G\n")


def test_as_json(node: FakeNode) -> None:
    found = plan_from_json(json.loads(run("--json", "--url", node.url, "--with", "1G")))
    assert found == replace(two_halves(), added=("1G",))


def test_what_the_node_refuses_is_said(node: FakeNode) -> None:
    with pytest.raises(BadRequest, match="'nobody'"):
        run("--url", node.url, "--with", "nobody")


def test_without_a_node() -> None:
    with pytest.raises(StartupError, match=r"no server at http://127.0.0.1:1 .*--url"):
        run("--url", "http://127.0.0.1:1")


def test_the_key_is_sent() -> None:
    with FakeNode(three_nodes(), api_key="sesame") as node:
        with pytest.raises(Unauthorized):
            run("--url", node.url)
        assert "answer together" in run("--url", node.url, "--api-key", "sesame")
