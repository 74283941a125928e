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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from swarmcpp.core import MAX_OUTPUTS, KvLayout
from swarmcpp.errors import SnapshotError, SwarmError
from swarmcpp.footprint import settle, share_heaps
from swarmcpp.supervisor.workerlink import WorkerLink
from swarmcpp.wire.engine import EngineLink, EngineOptions, Fault, Load, LoadProgress, Ready, Stop, UseArena

if TYPE_CHECKING:
    from swarmcpp.engine.abortflag import AbortFlag
    from swarmcpp.engine.drafting import Drafter
    from swarmcpp.engine.loop import Engine
    from swarmcpp.engine.modeldrafter import Guesser
    from swarmcpp.engine.scheduler import Scheduler
    from swarmcpp.engine.stageloop import StageLoop
    from swarmcpp.llama.backend import LlamaBackend
    from swarmcpp.llama.context import Context, ContextOptions, Model
    from swarmcpp.llama.stage import LlamaStage

logger = logging.getLogger(__name__)

PROGRESS_STEP = 0.01
"""Least rise of the load fraction that is worth a message."""


def main() -> int:
    """Run one engine; the exit code is 0 after Stop, 1 after a Fault."""
    share_heaps()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    ticket = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_node, args=(sys.stdin,), daemon=True).start()
    link = WorkerLink(ticket)
    try:
        _serve(link, Path(ticket["abort_file"]))
    except SwarmError as error:
        link.send(Fault(code=error.code, message=str(error)))
        return 1
    except ConnectionError:
        # The node is gone.
        return 0
    finally:
        link.close()
    return 0


def _die_with_node(stdin: TextIO) -> None:
    # The pipe closes when the node ends, however it ends. Nothing here is worth saving.
    stdin.read()
    os._exit(0)


def _serve(link: WorkerLink, abort_file: Path) -> None:
    # The first message tells the node that this end is connected.
    link.send(LoadProgress(fraction=0.0))
    message = link.receive(timeout_s=60.0)
    if message is None or isinstance(message, Stop):
        return
    if not isinstance(message, Load):
        raise SwarmError(f"expected Load, got {type(message).__name__}")
    _run_engine(message.options, link, abort_file)


def _run_engine(options: EngineOptions, link: WorkerLink, abort_file: Path) -> None:
    # Imported here: these load llama.cpp, and a library that cannot be loaded must be reported through the link.
    import psutil

    from swarmcpp.engine.abortflag import AbortFlag
    from swarmcpp.llama import lib
    from swarmcpp.llama.context import Model

    if options.diag:
        logging.getLogger("swarmcpp").setLevel(logging.DEBUG)
    abort = AbortFlag(abort_file, create=False)
    lib.use_kernels(q8=options.q8_kernel, attention=options.attention_kernel)
    with ExitStack() as stack:
        model = Model(
            Path(options.model_path), use_extra_bufts=options.use_extra_bufts, progress=_Progress(link).report
        )
        stack.callback(model.close)
        context, backend = _open_stage(options, model) if options.stage else _open_whole(options, model, abort)
        stack.callback(context.close)
        layout, no_blocks = _learn(options, backend)
        drafters = [] if options.stage else _drafters(options, model, stack)
        # Copies between slots need the layout too.
        block_tokens = options.prefix_block_tokens if layout else 0
        guesser = _guesser(options, model, stack) if options.stage and options.draft_path else None
        loop = _loop(options, backend, link, abort, block_tokens, drafters, guesser)
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
        settle()
        loop.serve()


def _drafters(options: EngineOptions, model: Model, stack: ExitStack) -> list[Drafter]:
    """Who guesses ahead for this engine. Raises BadModel, NotEnoughMemory."""
    if not options.gamma:
        return []
    from swarmcpp.engine.drafting import lookups
    from swarmcpp.engine.modeldrafter import ModelDrafter

    drafters = [make() for make in lookups(ngram=options.ngram)]
    if options.draft_path:
        backend = _open_draft(Path(options.draft_path), options, model, stack)
        drafters.append(ModelDrafter("draft", backend, model.vocab.n_vocab, time.monotonic))
    if options.skip_ratio:
        from swarmcpp.llama.selfdraft import self_draft

        path = self_draft(
            Path(options.model_path),
            model,
            options.skip_ratio,
            Path(options.skip_dir),
            options.threads,
            use_extra_bufts=options.use_extra_bufts,
        )
        backend = _open_draft(path, options, model, stack)
        drafters.append(ModelDrafter("skip", backend, model.vocab.n_vocab, time.monotonic))
    return drafters


def _guesser(options: EngineOptions, model: Model, stack: ExitStack) -> Guesser:
    """What guesses for the head of a chain. Raises BadModel, NotEnoughMemory."""
    from swarmcpp.engine.modeldrafter import Guesser, ModelDrafter

    # A slice has no vocabulary to compare, unless it is a tail: the head has compared them.
    backend = _open_draft(Path(options.draft_path), options, None, stack)
    return Guesser(ModelDrafter("draft", backend, backend.n_vocab, time.monotonic))


def _open_draft(path: Path, options: EngineOptions, target: Model | None, stack: ExitStack) -> LlamaBackend:
    from swarmcpp.llama.backend import LlamaBackend
    from swarmcpp.llama.context import Context, Model
    from swarmcpp.llama.vocab import check_draft

    draft = Model(path, use_extra_bufts=options.use_extra_bufts)
    stack.callback(draft.close)
    if target:
        check_draft(Path(options.model_path), target.vocab, path, draft.vocab)
    context = Context(draft, replace(_context_options(options), outputs=0))
    stack.callback(context.close)
    return LlamaBackend(draft, context)


def _loop(
    options: EngineOptions,
    backend: LlamaBackend,
    link: WorkerLink,
    abort: AbortFlag,
    block_tokens: int,
    drafters: Sequence[Drafter],
    guesser: Guesser | None,
) -> Engine | StageLoop:
    from swarmcpp.engine.loop import Engine
    from swarmcpp.engine.speculation import Speculation
    from swarmcpp.engine.stageloop import StageLoop
    from swarmcpp.kv.arena import ArenaFile, ArenaGeometry
    from swarmcpp.llama.stage import LlamaStage

    def open_arena(message: UseArena) -> None:
        backend.use_file(ArenaFile(Path(message.path), ArenaGeometry(message.block_bytes, message.n_blocks)))

    clock = time.monotonic
    if isinstance(backend, LlamaStage):
        return StageLoop(
            backend,
            link,
            clock,
            block_tokens=block_tokens,
            poll_s=options.poll_s,
            open_arena=open_arena,
            guesser=guesser,
        )
    return Engine(
        backend,
        link,
        _scheduler(options, backend.max_rows),
        abort,
        clock,
        block_tokens=block_tokens,
        open_arena=open_arena,
        speculation=Speculation(drafters, gamma=options.gamma, max_rows=backend.max_outputs, n_ctx=backend.n_ctx),
    )


def _open_whole(options: EngineOptions, model: Model, abort: AbortFlag) -> tuple[Context, LlamaBackend]:
    from swarmcpp._native import abort_callback_address
    from swarmcpp.llama.backend import LlamaBackend
    from swarmcpp.llama.context import Context

    sizes = _context_options(options)
    context = Context(model, replace(sizes, abort_callback=abort_callback_address(), abort_data=abort.address))
    return context, LlamaBackend(model, context, options.prefix_block_tokens)


def _open_stage(options: EngineOptions, model: Model) -> tuple[Context, LlamaStage]:
    from swarmcpp.llama.stage import LlamaStage, StageContext
    from swarmcpp.models.gguf_header import read_header
    from swarmcpp.models.slicing import slice_of

    found = slice_of(read_header(Path(options.model_path)))
    # A whole model is a stage with all layers.
    stage = StageContext(model, _context_options(options), is_tail=found is None or found.is_tail)
    return stage.context, LlamaStage(model, stage, options.prefix_block_tokens)


def _context_options(options: EngineOptions) -> ContextOptions:
    from swarmcpp.llama.context import ContextOptions

    outputs = MAX_OUTPUTS if options.gamma else 0
    return ContextOptions(n_ctx=options.ctx_size, n_seqs=options.slots, n_threads=options.threads, outputs=outputs)


def _learn(options: EngineOptions, backend: LlamaBackend) -> tuple[KvLayout | None, str]:
    """The layout of the KV, or why it is in no blocks."""
    if not options.prefix_block_tokens:
        return None, "prefix_cache_enabled is off"
    try:
        return backend.learn(), ""
    except SnapshotError as error:
        return None, str(error)


def _scheduler(options: EngineOptions, max_rows: int) -> Scheduler:
    from swarmcpp.engine.scheduler import Policy, Scheduler

    policy = Policy(
        prefill_chunk_tokens=options.prefill_chunk_tokens,
        prefill_budget_s=options.prefill_budget_s,
        max_rows=max_rows,
        continuous_batching=options.continuous_batching,
        batched_prefill_forward=options.batched_prefill_forward,
    )
    return Scheduler(policy)


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
