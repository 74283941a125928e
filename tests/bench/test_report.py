"""Medians, ratios and claims of a bench run."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

from rich.console import Console

from bench.latency import best_batch_note, cancel_fractions, stall_verdicts
from bench.report import Figure, Others, Outcome, Verdict, at_least, machine, show, write_json


def test_gain_says_how_many_times_better_whatever_better_means() -> None:
    rate = Figure("rate", "tokens/s", {"a": [1.0, 2.0, 100.0], "b": [4.0]})
    pause = Figure("pause", "s", {"a": [10.0], "b": [2.0, 2.5, 99.0]}, "lower")
    assert rate.median("a") == 2.0
    assert rate.gain("b") == 2.0
    assert pause.gain("b") == 4.0
    assert pause.gain("a", over="b") == 0.25
    assert math.isnan(rate.median("c"))


def stall(pauses: dict[str, float], rates: dict[str, float]) -> tuple[Figure, Figure]:
    return (
        Figure("pause", "s", {name: [value] for name, value in pauses.items()}, "lower"),
        Figure("rate", "tokens/s", {name: [value] for name, value in rates.items()}),
    )


def test_stall_claims_need_both_a_short_pause_and_the_prefill_rate() -> None:
    names = ("llama-server", "swarmcpp", "swarmcpp budget 800 ms")
    good = stall(dict(zip(names, (16.0, 0.5, 1.0), strict=True)), dict(zip(names, (200, 170, 190), strict=True)))
    assert [verdict.holds for verdict in stall_verdicts(*good)] == [True, True, True]
    slow = stall(dict(zip(names, (16.0, 0.5, 1.0), strict=True)), dict(zip(names, (200, 150, 180), strict=True)))
    assert [verdict.holds for verdict in stall_verdicts(*slow)] == [True, False, False]
    long = stall(dict(zip(names, (16.0, 1.0, 2.0), strict=True)), dict(zip(names, (200, 170, 190), strict=True)))
    assert [verdict.holds for verdict in stall_verdicts(*long)] == [False, True, False]


def test_best_batch_is_the_shortest_pause_that_keeps_the_rate() -> None:
    names = ("llama-server", "llama-server -b 64 -ub 64", "llama-server -b 256 -ub 256", "swarmcpp")
    figures = stall(dict(zip(names, (16, 1, 4, 0.5), strict=True)), dict(zip(names, (200, 100, 195, 180), strict=True)))
    (note,) = best_batch_note(*figures)
    assert "-b 256" in note
    assert "8.0 times less" in note


def test_cancel_moments_are_spread_over_the_prefill() -> None:
    assert list(cancel_fractions(2)) == [0.25, 0.75]
    assert all(0 < fraction < 1 for fraction in cancel_fractions(7))


def test_table_and_json_hold_what_was_measured(tmp_path: Path) -> None:
    outcome = Outcome(
        "decode",
        (Figure("1 user", "tokens/s", {"llama-server": [40.0, 42.0], "swarmcpp": [44.0]}),),
        (at_least("decode", 1.05, 0.97), Verdict("never", False)),
        ("a note with [brackets]",),
        {"swarmcpp": "swarmcpp serve"},
    )
    printed = io.StringIO()
    show(outcome, Console(file=printed, width=120))
    for part in ("1 user [tokens/s]", "1.073", "a note with [brackets]", "yes", "1.05x, wanted >= 0.97x", "NO"):
        assert part in printed.getvalue()
    target = tmp_path / "deep" / "out.json"
    write_json(target, machine(), [outcome])
    read = json.loads(target.read_text())
    assert read["scenarios"][0]["figures"][0]["samples"]["llama-server"] == [40.0, 42.0]
    assert read["scenarios"][0]["figures"][0]["median"] == {"llama-server": 41.0, "swarmcpp": 44.0}
    assert read["about"]["llama-cpp-python"]


def test_own_work_is_not_taken_for_that_of_others() -> None:
    others = Others()
    cores = others.cores()
    assert cores is None or cores >= 0.0


def test_times_of_a_busy_machine_settle_nothing_but_exact_claims_stand() -> None:
    timed, exact = at_least("faster", 2.0, 1.0), Verdict("same text", True, timed=False)
    busy = Outcome("decode", verdicts=(timed, exact), others_cores=0.8)
    assert [busy.settles(verdict) for verdict in busy.verdicts] == [False, True]
    printed = io.StringIO()
    show(busy, Console(file=printed, width=120))
    assert "?? " in printed.getvalue()
    assert "yes same text" in printed.getvalue()
    quiet = Outcome("decode", verdicts=(timed,), others_cores=0.02)
    unknown = Outcome("decode", verdicts=(timed,))
    assert quiet.settles(timed)
    assert unknown.settles(timed)
