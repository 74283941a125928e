"""A whole model that this node serves, with an engine of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from swarmcpp.config import Config
from swarmcpp.core import KvLayout
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.models.manifest import Manifest, manifest_of
from swarmcpp.node.hosted import Hosted
from swarmcpp.node.member import Swarm
from swarmcpp.node.placing import PlannedModel
from swarmcpp.node.preparing import Prepared, open_cache
from swarmcpp.supervisor.process import EngineStatus
from swarmcpp.supervisor.replica import LocalReplica
from swarmcpp.supervisor.whole import EngineSupervisor


class WholeModel(Hosted):
    """Made on the event loop that opens it."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        swarm: Swarm | None,
        on_progress: Callable[[EngineStatus], None] = lambda _status: None,
    ) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._swarm = swarm
        self.prepared = prepared
        self.supervisor = EngineSupervisor(prepared.options, on_change=on_progress, open_cache=self._open_cache)
        super().__init__(prepared.info, LocalReplica(config, prepared.options, self.supervisor))

    async def open(self) -> None:
        """See `Hosted`."""
        self.supervisor.start()
        await self.supervisor.wait_ready()
        await self.read_text(Path(self.prepared.options.model_path), self.prepared.model.chat_template)
        if self._swarm:
            await self._offer(self._swarm)

    async def close(self) -> None:
        """See `Hosted`."""
        await self.supervisor.close()
        await super().close()

    @property
    def cache_bytes(self) -> int:
        """Size of the arena on disk; 0: none."""
        cache = self.supervisor.cache
        return cache.n_blocks * cache.block_bytes if cache else 0

    def _manifest(self) -> Manifest:
        """Blocking."""
        return manifest_of(self.prepared.model.files, self._config.storage.data_dir)

    def _open_cache(self, layout: KvLayout) -> PrefixCache | None:
        """In a thread."""
        cache = open_cache(self._config, self._manifest().fingerprint, layout, self.info.path)
        if self._swarm and cache:
            self._loop.call_soon_threadsafe(self._swarm.blocks.use, cache)
        return cache

    async def _offer(self, swarm: Swarm) -> None:
        """Tell the swarm what can be had here now."""
        model, cache, runner = self.prepared.model, self.supervisor.cache, self.runner
        manifest = await asyncio.to_thread(self._manifest)
        self.planned = PlannedModel(self.info.id, model, manifest.fingerprint, runner.ctx_size, runner.slots)
        swarm.give(manifest, model.files)
        if cache:
            token_bytes = cache.block_bytes // cache.block_tokens
            self.offer(swarm, manifest.fingerprint, root=cache.root, token_bytes=token_bytes)
        else:
            self.offer(swarm, manifest.fingerprint, root=b"")
