"""What a process gives back of its memory, and what it never looks at again."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref

import pytest

from swarmcpp.footprint import settle


def test_what_exists_at_the_end_of_a_start_is_never_collected_again() -> None:
    class Node:
        other: Node | None = None

    old = Node()
    old.other = old
    before = weakref.ref(old)
    try:
        settle()
        assert gc.get_freeze_count() > 1000
        del old
        assert before() is not None
        young = Node()
        young.other = young
        after = weakref.ref(young)
        del young
        gc.collect()
        assert before() is not None, "it was there at the start"
        assert after() is None, "it was not"
    finally:
        gc.unfreeze()
        gc.collect()
    assert before() is None


HEAPS = """
import ctypes, sys, threading
from swarmcpp.footprint import share_heaps

if sys.argv[1] == "shared":
    share_heaps()
libc = ctypes.CDLL(None)
barrier = threading.Barrier(8)

def take():
    libc.malloc(1000)
    barrier.wait()

threads = [threading.Thread(target=take) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heaps")
def test_threads_share_heaps() -> None:
    def heaps(how: str) -> int:
        child = subprocess.run([sys.executable, "-c", HEAPS, how], capture_output=True, check=True, text=True)
        return child.stdout.count("<heap nr=")

    assert heaps("own") > 2
    assert heaps("shared") <= 2
