"""The command that every benchmark is: pick scenarios, run them in alternation, print tables, write JSON."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench import reference, report, servers
from bench.setting import LLAMA, SWARM, Setup, synthetic
from swarmcpp.models.synthetic import QWEN25_05B, TINYLLAMA_11B, Shape
from swarmcpp.models.synthetic_vocab import MIN_VOCAB

OUT = Path(__file__).resolve().parent / "out"
REPEATS = 5
QUICK_REPEATS = 2
WIDTH = 130
"""Columns that the tables need; a log file has no width of its own."""

Scenarios = Mapping[str, Callable[[Setup], Awaitable[report.Outcome]]]

SHAPES: dict[str, tuple[Shape, str]] = {
    "0.5b": (QWEN25_05B, "qwen2.5-0.5b-shape-q8_0.gguf"),
    "1.1b": (TINYLLAMA_11B, "tinyllama-1.1b-shape-q8_0.gguf"),
}
"""Models of random weights by the name of their size."""


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


def run(title: str, scenarios: Scenarios) -> None:
    """Run the benchmark `title` as the program that was called."""

    def main(
        scenario: Annotated[list[str] | None, typer.Option(help="only this scenario; repeatable")] = None,
        quick: Annotated[
            bool, typer.Option(help=f"{QUICK_REPEATS} rounds instead of {REPEATS}, fewer settings")
        ] = False,
        repeats: Annotated[int | None, typer.Option(min=1, help="rounds per scenario")] = None,
        side: Annotated[list[str] | None, typer.Option(help=f"{LLAMA} or {SWARM} only; default: both")] = None,
        threads: Annotated[int | None, typer.Option(min=1, help="compute threads; default: physical cores")] = None,
        size: Annotated[str, typer.Option(help=f"shape of the model: {', '.join(SHAPES)}")] = "0.5b",
        seed: Annotated[int, typer.Option(help="of the random prompts")] = 0,
        json: Annotated[
            Path | None, typer.Option(help="where the samples go; default: bench/out/TITLE-TIME.json")
        ] = None,
    ) -> None:
        """Measure, print the tables and write the samples as JSON. Exit code 1 unless every claim holds."""
        console = Console(width=max(Console().width, WIDTH))
        # Ended like by Ctrl-C, so that no server is left running.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        chosen = scenario or list(scenarios)
        for name in chosen:
            if name not in scenarios:
                raise typer.BadParameter(f"{name!r} is no scenario; choose from {', '.join(scenarios)}")
        if size not in SHAPES:
            raise typer.BadParameter(f"{size!r} is no shape; choose from {', '.join(SHAPES)}")
        for name in side or ():
            if name not in (LLAMA, SWARM):
                raise typer.BadParameter(f"{name!r} is no server; choose {LLAMA} or {SWARM}")
        built = reference.ensure()
        model = synthetic(OUT, *SHAPES[size], "Q8_0")
        cores = threads or servers.physical_cores()
        no_repack = servers.needs_no_repack(built, model, cores, OUT / "logs")
        setup = Setup(
            reference=built,
            model=model,
            stories=stories_file(),
            vocab=range(MIN_VOCAB, SHAPES[size][0].n_vocab),
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
        console.print(
            f"{about['cpu']}, {cores} threads, llama-cpp-python {built.version}, {model.name}", highlight=False
        )
        target = json or OUT / f"{title}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
        outcomes = []
        for name in chosen:
            outcomes.append(asyncio.run(_outcome(scenarios, name, setup)))
            report.show(outcomes[-1], console)
            report.write_json(target, about, outcomes)
        console.print(f"samples: {target}", highlight=False)
        if not all(verdict.holds and outcome.settles(verdict) for outcome in outcomes for verdict in outcome.verdicts):
            raise typer.Exit(1)

    typer.run(main)


async def _outcome(scenarios: Scenarios, name: str, setup: Setup) -> report.Outcome:
    others = report.Others()
    outcome = await scenarios[name](setup)
    return replace(outcome, others_cores=others.cores())
