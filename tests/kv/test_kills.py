"""kill -9 of a process that stores blocks: whatever is found afterwards is right."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from blake3 import blake3
from kv.blocks_on_disk import BLOCK_BYTES, BLOCK_TOKENS, Rig, chain, open_rig

from swarmcpp.kv.cache import verify

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are forked, to be quick")]

KILLS = 100
N_BLOCKS = 24
CHAINS = 12

NURSERY = """
import os, pathlib, random, sys
sys.path.insert(0, sys.argv[1])
from kv.blocks_on_disk import chain, open_rig

def work(directory, seed):
    draw = random.Random(seed)
    rig = open_rig(pathlib.Path(directory), None)
    while True:
        name = draw.randrange(CHAINS)
        tokens = chain(name, 6)[: 4 * draw.randint(1, 6)]
        rig.recall(tokens)
        rig.store(tokens)

for line in sys.stdin:
    seed, directory = line.split(maxsplit=1)
    pid = os.fork()
    if not pid:
        try:
            work(directory.strip(), int(seed))
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(3)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
"""Forks a writer for each line, since an interpreter takes longer to start than a writer lives."""


class Nursery:
    """Writers, one after another."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def kill_one(self, directory: Path, seed: int, after_s: float) -> None:
        """Start a writer and kill it `after_s` later."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seed} {directory}\n")
        self._process.stdin.flush()
        pid = int(self._line())
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
        assert int(self._line()) == -signal.SIGKILL, "the writer ended by itself"


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    command = [sys.executable, "-c", NURSERY.replace("CHAINS", str(CHAINS)), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0


def holes(rig: Rig) -> int:
    """Payloads in the arena that no entry tells of: of evicted blocks, or of a write that was cut."""
    table = {block.slot: block.digest for block in rig.cache._arena.entries()}
    payloads = [rig.cache._arena.read(slot) for slot in range(N_BLOCKS)]
    return sum(1 for slot, data in enumerate(payloads) if data != bytes(BLOCK_BYTES) and slot not in table)


def test_a_hundred_kills_leave_no_wrong_block(tmp_path: Path, nursery: Nursery) -> None:
    open_rig(tmp_path, N_BLOCKS).close()
    draw = random.Random(9)
    cut = found = 0
    for seed in range(KILLS):
        # The moment is random by itself: a step of the writer takes microseconds.
        nursery.kill_one(tmp_path, seed, draw.uniform(0.001, 0.02))
        with closing(open_rig(tmp_path, None)) as rig:
            rig.cache.check_integrity()
            for block in rig.cache._arena.entries():
                assert blake3(rig.cache._arena.read(block.slot)).digest() == block.digest, "an entry before its payload"
            cut += holes(rig) > 0
            # What is found is also compared with what its key says.
            found += sum(rig.recall(chain(name, 6)) for name in range(CHAINS))
            assert rig.cache.stats().bad == 0
            assert verify(rig.cache._arena)[1] == 0
    assert found > KILLS * N_BLOCKS / 2, "too little survives to tell anything"
    assert cut > KILLS / 10, "no write was ever cut"


def test_a_node_that_died_is_no_obstacle(tmp_path: Path, nursery: Nursery) -> None:
    nursery.kill_one(tmp_path, 1, 0.2)
    with closing(open_rig(tmp_path)) as rig:
        assert "-" not in rig.cache.path.name
        tokens = chain(77, 3)
        assert rig.store(tokens) == len(tokens) // BLOCK_TOKENS
