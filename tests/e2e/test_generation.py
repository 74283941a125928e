"""What a server generates: the reference's text, and the same text alone and in company."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import pytest
from serve_client import Body, Heard, ask, complete, completion, listen, until
from serve_process import ServeProcess, serving
from trained_models import BEGINNINGS, stories_model

pytestmark = pytest.mark.e2e

GOLDEN = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    " She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\" Lily was sad"
    " and didn't know what to do"
)
"""The 100 greedy tokens of llama-server with stories260K, built from the same source, after "Once upon a time"."""

ONLY_ASCII = {str(token): -100 for token in range(512) if not 33 <= token <= 126}
"""For the synthetic vocabulary, whose first 256 tokens are bytes: every token becomes one visible character, so that
equal texts are equal tokens. A bias of -100 is more than its random logits span."""


async def test_the_reference_text(data_dir: Path, http: aiohttp.ClientSession) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 100, "temperature": 0}
    with serving(stories_model(), "--slots", "2", "--data-dir", str(data_dir)) as server:
        status, answer = await ask(http, server.url, body)
        assert status == 200, answer
        assert answer["choices"] == [{"index": 0, "text": GOLDEN, "finish_reason": "length", "logprobs": None}]
        assert answer["usage"]["completion_tokens"] == 100
        streamed = await listen(http, server.url, body)
        assert (streamed.text, streamed.finish, streamed.done) == (GOLDEN, "length", True)


async def test_a_stream_is_the_answer_in_pieces(trained_server: ServeProcess, http: aiohttp.ClientSession) -> None:
    """Of a trained model, which ends its story itself."""
    body = {"prompt": BEGINNINGS[0], "max_tokens": 300, "temperature": 0}
    status, answer = await ask(http, trained_server.url, body)
    assert (status, answer["choices"][0]["finish_reason"]) == (200, "stop"), answer
    streamed = await listen(http, trained_server.url, body)
    assert (streamed.text, streamed.finish, streamed.done) == (answer["choices"][0]["text"], "stop", True)
    assert len(streamed.pieces) > 50


def random_prompts(lengths: Sequence[int]) -> list[list[int]]:
    """Token ids."""
    draw = random.Random(6)
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


async def staggered(http: aiohttp.ClientSession, url: str, bodies: Sequence[Body]) -> list[str]:
    """Texts of streams that begin in pairs, each pair while the ones before it run: prompts are then computed beside
    running answers, and beside one another."""
    heards = [Heard() for _ in bodies]
    tasks: list[asyncio.Task[Heard]] = []
    for index, body in enumerate(bodies):
        tasks.append(asyncio.create_task(listen(http, url, body, heards[index])))
        await until(lambda at=index: at % 2 == 0 or len(heards[at].pieces) > 2, "an answer begins")  # type: ignore[misc]
    return [heard.text for heard in await asyncio.gather(*tasks)]


async def assert_same_in_company(http: aiohttp.ClientSession, url: str, bodies: Sequence[Body]) -> None:
    alone = [await complete(http, url, body) for body in bodies]
    assert len(set(alone)) > 4, "too many equal texts to tell anything"
    for order in (bodies, bodies[::-1]):
        expected = alone if order is bodies else alone[::-1]
        for _ in range(3):
            assert await staggered(http, url, order) == expected
            assert await asyncio.gather(*(complete(http, url, body) for body in order)) == expected


async def test_random_weights_say_the_same_beside_seven_others(
    tiny_server: ServeProcess, http: aiohttp.ClientSession
) -> None:
    prompts = random_prompts((3, 63, 5, 40, 17, 33, 60, 48))
    bodies = [completion(prompt, 190, logit_bias=ONLY_ASCII) for prompt in prompts]
    await assert_same_in_company(http, tiny_server.url, bodies)


async def test_long_prompts_of_random_weights_say_the_same_beside_seven_others(
    tiny_server: ServeProcess, http: aiohttp.ClientSession
) -> None:
    prompts = random_prompts((3, 40, 70, 129, 150, 200, 257, 390))
    bodies = [completion(prompt, 100, logit_bias=ONLY_ASCII) for prompt in prompts]
    await assert_same_in_company(http, tiny_server.url, bodies)


async def test_a_trained_model_says_the_same_beside_seven_others(
    trained_server: ServeProcess, http: aiohttp.ClientSession
) -> None:
    bodies = [completion(prompt, 60) for prompt in BEGINNINGS]
    await assert_same_in_company(http, trained_server.url, bodies)
