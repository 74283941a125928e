"""When machines can move for another one, and where one helps that nobody moves for."""

from __future__ import annotations

from dataclasses import replace

from placement_support import MB, machine, shape

from swarmcpp.node.moving import movable, slowest_range
from swarmcpp.route.placement import place

EIGHT = shape(8)
ROOM = 1000.0


def test_a_machine_that_is_full_cannot_move() -> None:
    full = [replace(machine(0, 5), holds=((0, 5),)), replace(machine(1, 4), holds=((5, 8),))]
    wanted = place(EIGHT, [replace(each, holds=()) for each in full])
    assert wanted.wanted(full[0].node) == (0, 4)
    assert not movable(EIGHT, wanted, full)


def test_machines_with_room_for_both_can() -> None:
    roomy = [replace(machine(0, 5), holds=((0, 5),)), replace(machine(1, 4), holds=((5, 8),))]
    wanted = place(EIGHT, [replace(each, holds=()) for each in roomy])
    assert movable(EIGHT, wanted, [replace(each, memory=10_000 * MB) for each in roomy])
    assert movable(EIGHT, wanted, [replace(each, holds=()) for each in roomy]), "what is new has nothing to let go"


def test_help_goes_to_where_passes_take_longest() -> None:
    slow, quick, new = machine(0, ROOM, ms=20), machine(1, ROOM, ms=5), machine(2, ROOM)
    held = [replace(slow, holds=((0, 3),)), replace(quick, holds=((3, 8),)), new]
    assert slowest_range(EIGHT, held, new.node) == (0, 3)
    twice = [
        *held,
        replace(machine(3, ROOM, ms=20), holds=((0, 3),)),
        replace(machine(4, ROOM, ms=20), holds=((0, 3),)),
    ]
    assert slowest_range(EIGHT, twice, new.node) == (3, 8), "two more compute the others already"


def test_help_has_room_or_does_not_come() -> None:
    held = [replace(machine(0, ROOM, ms=20), holds=((0, 6),)), replace(machine(1, ROOM), holds=((6, 8),))]
    assert slowest_range(EIGHT, [*held, machine(2, 2)], machine(2, 2).node) == (6, 8)
    assert slowest_range(EIGHT, [*held, machine(2, 1)], machine(2, 1).node) is None
