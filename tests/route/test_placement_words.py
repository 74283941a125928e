"""Placements in words."""

from __future__ import annotations

from placement_support import machine, shape

from swarmcpp.route.placement import place
from swarmcpp.route.placement_words import explain


def text(*lines: str) -> str:
    return "\n".join(lines)


def test_every_machine_is_told_of() -> None:
    machines = [machine(0, 5), machine(1, 5), machine(2, 8), machine(3, 0.5), machine(4, 2, ms=300)]
    told = text(*explain(place(shape(), machines)))
    assert all(m.name in told for m in machines)
    assert "m2 holds the whole model" in told
    assert "m0 -> m1 answer together" in told
    assert "m3 stays out: it has 50 MB and the smallest stage of one layer needs 100 MB." in told
    assert "m4 stays out: adding it would make answers slower" in told
    assert "Expected:" in told


def test_a_machine_that_helps_and_one_that_does_not() -> None:
    machines = [machine(0, 5), machine(1, 5)]
    before = place(shape(slots=8), machines)
    told = explain(place(shape(slots=8), [*machines, machine(2, 5)]), before)
    assert told[-1].startswith("Adding m2 makes answers faster by ")
    told = explain(place(shape(slots=8), [*machines, machine(2, 5, ms=500)]), before)
    assert told[-1].startswith("Adding m2 changes nothing for the speed of answers")
    assert any(line.startswith("m2 stays out: adding it would make answers slower") for line in told)


def test_what_is_missing_and_whom_it_takes() -> None:
    before = place(shape(), [machine(0, 5)])
    told = text(*explain(before))
    assert "nobody can hold layers 5-8 of its 8 layers" in told
    assert "Memory is what is missing: 300 MB more" in told
    after = place(shape(), [machine(0, 5), machine(1, 5)])
    assert explain(after, before)[-1] == "Adding m1 makes the model run."
    assert explain(before, after)[-1] == "Without m1 the model runs no more."


def test_who_moves_is_told() -> None:
    held = [machine(0, 9, holds=((0, 6),)), machine(1, 9, holds=((6, 12),))]
    before = place(shape(12, slots=8), held)
    told = text(*explain(place(shape(12, slots=8), [*held, machine(2, 9)]), before))
    assert "moves from layers" in told
    assert "Adding m2 makes answers faster" in told


def test_a_gain_too_small_to_move_for_is_told() -> None:
    held = [machine(0, 6, holds=((0, 4),)), machine(1, 6, holds=((4, 8),))]
    told = text(*explain(place(shape(slots=8), [*held, machine(2, 6)])))
    assert "m2 stays out: m0 and m1 and it would give 66.7 tokens/s instead of 62.5, too little" in told
    assert "Machines keep the layers they hold" in told
