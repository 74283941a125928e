"""Running the real `swarmcpp` program in tests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

PROGRAM = (sys.executable, "-m", "swarmcpp")
DEADLINE_S = 60.0


def swarmcpp(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return subprocess.run(
        [*PROGRAM, *arguments], input=stdin, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Until `condition` holds; fails the test at the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(0.01)
