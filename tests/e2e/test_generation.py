"""What a server generates: the reference's text, and the same text alone and in company."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import aiohttp
import pytest
from serve_client import Body, Heard, ask, complete, completion, listen, until
from serve_process import ServeProcess

pytestmark = pytest.mark.e2e

GOLDEN = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    " She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\" Lily was sad"
    " and didn't know what to do"
)
"""The 100 greedy tokens of llama-server, built from the same source, after "Once upon a time"."""

ONLY_ASCII = {str(token): -100 for token in range(512) if not 33 <= token <= 126}
"""For the synthetic vocabulary, whose first 256 tokens are bytes: every token becomes one visible character, so that
equal texts are equal tokens. A bias of -100 is more than its random logits span."""

STORIES = (
    "The dog ran to the big tree",
    "Ben went to the red car",
    "Sue liked the big dog",
    "Tom saw a tree",
    "Mia saw a big dog",
    "Mia went to the tree",
    "Sue went to the big dog",
    "Tim saw a big dog",
)
"""Beginnings after which the best and the second best token are never nearer than 0.02, in 300 greedy tokens. llama.cpp
multiplies one row of F32 weights by another kernel than several, which rounds differently and may decide a near tie."""


async def test_the_reference_text(stories_server: ServeProcess, http: aiohttp.ClientSession) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 100, "temperature": 0}
    status, answer = await ask(http, stories_server.url, body)
    assert status == 200, answer
    assert answer["choices"] == [{"index": 0, "text": GOLDEN, "finish_reason": "length", "logprobs": None}]
    assert answer["usage"]["completion_tokens"] == 100
    streamed = await listen(http, stories_server.url, body)
    assert (streamed.text, streamed.finish, streamed.done) == (GOLDEN, "length", True)


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
    stories_server: ServeProcess, http: aiohttp.ClientSession
) -> None:
    bodies = [completion(prompt, 200) for prompt in STORIES]
    await assert_same_in_company(http, stories_server.url, bodies)
