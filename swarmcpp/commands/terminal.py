"""How commands talk to the terminal: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from functools import cache

from rich.console import Console

from swarmcpp.telemetry import printable

PIPE_WIDTH = 1000


def stdout() -> Console:
    """The console for results. Text is printed as it is: no markup, no emoji, no highlighting."""
    # A table for a program (grep, awk) must not be folded to the width of a terminal that is not there.
    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


@cache
def stderr() -> Console:
    """The one console for progress, notes and the log, so that lines of the log go above a progress bar."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def one_line(error: BaseException) -> str:
    """The error's message on a single line."""
    return printable(" ".join(str(error).split()))


def print_json(value: object) -> None:
    """`value` as indented JSON on standard output, for other programs."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def size_text(size: int) -> str:
    """Bytes as people read them: 512 B, 1.1 MB, 4.4 GB (powers of 1000, as model pages and disks count)."""
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"
