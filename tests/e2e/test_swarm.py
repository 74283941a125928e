"""Nodes that join, answer for one another and share what they have read."""

from __future__ import annotations

import asyncio
import filecmp
import json
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cli_process import swarmcpp
from serve_client import Body, completion
from serve_process import wait_until
from swarm_process import HOST, ONLY_ASCII, SLOW, Seat, Swarm, SwarmNode, answer, node, ready, refusal, refused, swarm
from trained_models import BEGINNINGS, TRAINED

from swarmcpp.commands.swarm import DEFAULT_PORT
from swarmcpp.models.synthetic import TINY, write_model
from swarmcpp.swarm.identity import JoinToken, SwarmKey

pytestmark = pytest.mark.e2e

FLAGS = ("--slots", "2", "--ctx-size", "1024")
PROMPT_TOKENS = 600
BLOCK_TOKENS = 64
PEER_TOKENS = 'swarmcpp_prompt_tokens_cached_total{tier="peer"}'

DataDirMaker = Callable[[], Path]


def prompt(seed: int, length: int = PROMPT_TOKENS) -> list[int]:
    """Token ids of the synthetic vocabulary."""
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(length)]


def ascii_completion(tokens: list[int], max_tokens: int = 8, **more: Any) -> Body:
    return completion(tokens, max_tokens, logit_bias=ONLY_ASCII, **more)


def damaged(token: str) -> str:
    """A token with one character mistyped."""
    return token[:40] + ("2" if token[40] != "2" else "3") + token[41:]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "slow.gguf", SLOW, quant="F16")


@pytest.fixture(scope="module")
def three(slow: Path, trained: Path, new_data_dir: DataDirMaker) -> Iterator[Swarm]:
    """Ann and Bob serve the slow model, Cid the trained one; for tests that leave them as they were."""
    models = {"Ann": slow, "Bob": slow, "Cid": trained}
    seats = {name: Seat(name, new_data_dir()) for name in models}
    with swarm(models, seats, *FLAGS) as whole:
        yield whole


# -- joining ---------------------------------------------------------------------------------------------------------


async def test_join_fetches_the_model_once(
    tiny: Path, new_data_dir: DataDirMaker, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    first, second = Seat("Ann", new_data_dir()), Seat("Bob", new_data_dir())
    copy = Path(shutil.copy(tiny, tmp_path / "copy.gguf"))
    other = write_model(tmp_path / "other.gguf", TINY, quant="Q8_0", seed=1)
    body = ascii_completion(prompt(1, 40))
    with ready(first, "serve", str(tiny), *FLAGS) as ann:
        expected = (await answer(http, ann, body)).text
        with ready(second, "join", ann.token, *FLAGS) as bob:
            assert bob.fetched
            assert filecmp.cmp(second.data / "models" / "tiny.gguf", tiny, shallow=False)
            assert manifests(second.data) == manifests(first.data) != []
            bob.wait_sees("Ann")
            ann.wait_sees("Bob")
            assert (await answer(http, bob, body)).text == expected
        with ready(second, "join", *FLAGS) as bob:
            assert not bob.fetched
            ann.wait_sees("Bob")
            assert (await answer(http, bob, body)).text == expected
        third = Seat("Cid", new_data_dir())
        line = refused(third, "join", ann.token, "--model", str(other))
        assert "other.gguf" in line and "leave out --model" in line
        with ready(third, "join", ann.token, "--model", str(copy), *FLAGS) as cid:
            assert not cid.fetched
            assert not (third.data / "models").exists()
            assert (await answer(http, cid, body)).text == expected


def manifests(data: Path) -> list[str]:
    """Fingerprints of the models that a node has read."""
    return sorted(path.read_bytes().hex() for path in (data / "fingerprints").glob("*.manifest"))


def test_tokens_that_are_none(data_dir: Path) -> None:
    seat = Seat("Ann", data_dir)
    token = str(JoinToken(SwarmKey.new()))
    for text in (damaged(token), token[:-1], "hello there"):
        assert text not in refused(seat, "join", text), "it may be a secret"
    assert "empty" in refused(seat, "join", " ")
    assert "TOKEN" in refused(seat, "join")
    assert not (data_dir / "swarm" / "key.json").exists()


def test_tokens_that_lead_nowhere(tiny: Path, new_data_dir: DataDirMaker) -> None:
    """A swarm that is off, a key that is not this swarm's, and a key that was changed: each join says whom it tried."""
    ann_seat = Seat("Ann", new_data_dir())
    with ready(Seat("off", new_data_dir()), "serve", str(tiny), *FLAGS) as off:
        gone = off.token
    with ready(ann_seat, "serve", str(tiny), *FLAGS) as ann:
        old = ann.token
        data = ("--data-dir", str(ann_seat.data))
        rotated = swarmcpp("token", "--rotate", "--url", ann.url, *data)
        assert rotated.returncode == 0, rotated.stderr
    new = rotated.stdout.split()[-1]
    foreign = str(JoinToken(SwarmKey.new(), JoinToken.parse(old).addresses))
    assert JoinToken.parse(new).key != JoinToken.parse(old).key
    with ready(ann_seat, "serve", str(tiny), *FLAGS) as ann, ExitStack() as stack:
        assert JoinToken.parse(ann.token).key == JoinToken.parse(new).key
        joins = [
            (token, stack.enter_context(node(Seat("Bob", new_data_dir()), "join", token)))
            for token in (gone, foreign, old)
        ]
        for token, joining in joins:
            line = refusal(joining)
            for address in JoinToken.parse(token).addresses:
                assert f"{address.host}:{address.port}" in line
        ann.wait_sees()
        assert [each["name"] for each in ann.swarm()["nodes"]] == ["Ann"]
        with ready(Seat("Bob", new_data_dir()), "join", new, *FLAGS):
            ann.wait_sees("Bob")


def test_a_swarm_port_that_is_taken(tiny: Path, data_dir: Path) -> None:
    seat = Seat("Ann", data_dir)
    with socket.socket() as taken:
        taken.bind((HOST, seat.port))
        taken.listen()
        line = refused(seat, "serve", str(tiny))
        assert str(seat.port) in line and "--swarm-port" in line
    with ExitStack() as stack:
        holder = stack.enter_context(socket.socket())
        # What an earlier node's connections left behind must not keep this from holding the port.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def held() -> bool:
            try:
                holder.bind((HOST, DEFAULT_PORT))
            except OSError:
                return False
            return True

        # Whoever has it at this moment, a node of another test, may let it go before this one's looks for it.
        wait_until(held, "the default port is free")
        holder.listen()
        with ready(Seat("Ann", data_dir, DEFAULT_PORT), "serve", str(tiny), *FLAGS) as ann:
            (address,) = JoinToken.parse(ann.token).addresses
            assert address.port != DEFAULT_PORT


# -- answering for one another ---------------------------------------------------------------------------------------


async def test_any_node_answers_for_any_model(three: Swarm, http: aiohttp.ClientSession) -> None:
    ann, cid = three["Ann"], three["Cid"]
    for each in three.nodes.values():
        status, found = each.get("/v1/models")
        assert status == 200
        assert sorted(model["id"] for model in found["data"]) == ["slow", TRAINED]
    for text in BEGINNINGS[:4]:
        there = await answer(http, ann, completion(text, 200, model=TRAINED))
        here = await answer(http, cid, completion(text, 200, model=TRAINED))
        assert (there.route, here.route) == ("peer Cid", "local")
        assert there.text == here.text != ""
        assert there.prompt_tokens == here.prompt_tokens
    body = {
        "messages": [{"role": "user", "content": "Grüße, 世界"}],
        "temperature": 0,
        "max_tokens": 20,
        "model": "slow",
    }
    asked = [await chat(http, each.url, body) for each in (cid, ann)]
    assert asked[0][1].startswith("peer ") and asked[1][1] == "local"
    assert asked[0][0] == asked[1][0]
    async with http.post(f"{ann.url}/v1/completions", json=completion("a", 1, model="nobody's")) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "model_not_found"


async def chat(http: aiohttp.ClientSession, url: str, body: Body) -> tuple[tuple[str, int], str]:
    """Text, prompt tokens, and route of an answer to a chat."""
    async with http.post(f"{url}/v1/chat/completions", json=body) as response:
        found = await response.json()
        assert response.status == 200, found
        text = found["choices"][0]["message"]["content"]
        return (text, found["usage"]["prompt_tokens"]), response.headers["x-swarm-route"]


async def test_eight_users_are_shared_out(three: Swarm, http: aiohttp.ClientSession) -> None:
    ann, bob = three["Ann"], three["Bob"]
    bodies = [ascii_completion(prompt(seed, 40), 60) for seed in range(100, 108)]
    # Another salt: nothing that was read for these answers helps with the others.
    alone = [await answer(http, ann, {**body, "cache_salt": "alone"}) for body in bodies]
    routes: set[str] = set()
    for places in ([bob] * 8, [ann, bob] * 4):
        found = await asyncio.gather(*(answer(http, place, body) for place, body in zip(places, bodies, strict=True)))
        assert [each.text for each in found] == [each.text for each in alone]
        routes |= {each.route for each in found}
    assert {"local", "peer Ann"} <= routes
    wait_until(lambda: ann.get("/health")[1]["slots_busy"] == bob.get("/health")[1]["slots_busy"] == 0, "idle")


# -- what was read elsewhere -----------------------------------------------------------------------------------------


async def test_what_one_node_read_another_need_not(
    slow: Path, new_data_dir: DataDirMaker, http: aiohttp.ClientSession
) -> None:
    """Prompts that only Ann has read, asked with so much room for the answer that she has no slot for it."""
    whole = PROMPT_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
    prompts = [prompt(seed) for seed in range(200, 204)]
    large = ("--model", str(slow), "--slots", "2", "--ctx-size", "2048")
    off = {"SWARMCPP_INFERENCE_CROSS_NODE_PREFIX_TRUST_MIN": "2"}

    async def again(where: SwarmNode, number: int, **more: Any) -> int:
        """The tokens that were not computed; the answer is the same, as far as it goes."""
        text = cold[number].text
        found = await answer(http, where, ascii_completion(prompts[number], 1200, stop=[text[-1]], **more))
        assert (found.route, found.text) == ("local", text.partition(text[-1])[0])
        return found.cached

    with ready(Seat("Ann", new_data_dir()), "serve", str(slow), *FLAGS) as ann:
        cold = [await answer(http, ann, ascii_completion(tokens, 16)) for tokens in prompts[:2]]
        with ready(Seat("Bob", new_data_dir()), "join", ann.token, *large) as bob:
            ann.wait_sees("Bob")
            bob.wait_sees("Ann")
            cold += [await answer(http, ann, ascii_completion(tokens, 16)) for tokens in prompts[2:]]
            assert {each.cached for each in cold} == {0}
            read = sum(node.swarm()["nodes"][0]["blocks"] for node in (ann, bob))
            assert read == len(prompts) * whole // BLOCK_TOKENS
            # The newest may be announced in this moment.
            for number in range(3):
                assert await again(bob, number) == whole
                assert await again(bob, number, cache_salt="mine") == 0
            assert bob.metric(PEER_TOKENS) == 3 * whole - (cold[2].route != "local") * whole
            assert ann.metric(PEER_TOKENS) == 0
        with ready(Seat("Dan", new_data_dir()), "join", ann.token, *large, env=off) as dan:
            dan.wait_sees("Ann")
            for number in range(3):
                assert await again(dan, number) == 0
            assert dan.metric(PEER_TOKENS) == 0


# -- commands --------------------------------------------------------------------------------------------------------


def test_commands_of_a_running_swarm(three: Swarm) -> None:
    ann, seat = three["Ann"], three.seats["Ann"]
    data = ("--data-dir", str(seat.data))
    status = swarmcpp("status", "--once", "--json", "--url", ann.url)
    assert status.returncode == 0, status.stderr
    document = json.loads(status.stdout)
    rows = {row["name"]: row for row in document["nodes"]}
    assert {name: (row["status"], row["model"]) for name, row in rows.items()} == {
        "Ann": ("alive", "slow"),
        "Bob": ("alive", "slow"),
        "Cid": ("alive", TRAINED),
    }
    assert [name for name, row in rows.items() if row["is_self"]] == ["Ann"]
    assert rows["Bob"]["rtt_s"] > 0 and rows["Bob"]["trust"] >= 0.5
    screen = swarmcpp("status", "--once", "--url", ann.url)
    assert all(name in screen.stdout for name in rows)
    peers = swarmcpp("peers", "--json", "--url", ann.url, *data)
    assert peers.returncode == 0, peers.stderr
    assert sorted(row["name"] for row in json.loads(peers.stdout)) == ["Bob", "Cid"]
    shown = swarmcpp("token", "--url", ann.url, *data)
    token = JoinToken.parse(shown.stdout)
    assert token.key == JoinToken.parse(ann.token).key
    assert {address.port for address in token.addresses} == {each.port for each in three.seats.values()}


def test_leave_forgets_the_swarm(tiny: Path, data_dir: Path) -> None:
    seat = Seat("Ann", data_dir)
    with ready(seat, "serve", str(tiny), *FLAGS) as ann:
        token = JoinToken.parse(ann.token)
    left = swarmcpp("leave", "--data-dir", str(data_dir))
    assert left.returncode == 0, left.stderr
    assert "swarmcpp join TOKEN" in refused(seat, "join")
    assert swarmcpp("leave", "--data-dir", str(data_dir)).returncode == 2
    with ready(seat, "serve", str(tiny), *FLAGS) as ann:
        assert JoinToken.parse(ann.token).key != token.key
