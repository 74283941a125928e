"""A whole request that runs on another node: what is told while it does, on both sides."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Final

import msgspec

from swarmcpp.core import MAX_GAMMA, GenerateRequest, Limits, TokenPart
from swarmcpp.errors import EngineFailed, WireError
from swarmcpp.wire.checks import are_tokens, check_request
from swarmcpp.wire.peers import Caller, Generate, KeepAlive, Part, Reply

KEEP_ALIVE_S: Final = 0.5
"""Silence after which a node says that it is still at work."""

SILENCE_S: Final = 2.0
"""Silence after which a node is taken for lost: four times as long, so that one late message does not matter."""

TIERS: Final = frozenset({"", "slot", "arena", "peer"})

Run = Callable[[GenerateRequest], AsyncGenerator[TokenPart, None]]


# -- the node that runs it ---------------------------------------------------------------------------------------------


async def serve_generate(
    message: Generate,
    send: Callable[[Reply], None],
    run: Run,
    limits: Limits,
    *,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> None:
    """Run a peer's request and send its tokens: those that are ready together in one Part, the last with `finish`.

    Raises what the request is refused for (see `check_request`), what `run` and `send` raise, and EngineFailed when
    `run` ends without a finish: the caller tells the asker. `run` is closed, which cancels its work, before this ends.
    """
    request = check_request(message.request, limits)
    parts: list[TokenPart] = []
    news = asyncio.Event()
    reader = asyncio.create_task(_read(run(request), parts, news))
    reader.add_done_callback(lambda _: news.set())
    try:
        while True:
            try:
                async with asyncio.timeout(keep_alive_s):
                    await news.wait()
            except TimeoutError:
                send(KeepAlive())
                continue
            news.clear()
            if parts:
                part = _joined(parts)
                parts.clear()
                send(Part(part))
                if part.finish:
                    return
            if reader.done():
                reader.result()
                raise EngineFailed("the generation stopped before its end; send the request again")
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read(stream: AsyncGenerator[TokenPart, None], parts: list[TokenPart], news: asyncio.Event) -> None:
    # A task of its own: it takes all that is ready before the sender gets its turn.
    async with aclosing(stream):
        async for part in stream:
            parts.append(part)
            news.set()


def _joined(parts: Sequence[TokenPart]) -> TokenPart:
    tokens = tuple(token for part in parts for token in part.tokens)
    return msgspec.structs.replace(
        parts[0],
        tokens=tokens,
        finish=parts[-1].finish,
        drafted=sum(part.drafted for part in parts),
        accepted=sum(part.accepted for part in parts),
    )


# -- the node that asks ------------------------------------------------------------------------------------------------


async def remote_tokens(caller: Caller, request: GenerateRequest, n_vocab: int) -> AsyncGenerator[TokenPart, None]:
    """Run `request` on the peer of `caller`: its tokens as they come, the last part with `finish`. Closing it cancels.

    `request.deadline_s` is what is left of the deadline now; the peer keeps it.
    Raises PeerTimeout (silence), PeerLost, WireError (what came cannot be an answer), or what the peer failed with.
    """
    left = request.max_tokens - len(request.generated)
    # What was generated before is a part of the prompt there, and may be cached as well.
    given = len(request.prompt) + len(request.generated)
    finished = False
    async with aclosing(caller.stream(Generate(request), silence_s=SILENCE_S)) as replies:
        async for reply in replies:
            if finished:
                raise WireError(f"a {type(reply).__name__} came after the end of request {request.id}")
            if isinstance(reply, KeepAlive):
                continue
            if not isinstance(reply, Part):
                raise WireError(f"request {request.id} was answered with a {type(reply).__name__}")
            _check_part(reply.part, given, left, n_vocab)
            left -= len(reply.part.tokens)
            finished = reply.part.finish is not None
            yield reply.part
    if not finished:
        raise WireError(f"the answer to request {request.id} has no end")


def _check_part(part: TokenPart, given: int, left: int, n_vocab: int) -> None:
    if not part.tokens and part.finish is None:
        raise WireError("a part without tokens and without an end")
    if len(part.tokens) > left:
        raise WireError(f"a part of {len(part.tokens)} tokens where {left} were left of max_tokens")
    if not are_tokens(part.ids, n_vocab):
        raise WireError(f"a part names a token outside 0 to {n_vocab - 1}")
    if not 0 <= part.cached_tokens <= given or part.tier not in TIERS:
        raise WireError(f"a part says that {part.cached_tokens} of {given} tokens came from {part.tier[:20]!r}")
    if not 0 <= part.accepted <= min(part.drafted, len(part.tokens)) or part.drafted > MAX_GAMMA * len(part.tokens):
        raise WireError(f"a part of {len(part.tokens)} tokens says that {part.accepted} of {part.drafted} were guessed")
    if not _are_seconds((part.queue_s, part.prefill_s, part.fetch_s)):
        raise WireError("a part has a time that is negative or not finite")


def _are_seconds(times: Iterable[float]) -> bool:
    return all(math.isfinite(time) and time >= 0 for time in times)
