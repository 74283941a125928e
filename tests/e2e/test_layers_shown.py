"""What users see of a model whose layers several machines share: status, routes, plans, and what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from cli_process import swarmcpp
from serve_client import completion
from serve_process import wait_until
from swarm_process import Seat, SwarmNode, answer, ready
from trained_models import TRAINED

pytestmark = pytest.mark.e2e

FLAGS = ("--slots", "2", "--ctx-size", "512")
PROMPT = "Once upon a time"


def planned(where: SwarmNode, *arguments: str) -> tuple[int, str]:
    done = swarmcpp("plan", "--url", where.url, *arguments)
    return done.returncode, done.stdout + done.stderr


async def refusal(http: aiohttp.ClientSession, where: SwarmNode) -> str:
    """What a client is told while nobody can answer."""
    async with http.post(f"{where.url}/v1/completions", json=completion(PROMPT, 4)) as response:
        found = await response.json()
    assert response.status == 503 and found["error"]["code"] == "not_ready", found
    return str(found["error"]["message"])


async def test_a_model_on_two_nodes(
    trained: Path, new_data_dir: Callable[[], Path], http: aiohttp.ClientSession
) -> None:
    first, second = Seat("alpha", new_data_dir()), Seat("beta", new_data_dir())
    small = ("--memory", "100M", *FLAGS)
    with ready(first, "serve", str(trained), "--swarm", "--layers", "0-7", *small) as alpha:
        missing = "layers 7-12 of 12 are on no node that runs now; memory is what is missing: they need "
        assert missing in await refusal(http, alpha)
        alpha.wait_says(missing)
        assert missing in alpha.get("/health/ready")[1]["detail"]
        row = alpha.row("alpha")
        assert (row["ranges"], row["role"], row["n_layers"], row["slots"]) == (["0-7"], "stage", 12, 2)
        # Without the first layer and without the model's file it cannot answer requests itself.
        with ready(second, "join", alpha.token, "--layers", "7-12", *small) as beta:
            wait_until(lambda: alpha.get("/health/ready")[0] == 200, "alpha sees beta's layers")
            # Of one token: the stages are free again before the node has it.
            for count in (1, 8):
                found = await answer(http, alpha, completion(PROMPT, count))
                assert found.route == "stages alpha 0-7, beta 7-12"
            wait_until(lambda: beta.row("alpha").get("role") == "head", "beta sees that alpha answers")
            assert (await answer(http, beta, completion(PROMPT, 8))).route == "peer alpha"
            assert beta.get("/health/ready")[0] == 200
            rows = [(row["name"], row["ranges"], row["role"], row["slots"]) for row in alpha.swarm()["nodes"]]
            assert rows == [("alpha", ["0-7"], "head", 2), ("beta", ["7-12"], "stage", 2)]
            code, said = planned(alpha, "--with", "desk=16G")
            assert code == 0 and f"{TRAINED}: 12 layers, 2 slots of 512 tokens, with desk\n" in said
            assert "desk holds the whole model" in said and "Adding desk makes answers" in said
            code, said = planned(alpha, "--with", "beta")
            assert code == 2 and said.startswith(f"error: with 'beta': that node serves '{TRAINED}' already")
            assert said.count("\n") == 1


async def test_a_request_that_runs_shows_its_stages(
    trained: Path, new_data_dir: Callable[[], Path], http: aiohttp.ClientSession
) -> None:
    with ready(Seat("alpha", new_data_dir()), "serve", str(trained), "--swarm", "--layers", "0-12", *FLAGS) as alpha:
        body = completion(PROMPT, 400, stream=True, ignore_eos=True)
        async with http.post(f"{alpha.url}/v1/completions", json=body) as response:
            assert response.headers["x-swarm-route"] == "stages alpha 0-12"
            assert [row["route"] for row in alpha.swarm()["requests"]] == ["stages alpha 0-12"]


def test_a_node_with_the_whole_model_plans_too(trained: Path, new_data_dir: Callable[[], Path]) -> None:
    with ready(Seat("alpha", new_data_dir()), "serve", str(trained), *FLAGS) as alpha:
        # The offer follows the ready line at once, but follows it.
        wait_until(lambda: alpha.row("alpha")["role"] == "replica", "it offers its model")
        assert alpha.row("alpha")["ranges"] == ["0-12"]
        code, said = planned(alpha, "--with", "1M")
        assert code == 0 and "alpha holds the whole model" in said and "new-1M stays out: it has 2 MB" in said
