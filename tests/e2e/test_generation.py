"""What a server generates: the reference's text, and the same text alone and in company."""

from __future__ import annotations

import asyncio
import random

import aiohttp
import pytest
from serve_client import Heard, ask, complete, completion, listen
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

WORDS = ("Once upon a time", "Tom and Lily", "The dog ran to the big tree", "One day, a bird", "Mia liked her red car")


async def test_the_reference_text(stories_server: ServeProcess, http: aiohttp.ClientSession) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 100, "temperature": 0}
    status, answer = await ask(http, stories_server.url, body)
    assert status == 200, answer
    assert answer["choices"] == [{"index": 0, "text": GOLDEN, "finish_reason": "length", "logprobs": None}]
    assert answer["usage"]["completion_tokens"] == 100
    streamed = await listen(http, stories_server.url, body)
    assert (streamed.text, streamed.finish, streamed.done) == (GOLDEN, "length", True)


def random_prompts() -> list[list[int]]:
    """Token ids, from a handful to several chunks of prefill."""
    draw = random.Random(6)
    return [[draw.randrange(256) for _ in range(length)] for length in (3, 40, 70, 129, 150, 200, 257, 390)]


def story_prompts() -> list[str]:
    return [" ".join(WORDS[(index + word) % len(WORDS)] for word in range(1 + 4 * index)) for index in range(8)]


async def together(http: aiohttp.ClientSession, url: str, bodies: list[dict[str, object]]) -> list[str]:
    """Texts of streams of which each begins when the one before it has brought a little, so that prompts are
    computed beside running answers."""
    heards = [Heard() for _ in bodies]
    tasks: list[asyncio.Task[Heard]] = []
    for index, body in enumerate(bodies):
        tasks.append(asyncio.create_task(listen(http, url, body, heards[index])))
        # Every other one starts at once: several prompts then share a step.
        while index % 2 and len(heards[index].pieces) < 3 and not tasks[index].done():
            await asyncio.sleep(0.001)
    return [heard.text for heard in await asyncio.gather(*tasks)]


@pytest.mark.parametrize("order", [1, -1])
async def test_random_weights_say_the_same_beside_seven_others(
    tiny_server: ServeProcess, http: aiohttp.ClientSession, order: int
) -> None:
    url = tiny_server.url
    bodies = [completion(prompt, 100, logit_bias=ONLY_ASCII) for prompt in random_prompts()[::order]]
    alone = [await complete(http, url, body) for body in bodies]
    assert [len(text) for text in alone] == [100] * 8
    assert len(set(alone)) > 4
    for _ in range(3):
        assert await together(http, url, bodies) == alone
        assert await asyncio.gather(*(complete(http, url, body) for body in bodies)) == alone


@pytest.mark.parametrize("order", [1, -1])
async def test_a_trained_model_says_the_same_beside_seven_others(
    stories_server: ServeProcess, http: aiohttp.ClientSession, order: int
) -> None:
    url = stories_server.url
    bodies = [completion(prompt, 200) for prompt in story_prompts()[::order]]
    alone = [await complete(http, url, body) for body in bodies]
    assert len(set(alone)) > 4
    for _ in range(3):
        assert await together(http, url, bodies) == alone
        assert await asyncio.gather(*(complete(http, url, body) for body in bodies)) == alone
