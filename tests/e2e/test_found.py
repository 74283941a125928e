"""Nodes on ports that nobody told the commands: they are found by their data directories, and missed when killed."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import swarmcpp
from serve_process import serving, wait_until
from swarm_process import HOST, Seat, SwarmNode, free_port, ready

from swarmcpp.commands.own_server import own_server
from swarmcpp.commands.terminal import stderr
from swarmcpp.models.embedded import embedded_file
from swarmcpp.node.whereabouts import find_nodes
from swarmcpp.swarm.identity import JoinToken

pytestmark = pytest.mark.e2e

DataDirMaker = Callable[[], Path]
FLAGS = ("--slots", "2", "--ctx-size", "512")


@pytest.fixture(autouse=True)
def usual(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address that is asked when there is no node; nobody is there."""
    port = free_port()
    monkeypatch.setenv("SWARMCPP_PORT", str(port))
    return f"http://{HOST}:{port}"


def ask(seat: Seat, *arguments: str, stdin: str = "") -> str:
    """What a command says that is told nothing but the data directory."""
    done = swarmcpp(*arguments, "--data-dir", str(seat.data), stdin=stdin)
    assert done.returncode == 0 and "asking" not in done.stderr, done.stderr
    return done.stdout


def shown(seat: Seat) -> str:
    """The name of the node that `status` asks."""
    nodes = json.loads(ask(seat, "status", "--json"))["nodes"]
    return next(str(each["name"]) for each in nodes if each["is_self"])


def assert_found(seat: Seat, node: SwarmNode, other: Seat) -> None:
    """Every command asks the node in its seat."""
    assert [(each.url, each.pid) for each in find_nodes(seat.data)[0]] == [(node.url, node.pid)]
    assert shown(seat) == seat.name
    assert [line.split()[0] for line in ask(seat, "peers").splitlines()[1:]] == [other.name]
    token = JoinToken.parse(ask(seat, "token"))
    assert [each.port for each in token.addresses] == [seat.port, other.port]
    assert "12 layers" in ask(seat, "plan")
    assert ask(seat, "chat", "--temperature", "0", "--max-tokens", "4", stdin="Hello\n")


def test_nodes_with_layers_are_found_until_they_are_killed(new_data_dir: DataDirMaker, usual: str) -> None:
    first, second = Seat("alpha", new_data_dir()), Seat("beta", new_data_dir())
    with ready(first, "serve", str(embedded_file()), "--layers", "0-6", *FLAGS) as alpha:
        with ready(second, "join", alpha.token, "--layers", "6-12", *FLAGS) as beta:
            for node in (alpha, beta):
                wait_until(lambda node=node: node.get("/health/ready")[0] == 200, "all layers are there")
            assert_found(first, alpha, second)
            assert_found(second, beta, first)
            beta.kill()
            gone = f"the node of {second.data} that ran at {beta.url} is gone; asking {usual}\n"
            for name in ("status", "plan"):
                done = swarmcpp(name, "--data-dir", str(second.data))
                assert (done.returncode, done.stdout) == (2, "")
                assert done.stderr.startswith(f"{gone}error: no server at {usual} ") and done.stderr.count("\n") == 2
            for name in ("token", "peers"):
                done = swarmcpp(name, "--data-dir", str(second.data))
                assert done.returncode == 0 and done.stderr.startswith(gone) and "remembered" in done.stderr
        assert shown(first) == "alpha"
        with ready(second, "join", "--layers", "6-12", *FLAGS) as beta:
            assert shown(second) == "beta"
            assert find_nodes(second.data)[1] == []
    assert list((first.data / "nodes").iterdir()) == list((second.data / "nodes").iterdir()) == []


def test_two_nodes_with_one_directory(tiny: Path, data_dir: Path) -> None:
    first, second = Seat("alpha", data_dir), Seat("beta", data_dir)
    with ready(second, "serve", str(tiny), *FLAGS):
        assert shown(second) == "beta"
        with ready(first, "serve", str(tiny), *FLAGS) as alpha:
            done = swarmcpp("status", "--once", "--data-dir", str(data_dir))
            assert done.returncode == 0 and done.stderr.startswith(f"2 nodes run with {data_dir}; asking ")
            assert done.stderr.endswith(f": {alpha.url}\n")
            alpha.kill()
        assert shown(second) == "beta"


def test_a_node_that_listens_everywhere_is_found_here_and_does_not_write_its_key(tiny: Path, data_dir: Path) -> None:
    with serving(
        tiny, *FLAGS, "--data-dir", str(data_dir), "--host", "0.0.0.0", env={"SWARMCPP_API_KEY": "sesame"}
    ) as server:
        (found,), _ = find_nodes(data_dir)
        assert found.url == server.url
        assert not [path for path in (data_dir / "nodes").iterdir() if b"sesame" in path.read_bytes()]
        refused = swarmcpp("status", "--data-dir", str(data_dir))
        assert refused.returncode == 2 and "API key" in refused.stderr
        assert swarmcpp("status", "--data-dir", str(data_dir), "--api-key", "sesame").returncode == 0


def test_the_server_of_a_conversation_is_nobody_elses(data_dir: Path) -> None:
    with own_server(data_dir, stderr()) as url:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as response:
            assert response.status == 200
        assert find_nodes(data_dir) == ([], [])
