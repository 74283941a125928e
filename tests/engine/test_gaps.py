"""Running slots stay neighbours, since llama.cpp computes only neighbouring streams together."""

from __future__ import annotations

from collections.abc import Sequence

from engine_support import Rig, RigMaker, prompt_of, request
from fake_backend import continuation

from swarmcpp.core import Rows
from swarmcpp.wire.engine import Cancel, Submit, ToEngine


def drive(rig: Rig, script: dict[int, list[ToEngine]]) -> None:
    """Step until nothing runs. Slots keep their tokens, so this is not the rig's own `run`."""
    for step in range(500):
        rig.link.inbox.extend(script.pop(step, ()))
        rig.engine.receive(0.0)
        if rig.engine.busy:
            rig.engine.step()
    assert not script
    assert not rig.engine.busy
    rig.engine.check_integrity()


def test_a_gap_is_closed_and_nobody_notices(fake_rig: RigMaker) -> None:
    rig = fake_rig(n_slots=4, n_ctx=512, block_tokens=64)
    together: list[list[int]] = []

    def note(rows: Sequence[Rows]) -> None:
        together.append([part.slot for part in rows])

    rig.fake.on_decode = note
    wanted = {serial: request(prompt_of(70, serial), 60) for serial in range(1, 5)}
    drive(rig, {0: [Submit(serial, each) for serial, each in wanted.items()], 20: [Cancel(2)]})
    for serial in (1, 3, 4):
        assert rig.tokens(serial) == continuation(wanted[serial], 60, rig.fake.n_vocab)
    assert [0, 1, 2] in together
    assert [0, 2, 3] not in together


def test_a_slot_that_runs_alone_stays_where_its_tokens_are(fake_rig: RigMaker) -> None:
    rig = fake_rig(n_slots=4, n_ctx=512, block_tokens=64)
    slots: list[int] = []

    def note(rows: Sequence[Rows]) -> None:
        slots.extend(part.slot for part in rows)

    rig.fake.on_decode = note
    talk = {serial: request(prompt_of(70, serial), 40) for serial in (1, 2)}
    drive(rig, {0: [Submit(serial, each) for serial, each in talk.items()]})
    slots.clear()
    drive(rig, {0: [Submit(3, talk[2])]})
    assert set(slots) == {1}
