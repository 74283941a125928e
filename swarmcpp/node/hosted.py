"""A model that this node serves: what runs its requests, its text side, and what the swarm is told of it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from pathlib import Path

from swarmcpp.core import Limits, ModelInfo, NodeSnapshot
from swarmcpp.llama.chat import ChatCodec
from swarmcpp.llama.vocab import Vocab, VocabModel
from swarmcpp.node.member import Swarm
from swarmcpp.node.placing import PlannedModel
from swarmcpp.node.preparing import whole_offer
from swarmcpp.sharing.offers import Served
from swarmcpp.supervisor.runner import Runner


class Hosted(ABC):
    """One model of a node, from `open` to `close`. Used on the event loop's thread."""

    def __init__(self, info: ModelInfo, runner: Runner, planned: PlannedModel | None = None) -> None:
        self.info = info
        self.runner = runner
        self.names = frozenset({info.id, info.path, Path(info.path).name})
        """All that it answers to."""
        self.codec: ChatCodec | None = None
        """None until it is loaded, and where only layers are here that no text goes in or out of."""
        self.planned = planned
        """What /swarm/plan is about; None until it is known."""
        self._vocab: VocabModel | None = None

    @abstractmethod
    async def open(self) -> None:
        """Load it, and offer it to the swarm. Raises StartupError, SwarmError."""

    async def close(self) -> None:
        """Free the vocabulary; what else was opened goes before it."""
        self.codec = None
        if self._vocab:
            self._vocab.close()
            self._vocab = None

    async def read_text(self, path: Path, chat_template: str | None) -> Vocab:
        """Load the vocabulary of the file at `path`: the model can be talked to from now on. Raises BadModel.

        Once its engine has loaded: a file that crashes llama.cpp has then done so there, not in the node.
        """
        self._vocab = await asyncio.to_thread(VocabModel, path)
        self.codec = ChatCodec(self._vocab.vocab, chat_template)
        return self._vocab.vocab

    def offer(
        self, swarm: Swarm, fingerprint: bytes, *, root: bytes, token_bytes: int = 0, pipeline: bool = False
    ) -> None:
        """Tell the swarm that this node answers for the model now. The arguments: see `ModelOffer`."""
        ctx_size, slots = self.runner.ctx_size, self.runner.slots
        offer = whole_offer(self.info, fingerprint, root, token_bytes, ctx_size, slots, pipeline=pipeline)
        swarm.serve(Served(self.runner, offer, self.names))

    @property
    def limits(self) -> Limits:
        """What a request may ask for at most, now."""
        return Limits(ctx_size=self.runner.ctx_size, n_vocab=self.info.n_vocab)

    def snapshot(self, *, elsewhere: bool) -> NodeSnapshot:
        """State now; `elsewhere`: a peer answers with the model too."""
        status, stats = self.runner.status, self.runner.stats
        starting = status.state == "ready" and self.codec is None and not elsewhere
        return NodeSnapshot(
            state="starting" if starting else status.state,
            detail=status.detail or (f"loading, {status.load_fraction:.0%}" if status.state == "starting" else ""),
            model=self.info,
            slots=self.runner.slots,
            slots_busy=stats.slots_busy,
            ctx_size=self.runner.ctx_size,
            queued=max(0, self.runner.ahead - stats.slots_busy),
            running=stats.slots_busy,
            restarts=status.restarts,
            prefill_tps=stats.prefill_tps,
            decode_tps=stats.decode_tps,
        )
