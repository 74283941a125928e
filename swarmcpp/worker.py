"""The engine process: `python -m swarmcpp.worker`, started by a node's supervisor only.

It reads a ticket (one JSON line) from stdin, connects to its node, loads what it is told, and runs the engine loop. It
ends when the node says so, when the node dies (stdin closes), or when something fails for good.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from swarmcpp.errors import SnapshotError, SwarmError
from swarmcpp.swarm.link import WorkerLink
from swarmcpp.wire import EngineLink, EngineOptions, Fault, Load, LoadProgress, Ready, Stop, UseArena

logger = logging.getLogger(__name__)

PROGRESS_STEP = 0.01
"""Least rise of the load fraction that is worth a message."""


def main() -> int:
    """Run one engine; the exit code is 0 after Stop, 1 after a Fault."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    ticket = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_node, args=(sys.stdin,), daemon=True).start()
    link = WorkerLink(ticket)
    try:
        _serve(link, Path(ticket["abort_file"]))
    except SwarmError as error:
        link.send(Fault(code=error.code, message=str(error)))
        return 1
    finally:
        link.close()
    return 0


def _die_with_node(stdin: TextIO) -> None:
    # The pipe closes when the node ends, however it ends. Nothing here is worth saving.
    stdin.read()
    os._exit(0)


def _serve(link: EngineLink, abort_file: Path) -> None:
    # The first message tells the node that this end is connected.
    link.send(LoadProgress(fraction=0.0))
    message = link.receive(timeout_s=60.0)
    if message is None or isinstance(message, Stop):
        return
    if not isinstance(message, Load):
        raise SwarmError(f"expected Load, got {type(message).__name__}")
    _run_engine(message.options, link, abort_file)


def _run_engine(options: EngineOptions, link: EngineLink, abort_file: Path) -> None:
    # Imported here: these load llama.cpp, and a library that cannot be loaded must be reported through the link.
    import psutil

    from swarmcpp._native import abort_callback_address
    from swarmcpp.engine.abortflag import AbortFlag
    from swarmcpp.engine.loop import Engine
    from swarmcpp.engine.scheduler import Policy, Scheduler
    from swarmcpp.kv.arena import ArenaFile, ArenaGeometry
    from swarmcpp.llama.backend import LlamaBackend
    from swarmcpp.llama.context import Context, ContextOptions, Model

    if options.diag:
        logging.getLogger("swarmcpp").setLevel(logging.DEBUG)
    abort = AbortFlag(abort_file, create=False)
    model = Model(Path(options.model_path), use_extra_bufts=options.use_extra_bufts, progress=_Progress(link).report)
    context = Context(
        model,
        ContextOptions(
            n_ctx=options.ctx_size,
            n_seqs=options.slots,
            n_threads=options.threads,
            abort_callback=abort_callback_address(),
            abort_data=abort.address,
        ),
    )
    backend = LlamaBackend(model, context, options.prefix_block_tokens)
    layout, no_blocks = None, "prefix_cache_enabled is off"
    if options.prefix_block_tokens:
        try:
            layout, no_blocks = backend.learn(), ""
        except SnapshotError as error:
            no_blocks = str(error)
    policy = Policy(
        prefill_chunk_tokens=options.prefill_chunk_tokens,
        prefill_budget_s=options.prefill_budget_s,
        max_rows=backend.max_rows,
        continuous_batching=options.continuous_batching,
        batched_prefill_forward=options.batched_prefill_forward,
    )
    # Copies between slots need the layout too.
    reuse = options.prefix_block_tokens if layout else 0
    engine = Engine(backend, link, Scheduler(policy), abort, time.monotonic, block_tokens=reuse)

    def use_arena(message: UseArena) -> None:
        backend.use_file(ArenaFile(Path(message.path), ArenaGeometry(message.block_bytes, message.n_blocks)))

    engine.on_arena = use_arena
    link.send(
        Ready(
            ctx_size=backend.n_ctx,
            slots=backend.n_slots,
            threads=options.threads,
            resident_bytes=psutil.Process().memory_info().rss,
            layout=layout,
            no_blocks=no_blocks,
        )
    )
    try:
        engine.serve()
    finally:
        context.close()
        model.close()


class _Progress:
    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self._sent = 0.0

    def report(self, fraction: float) -> None:
        if fraction - self._sent >= PROGRESS_STEP or fraction >= 1.0:
            self._sent = fraction
            self._link.send(LoadProgress(fraction=fraction))


if __name__ == "__main__":
    sys.exit(main())
