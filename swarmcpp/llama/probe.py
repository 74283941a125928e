"""Which llama.cpp kernels are safe on this CPU: tried in child processes, because a wrong one kills its process.

Background: llama.cpp built by gcc 12 dies in `ldtilecfg` at the first quantised matmul on CPUs with AMX (llama.cpp PR
26954). Turning extra buffer types off avoids such kernels at run time, at the price of the repacked ones. So each
candidate, fastest first, computes a tiny quantised model in a process of its own; the first that lives and agrees with
the plain kernels is chosen, and the answer is remembered for this CPU, library build and boot.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from swarmcpp import _native
from swarmcpp._native import attention_problem, q8_problem
from swarmcpp.files import replace_file
from swarmcpp.hardware import read_hardware
from swarmcpp.models.synthetic import TINY, Quant, write_model

TIMEOUT_S = 60.0
"""A tiny model takes under a second; a child that hangs counts as crashed."""

QUANTS: tuple[Quant, ...] = ("Q8_0", "Q4_0")
"""The two layouts that have repacked and AMX kernels; K-quants share their code paths."""

MAX_DEVIATION = 0.05
"""Share of the logits' spread by which candidates may differ: kernels round differently, wrong ones are far off."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to load weights, by name."""

    name: str
    use_extra_bufts: bool
    q8_kernel: bool = False
    """Q8_0 matrices are multiplied by native/q8_matmul.cpp."""
    attention_kernel: bool = False
    """Attention of few rows is computed by native/attention.cpp."""


CANDIDATES = (
    Candidate("native", use_extra_bufts=True, q8_kernel=True, attention_kernel=True),
    Candidate("native attention", use_extra_bufts=True, attention_kernel=True),
    Candidate("repacked", use_extra_bufts=True),
    Candidate("plain", use_extra_bufts=False),
)
"""Fastest first. The last one is the reference that the others are compared with."""


def candidates() -> tuple[Candidate, ...]:
    """Those that this machine and this build can have at all."""
    lacking = {"q8_kernel": q8_problem(), "attention_kernel": attention_problem()}
    return tuple(
        each for each in CANDIDATES if not any(getattr(each, kernel) for kernel, problem in lacking.items() if problem)
    )


@dataclass(frozen=True, slots=True)
class CandidateResult:
    """How one candidate fared; `detail` says why not when `ok` is False."""

    candidate: Candidate
    ok: bool
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """The choice and what it rests on. `cached`: read from an earlier probe of the same CPU, library and boot."""

    chosen: Candidate
    results: tuple[CandidateResult, ...]
    cpu: str
    library: str
    cached: bool
    llama_version: str
    system_info: str


def probe(
    data_dir: Path,
    *,
    force: bool = False,
    command: Sequence[str] = (sys.executable, "-m", "swarmcpp.llama.probe"),
) -> ProbeReport:
    """Choose a candidate, from the cache when it still applies. Never raises on a crashing kernel.

    When every candidate fails, the plain one is chosen and its result says so: loading will then report the failure.
    """
    hardware = read_hardware()
    library = _library_id()
    key = hashlib.sha256(f"{hardware.cpu_model}|{library}|{hardware.boot_id}".encode()).hexdigest()[:16]
    cache = data_dir / "probe" / f"{key}.json"
    if not force and (known := _read(cache)):
        return known
    report = _run_all(tuple(command), hardware.cpu_model, library)
    _write(cache, report)
    return report


def _run_all(command: tuple[str, ...], cpu: str, library: str) -> ProbeReport:
    runs = {candidate: _run_child(command, candidate) for candidate in candidates()}
    reference = runs[CANDIDATES[-1]]
    results: list[CandidateResult] = []
    for candidate, run in runs.items():
        detail = run.problem or _disagreement(run.logits, reference.logits)
        results.append(CandidateResult(candidate, not detail, detail, run.seconds))
    chosen = next((result.candidate for result in results if result.ok), CANDIDATES[-1])
    info = next((run.system_info for run in runs.values() if run.system_info), "")
    llama = next((run.version for run in runs.values() if run.version), "")
    return ProbeReport(chosen, tuple(results), cpu, library, False, llama, info)


@dataclass(frozen=True, slots=True)
class _Run:
    problem: str
    logits: dict[str, list[float]]
    seconds: float
    version: str = ""
    system_info: str = ""


def _run_child(command: tuple[str, ...], candidate: Candidate) -> _Run:
    try:
        child = subprocess.run(
            [*command, candidate.name],
            capture_output=True,
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _Run(f"did not finish within {TIMEOUT_S:.0f} s", {}, TIMEOUT_S)
    except OSError as error:
        return _Run(f"could not be started: {error}", {}, 0.0)
    if child.returncode:
        last = child.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return _Run(f"{_exit_name(child.returncode)} {' '.join(last)}".strip(), {}, 0.0)
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
        return _Run("", answer["logits"], answer["seconds"], answer["version"], answer["system_info"])
    except (ValueError, KeyError, IndexError, TypeError):
        return _Run("answered nonsense", {}, 0.0)


def _exit_name(code: int) -> str:
    import signal

    try:
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    except ValueError:
        return f"died of signal {-code}"


def _disagreement(logits: dict[str, list[float]], reference: dict[str, list[float]]) -> str:
    """Why `logits` are not the reference's, by quantisation; empty when they agree or there is no reference."""
    for quant, expected in reference.items():
        got = logits.get(quant, [])
        if len(got) != len(expected):
            return f"{quant}: {len(got)} logits instead of {len(expected)}"
        differences = [abs(a - b) for a, b in zip(got, expected, strict=True)]
        if any(math.isnan(difference) for difference in differences):
            return f"{quant}: logits are not numbers"
        spread, worst = max(expected) - min(expected), max(differences)
        if worst > MAX_DEVIATION * spread:
            return f"{quant}: logits differ by {worst:.3g} of a spread of {spread:.3g}"
    return ""


def _library_id() -> str:
    """Version, size and time of the llama.cpp libraries, without loading them, and of the kernels of this package."""
    from importlib.metadata import files, version
    from importlib.util import find_spec

    spec = find_spec("llama_cpp")
    directory = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    parts = [version("llama-cpp-python"), _file_id(Path(_native.__file__))]
    if directory and directory.is_dir():
        parts += [_file_id(path) for path in sorted(directory.iterdir())]
    elif found := files("llama-cpp-python"):
        parts.append(str(len(found)))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _file_id(path: Path) -> str:
    return f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}"


def _read(path: Path) -> ProbeReport | None:
    try:
        return replace(msgspec.json.decode(path.read_bytes(), type=ProbeReport), cached=True)
    except (OSError, ValueError, msgspec.DecodeError):
        return None


def _write(path: Path, report: ProbeReport) -> None:
    # A data directory that cannot be written costs a second at the next start, no more.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, msgspec.json.encode(report))


def _child(candidate: Candidate) -> None:
    """Compute tiny models with one candidate and print their logits as JSON: one row alone, then 40 rows at once."""
    import time

    import numpy as np

    from swarmcpp.core import Rows
    from swarmcpp.llama import lib
    from swarmcpp.llama.backend import LlamaBackend
    from swarmcpp.llama.context import Context, ContextOptions, Model

    begun = time.monotonic()
    lib.use_kernels(q8=candidate.q8_kernel, attention=candidate.attention_kernel)
    logits: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="swarmcpp-probe-") as directory:
        for quant in QUANTS:
            path = write_model(Path(directory) / f"{quant}.gguf", TINY, quant=quant, tokenizer="none")
            model = Model(path, use_extra_bufts=candidate.use_extra_bufts)
            context = Context(model, ContextOptions(n_ctx=256, n_seqs=1, n_threads=2))
            backend = LlamaBackend(model, context)
            backend.decode([Rows(0, 0, [1], outputs=1)])
            one = backend.logits(0)
            backend.decode([Rows(0, 1, [2 + i % 50 for i in range(40)], outputs=1)])
            logits[quant] = np.concatenate([one, backend.logits(0)]).astype(float).round(5).tolist()
            context.close()
            model.close()
    answer = {
        "logits": logits,
        "seconds": time.monotonic() - begun,
        "version": lib.version(),
        "system_info": lib.system_info(),
    }
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _child(next(each for each in CANDIDATES if each.name == sys.argv[1]))
