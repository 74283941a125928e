"""How commands talk to the terminal: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import shlex
import sys
from functools import cache
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from swarmcpp.config import is_loopback
from swarmcpp.telemetry import printable

if TYPE_CHECKING:
    from swarmcpp.supervisor.process import EngineStatus
    from swarmcpp.swarm.identity import JoinToken

PIPE_WIDTH = 1000


def stdout() -> Console:
    """The console for results. Text is printed as it is: no markup, no emoji, no highlighting."""
    # A table for a program (grep, awk) must not be folded to the width of a terminal that is not there.
    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


@cache
def stderr() -> Console:
    """The one console for progress, notes and the log, so that lines of the log go above a progress bar."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def note(text: str) -> None:
    """A line on standard error beside the result."""
    stderr().print(text, style="dim", soft_wrap=True)


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


class LoadingView:
    """A progress bar on a terminal, one line elsewhere, from the engine's start until `close`."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._progress: Progress | None = None
        self._closed = False

    def update(self, status: EngineStatus) -> None:
        """Show how far the engine is."""
        if self._closed or status.state != "starting":
            return
        if self._progress is None:
            self._progress = self._start()
        self._progress.update(TaskID(0), completed=status.load_fraction)

    def _start(self) -> Progress:
        on_screen = self._console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        progress = Progress(*columns, console=self._console, transient=True, disable=not on_screen)
        progress.add_task(f"loading {self._name}", total=1.0)
        progress.start()
        if not on_screen:
            self._console.print(f"loading {self._name}")
        return progress

    def close(self) -> None:
        """Take the bar away, for good: an engine that is started again later says so in the log."""
        self._closed = True
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def ready(self, text: str) -> None:
        """All is loaded: say `text` in place of the bar."""
        self.close()
        stdout().print(text, soft_wrap=True)


def ask_text(url: str, model: str, *, with_key: bool) -> str:
    """A command to try a node."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
    # The key itself is not repeated on a screen that others may see.
    key = ' -H "Authorization: Bearer $SWARMCPP_API_KEY"' if with_key else ""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {data}"


def join_text(token: JoinToken | None) -> str:
    """How another machine becomes a part of this."""
    if token is None:
        return ""
    if all(is_loopback(address.host) for address in token.addresses):
        return f"\n  another node on this machine (--swarm lets others in): swarmcpp join {token}"
    return f"\n  on another machine: swarmcpp join {token}"
