"""A small real server with OpenAI's API, in a thread of its own; the last message of a request says how to behave."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any, Self

from aiohttp import web

PIECES = ("Hi", " there,\n", "\tfriend\x1b[31m!")


class FakeOpenAI:
    """Used with `with`. `bodies` are the chat requests so far; `left` is set when a client leaves a hanging answer."""

    def __init__(self, api_key: str | None = None) -> None:
        self.api_key = api_key
        self.bodies: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._runner: web.AppRunner | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening; again is fine."""
        if self._runner is not None:
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
            self._runner = None
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.add_routes([web.get("/v1/models", self._models), web.post("/v1/chat/completions", self._chat)])
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def _refusal(self, request: web.Request) -> web.Response | None:
        if self.api_key is None or request.headers.get("Authorization") == f"Bearer {self.api_key}":
            return None
        return _error(401, "invalid_api_key", "this server needs an API key")

    async def _models(self, request: web.Request) -> web.Response:
        return self._refusal(request) or web.json_response({"object": "list", "data": [{"id": "tiny"}, {"id": "big"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        wish = body["messages"][-1]["content"]
        if wish == "refuse":
            return _error(400, "context_length_exceeded", "the prompt is too long:\n9 tokens, 8 fit")
        if wish == "html":
            return web.Response(status=502, text="<h1>Bad gateway</h1>", content_type="text/html")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self._stream(wish, request, response)
        return response

    async def _stream(self, wish: str, request: web.Request, response: web.StreamResponse) -> None:
        await _send(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await response.write(b": a comment\n\n")
        for piece in PIECES:
            await _send(response, {"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
        if wish == "hang":
            try:
                await asyncio.Event().wait()
            finally:
                self.left.set()
        if wish == "break":
            assert request.transport is not None
            request.transport.abort()
            return
        if wish == "fail":
            await _send(response, {"error": {"message": "the engine died", "code": "engine_failed"}})
            return
        if wish == "short":
            return
        await _send(response, {"choices": [{"delta": {}, "finish_reason": "length" if wish == "cut" else "stop"}]})
        await _send(response, {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 7}})
        await response.write(b"data: [DONE]\n\n")


def _error(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "x", "code": code, "param": None}}, status=status)


async def _send(response: web.StreamResponse, document: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(document)}\n\n".encode())
