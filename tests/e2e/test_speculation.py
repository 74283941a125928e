"""Guesses that are verified in one pass change no answer, on one engine and over stages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pipeline_process import Pipeline, pipeline
from serve_client import Body, Heard, ask, completion, listen, until
from serve_process import ServeProcess, serving
from trained_models import BEGINNINGS

from swarmcpp.models.embedded import DRAFT

pytestmark = pytest.mark.e2e

DataDirMaker = Callable[[], Path]
TOKENS = 120
NONE = {"drafter": "none"}


@pytest.fixture(scope="module")
def server(unquantised: Path, new_data_dir: DataDirMaker) -> Iterator[ServeProcess]:
    """The trained model, with its draft, and with one that is itself without some layers."""
    flags = ("--slots", "8", "--ctx-size", "2048", "--draft-model", DRAFT, "--data-dir", str(new_data_dir()))
    with serving(unquantised, *flags, env={"SWARMCPP_INFERENCE_SWIFT_SELF_SPECULATIVE": "true"}) as one:
        yield one


@pytest.fixture(scope="module")
def stages(unquantised: Path, new_data_dir: DataDirMaker) -> Iterator[Pipeline]:
    """Two stages of it, with its draft beside them."""
    flags = ("--slots", "8", "--ctx-size", "2048", "--draft-model", DRAFT)
    with pipeline(unquantised, new_data_dir, ("0-7", "7-12"), *flags) as whole:
        yield whole


async def told(http: aiohttp.ClientSession, url: str, body: Body, **more: Any) -> tuple[str, dict[str, Any]]:
    """The text of an answer and its timings."""
    status, found = await ask(http, url, {**body, **more})
    assert status == 200, found
    details = found["usage"]["completion_tokens_details"]
    times = found["timings"]
    assert details["accepted_prediction_tokens"] == times["draft_n_accepted"]
    assert details["rejected_prediction_tokens"] == times["draft_n"] - times["draft_n_accepted"]
    return found["choices"][0]["text"], times


def edited(text: str) -> str:
    """A text with a word of another in its middle."""
    words = text.split(" ")
    words[len(words) // 2] = "elephants"
    return " ".join(words)


async def plain(http: aiohttp.ClientSession, url: str) -> list[str]:
    """What is said after the beginnings without guesses."""
    return [(await told(http, url, completion(text, TOKENS), speculative=NONE))[0] for text in BEGINNINGS]


@pytest.mark.parametrize("drafter", ["ngram", "draft", "skip", "prediction", ""])
async def test_every_drafter_beside_seven_others(
    server: ServeProcess, http: aiohttp.ClientSession, drafter: str
) -> None:
    expected = await plain(http, server.url)
    # With a number it is not left to what passes happen to take whether anything is guessed.
    wanted = {"drafter": drafter, "gamma": 5} if drafter else {}
    bodies: list[Body] = [completion(text, TOKENS, speculative=wanted) for text in BEGINNINGS]
    if drafter in ("prediction", ""):
        guesses = [{"type": "content", "content": edited(text)} for text in expected]
        bodies = [{**body, "prediction": guess} for body, guess in zip(bodies, guesses, strict=True)]
    alone = [await told(http, server.url, body) for body in bodies[:2]]
    assert [text for text, _ in alone] == expected[:2]
    beside = await asyncio.gather(*(told(http, server.url, body) for body in bodies))
    assert [text for text, _ in beside] == expected
    if drafter in ("draft", "prediction"):
        # Stories repeat little of themselves, and a model of this size misses each of its layers.
        assert sum(times["draft_n_accepted"] for _, times in alone) >= TOKENS // 2


async def test_a_seeded_answer_is_the_same(server: ServeProcess, http: aiohttp.ClientSession) -> None:
    same = 0
    for seed, text in enumerate(BEGINNINGS):
        body = completion(text, 40, temperature=0.8, seed=seed)
        expected, _ = await told(http, server.url, body, speculative=NONE)
        found, times = await told(http, server.url, body, speculative={"drafter": "draft", "gamma": 3})
        assert times["draft_n"] > 0
        same += found == expected
    # A draw whose random number lies between two tokens may fall to either, when rows are computed together.
    assert same >= len(BEGINNINGS) - 1


async def test_a_limit_on_guesses_holds_for_a_request(server: ServeProcess, http: aiohttp.ClientSession) -> None:
    body = completion(BEGINNINGS[0], 30)
    for limit in ({"gamma": 0}, NONE):
        assert (await told(http, server.url, body, speculative=limit))[1]["draft_n"] == 0


async def test_stop_strings_end_an_answer_where_they_would(server: ServeProcess, http: aiohttp.ClientSession) -> None:
    whole, _ = await told(http, server.url, completion(BEGINNINGS[0], TOKENS), speculative=NONE)
    stop = whole[len(whole) // 2 :][:6]
    body = completion(BEGINNINGS[0], TOKENS, stop=[stop])
    expected = await ask(http, server.url, {**body, "speculative": NONE})
    found = await ask(http, server.url, {**body, "prediction": {"type": "content", "content": whole}})
    assert found[1]["choices"][0]["text"] == expected[1]["choices"][0]["text"] == whole[: whole.index(stop)]
    assert found[1]["usage"]["completion_tokens"] == expected[1]["usage"]["completion_tokens"]


async def test_an_engine_that_dies_with_guesses_under_way(server: ServeProcess, http: aiohttp.ClientSession) -> None:
    expected = await plain(http, server.url)
    for at in (1, 150):
        heard = Heard()
        guess = {"type": "content", "content": expected[0]}
        task = asyncio.create_task(listen(http, server.url, completion(BEGINNINGS[0], TOKENS, prediction=guess), heard))
        await until(lambda: heard.chars >= at or task.done(), "text", pause_s=0.001)  # noqa: B023
        server.kill_engine()
        await task
        assert (heard.text, heard.finish, heard.error) == (expected[0], "length", None)


async def test_stages_verify_guesses(server: ServeProcess, stages: Pipeline, http: aiohttp.ClientSession) -> None:
    expected = await plain(http, server.url)
    url = stages["Ann"].url
    guesses = [{"type": "content", "content": edited(text)} for text in expected]
    wanted = {"drafter": "prediction", "gamma": 5}
    bodies: list[Body] = [
        completion(text, TOKENS, prediction=guess, speculative=wanted)
        for text, guess in zip(BEGINNINGS, guesses, strict=True)
    ]
    text, times = await told(http, url, bodies[0])
    assert text == expected[0]
    assert times["draft_n_accepted"] >= TOKENS // 2
    assert [text for text, _ in await asyncio.gather(*(told(http, url, body) for body in bodies))] == expected
    # What was stored of them is of tokens that were accepted.
    assert [(await told(http, url, body))[0] for body in bodies[:3]] == expected[:3]


async def test_a_draft_model_guesses_for_stages(
    server: ServeProcess, stages: Pipeline, http: aiohttp.ClientSession
) -> None:
    expected = await plain(http, server.url)
    bodies: list[Body] = [completion(text, TOKENS, speculative={"drafter": "draft", "gamma": 3}) for text in BEGINNINGS]
    url = stages["Ann"].url
    text, times = await told(http, url, bodies[0])
    assert text == expected[0]
    assert times["draft_n_accepted"] >= TOKENS // 2
    assert [text for text, _ in await asyncio.gather(*(told(http, url, body) for body in bodies))] == expected
    # The engine that has the draft is the head's own stage as well.
    heard = Heard()
    task = asyncio.create_task(listen(http, url, bodies[1], heard))
    await until(lambda: heard.chars >= 60 or task.done(), "text", pause_s=0.001)
    stages["Ann"].kill_engine()
    await task
    assert (heard.text, heard.finish, heard.error) == (expected[1], "length", None)


async def test_a_stage_that_dies_with_guesses_under_way(
    server: ServeProcess, stages: Pipeline, http: aiohttp.ClientSession
) -> None:
    expected, heard = await plain(http, server.url), Heard()
    guess = {"type": "content", "content": expected[1]}
    body = completion(BEGINNINGS[1], TOKENS, prediction=guess)
    task = asyncio.create_task(listen(http, stages["Ann"].url, body, heard))
    await until(lambda: heard.chars >= 60 or task.done(), "text", pause_s=0.001)
    stages["Bob"].kill_engine()
    await task
    assert (heard.text, heard.finish, heard.error) == (expected[1], "length", None)
