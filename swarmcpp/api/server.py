"""The HTTP server: routes, keys, limits and errors around `answers`.

Only this module, `listener` (sockets) and `options` know aiohttp.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass

from aiohttp import web

from swarmcpp.api import answers, openai, replies
from swarmcpp.api.answers import Answer
from swarmcpp.api.listener import RunningServer, start_server
from swarmcpp.api.metrics import CONTENT_TYPE, Metrics
from swarmcpp.api.openai import LimitsOf, Query, SeedSource
from swarmcpp.api.options import BUSY, OPTIONS, ServerOptions
from swarmcpp.core import Clock, Service
from swarmcpp.errors import (
    BadConfig,
    BadRequest,
    BodyTooLarge,
    Cancelled,
    MethodNotAllowed,
    QueueFull,
    RequestTimeout,
    SwarmError,
    Unauthorized,
    UnknownModel,
    UnknownRoute,
)

_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Parser = Callable[[bytes, LimitsOf, SeedSource], Query]

_OPEN_PATHS = frozenset({"/health", "/health/ready"})
"""Paths that need no key: a load balancer has none."""

_PREFLIGHT_MAX_AGE_S = 600

__all__ = ["RunningServer", "ServerOptions", "build_app", "start_server"]

_draw_seed = random.SystemRandom().getrandbits


def build_app(
    service: Service,
    options: ServerOptions,
    *,
    clock: Clock = time.monotonic,
    draw_seed: SeedSource = _draw_seed,
) -> web.Application:
    """The whole API of `service` as an aiohttp application. Raises BadConfig for an empty API key."""
    if options.api_key == "":
        # Most likely an unset variable; an open server is not what was meant.
        raise BadConfig("the API key is empty; set --api-key to a secret, or leave it out for a server without a key")
    api = _Api(service, options, Metrics(service.snapshot), clock, draw_seed)
    app = web.Application(middlewares=[api.root])
    app[OPTIONS] = options
    app[BUSY] = api.busy
    app.on_response_prepare.append(api.add_headers)
    for prefix in ("/v1", ""):
        app.router.add_get(f"{prefix}/models", api.list_models)
        app.router.add_get(prefix + "/models/{id:.+}", api.get_model)
        app.router.add_post(f"{prefix}/chat/completions", api.chat, expect_handler=api.expect)
        app.router.add_post(f"{prefix}/completions", api.text, expect_handler=api.expect)
    app.router.add_get("/health", api.health)
    app.router.add_get("/health/ready", api.ready)
    app.router.add_get("/metrics", api.show_metrics)
    return app


@dataclass(slots=True)
class _Trace:
    """What is told of a request in its headers and in the metrics."""

    id: str
    outcome: str = "ok"


_trace: ContextVar[_Trace] = ContextVar("trace")
"""Of the request that the current task handles; aiohttp runs each in a context of its own."""


def _new_trace() -> _Trace:
    trace = _Trace(f"req_{secrets.token_hex(12)}")
    _trace.set(trace)
    return trace


class _ClientGone(Exception):
    """There is no one left to answer; its text is the outcome for the metrics."""


class _Api:
    """Handlers and what they share. One per application; used on the event loop's thread."""

    def __init__(
        self, service: Service, options: ServerOptions, metrics: Metrics, clock: Clock, draw_seed: SeedSource
    ) -> None:
        self._service = service
        self._options = options
        self._clock = clock
        self._draw_seed = draw_seed
        self._key_digest = _digest(options.api_key) if options.api_key else None
        self.metrics = metrics
        self.busy: set[object] = set()

    # ---- around every request

    @web.middleware
    async def root(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The task root of every request: every error becomes an answer and is counted."""
        trace = _new_trace()
        self.busy.add(request.protocol)
        try:
            response = await self._respond(request, handler)
            # Sent here and not by aiohttp, which would wait for ever for a client that does not read.
            await self._deliver(request, response.prepare(request))
            await self._deliver(request, response.write_eof())
        except asyncio.CancelledError:
            trace.outcome = Cancelled.code
            raise
        except _ClientGone as gone:
            trace.outcome = str(gone)
            return web.Response(status=Cancelled.status)
        finally:
            self.busy.discard(request.protocol)
            self.metrics.request(_endpoint(request), trace.outcome)
        return response

    async def _respond(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if self._is_preflight(request):
                return _preflight(request)
            self._check_key(request)
            return await handler(request)
        except web.HTTPException as error:
            return self._error_response(_http_error(request, error), error)
        except _ClientGone:
            raise
        except Exception as error:  # noqa: BLE001 - task root of a request: every error becomes an answer
            return self._error_response(_as_swarm_error(error))

    async def _deliver(self, request: web.Request, sending: Awaitable[object]) -> None:
        """Await `sending`. Raises _ClientGone when the client left or takes no data, and drops it then."""
        try:
            async with asyncio.timeout(self._options.write_timeout_s):
                await sending
        except TimeoutError as error:
            # Not close(): that would wait for the client to take what is buffered.
            if request.transport is not None:
                request.transport.abort()
            raise _ClientGone("slow_client") from error
        except ConnectionError as error:
            raise _ClientGone(Cancelled.code) from error

    def _error_response(self, error: SwarmError, cause: web.HTTPException | None = None) -> web.Response:
        _trace.get().outcome = error.code
        response = _json(replies.error_body(error), error.status)
        if isinstance(error, QueueFull):
            response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        if isinstance(error, Unauthorized):
            response.headers["WWW-Authenticate"] = "Bearer"
        if isinstance(error, MethodNotAllowed) and cause is not None:
            response.headers["Allow"] = cause.headers.get("Allow", "")
        if isinstance(error, BodyTooLarge | RequestTimeout):
            # What is left of the body is never read as the next request.
            response.force_close()
        return response

    def _check_key(self, request: web.Request) -> None:
        if self._key_digest is None or request.path in _OPEN_PATHS:
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # Digests have one length, so that the comparison tells nothing of the key's.
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self._key_digest):
            raise Unauthorized("the API key is missing or wrong; send it as 'Authorization: Bearer KEY'")

    # ---- CORS

    def _allowed_origin(self, request: web.BaseRequest) -> str | None:
        origin = request.headers.get("Origin")
        if origin is None or not self._options.cors_origins:
            return None
        if "*" in self._options.cors_origins:
            return "*"
        return origin if origin in self._options.cors_origins else None

    def _is_preflight(self, request: web.Request) -> bool:
        return (
            request.method == "OPTIONS"
            and "Access-Control-Request-Method" in request.headers
            and self._allowed_origin(request) is not None
        )

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Headers of every response."""
        response.headers["X-Request-Id"] = _trace.get().id
        if self._options.cors_origins:
            response.headers["Vary"] = "Origin"
            origin = self._allowed_origin(request)
            if origin is not None:
                response.headers["Access-Control-Allow-Origin"] = origin
                response.headers["Access-Control-Expose-Headers"] = (
                    "X-Request-Id, Retry-After, x-swarm-route, Server-Timing"
                )

    # ---- bodies

    async def expect(self, request: web.Request) -> web.StreamResponse | None:
        """Answer `Expect: 100-continue`: the client waits for this before it sends a body that is too large."""
        if self._oversized(request):
            # This runs before the middleware.
            _new_trace()
            self.metrics.request(_endpoint(request), BodyTooLarge.code)
            return self._error_response(self._too_large())
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # aiohttp takes a non-zero output size for a response that has begun.
        request.writer.output_size = 0
        return None

    def _oversized(self, request: web.Request) -> bool:
        return (request.content_length or 0) > self._options.max_body_bytes

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body has more than {self._options.max_body_bytes} bytes; send less")

    async def _read_body(self, request: web.Request) -> bytes:
        if self._oversized(request):
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._options.body_timeout_s):
                async for piece in request.content.iter_any():
                    body += piece
                    if len(body) > self._options.max_body_bytes:
                        raise self._too_large()
        except TimeoutError as error:
            raise RequestTimeout(
                f"the body did not arrive within {self._options.body_timeout_s:g} s; send it faster"
            ) from error
        except ConnectionError as error:
            raise _ClientGone(Cancelled.code) from error
        except web.RequestPayloadError as error:
            raise BadRequest(f"the body broke off or is badly encoded: {error}") from error
        return bytes(body)

    # ---- handlers

    async def list_models(self, request: web.Request) -> web.Response:
        return _json(replies.model_list(self._service.models()))

    async def get_model(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        for model in self._service.models():
            if model.id == name:
                return _json(replies.model_json(model))
        raise UnknownModel(f"model {name[:80]!r} is not served here; GET /v1/models lists what is", param="model")

    async def health(self, request: web.Request) -> web.Response:
        return _json(replies.health_json(self._service.snapshot()))

    async def ready(self, request: web.Request) -> web.Response:
        snapshot = self._service.snapshot()
        return _json(replies.health_json(snapshot), 200 if snapshot.state == "ready" else 503)

    async def show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, openai.parse_chat, f"chatcmpl-{secrets.token_hex(12)}")

    async def text(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, openai.parse_text, f"cmpl-{secrets.token_hex(12)}")

    async def _complete(self, request: web.Request, parse: Parser, answer_id: str) -> web.StreamResponse:
        _trace.get().id = answer_id
        body = await self._read_body(request)
        query = parse(body, self._service.limits, self._draw_seed)
        model = answers.pick_model(self._service, query.model)
        head = replies.Head(answer_id, query.kind, model, int(time.time()))
        requests = await answers.plan(self._service, query, head)
        answer = Answer(self._service, query, head, requests, metrics=self.metrics, clock=self._clock)
        if query.stream:
            return await self._stream(request, answer)
        response = _json(await answer.reply())
        response.headers.update(answer.headers())
        return response

    async def _stream(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        async with aclosing(answer.stream()) as chunks:
            # A request that is refused fails here, while the status line can still say so.
            first = await anext(chunks)
            response = web.StreamResponse(
                headers={
                    "Content-Type": "text/event-stream; charset=utf-8",
                    "Cache-Control": "no-cache, no-store",
                    # Proxies such as nginx would otherwise collect the events.
                    "X-Accel-Buffering": "no",
                    **answer.headers(),
                }
            )
            try:
                await self._deliver(request, response.prepare(request))
                await self._deliver(request, response.write(first))
                async for chunk in chunks:
                    await self._deliver(request, response.write(chunk))
            except _ClientGone:
                raise
            except Exception as error:  # noqa: BLE001 - the status is sent: the stream itself must tell the failure
                failure = _as_swarm_error(error)
                _trace.get().outcome = failure.code
                await self._deliver(request, response.write(replies.sse(replies.error_body(failure))))
        return response


def _preflight(request: web.Request) -> web.Response:
    headers = {
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        # Clients such as openai's add headers of their own; the origin is what is checked.
        "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "authorization"),
        "Access-Control-Max-Age": str(_PREFLIGHT_MAX_AGE_S),
    }
    return web.Response(status=204, headers=headers)


def _json(obj: replies.JsonObject, status: int = 200) -> web.Response:
    return web.Response(body=replies.encode(obj), status=status, content_type="application/json")


def _as_swarm_error(error: Exception) -> SwarmError:
    if isinstance(error, SwarmError):
        return error
    _log.error("a request failed in a way that is a bug", exc_info=error)
    return SwarmError("an internal error; the server's log has the details")


def _http_error(request: web.Request, error: web.HTTPException) -> SwarmError:
    """aiohttp's own refusals in our tree."""
    path = request.path[:200]
    if isinstance(error, web.HTTPNotFound):
        return UnknownRoute(f"there is no {path}; the API is under /v1")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"{request.method[:20]} does not work on {path}; use {allowed}")
    return BadRequest(f"{error.status}: {error.reason}")


def _endpoint(request: web.Request) -> str:
    """The route as a metric label: a pattern of ours, never the client's text."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unmatched"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
