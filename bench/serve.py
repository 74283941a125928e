"""`swarmcpp serve` against llama-server of the same source, on one machine: `make bench`, or this file with --help."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

# Run as a file, Python puts bench/ itself on the path, not the directory that has it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer
from rich.console import Console

from bench import exactness, latency, rates, reference, report, servers
from bench.setting import LLAMA, SWARM, Setup
from swarmcpp.models.synthetic import QWEN25_05B, write_model
from swarmcpp.models.synthetic_vocab import MIN_VOCAB

OUT = Path(__file__).resolve().parent / "out"
REPEATS = 5
QUICK_REPEATS = 2
WIDTH = 130
"""Columns that the tables need; a log file has no width of its own."""
SCENARIOS: dict[str, Callable[[Setup], Awaitable[report.Outcome]]] = {
    "decode": rates.decode,
    "agreement": exactness.agreement,
    "stall": latency.stall,
    "cancel": latency.cancel,
    "beside": exactness.beside,
}


def model_file(out: Path) -> Path:
    """The random-weight model of Qwen2.5-0.5B's shape in Q8_0, written once (528 MB)."""
    path = out / "qwen2.5-0.5b-shape-q8_0.gguf"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_model(path, QWEN25_05B, quant="Q8_0", seed=0, tokenizer="bytes")
    return path


def stories_file() -> Path | None:
    """stories260K.gguf: where SWARMCPP_STORIES says, else in ../shared/models beside the repository; None without."""
    named = os.environ.get("SWARMCPP_STORIES")
    beside = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K.gguf"
    path = Path(named) if named else beside
    if path.is_file():
        return path
    if named:
        raise typer.BadParameter(f"SWARMCPP_STORIES names {named}, which is no file; point it at stories260K.gguf")
    return None


def main(
    scenario: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(SCENARIOS)}; repeatable")] = None,
    quick: Annotated[bool, typer.Option(help=f"{QUICK_REPEATS} rounds instead of {REPEATS}, fewer settings")] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="rounds per scenario")] = None,
    side: Annotated[list[str] | None, typer.Option(help=f"{LLAMA} or {SWARM} only; default: both")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="compute threads; default: physical cores")] = None,
    seed: Annotated[int, typer.Option(help="of the random prompts")] = 0,
    json: Annotated[Path | None, typer.Option(help="where the samples go; default: bench/out/serve-TIME.json")] = None,
) -> None:
    """Measure, print the tables and write the samples as JSON. Exit code 1 unless every claim holds."""
    console = Console(width=max(Console().width, WIDTH))
    # Ended like by Ctrl-C, so that no server is left running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen = scenario or list(SCENARIOS)
    for name in chosen:
        if name not in SCENARIOS:
            raise typer.BadParameter(f"{name!r} is no scenario; choose from {', '.join(SCENARIOS)}")
    for name in side or ():
        if name not in (LLAMA, SWARM):
            raise typer.BadParameter(f"{name!r} is no server; choose {LLAMA} or {SWARM}")
    built = reference.ensure()
    model = model_file(OUT)
    cores = threads or servers.physical_cores()
    no_repack = servers.needs_no_repack(built, model, cores, OUT / "logs")
    setup = Setup(
        reference=built,
        model=model,
        stories=stories_file(),
        vocab=range(MIN_VOCAB, QWEN25_05B.n_vocab),
        threads=cores,
        repeats=repeats or (QUICK_REPEATS if quick else REPEATS),
        repack=not no_repack,
        out=OUT,
        sides=tuple(side or (LLAMA, SWARM)),
        quick=quick,
        say=lambda line: console.print(line, style="dim", markup=False, highlight=False),
        seed=seed,
    )
    about = {
        **report.machine(),
        "threads": cores,
        "repack": setup.repack,
        "cmake_flags": list(built.flags),
        "seed": seed,
    }
    console.print(f"{about['cpu']}, {cores} threads, llama-cpp-python {built.version}, {model.name}", highlight=False)
    target = json or OUT / f"serve-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    outcomes = []
    for name in chosen:
        outcomes.append(asyncio.run(_run(name, setup)))
        report.show(outcomes[-1], console)
        report.write_json(target, about, outcomes)
    console.print(f"samples: {target}", highlight=False)
    if not all(verdict.holds and outcome.settles(verdict) for outcome in outcomes for verdict in outcome.verdicts):
        raise typer.Exit(1)


async def _run(name: str, setup: Setup) -> report.Outcome:
    others = report.Others()
    outcome = await SCENARIOS[name](setup)
    return replace(outcome, others_cores=others.cores())


if __name__ == "__main__":
    typer.run(main)
