"""What models the swarm serves, who has them, and the text side of those that only peers have."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from swarmcpp.core import ModelInfo
from swarmcpp.errors import UnknownModel
from swarmcpp.llama.chat import ChatCodec
from swarmcpp.llama.vocab import VocabModel
from swarmcpp.models.gguf_header import read_header
from swarmcpp.peers import ModelOffer, NodeId
from swarmcpp.sharing.vocabulary import fetch_vocabulary
from swarmcpp.supervisor.replica import LocalReplica
from swarmcpp.supervisor.runner import Runner
from swarmcpp.swarm.membership import PeerView, Status
from swarmcpp.swarm.mesh import Mesh
from swarmcpp.wire.peers import Caller


@dataclass(frozen=True, slots=True)
class Served:
    """A model that this node itself serves. `names` are all that it answers to."""

    runner: Runner
    offer: ModelOffer
    names: frozenset[str]

    @property
    def replica(self) -> LocalReplica | None:
        """The runner, if it is an engine with the whole model."""
        return self.runner if isinstance(self.runner, LocalReplica) else None


class SwarmModels:
    """The models of a swarm as one node sees them, its own among them."""

    def __init__(self, mesh: Mesh, data_dir: Path) -> None:
        self._mesh = mesh
        self._directory = data_dir / "vocabularies"
        self._codecs: dict[bytes, ChatCodec] = {}
        self._vocabs: list[VocabModel] = []
        self._lock = asyncio.Lock()
        self._own: dict[str, Served] = {}

    @property
    def served(self) -> tuple[Served, ...]:
        """What this node serves itself, in the order in which it was ready."""
        return tuple(self._own.values())

    def serve(self, served: Served) -> None:
        """Serve a model here from now on; it takes the place of one that peers know by the same name."""
        self._own[served.offer.id] = served

    def own(self, model: str) -> Served | None:
        """What this node itself serves under a name."""
        return self._own.get(model) or next((each for each in self._own.values() if model in each.names), None)

    def close(self) -> None:
        """Free the vocabularies."""
        for vocab in self._vocabs:
            vocab.close()
        self._vocabs.clear()

    def offers(self) -> Iterator[tuple[PeerView, ModelOffer]]:
        """Whole models of peers that can be asked now."""
        callers = self._mesh.callers()
        for view in self._mesh.membership.peers():
            capability = view.capability
            if view.status is Status.ALIVE and capability.node in callers and capability.state == "ready":
                for offer in capability.models:
                    if offer.first == 0 and offer.last == offer.n_layers:
                        yield view, offer

    def of(self, model: str) -> Iterator[tuple[PeerView, ModelOffer]]:
        """Peers' offers of one model: by its name, or by what it is when it is served here too."""
        own = self.own(model)
        for view, offer in self.offers():
            if offer.fingerprint == own.offer.fingerprint if own else offer.id == model:
                yield view, offer

    def offer(self, model: str) -> ModelOffer | None:
        """A peer's offer of a model; None when nobody has it now."""
        return next((offer for _, offer in self.of(model)), None)

    def name_at(self, node: NodeId, model: str) -> str:
        """What a peer calls a model."""
        return next((offer.id for view, offer in self.of(model) if view.capability.node == node), model)

    def infos(self) -> tuple[ModelInfo, ...]:
        """Models that only peers serve, one for each name."""
        found: dict[str, ModelInfo] = {}
        own = {each.offer.fingerprint for each in self.served}
        for _, offer in self.offers():
            if offer.fingerprint not in own and offer.id not in found:
                found[offer.id] = ModelInfo(
                    id=offer.id,
                    path="",
                    architecture=offer.architecture,
                    description=offer.description,
                    n_params=offer.n_params,
                    size_bytes=offer.size_bytes,
                    n_vocab=offer.n_vocab,
                    n_ctx_train=offer.n_ctx_train,
                    n_layers=offer.n_layers,
                    created=offer.created,
                )
        return tuple(found.values())

    def holders(self, fingerprint: bytes) -> list[Caller]:
        """Links to peers that have a model's files, or parts of them; the whole ones first, least busy first."""
        found: list[tuple[bool, int, NodeId]] = []
        for view in self._mesh.membership.peers():
            capability = view.capability
            whole = any(each.fingerprint == fingerprint and not each.pipeline for each in capability.models)
            if whole or any(each.fingerprint == fingerprint for each in capability.stages):
                found.append((not whole, capability.load.slots_busy + capability.load.waiting, capability.node))
        return [caller for *_, node in sorted(found) if (caller := self._mesh.caller(node))]

    async def codec(self, model: str) -> ChatCodec:
        """The text side of a model that only peers have; its vocabulary is fetched once.

        Raises UnknownModel when nobody serves it, and what `fetch_vocabulary` raises.
        """
        offer = self.offer(model)
        if offer is None:
            raise UnknownModel(f"model {model[:80]!r} is not served by any node of the swarm now", param="model")
        async with self._lock:
            if offer.fingerprint not in self._codecs:
                self._codecs[offer.fingerprint] = await self._load(offer.fingerprint)
        return self._codecs[offer.fingerprint]

    async def _load(self, fingerprint: bytes) -> ChatCodec:
        path = self._directory / f"{fingerprint.hex()[:32]}.gguf"
        if not await asyncio.to_thread(path.is_file):
            await fetch_vocabulary(self.holders(fingerprint), fingerprint, path)
        header = await asyncio.to_thread(read_header, path)
        template = header.metadata.get("tokenizer.chat_template")
        vocab = await asyncio.to_thread(VocabModel, path)
        self._vocabs.append(vocab)
        return ChatCodec(vocab.vocab, template if isinstance(template, str) else None)
