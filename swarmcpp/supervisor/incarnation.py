"""One engine process: its launch, what belongs to it alone, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from swarmcpp.engine.abortflag import AbortFlag
from swarmcpp.errors import EngineFailed, SwarmError
from swarmcpp.kv.cache import Grant
from swarmcpp.supervisor.nodelink import NodeLink
from swarmcpp.wire.engine import Stop

logger = logging.getLogger(__name__)

STOP_GRACE_S = 3.0


@dataclass(slots=True)
class Incarnation:
    """One engine process and what belongs to it alone."""

    process: asyncio.subprocess.Process
    link: NodeLink
    abort: AbortFlag
    directory: tempfile.TemporaryDirectory[str]
    stderr: deque[str] = field(default_factory=lambda: deque(maxlen=30))
    grants: dict[int, deque[Grant]] = field(default_factory=dict)
    """By serial, in the order of their StoreBlocks."""
    introduced: bool = False
    """It has said something, and so can hear."""
    readying: asyncio.Task[None] | None = None
    """What its node does until it is found ready."""

    def close(self) -> None:
        """Release everything but the process."""
        self.link.close()
        self.abort.close()
        self.directory.cleanup()

    async def end(self) -> None:
        """Tell the engine to stop, and see to it that it does."""
        with contextlib.suppress(EngineFailed):
            self.link.send(Stop())
        try:
            await asyncio.wait_for(self.process.wait(), STOP_GRACE_S)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

    async def collect_stderr(self) -> None:
        """Read what the engine says until it has ended."""
        if self.process.stderr is None:
            return
        while True:
            try:
                line = await self.process.stderr.readline()
            except ValueError:
                # Longer than the reader's buffer; it is dropped, so that the engine never blocks on a full pipe.
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            self.stderr.append(text)
            logger.debug("engine: %s", text)


async def launch(command: tuple[str, ...]) -> Incarnation:
    """Start an engine and hand it its ticket. Raises OSError."""
    with contextlib.ExitStack() as undo:
        directory = tempfile.TemporaryDirectory(prefix="swarmcpp-", ignore_cleanup_errors=True)
        undo.callback(directory.cleanup)
        abort_file = Path(directory.name) / "abort"
        abort = AbortFlag(abort_file, create=True)
        undo.callback(abort.close)
        link = NodeLink()
        undo.callback(link.close)
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            # Ctrl-C belongs to the node, which then stops the engine in order.
            start_new_session=sys.platform != "win32",
        )
        undo.pop_all()
    incarnation = Incarnation(process, link, abort, directory)
    if process.stdin:
        ticket = {**link.ticket, "abort_file": str(abort_file)}
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(ticket).encode() + b"\n")
            await process.stdin.drain()
    return incarnation


def describe_exit(code: int, stderr: deque[str], fault: SwarmError | None) -> str:
    """An exit code with its signal's name and the last thing the engine said."""
    if fault is not None:
        return str(fault)
    try:
        what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        what = f"signal {-code}"
    last = next((line for line in reversed(stderr) if line.strip()), "")
    return f"{what}: {last}" if last else what
