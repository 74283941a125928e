"""How commands talk to the terminal: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys

from rich.console import Console

PIPE_WIDTH = 1000
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def stdout() -> Console:
    """The console for results. Text is printed as it is: no markup, no emoji, no highlighting."""
    # A table for a program (grep, awk) must not be folded to the width of a terminal that is not there.
    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def stderr() -> Console:
    """The console for progress, notes and errors."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def printable(text: str) -> str:
    """`text` without control characters but newline and tab, so that a model cannot steer the terminal."""
    return text.translate(_CONTROLS)


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
