"""Entries in data directories: of a node that runs, which is this process, and of nodes that were killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swarmcpp.node.whereabouts import Entry, Whereabouts

_DIE = """
import os, sys
from pathlib import Path
from swarmcpp.node.whereabouts import Entry, Whereabouts
Entry(Path(sys.argv[1])).write(Whereabouts(sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
os.kill(os.getpid(), int(sys.argv[5]))
"""


@contextmanager
def running(data_dir: Path, url: str, **more: Any) -> Iterator[Whereabouts]:
    """A node at `url` runs with `data_dir` meanwhile."""
    where = Whereabouts(url, os.getpid(), **{"started": time.time(), **more})
    entry = Entry(data_dir)
    entry.write(where)
    try:
        yield where
    finally:
        entry.close()


def killed(data_dir: Path, url: str, started: float = 1.0) -> Whereabouts:
    """A node ran with `data_dir`, and was killed. The number of its process is one that runs: this one's."""
    where = Whereabouts(url, os.getpid(), started)
    command = [sys.executable, "-c", _DIE, str(data_dir), url, str(where.pid), str(started), str(int(signal.SIGKILL))]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    return where
