"""The node: what joins the model, its engine, the text side and the HTTP API into one running process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from swarmcpp.config import Config
from swarmcpp.core import (
    ChatMessage,
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
from swarmcpp.errors import Cancelled, NotReady, UnknownModel
from swarmcpp.llama.chat import ChatCodec
from swarmcpp.llama.text import TextStream
from swarmcpp.llama.vocab import Vocab, VocabModel
from swarmcpp.node.member import Swarm
from swarmcpp.node.placing import PlannedModel, plan
from swarmcpp.status import SwarmPlan, SwarmStatus
from swarmcpp.supervisor.runner import Runner


class Node:
    """One served model, and those of the swarm. Satisfies `core.Service`; every method runs on its event loop."""

    def __init__(self, config: Config, info: ModelInfo, runner: Runner, swarm: Swarm | None = None) -> None:
        self._config = config
        self._info = info
        self._runner = runner
        self._swarm = swarm
        self._vocab: VocabModel | None = None
        self._codec: ChatCodec | None = None
        self._planning = asyncio.Lock()
        self.planned: PlannedModel | None = None
        """What /swarm/plan is about; None until it is loaded."""
        self.names = frozenset({info.id, info.path, Path(info.path).name})

    async def read_text(self, path: Path, chat_template: str | None) -> Vocab:
        """Load the vocabulary of the file at `path`: the model can be talked to from now on. Raises BadModel.

        The vocabulary is the node's, until it is closed.

        Once its engine has loaded: a file that crashes llama.cpp has then done so there, not in the node.
        """
        self._vocab = await asyncio.to_thread(VocabModel, path)
        self._codec = ChatCodec(self._vocab.vocab, chat_template)
        return self._vocab.vocab

    def close(self) -> None:
        """Free the vocabulary."""
        if self._vocab:
            self._vocab.close()
            self._vocab = None

    # -- what the API asks -----------------------------------------------------------------------------------------

    def models(self) -> tuple[ModelInfo, ...]:
        """See `core.Service`."""
        others = self._swarm.models.infos() if self._swarm else ()
        return (self._info, *(info for info in others if info.id not in self.names))

    def snapshot(self) -> NodeSnapshot:
        """See `core.Service`."""
        status, stats = self._runner.status, self._runner.stats
        starting = status.state == "ready" and self._codec is None and not self._elsewhere
        return NodeSnapshot(
            state="starting" if starting else status.state,
            detail=status.detail or (f"loading, {status.load_fraction:.0%}" if status.state == "starting" else ""),
            model=self._info,
            slots=self._runner.slots,
            slots_busy=stats.slots_busy,
            ctx_size=self._runner.ctx_size,
            queued=max(0, self._runner.ahead - stats.slots_busy),
            running=stats.slots_busy,
            restarts=status.restarts,
            prefill_tps=stats.prefill_tps,
            decode_tps=stats.decode_tps,
        )

    def swarm_status(self) -> SwarmStatus:
        """The swarm as this node sees it, for /swarm/status."""
        return self._swarm.status() if self._swarm else SwarmStatus(at=time.time())

    async def swarm_plan(self, added: Sequence[str]) -> SwarmPlan:
        """Who would hold what of this node's model, for /swarm/plan. Raises NotReady, BadRequest, BadModel."""
        if self._swarm is None:
            raise NotReady("this node is in no swarm; start it with --swarm")
        # One at a time: each takes a core for as long as a second for every machine that is added.
        async with self._planning:
            if self.planned is None:
                raise NotReady("this node serves no model yet; ask again when it does, or ask another one with --url")
            return await asyncio.to_thread(plan, self.planned, self._swarm.capabilities(), added)

    @property
    def _elsewhere(self) -> bool:
        """Whether a peer answers with this node's model."""
        return self._swarm is not None and self._swarm.models.offer(self._info.id) is not None

    def limits(self, model: str | None = None) -> Limits:
        """See `core.Service`."""
        if self._swarm and model is not None and model not in self.names and (offer := self._swarm.models.offer(model)):
            return Limits(ctx_size=offer.ctx_size, n_vocab=offer.n_vocab)
        return Limits(ctx_size=self._runner.ctx_size, n_vocab=self._info.n_vocab)

    async def tokenize_chat(
        self, model: str, messages: Sequence[ChatMessage], extra: dict[str, Any] | None = None
    ) -> tuple[int, ...]:
        """See `core.Service`."""
        codec = await self._codec_of(model)
        return tuple(await asyncio.to_thread(codec.tokenize_chat, messages, extra))

    async def tokenize_text(self, model: str, text: str) -> tuple[int, ...]:
        """See `core.Service`."""
        codec = await self._codec_of(model)
        return tuple(await asyncio.to_thread(codec.tokenize_text, text))

    async def _codec_of(self, model: str) -> ChatCodec:
        if model not in self.names:
            if self._swarm and self._swarm.models.offer(model):
                return await self._swarm.models.codec(model)
            raise UnknownModel(f"model {model!r} is not served here; this node serves {self._info.id!r}")
        if self._codec is None:
            # A node that only computes layers has no vocabulary: those who answer with the model are asked.
            if self._swarm and self._elsewhere:
                return await self._swarm.models.codec(self._info.id)
            raise NotReady(self.snapshot().detail or "the model is still loading")
        if not self._runner.usable and not self._elsewhere:
            raise NotReady(self.snapshot().detail)
        return self._codec

    # -- generation --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """See `core.Service`."""
        codec = await self._codec_of(request.model)
        text = TextStream(codec.piece, request.stop)
        clock = asyncio.get_running_loop().time
        timeout = request.deadline_s or self._config.server.request_timeout_s or None
        try:
            async with asyncio.timeout(timeout), aclosing(self._routed(request, timeout)) as parts:
                async for event in _events(parts, text, len(request.prompt), clock):
                    yield event
        except TimeoutError:
            raise Cancelled(f"the request took longer than its limit of {timeout:g} s") from None

    async def _routed(
        self, request: GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[tuple[str, TokenPart], None]:
        """Tokens with the route that they came by, from one replica after another until one has finished."""
        if self._swarm is None:
            async with aclosing(self._runner.tokens(self._runner.admit(request))) as parts:
                async for part in parts:
                    yield "local", part
            return
        local = self._runner if request.model in self.names else None
        async with aclosing(self._swarm.requests.tokens(request, local, timeout)) as routed:
            async for each in routed:
                yield each


async def _events(
    parts: AsyncGenerator[tuple[str, TokenPart], None], text: TextStream, prompt_tokens: int, clock: Callable[[], float]
) -> AsyncGenerator[Event, None]:
    """Tokens of a request as text events, then Done."""
    first: TokenPart | None = None
    first_s = 0.0
    count = 0
    async for route, part in parts:
        if first is None:
            first, first_s = part, clock()
            yield Started(route, part.queue_s, part.fetch_s, part.prefill_s)
        pieces: list[str] = []
        reason: FinishReason | None = None
        for number, token in enumerate(part.tokens, 1):
            count += 1
            finish = part.finish if number == len(part.tokens) else None
            # A token that ends the generation says nothing, even where the vocabulary gives it a text.
            pieces.append("" if finish == "stop" else text.feed(token.id))
            reason = "stop" if text.stopped else finish
            if reason:
                break
        if reason or part.finish:
            pieces.append(text.finish())
            # A stop string that only the last, incomplete text completed.
            reason = "stop" if text.stopped else reason or part.finish
        yield TextEvent("".join(pieces), part.tokens)
        if reason:
            timings = Timings(queue_s=first.queue_s, prefill_s=first.prefill_s, decode_s=clock() - first_s)
            yield Done(reason, Usage(prompt_tokens, count, first.cached_tokens, first.tier), timings)
            return
