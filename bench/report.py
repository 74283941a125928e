"""Samples, medians, ratios and verdicts of a run, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console
from rich.table import Table

QUIET_CORES = 0.1
"""What other processes may use before a run is called noisy."""
Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity: its samples for each setting, the first setting being what the others are held against."""

    name: str
    unit: str
    samples: Mapping[str, Sequence[float]]
    better: Better = "higher"

    def median(self, setting: str) -> float:
        """Median of the samples; NaN when there are none."""
        values = self.samples.get(setting, ())
        return statistics.median(values) if values else float("nan")

    def gain(self, setting: str, over: str | None = None) -> float:
        """How many times better `setting` is than `over` (default: the first setting), by medians."""
        base = self.median(over if over is not None else next(iter(self.samples)))
        own = self.median(setting)
        top, bottom = (own, base) if self.better == "higher" else (base, own)
        return top / bottom if bottom else float("nan")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One claim that the run supports or does not. `timed`: it rests on times, which a busy machine spoils."""

    text: str
    holds: bool
    timed: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one scenario found. `commands` are the servers' command lines by setting."""

    scenario: str
    figures: tuple[Figure, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    commands: Mapping[str, str] = field(default_factory=dict)
    others_cores: float | None = None
    """Cores that other processes used meanwhile, on average."""

    @property
    def noisy(self) -> bool:
        """Whether other processes took so much of the machine that times prove nothing."""
        return self.others_cores is not None and self.others_cores > QUIET_CORES

    def settles(self, verdict: Verdict) -> bool:
        """Whether this run can decide `verdict` at all."""
        return not (verdict.timed and self.noisy)


def at_least(text: str, value: float, target: float) -> Verdict:
    """The verdict that `value` reaches `target`, with both in its text."""
    return Verdict(f"{text}: {value:.3g}x, wanted >= {target:g}x", value >= target)


def show(outcome: Outcome, console: Console) -> None:
    """Print one scenario: a row per figure and setting, then notes and verdicts."""
    table = Table(title=outcome.scenario, title_justify="left", title_style="bold")
    for column in ("figure", "setting"):
        table.add_column(column, no_wrap=True)
    for column in ("median", "least - most", "n", "times better"):
        table.add_column(column, justify="right", no_wrap=True)
    for figure in outcome.figures:
        for index, (setting, values) in enumerate(figure.samples.items()):
            spread = f"{min(values):.4g} - {max(values):.4g}" if values else "-"
            gain = "" if index == 0 else f"{figure.gain(setting):.3f}"
            name = f"{figure.name} [{figure.unit}]".replace("[", "\\[") if index == 0 else ""
            table.add_row(name, setting, f"{figure.median(setting):.4g}", spread, str(len(values)), gain)
        table.add_section()
    if outcome.figures:
        console.print(table)
    if outcome.noisy:
        text = f"other processes used {outcome.others_cores:.2f} cores meanwhile: times prove nothing (??)"
        console.print(f"  [yellow]{text}[/]", highlight=False)
    for note in outcome.notes:
        console.print(f"  {note}", markup=False, highlight=False)
    for verdict in outcome.verdicts:
        style, mark = ("green", "yes") if verdict.holds else ("red", "NO ")
        if not outcome.settles(verdict):
            style, mark = "yellow", "?? "
        console.print(f"  [{style}]{mark}[/] {verdict.text}", highlight=False)


def cpu_name() -> str:
    """The CPU's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code: CPU, cores, memory, system, versions, load when it began."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "commit": done.stdout.strip() or None,
        **{name: metadata.version(name) for name in ("swarmcpp", "llama-cpp-python")},
    }


def _children_cpu_s() -> float | None:
    """CPU seconds of this process and of the children that ended; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


class Others:
    """How much of the machine other processes take while a scenario runs: on a busy machine no ratio means much."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy_cpu_s(), _children_cpu_s()

    def cores(self) -> float | None:
        """Cores that others kept busy on average since the start; call it once the servers have stopped."""
        own = _children_cpu_s()
        if own is None or self._own is None:
            return None
        busy = _busy_cpu_s() - self._busy - (own - self._own)
        return max(0.0, busy / max(time.monotonic() - self._began, 1e-3))


def _busy_cpu_s() -> float:
    """CPU seconds that the whole machine has worked since it started, stolen time of a virtual one included."""
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "steal", 0.0))


def write_json(path: Path, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write everything that was measured, with medians and gains beside the samples."""
    scenarios = []
    for outcome in outcomes:
        entry = asdict(outcome)
        for figure, plain in zip(outcome.figures, entry["figures"], strict=True):
            plain["median"] = {setting: figure.median(setting) for setting in figure.samples}
            plain["gain"] = {setting: figure.gain(setting) for setting in figure.samples}
        scenarios.append(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": dict(about), "scenarios": scenarios}, indent=1) + "\n")
