"""Stages against RPC: how RPC's layers are spread, and what logs say of a hop."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.longprompts import hop_overhead_us
from bench.netns import Namespace
from bench.reference import Reference
from bench.rpc import Box, Split, worker

HEAD = """
DIAG: pipeline pass rows=8 parts=1 ms=99.0
DIAG: pipeline pass rows=1 parts=1 ms=10.0
engine: DIAG: stage pass rows=1 parts=1 ms=4.0
engine: DIAG: stage pass rows=8 parts=1 ms=60.0
DIAG: pipeline pass rows=1 parts=1 ms=12.0
engine: DIAG: stage pass rows=1 parts=1 ms=4.5
DIAG: pipeline pass rows=1 parts=1 ms=11.0
"""
TAIL = "engine: DIAG: stage pass rows=1 parts=1 ms=5.75\n"


def test_a_hop_costs_what_a_pass_takes_beyond_its_stages() -> None:
    assert hop_overhead_us([HEAD, TAIL]) == pytest.approx(1000 * (11.0 - 4.25 - 5.75) / 2)


def test_logs_without_passes_are_no_measurement() -> None:
    with pytest.raises(ValueError, match="-vv"):
        hop_overhead_us([HEAD, "nothing"])


def test_both_boxes_get_half_of_the_layers_and_the_second_one_the_output() -> None:
    split = Split(options=("-bs",)).argv(24, 12, (7001, 7002), ("127.0.0.1", "10.0.0.2"))
    assert " ".join(split) == "--rpc 127.0.0.1:7001,10.0.0.2:7002 -ngl 25 -ts 12,13 -fit off -bs"
    local = Split(two_workers=False).argv(24, 12, (7002,), ("10.0.0.2",))
    assert " ".join(local) == "--rpc 10.0.0.2:7002 -ngl 13 -fit off"


def test_a_worker_is_open_to_nobody_but_its_namespace() -> None:
    reference = Reference("0.0", Path("bin"), ())
    assert worker(reference, Box(1)).argv[2] == "127.0.0.1"
    assert worker(reference, Box(1, Namespace("n", "10.0.0.2", "s", "p"))).argv[2] == "0.0.0.0"
    assert worker(reference, Box(1)).cpus == (1,)
