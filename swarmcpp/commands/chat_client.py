"""The client's side of the OpenAI API, as far as `chat` needs it. Any server that speaks it will do."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp

from swarmcpp.commands.sse import SseParser
from swarmcpp.errors import BadConfig, StartupError, SwarmError, WireError, revive

CONNECT_TIMEOUT_S = 10.0
MAX_ERROR_CHARS = 500


@dataclass(frozen=True, slots=True)
class Delta:
    """One event of an answer. `completion_tokens` comes with the last one, from servers that count."""

    text: str
    finish_reason: str | None
    completion_tokens: int | None


class ChatClient:
    """A session with one server; used with `async with`."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """`url` may leave out http:// and may end in /v1. Raises BadConfig when it is no address."""
        self.url = base_url(url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # An answer may take as long as it takes; only a server that is not there is given up on.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def models(self) -> list[str]:
        """Ids of the models that the server offers, its default first. Raises as `stream`."""
        async with await self._request("GET", "/v1/models") as response:
            document = parse_json(await response.read())
        entries = document.get("data") if isinstance(document, dict) else None
        if not isinstance(entries, list):
            raise WireError(f"{self.url} does not answer like an OpenAI API: /v1/models has no list of models")
        return [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]

    async def stream(self, body: Mapping[str, object]) -> AsyncGenerator[Delta, None]:
        """The answer to the chat completion `body`, piece by piece. Closing the iterator drops the connection.

        Raises StartupError when there is no server, WireError when it does not speak the API or the answer
        breaks off, and the error that the server reports as its class in swarmcpp.errors.
        """
        request = {**body, "stream": True, "stream_options": {"include_usage": True}}
        response = await self._request("POST", "/v1/chat/completions", request)
        parser = SseParser()
        try:
            async for chunk in response.content.iter_any():
                for data in parser.feed(chunk):
                    if data == "[DONE]":
                        return
                    yield read_delta(parse_json(data))
        except (aiohttp.ClientError, OSError) as error:
            raise WireError(f"the connection to {self.url} broke in the middle of the answer") from error
        finally:
            # Not released: only a closed connection tells the server at once that nobody listens any more.
            response.close()
        raise WireError(f"the answer of {self.url} ended too early, without [DONE]")

    async def _request(self, method: str, path: str, body: object = None) -> aiohttp.ClientResponse:
        assert self._session is not None, "ChatClient is used with `async with`"
        try:
            # A redirect would send the key somewhere that the user did not name.
            response = await self._session.request(method, self.url + path, json=body, allow_redirects=False)
        except aiohttp.InvalidURL as error:
            raise BadConfig(f"{self.url} is not an address of a server; write it as http://HOST:PORT") from error
        except (aiohttp.ClientError, OSError) as error:
            raise StartupError(
                f"no server at {self.url} ({_reason(error)}); start one with `swarmcpp serve MODEL`,"
                " or say where it is with --url or --data-dir"
            ) from error
        if response.status == 200:
            return response
        try:
            raise read_error(response.status, parse_json(await response.read()), self.url)
        except (aiohttp.ClientError, OSError) as error:
            raise WireError(f"{self.url} answered {response.status} and broke off") from error
        finally:
            response.close()


def base_url(url: str) -> str:
    """`url` with a scheme and without the path of the API. Raises BadConfig."""
    full = url.strip() if "://" in url else f"http://{url.strip()}"
    scheme, _, rest = full.partition("://")
    if scheme.lower() not in ("http", "https") or not rest.strip("/") or any(mark.isspace() for mark in rest):
        raise BadConfig(f"--url {url!r} is not an address of a server; write it as http://HOST:PORT")
    return full.rstrip("/").removesuffix("/v1").rstrip("/")


def parse_json(text: str | bytes) -> Any:
    """The JSON document, or None for anything else: what the caller makes of a server that talks otherwise."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_delta(document: Any) -> Delta:
    """One chunk of a streamed completion. Raises WireError for something else and the error that a chunk carries."""
    if not isinstance(document, dict):
        raise WireError("the server sent an event that is not a JSON object")
    if "error" in document:
        raise read_error(500, document, "the server")
    usage, choices = document.get("usage"), document.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta = choice.get("delta")
    content = delta.get("content") if isinstance(delta, dict) else None
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    finish = choice.get("finish_reason")
    return Delta(
        text=content if isinstance(content, str) else "",
        finish_reason=finish if isinstance(finish, str) else None,
        completion_tokens=tokens if isinstance(tokens, int) else None,
    )


def read_error(status: int, document: Any, source: str) -> SwarmError:
    """The error that a server reported in OpenAI's form, or one that says what came instead."""
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return WireError(f"{source} answered {status} and no error message; is it a server with an OpenAI API?")
    return revive(str(error.get("code")), error["message"][:MAX_ERROR_CHARS])


def _reason(error: Exception) -> str:
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer in {CONNECT_TIMEOUT_S:.0f} s"
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno in errno.errorcode:
        # asyncio puts the address in the place of the reason; the number is that of the system.
        return os.strerror(cause.errno).lower()
    return (getattr(cause, "strerror", None) or str(cause) or type(cause).__name__).lower()
