"""Stages of a small model, each in an engine process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from stage_support import FINGERPRINT, cut

from swarmcpp.core import KvLayout
from swarmcpp.kv.arena import Arena
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.kv.keys import KvIdentity
from swarmcpp.supervisor.stage import StageSupervisor
from swarmcpp.wire.engine import EngineOptions

DEADLINE_S = 60.0
IDENTITY = KvIdentity(FINGERPRINT, 64, (1, 1))


def options(file: Path, slots: int = 2) -> EngineOptions:
    return EngineOptions(
        model_path=str(file),
        ctx_size=512,
        slots=slots,
        threads=1,
        use_extra_bufts=False,
        q8_kernel=False,
        attention_kernel=False,
        prefill_chunk_tokens=128,
        prefill_budget_s=0.4,
        stage=True,
    )


@asynccontextmanager
async def stage(
    path: Path, first: int, last: int, arena: Path | None = None, **how: Any
) -> AsyncIterator[StageSupervisor]:
    def open_cache(layout: KvLayout) -> PrefixCache | None:
        if arena is None:
            return None
        block_bytes = layout.token_bytes * 64
        opened = Arena.open(arena, IDENTITY.arena_root(first, last), block_bytes, 1 << 20, 0)
        assert opened
        return PrefixCache(opened, IDENTITY)

    slots = how.pop("slots", 2)
    supervisor = StageSupervisor(options(cut(path, first, last), slots), open_cache=open_cache, **how)
    supervisor.start()
    try:
        await asyncio.wait_for(supervisor.wait_ready(), DEADLINE_S)
        yield supervisor
    finally:
        await supervisor.close()
