"""Real clients: openai's, curl, and many streams at once."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from swarmcpp.api.server import RunningServer
from swarmcpp.core import GenerateRequest
from swarmcpp.errors import EngineFailed
from swarmcpp.testing import FakeService

Serve = Callable[..., Awaitable[RunningServer]]
ClientOf = Callable[[RunningServer], openai.AsyncOpenAI]
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def client_of() -> AsyncIterator[ClientOf]:
    """The openai client of a server."""
    clients: list[openai.AsyncOpenAI] = []

    def make(server: RunningServer) -> openai.AsyncOpenAI:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.close()


async def test_openai_client_chat(serve: Serve, client_of: ClientOf) -> None:
    client = client_of(await serve(FakeService(script="Hi there"), api_key="secret"))
    answer = await client.chat.completions.create(model="fake", messages=MESSAGES, n=2, seed=1, max_tokens=2)
    assert [choice.message.content for choice in answer.choices] == ["Hi", "Hi"]
    assert answer.choices[1].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert [model.id async for model in client.models.list()] == ["fake"]
    assert (await client.models.retrieve("fake")).owned_by == "swarmcpp"


async def test_openai_client_streams(serve: Serve, client_of: ClientOf) -> None:
    client = client_of(await serve(FakeService(script="Grüße 👋"), api_key="secret"))
    text, usage = "", None
    stream = await client.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == "Grüße 👋"
    assert usage is not None
    assert usage.completion_tokens == len(text.encode())
    pieces = await client.completions.create(model="fake", prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in pieces]) == "Grüße 👋"
    assert (await client.completions.create(model="fake", prompt=["a", "b"])).choices[1].text == "Grüße 👋"


async def test_openai_client_understands_the_errors(serve: Serve, client_of: ClientOf) -> None:
    service = FakeService(max_running=0)
    client = client_of(await serve(service, api_key="secret"))
    with pytest.raises(openai.RateLimitError) as limited:
        await client.completions.create(model="fake", prompt="a")
    assert limited.value.code == "queue_full"
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model="fake", prompt="a", logprobs=3)
    assert (refused.value.code, refused.value.param) == ("unsupported_field", "logprobs")
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    service.max_running = 1
    service.fail_at = (2, EngineFailed("the engine died"))
    with pytest.raises(openai.APIError, match="the engine died"):
        async for _ in await client.completions.create(model="fake", prompt="a", stream=True):
            pass


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl(serve: Serve) -> None:
    server = await serve(FakeService(script="Hi"))

    async def curl(*arguments: str, body: str = "") -> str:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec("curl", "-sS", "-m", "20", *arguments, stdin=pipe, stdout=pipe)
        output, _ = await process.communicate(body.encode())
        assert process.returncode == 0
        return output.decode()

    url = f"{server.url}/v1/chat/completions"
    body = json.dumps({"messages": MESSAGES})
    answer = json.loads(await curl(url, "-d", body))
    assert answer["choices"][0]["message"]["content"] == "Hi"
    lines = (await curl("-N", url, "-d", json.dumps({"messages": MESSAGES, "stream": True}))).splitlines()
    assert lines[-2:] == ["data: [DONE]", ""]
    # More than a megabyte, so that curl asks with Expect: 100-continue.
    long = json.dumps({"messages": MESSAGES, "user": "x" * 2_000_000})
    output = await curl(url, "--data-binary", "@-", body=long)
    assert json.loads(output)["choices"][0]["message"]["content"] == "Hi"


async def test_200_streams_at_once(serve: Serve, http: aiohttp.ClientSession) -> None:
    def script(request: GenerateRequest) -> str:
        return f"{request.sampling.seed:03d}" * 20

    service = FakeService(script=script, gate=asyncio.Event(), gate_at=1)
    server = await serve(service)
    assert service.gate is not None

    async def one(seed: int) -> str:
        text = ""
        query = {"messages": MESSAGES, "stream": True, "seed": seed}
        async with http.post(f"{server.url}/v1/chat/completions", json=query) as response:
            assert response.status == 200
            async for line in response.content:
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                    if service.running == 200:
                        # All streams are open at this moment, each with its first character sent.
                        service.gate.set()  # type: ignore[union-attr]
        return text

    async with asyncio.timeout(60):
        texts = await asyncio.gather(*(one(seed) for seed in range(200)))
    assert texts == [f"{seed:03d}" * 20 for seed in range(200)]
    assert service.cancelled == []
