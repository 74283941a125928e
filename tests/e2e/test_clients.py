"""Real clients of a real server: openai's, curl, and 200 streams at once."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator

import aiohttp
import openai
import pytest
from serve_client import Heard, completion, listen, until_health
from serve_process import ServeProcess

pytestmark = pytest.mark.e2e

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture
async def client(tiny_server: ServeProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_openai_chat(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["tiny"]
    answer = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=3, seed=5, max_completion_tokens=9, extra_body={"ignore_eos": True}
    )
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
    assert len({choice.message.content for choice in answer.choices}) == 3, "each choice has a seed of its own"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 27
    again = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=3, seed=5, max_completion_tokens=9, extra_body={"ignore_eos": True}
    )
    assert [choice.message.content for choice in again.choices] == [choice.message.content for choice in answer.choices]


async def test_openai_stream(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=40, extra_body={"ignore_eos": True}
    )
    text, usage, finish = "", None, None
    async for chunk in await client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert (text, finish) == (whole.choices[0].message.content, "length")
    assert usage is not None and whole.usage is not None
    # How much was guessed ahead depends on what passes took.
    assert usage.model_copy(update={"completion_tokens_details": None}) == whole.usage.model_copy(
        update={"completion_tokens_details": None}
    )
    assert usage.completion_tokens == 40


async def test_openai_leaves_a_stream(
    client: openai.AsyncOpenAI, tiny_server: ServeProcess, http: aiohttp.ClientSession
) -> None:
    stream = await client.completions.create(
        model="tiny", prompt="a", stream=True, max_tokens=500, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    await stream.close()
    await until_health(http, tiny_server.url, slots_busy=0, queued=0)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl(tiny_server: ServeProcess) -> None:
    async def curl(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", "-m", "30", *arguments, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert process.returncode == 0
        return output.decode()

    url = f"{tiny_server.url}/v1/chat/completions"
    body = {"messages": MESSAGES, "max_tokens": 5, "ignore_eos": True}
    answer = json.loads(await curl(url, "-H", "Content-Type: application/json", "-d", json.dumps(body)))
    assert answer["usage"]["completion_tokens"] == 5
    events = (await curl("-N", url, "-d", json.dumps({**body, "stream": True}))).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert "swarmcpp_ready 1.0" in await curl(f"{tiny_server.url}/metrics")


async def test_200_streams_on_8_slots(tiny_server: ServeProcess, http: aiohttp.ClientSession) -> None:
    def body(number: int) -> dict[str, object]:
        options = {"include_usage": True}
        return completion([number % 256, 7, 8], 5 + number % 20, temperature=1, seed=number, stream_options=options)

    heards = await asyncio.gather(*(listen(http, tiny_server.url, body(number)) for number in range(200)))
    for number, heard in enumerate(heards):
        assert (heard.done, heard.finish, heard.error) == (True, "length", None)
        assert heard.usage is not None
        assert (heard.usage["prompt_tokens"], heard.usage["completion_tokens"]) == (3, 5 + number % 20)
    # A seeded draw is the client's own, whoever else is there.
    alone: Heard = await listen(http, tiny_server.url, body(150))
    assert alone.text == heards[150].text
    await until_health(http, tiny_server.url, slots_busy=0, queued=0)
