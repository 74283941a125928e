"""Which node a command asks: the one that was named, the one of the data directory, or the usual address."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from entries import killed, running
from fake_node import KEY, FakeNode, three_nodes
from fake_openai import FakeOpenAI
from typer.testing import CliRunner

from swarmcpp.cli import app
from swarmcpp.commands.server import Server, find_server
from swarmcpp.config import load_config
from swarmcpp.errors import StartupError
from swarmcpp.swarm.identity import JoinToken, SwarmKey
from swarmcpp.swarm.store import SwarmStore

NOBODY = "http://127.0.0.1:1"
THERE = "http://127.0.0.1:8081"
USUAL = "http://127.0.0.1:8080"


@pytest.fixture
def node() -> Iterator[FakeNode]:
    with FakeNode(three_nodes()) as running:
        yield running


@pytest.fixture
def usual(home: Path) -> Path:
    """The data directory that is used when none is named."""
    return home / "data" / "swarmcpp"


def run(*arguments: str, stdin: str = "") -> tuple[str, str]:
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def find(url: str | None = None, env: Mapping[str, str] | None = None, **flags: str) -> str:
    return find_server(load_config(flags, env or {}, None), url).url


# ---- every command


COMMANDS = {
    "status": (["status", "--once"], "laptop"),
    "plan": (["plan"], "answer together"),
    "peers": (["peers"], "desk"),
    "chat": (["chat"], "friend"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("named", [True, False])
def test_it_asks_the_node_of_the_data_directory(
    name: str, named: bool, node: FakeNode, home: Path, usual: Path
) -> None:
    data_dir = home / "two" if named else usual
    arguments, says = COMMANDS[name]
    with FakeOpenAI() as openai, running(data_dir, openai.url if name == "chat" else node.url):
        out, notes = run(*arguments, *(["--data-dir", str(data_dir)] if named else []), stdin="Hello\n")
    assert says in out
    assert "no server" not in notes and "asking" not in notes


def test_the_token_has_the_addresses_of_the_node_of_the_data_directory(node: FakeNode, home: Path) -> None:
    store = SwarmStore(home / "two")
    key = store.rotate()
    node.status = three_nodes(key.swarm_id)
    for more in ([], ["--rotate"]):
        with running(home / "two", node.url):
            token = JoinToken.parse(run("token", "--data-dir", str(home / "two"), *more)[0])
        assert [str(each) for each in token.addresses][:2] == ["192.168.1.10:17610", "[fd00::10]:17610"]
    assert token.key != key


def test_the_token_of_a_node_that_tells_nothing_without_its_key_has_what_it_wrote(usual: Path) -> None:
    key = SwarmStore(usual).rotate()
    with FakeNode(three_nodes(), api_key="sesame") as node:
        wrote = {"addresses": ("10.0.0.9:17610", "nonsense"), "key": KEY}
        with running(usual, node.url, swarm=key.swarm_id, **wrote):
            out, notes = run("token")
            assert [str(each) for each in JoinToken.parse(out).addresses] == ["10.0.0.9:17610"]
            assert "API key" in notes
        with running(usual, node.url, swarm=SwarmKey.new().swarm_id, **wrote):
            assert JoinToken.parse(run("token")[0]).addresses == ()


def test_a_key_from_a_file_goes_to_the_node_of_the_data_directory(home: Path, usual: Path) -> None:
    (home / "swarmcpp.toml").write_text("[server]\napi_key = 'sesame'\n")
    with FakeNode(three_nodes(), api_key="sesame") as node, running(usual, node.url):
        assert "laptop" in run("status")[0]


# ---- a node that was killed


@pytest.mark.parametrize("name", ["status", "plan", "peers"])
def test_a_node_that_was_killed_is_told_before_the_error(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMCPP_PORT", "1")
    killed(home / "two", THERE)
    result = CliRunner().invoke(app, [name, "--data-dir", str(home / "two")])
    assert isinstance(result.exception, StartupError) and f"no server at {NOBODY}" in str(result.exception)
    assert result.stderr == f"the node of {home / 'two'} that ran at {THERE} is gone; asking {NOBODY}\n"


def test_another_node_at_the_usual_address_is_not_taken_for_the_one_that_was_killed(
    home: Path, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMCPP_PORT", node.url.rpartition(":")[2])
    killed(home / "two", THERE, started=1.0)
    killed(home / "two", "http://127.0.0.1:8082", started=2.0)
    out, notes = run("status", "--data-dir", str(home / "two"))
    assert "laptop" in out
    assert notes == f"the node of {home / 'two'} that ran at http://127.0.0.1:8082 is gone; asking {node.url}\n"
    # Nothing is written: nothing is said.
    assert run("status", "--data-dir", str(home / "three"))[1] == ""


def test_a_killed_node_and_one_that_runs(usual: Path, node: FakeNode) -> None:
    with running(usual, node.url):
        killed(usual, THERE)
        out, notes = run("status")
    assert "laptop" in out and notes == ""


# ---- which one


def test_what_was_named_for_this_command_beats_what_is_found(usual: Path, home: Path) -> None:
    assert find() == USUAL
    two = str(home / "two")
    with running(usual, THERE), running(home / "two", "http://127.0.0.1:8082"):
        assert find() == THERE
        assert find(url="http://h") == "http://h"
        assert find(env={"SWARMCPP_PORT": "9"}) == find(port="9") == "http://127.0.0.1:9"
        assert find(env={"SWARMCPP_HOST": "127.0.0.2"}) == "http://127.0.0.2:8080"
        assert find(env={"SWARMCPP_DATA_DIR": two}) == find(data_dir=two) == "http://127.0.0.1:8082"
        # The stronger of the two, and of equals the address, which says more.
        assert find(env={"SWARMCPP_PORT": "9"}, data_dir=two) == "http://127.0.0.1:8082"
        assert find(env={"SWARMCPP_PORT": "9", "SWARMCPP_DATA_DIR": two}) == "http://127.0.0.1:9"
        assert find(port="9", data_dir=two) == "http://127.0.0.1:9"


def test_what_a_file_says_of_the_port_is_for_who_starts_a_node(usual: Path, home: Path) -> None:
    (home / "swarmcpp.toml").write_text("[server]\nport = 9\n")
    assert find() == "http://127.0.0.1:9"
    with running(usual, THERE):
        assert find() == THERE


def test_of_several_it_is_the_one_at_the_usual_address_or_the_first(usual: Path, node: FakeNode) -> None:
    with running(usual, node.url, started=1.0):
        with running(usual, THERE, started=2.0):
            out, notes = run("status")
            assert "laptop" in out
            assert notes == f"2 nodes run with {usual}; asking {node.url}, and --url asks another: {THERE}\n"
            with running(usual, USUAL, started=3.0):
                assert find() == USUAL
        assert run("status")[1] == ""
    with running(usual, THERE, started=2.0):
        assert find() == THERE


def test_what_was_found_is_kept(usual: Path) -> None:
    with running(usual, THERE, swarm="1f3a") as where:
        found = find_server(load_config({"api_key": "sesame"}, {}, None), None)
    assert found == Server(THERE, "sesame", where)
    assert replace(found, wrote=None) == Server(THERE, "sesame")


def test_the_help_says_whom_it_asks() -> None:
    for name in (*COMMANDS, "token"):
        text = " ".join(CliRunner().invoke(app, [name, "--help"]).output.split())
        assert "the node of --data-dir, or http://127.0.0.1:8080" in text and "--data-dir DIR" in text
