"""The node: what the API asks of it, for each of its models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from swarmcpp.config import Config
from swarmcpp.core import (
    ChatMessage,
    Clock,
    Done,
    Event,
    FinishReason,
    GenerateRequest,
    Limits,
    ModelInfo,
    NodeSnapshot,
    Started,
    TextEvent,
    Timings,
    TokenPart,
    Usage,
)
from swarmcpp.errors import BadConfig, NotReady, UnknownModel
from swarmcpp.llama.chat import ChatCodec
from swarmcpp.llama.text import TextStream
from swarmcpp.node.hosted import Hosted
from swarmcpp.node.member import Swarm
from swarmcpp.node.placing import plan
from swarmcpp.status import SwarmPlan, SwarmStatus
from swarmcpp.supervisor.runner import LOCAL, Runner, deadline


class Node:
    """The models that are served here, the default first, and those of the swarm. Satisfies `core.Service`.

    Every method runs on its event loop.
    """

    def __init__(self, config: Config, models: Sequence[Hosted], swarm: Swarm | None = None) -> None:
        """Raises BadConfig when two models have one id."""
        self._config = config
        self._swarm = swarm
        self._hosted = {each.info.id: each for each in models}
        if len(self._hosted) < len(models):
            names = ", ".join(each.info.id for each in models)
            raise BadConfig(f"the models {names} do not all have names of their own; rename a file")
        self._default = models[0]
        self._planning = asyncio.Lock()

    # -- what the API asks -----------------------------------------------------------------------------------------

    def models(self) -> tuple[ModelInfo, ...]:
        """See `core.Service`."""
        others = self._swarm.models.infos() if self._swarm else ()
        own = (each.info for each in self._hosted.values())
        return (*own, *(info for info in others if self._find(info.id) is None))

    def _find(self, model: str | None) -> Hosted | None:
        """What serves a model here, by any name that it answers to; the default for None."""
        if model is None:
            return self._default
        return self._hosted.get(model) or next((each for each in self._hosted.values() if model in each.names), None)

    def _elsewhere(self, model: Hosted) -> bool:
        """Whether a peer answers with a model of this node."""
        return self._swarm is not None and self._swarm.models.offer(model.info.id) is not None

    def snapshot(self, model: str | None = None) -> NodeSnapshot:
        """See `core.Service`; of a model of this node, the default when none of that name is."""
        hosted = self._find(model) or self._default
        return hosted.snapshot(elsewhere=self._elsewhere(hosted))

    def swarm_status(self) -> SwarmStatus:
        """The swarm as this node sees it, for /swarm/status."""
        return self._swarm.status() if self._swarm else SwarmStatus(at=time.time())

    async def swarm_plan(self, added: Sequence[str]) -> SwarmPlan:
        """Who would hold what of the default model, for /swarm/plan. Raises NotReady, BadRequest, BadModel."""
        if self._swarm is None:
            raise NotReady("this node is in no swarm; start it with --swarm")
        # One at a time: each takes a core for as long as a second for every machine that is added.
        async with self._planning:
            planned = self._default.planned
            if planned is None:
                raise NotReady("this node serves no model yet; ask again when it does, or ask another one with --url")
            return await asyncio.to_thread(plan, planned, self._swarm.capabilities(), added)

    def limits(self, model: str | None = None) -> Limits:
        """See `core.Service`."""
        hosted = self._find(model)
        if hosted is None and self._swarm and model is not None and (offer := self._swarm.models.offer(model)):
            return Limits(ctx_size=offer.ctx_size, n_vocab=offer.n_vocab)
        return (hosted or self._default).limits

    async def tokenize_chat(
        self, model: str, messages: Sequence[ChatMessage], extra: dict[str, Any] | None = None
    ) -> tuple[int, ...]:
        """See `core.Service`."""
        codec = await self._codec_of(model)
        return tuple(await asyncio.to_thread(codec.tokenize_chat, messages, extra))

    async def tokenize_text(self, model: str, text: str, *, begins: bool = True) -> tuple[int, ...]:
        """See `core.Service`."""
        codec = await self._codec_of(model)
        return tuple(await asyncio.to_thread(codec.tokenize_text, text, begins=begins))

    async def _codec_of(self, model: str) -> ChatCodec:
        hosted = self._find(model)
        if hosted is None:
            if self._swarm and self._swarm.models.offer(model):
                return await self._swarm.models.codec(model)
            names = ", ".join(repr(each) for each in self._hosted)
            raise UnknownModel(f"model {model!r} is not served here; this node serves {names}")
        elsewhere = self._elsewhere(hosted)
        if hosted.codec is None:
            # A node that only computes layers has no vocabulary: those who answer with the model are asked.
            if self._swarm and elsewhere:
                return await self._swarm.models.codec(hosted.info.id)
            raise NotReady(hosted.snapshot(elsewhere=False).detail or "the model is still loading")
        if not hosted.runner.usable and not elsewhere:
            raise NotReady(hosted.snapshot(elsewhere=False).detail)
        return hosted.codec

    # -- generation --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """See `core.Service`."""
        codec = await self._codec_of(request.model)
        answer = _Answer(TextStream(codec.piece, request.stop), len(request.prompt), asyncio.get_running_loop().time)
        timeout = request.deadline_s or self._config.server.request_timeout_s or None
        async with deadline(timeout), aclosing(self._tokens(request, timeout)) as parts:
            async for route, part in parts:
                for event in answer.events(route, part):
                    yield event
                if answer.ended:
                    return

    def _tokens(self, request: GenerateRequest, timeout: float | None) -> AsyncGenerator[tuple[str, TokenPart], None]:
        """Tokens with the route that they came by, from one replica after another until one has finished."""
        hosted = self._find(request.model)
        if self._swarm:
            return self._swarm.requests.tokens(request, hosted.runner if hosted else None, timeout)
        return _alone((hosted or self._default).runner, request)


async def _alone(runner: Runner, request: GenerateRequest) -> AsyncGenerator[tuple[str, TokenPart], None]:
    """`Requests.tokens` of a node that is in no swarm."""
    async with aclosing(runner.tokens(runner.admit(request))) as parts:
        async for part in parts:
            yield LOCAL, part


class _Answer:
    """Tokens of a request as text events, then Done."""

    def __init__(self, text: TextStream, prompt_tokens: int, clock: Clock) -> None:
        self._text = text
        self._prompt_tokens = prompt_tokens
        self._clock = clock
        self._first: TokenPart | None = None
        self._first_s = 0.0
        self._count = self._drafted = self._accepted = 0
        self.ended = False

    def events(self, route: str, part: TokenPart) -> Iterator[Event]:
        """What the next tokens are for a reader."""
        if self._first is None:
            self._first, self._first_s = part, self._clock()
            yield Started(route, part.queue_s, part.fetch_s, part.prefill_s)
        self._drafted += part.drafted
        self._accepted += part.accepted
        pieces, reason = self._pieces(part)
        yield TextEvent("".join(pieces), part.tokens)
        if reason:
            self.ended = True
            first = self._first
            timings = Timings(queue_s=first.queue_s, prefill_s=first.prefill_s, decode_s=self._clock() - self._first_s)
            guesses = (self._drafted, self._accepted)
            usage = Usage(self._prompt_tokens, self._count, first.cached_tokens, first.tier, *guesses)
            yield Done(reason, usage, timings)

    def _pieces(self, part: TokenPart) -> tuple[list[str], FinishReason | None]:
        """The text of tokens, and why it ends."""
        pieces: list[str] = []
        reason: FinishReason | None = None
        for number, token in enumerate(part.tokens, 1):
            self._count += 1
            finish = part.finish if number == len(part.tokens) else None
            # A token that ends the generation says nothing, even where the vocabulary gives it a text.
            pieces.append("" if finish == "stop" else self._text.feed(token.id))
            reason = "stop" if self._text.stopped else finish
            if reason:
                break
        if reason or part.finish:
            pieces.append(self._text.finish())
            # A stop string that only the last, incomplete text completed.
            reason = "stop" if self._text.stopped else reason or part.finish
        return pieces, reason
