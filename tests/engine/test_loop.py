"""The engine loop, on a fake model and on llama.cpp: what a request gets, whatever happens beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from engine_support import Rig, RigMaker, prompt_of, request
from fake_backend import continuation

from swarmcpp.core import GenerateRequest, Rows, SamplingParams
from swarmcpp.engine.backend import Backend
from swarmcpp.engine.scheduler import Policy
from swarmcpp.errors import DecodeAborted, DecodeFailed, SwarmError
from swarmcpp.wire.engine import Cancel, LoadProgress, Stop, Submit

ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)
SMALL_CHUNKS = Policy(prefill_chunk_tokens=16)
# The last two have whole tiles, which stay whole whatever runs beside them.
PROMPTS = {serial: prompt_of(9 * serial, serial) for serial in range(1, 7)} | {
    7: prompt_of(133, 7),
    8: prompt_of(200, 8),
}


def ask(serial: int, max_tokens: int = 12) -> GenerateRequest:
    return request(PROMPTS[serial], max_tokens, sampling=ENDLESS)


def alone(rig: RigMaker, serial: int, max_tokens: int = 12) -> list[int]:
    """Tokens of a request that has an engine to itself."""
    one = rig(n_slots=1)
    one.submit(serial, ask(serial, max_tokens))
    one.run()
    assert one.finish(serial) == "length"
    return one.tokens(serial)


class Interrupted:
    """A backend whose n-th decodes (from 1) stop half-way, with some rows in the KV."""

    def __init__(self, backend: Backend, at: set[int]) -> None:
        self._backend = backend
        self._at = at
        self.decodes = 0
        self.aborted = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def decode(self, rows: Sequence[Rows]) -> None:
        self.decodes += 1
        if self.decodes not in self._at:
            self._backend.decode(rows)
            return
        half = [replace(part, tokens=part.tokens[: (len(part.tokens) + 1) // 2], outputs=0) for part in rows[::2]]
        self._backend.decode(half)
        self.aborted += 1
        raise DecodeAborted("half-way")


def test_tokens_are_the_same_alone_and_beside_others(rig: RigMaker) -> None:
    expected = {serial: alone(rig, serial) for serial in PROMPTS}
    crowd = rig(n_slots=3)
    arrivals = {0: [1, 8, 2], 2: [3, 4], 5: [5, 7], 9: [6]}
    crowd.run({step: [Submit(serial, ask(serial)) for serial in serials] for step, serials in arrivals.items()})
    assert {serial: crowd.tokens(serial) for serial in PROMPTS} == expected
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)


@pytest.mark.parametrize(("policy", "cancel_before"), [(Policy(), 0), (SMALL_CHUNKS, 2), (Policy(), 5)])
def test_cancel_frees_the_slot_and_leaves_the_others_alone(rig: RigMaker, policy: Policy, cancel_before: int) -> None:
    """Serial 6 is cancelled while it waits, in mid-prefill (54 tokens in chunks of 16), and while it decodes."""
    victim = 6
    expected = {serial: alone(rig, serial) for serial in (1, 2, 3)}
    crowd = rig(n_slots=2, policy=policy)
    script: dict[int, list[Any]] = {0: [Submit(1, ask(1)), Submit(victim, ask(victim, 100)), Submit(2, ask(2))]}
    script.setdefault(cancel_before, []).append(Cancel(victim))
    script.setdefault(cancel_before + 1, []).append(Submit(3, ask(3)))
    crowd.run(script)
    assert {serial: crowd.tokens(serial) for serial in (1, 2, 3)} == expected
    assert crowd.finish(victim) is None
    if cancel_before == 5:
        assert 0 < len(crowd.tokens(victim)) < 100
    else:
        assert crowd.tokens(victim) == []


def test_cancels_of_strangers_and_the_finished_are_ignored(rig: RigMaker) -> None:
    one = rig()
    one.submit(1, ask(1, 3))
    one.run({0: [Cancel(99)], 10: [Cancel(1), Cancel(1)]})
    assert (len(one.tokens(1)), one.finish(1)) == (3, "length")


@pytest.mark.parametrize("aborted", [{1}, {2, 3}, {1, 4, 5, 9}, set(range(2, 30, 2))])
def test_an_aborted_step_changes_nothing_but_time(rig: RigMaker, aborted: set[int]) -> None:
    expected = {serial: alone(rig, serial) for serial in (1, 4, 6)}
    crowd = rig(n_slots=2, policy=SMALL_CHUNKS)
    interrupted = Interrupted(crowd.backend, aborted)
    crowd.engine._backend = interrupted
    crowd.run({0: [Submit(serial, ask(serial)) for serial in expected]})
    assert interrupted.aborted == len([at for at in aborted if at <= interrupted.decodes])
    assert {serial: crowd.tokens(serial) for serial in expected} == expected


@pytest.mark.parametrize("length", [0, 256, 257, 5000])
def test_a_prompt_that_no_slot_holds_is_refused(rig: RigMaker, length: int) -> None:
    one = rig()
    one.submit(1, request(prompt_of(length)))
    one.submit(2, ask(1))
    one.run()
    [refused] = one.link.refusals()
    assert (refused.serial, refused.code) == (1, "context_length_exceeded")
    assert str(length) in refused.message
    assert "256" in refused.message
    assert one.tokens(1) == []
    assert one.finish(2) == "length"


def test_a_refusal_does_not_wait_for_work(rig: RigMaker) -> None:
    one = rig()
    one.submit(1, request(prompt_of(300)))
    one.engine.receive(0.0)
    assert [refused.serial for refused in one.link.refusals()] == [1]
    assert not one.engine.busy


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_ends_with_length(rig: RigMaker, max_tokens: int) -> None:
    one = rig()
    one.submit(1, ask(1, max_tokens))
    one.run()
    assert (len(one.tokens(1)), one.finish(1)) == (max_tokens, "length")


@pytest.mark.parametrize("length", [1, 250, 255])
def test_a_full_slot_ends_with_length(rig: RigMaker, length: int) -> None:
    one = rig()
    one.submit(1, request(prompt_of(length), 1000, sampling=ENDLESS))
    one.run()
    assert (len(one.tokens(1)), one.finish(1)) == (256 - length, "length")


def test_an_end_of_generation_token_ends_with_stop(rig: RigMaker) -> None:
    free = alone(rig, 3)
    last = next(token for token in free[1:] if token != free[0])
    greedy = request(PROMPTS[3], 12)
    for sampling, expected, reason in (
        (greedy.sampling, free[: free.index(last) + 1], "stop"),
        (ENDLESS, free, "length"),
    ):
        one = rig()
        one.backend.eog_tokens = frozenset({last})
        one.submit(1, replace(greedy, sampling=sampling))
        one.run()
        assert (one.tokens(1), one.finish(1)) == (expected, reason)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_resumed_request_goes_on_where_it_was(fake_rig: RigMaker, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, seed=7)
    whole = continuation(request(PROMPTS[2], sampling=sampling), 10, n_vocab=97)
    for done in range(10):
        one = fake_rig()
        one.submit(1, request(PROMPTS[2], 10, sampling=sampling, generated=whole[:done]))
        one.run()
        assert (one.tokens(1), one.finish(1)) == (whole[done:], "length")


def test_generated_tokens_count_against_the_slot(fake_rig: RigMaker) -> None:
    one = fake_rig()
    one.submit(1, request(prompt_of(200), 100, generated=prompt_of(56)))
    one.run()
    assert [refused.serial for refused in one.link.refusals()] == [1]


def test_integrity_check_sees_a_wrong_length(rig: RigMaker) -> None:
    one = rig()
    one.submit(1, ask(5, 50))
    one.engine.receive(0.0)
    one.engine.step()
    one.engine.check_integrity()
    held = one.backend.length(0)
    one.backend.truncate(0, held - 1)
    with pytest.raises(SwarmError, match=f"slot 0 holds {held - 1} tokens in llama.cpp and {held} in its books"):
        one.engine.check_integrity()


def test_an_idle_engine_checks_itself(rig: RigMaker) -> None:
    one = rig()
    one.backend.decode([Rows(2, 0, (1, 2, 3), outputs=1)])
    with pytest.raises(SwarmError, match="slot 2 holds 3 tokens"):
        one.engine.serve()


def test_serve_works_until_it_is_stopped(rig: RigMaker) -> None:
    one = rig()
    waits: list[float] = []

    def idle(timeout_s: float) -> None:
        waits.append(timeout_s)
        if len(waits) == 3:
            one.link.inbox.append(Stop())

    one.link.on_idle = idle
    one.submit(1, ask(2, 4))
    one.engine.serve()
    assert one.finish(1) == "length"
    assert len(waits) == 3
    one.check_clean()


def test_stop_ends_a_busy_engine(rig: RigMaker) -> None:
    one = rig()
    one.link.inbox.extend([Submit(1, ask(2, 4)), Stop()])
    one.engine.receive(0.0)
    one.engine.serve()
    assert one.engine.stopped


def test_a_message_out_of_place_is_ignored(fake_rig: RigMaker, caplog: pytest.LogCaptureFixture) -> None:
    one = fake_rig()
    one.link.inbox.append(LoadProgress(0.5))  # type: ignore[arg-type]
    one.submit(1, ask(1, 2))
    with caplog.at_level(logging.WARNING):
        one.run()
    assert one.finish(1) == "length"
    assert "LoadProgress" in caplog.text


def test_a_failed_decode_ends_the_engine(fake_rig: RigMaker) -> None:
    one: Rig = fake_rig(fail_at={3})
    one.submit(1, ask(1))
    one.engine.receive(0.0)
    with pytest.raises(DecodeFailed):
        for _ in range(3):
            one.engine.step()
    assert len(one.tokens(1)) == 2
    assert not one.abort.abort_prompt(1), "no step runs any more"


def test_the_running_step_names_its_prompts(fake_rig: RigMaker) -> None:
    """While prompt rows are computed the node can abort them, and only then."""
    one = fake_rig(n_slots=2, policy=SMALL_CHUNKS)
    seen: list[tuple[bool, bool, list[bool]]] = []

    def note(rows: Sequence[Rows]) -> None:
        prompts = [len(part.tokens) > 1 for part in rows]
        seen.append((one.abort.abort_prompt(1), one.abort.abort_prompt(6), prompts))

    one.fake.on_decode = note
    one.run({0: [Submit(1, request((5, 6, 7), 6))], 1: [Submit(6, ask(6, 2))]})
    assert seen[0] == (True, False, [True])
    assert seen[1] == (False, False, [False])
    assert seen[2] == (False, True, [True])
    assert seen[-1][:2] == (False, False)
