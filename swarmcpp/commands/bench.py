"""`swarmcpp bench`: how fast this machine runs a model, on the engine that `serve` would run, without HTTP."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from pathlib import Path

from rich.table import Table

from swarmcpp.commands import terminal
from swarmcpp.commands.serve import find_model
from swarmcpp.config import Config, LoadedConfig
from swarmcpp.core import GenerateRequest, SamplingParams
from swarmcpp.node.preparing import prepare
from swarmcpp.supervisor.whole import EngineSupervisor

PROMPT_TOKENS = 512
ANSWER_TOKENS = 64
RUNS = 5


def run(loaded: LoadedConfig) -> None:
    """Measure and print. Raises StartupError when the model cannot be found or loaded."""
    console = terminal.stderr()
    path, _name = find_model(loaded.config, console)
    console.print(f"measuring {path.name}, {RUNS} runs for each number of users")
    rows = asyncio.run(_measure(loaded.config, path))
    table = Table(title=f"{path.name}: median of {RUNS} runs")
    for heading in ("users", "prefill tokens/s", "decode tokens/s", "time to first token"):
        table.add_column(heading, justify="right")
    for users, prefill_tps, decode_tps, ttft_ms in rows:
        table.add_row(str(users), f"{prefill_tps:.1f}", f"{decode_tps:.1f}", f"{ttft_ms:.0f} ms")
    terminal.stdout().print(table)


async def _measure(config: Config, path: Path) -> list[tuple[float, ...]]:
    """(users, prefill rate, decode rate, ms to the first token): each the median over the runs, rates in tokens/s of
    all users together."""
    prepared = await asyncio.to_thread(prepare, config, path)
    supervisor = EngineSupervisor(prepared.options)
    supervisor.start()
    try:
        await supervisor.wait_ready()
        ctx_size = supervisor.status.ctx_size
        answer = min(ANSWER_TOKENS, ctx_size // 4)
        prompt = min(PROMPT_TOKENS, ctx_size - answer)
        draw = random.Random(0)
        users = sorted({1, min(4, prepared.options.slots), prepared.options.slots})
        rows: list[tuple[float, ...]] = []
        for count in users:
            runs = [await _run(supervisor, count, prompt, answer, prepared.info.n_vocab, draw) for _ in range(RUNS)]
            rows.append((count, *(statistics.median(column) for column in zip(*runs, strict=True))))
        return rows
    finally:
        await supervisor.close()


async def _run(
    supervisor: EngineSupervisor, users: int, prompt: int, answer: int, n_vocab: int, draw: random.Random
) -> tuple[float, float, float]:
    """One run of `users` at once: prefill and decode rate, and the mean time to first token in milliseconds."""

    async def one(tokens: tuple[int, ...]) -> list[float]:
        request = GenerateRequest(
            id="bench",
            model="bench",
            prompt=tokens,
            max_tokens=answer,
            sampling=SamplingParams(temperature=0.0, ignore_eos=True),
        )
        return [time.perf_counter() async for _out in supervisor.submit(request)]

    prompts = [tuple(draw.randrange(n_vocab) for _ in range(prompt)) for _ in range(users)]
    begun = time.perf_counter()
    times = await asyncio.gather(*(one(tokens) for tokens in prompts))
    # Everybody decodes from the moment at which the last prompt has been read; earlier tokens do not count.
    all_read = max(each[0] for each in times)
    decoded = [at for each in times for at in each if at > all_read]
    ttft_ms = 1000 * statistics.fmean(each[0] - begun for each in times)
    return users * prompt / (all_read - begun), len(decoded) / (max(decoded) - all_read), ttft_ms
