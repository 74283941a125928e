"""What a process keeps in memory of what it once needed."""

from __future__ import annotations

import ctypes
import gc
import sys

_M_ARENA_MAX = -8
"""glibc's malloc.h."""


def share_heaps() -> None:
    """Let all threads take memory from the same two heaps, where the C library is glibc: by default each has one of its
    own, and what it has freed no other one can use (17 MiB of a node). To be called before there are threads."""
    if sys.platform.startswith("linux") and (option := getattr(ctypes.CDLL(None), "mallopt", None)):
        option(_M_ARENA_MAX, 2)


def settle() -> None:
    """Tidy up at the end of a start. The garbage collector never looks again at what exists now, modules and what lives
    as long as the process: its full collections took 50 ms otherwise, in the middle of answers. And memory that only
    the start needed goes back to the system, where the C library can be told to."""
    gc.collect()
    gc.freeze()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None:
        trim(0)
