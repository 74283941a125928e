"""Whole workloads on the fake backend with a synthetic cost: pauses, order, starvation, static batches."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from engine_support import Rig, RigMaker, prompt_of, request
from fake_backend import FakeBackend, FakeLink, continuation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarmcpp.core import Rows, SamplingParams
from swarmcpp.engine.scheduler import Policy
from swarmcpp.testing import FakeClock
from swarmcpp.wire.engine import FromEngine, StepOut, Submit

N_VOCAB = 97


def cost(decode: int, prompt: int) -> float:
    """Seconds of a step, as a 0.5B model takes them on two cores."""
    return 0.036 + 0.009 * decode + 0.0044 * prompt


class TimedLink(FakeLink):
    """Delivers messages when their time has come, and notes when each step was reported."""

    def __init__(self, clock: FakeClock, arrivals: Sequence[tuple[float, Submit]]) -> None:
        super().__init__(on_idle=self._wait)
        self.clock = clock
        self.arrivals = sorted(arrivals, key=lambda arrival: arrival[0])
        self.times: list[tuple[float, StepOut]] = []

    def _wait(self, timeout_s: float) -> None:
        if self.arrivals:
            self.clock.now = max(self.clock.now, self.arrivals[0][0])
            self._deliver()

    def _deliver(self) -> None:
        while self.arrivals and self.arrivals[0][0] <= self.clock.now:
            self.inbox.append(self.arrivals.pop(0)[1])

    def receive(self, timeout_s: float) -> object:  # type: ignore[override]
        self._deliver()
        return super().receive(timeout_s)

    def send(self, message: FromEngine) -> None:
        super().send(message)
        assert isinstance(message, StepOut)
        self.times.append((self.clock.now, message))

    def longest_pause(self) -> float:
        """The longest time between two tokens of one request."""
        last: dict[int, float] = {}
        worst = 0.0
        for now, step in self.times:
            for out in step.tokens:
                worst = max(worst, now - last.get(out.serial, now))
                last[out.serial] = now
        return worst


def play(fake_rig: RigMaker, policy: Policy, arrivals: Sequence[tuple[float, Submit]], n_slots: int = 8) -> Rig:
    clock = FakeClock()
    rig = fake_rig(n_slots=n_slots, n_ctx=8192, n_vocab=N_VOCAB, clock=clock, cost=cost, policy=policy)
    link = TimedLink(clock, arrivals)
    rig.link = rig.engine._link = link
    while link.arrivals or link.inbox or rig.engine.busy:
        rig.engine.receive(0.0 if rig.engine.busy else 1.0)
        if rig.engine.busy:
            rig.engine.step()
    rig.check_clean()
    return rig


def random_arrivals(seed: int, count: int) -> list[tuple[float, Submit]]:
    rng = random.Random(seed)
    arrivals = []
    for serial in range(1, count + 1):
        length = rng.choice([rng.randint(1, 60), rng.randint(100, 600), rng.randint(1000, 4000)])
        sampling = SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=serial)
        wanted = request(prompt_of(length, serial % 11), rng.randint(1, 30), sampling=sampling)
        arrivals.append((rng.uniform(0.0, 20.0), Submit(serial, wanted)))
    return arrivals


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), budget_s=st.sampled_from([0.2, 0.4, 0.8]))
def test_pauses_stay_under_the_budget_and_all_finish(fake_rig: RigMaker, seed: int, budget_s: float) -> None:
    arrivals = random_arrivals(seed, 20)
    rig = play(fake_rig, Policy(prefill_budget_s=budget_s), arrivals)
    for _, submit in arrivals:
        expected = continuation(submit.request, submit.request.max_tokens, N_VOCAB)
        assert rig.tokens(submit.serial) == expected
        assert rig.finish(submit.serial) == "length"
    link = rig.link
    assert isinstance(link, TimedLink)
    # The rows of a step cost the budget, or a chunk where nobody decoded when it was planned; each call has its base.
    assert link.longest_pause() <= max(budget_s, cost(0, 128)) + cost(8, 0) + 7 * cost(0, 0)


def test_without_the_budget_the_same_workload_pauses_longer(fake_rig: RigMaker) -> None:
    arrivals = [(0.0, Submit(1, request((1, 2, 3), 200))), (1.0, Submit(2, request(prompt_of(4000), 4)))]
    pauses = {}
    for budget_s, cap in ((0.2, 128), (60.0, 512)):
        policy = Policy(prefill_budget_s=budget_s, prefill_chunk_tokens=cap)
        link = play(fake_rig, policy, arrivals).link
        assert isinstance(link, TimedLink)
        pauses[budget_s] = link.longest_pause()
    assert pauses[0.2] < 0.5 < pauses[60.0]


def test_a_long_document_is_not_starved_by_short_questions(fake_rig: RigMaker) -> None:
    """Short questions without end take at most half of the prompt rows, so the document waits at most twice as long."""
    document = request(prompt_of(4000), 1)
    crowd = [(0.01 * i, Submit(10 + i, request(prompt_of(60, i % 7), 1))) for i in range(1000)]

    def first_token(arrivals: Sequence[tuple[float, Submit]]) -> float:
        link = play(fake_rig, Policy(prefill_chunk_tokens=128, max_rows=128), arrivals).link
        assert isinstance(link, TimedLink)
        return next(now for now, step in link.times for out in step.tokens if out.serial == 1)

    alone = first_token([(0.0, Submit(1, document))])
    crowded = first_token([(0.0, Submit(1, document)), *crowd])
    assert crowded <= 2.3 * alone


@pytest.mark.parametrize("continuous", [True, False])
def test_a_static_batch_lets_nobody_join(fake_rig: RigMaker, continuous: bool) -> None:
    rig = fake_rig(n_slots=4, policy=Policy(continuous_batching=continuous))
    batches: list[set[int]] = []
    joined: list[bool] = []

    def note(rows: Sequence[Rows]) -> None:
        batch = {part.slot for part in rows}
        fresh = {part.slot for part in rows if part.start == 0}
        running = {slot for slot, held in enumerate(rig.fake.kv) if held}
        joined.append(bool(fresh) and bool(running - fresh))
        batches.append(batch)

    rig.fake.on_decode = note
    for serial in range(1, 10):
        rig.submit(serial, request(prompt_of(5, serial), 3 + serial % 4))
    rig.run()
    assert max(map(len, batches)) == 4
    assert any(joined) == continuous


def test_the_first_come_is_the_first_served(fake_rig: RigMaker) -> None:
    rig = fake_rig(n_slots=1)
    for serial in range(1, 6):
        rig.submit(serial, request(prompt_of(5, serial), 2))
    rig.run()
    steps = [message for message in rig.link.outbox if isinstance(message, StepOut)]
    assert [out.serial for step in steps for out in step.tokens] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_prompts_go_one_by_one_without_batched_prefill(fake_rig: RigMaker) -> None:
    for batched in (True, False):
        rig = fake_rig(n_slots=4, policy=Policy(batched_prefill_forward=batched))
        most = [0]

        def note(rows: Sequence[Rows], most: list[int] = most) -> None:
            most[0] = max(most[0], sum(1 for part in rows if len(part.tokens) > 1))

        rig.fake.on_decode = note
        for serial in range(1, 5):
            rig.submit(serial, request(prompt_of(20, serial), 3))
        rig.run()
        assert most[0] == (4 if batched else 1)


def test_queue_and_prefill_times_are_reported_on_the_first_token(fake_rig: RigMaker) -> None:
    clock = FakeClock()
    rig = fake_rig(n_slots=1, clock=clock, cost=lambda decode, prompt: 1.0)
    rig.submit(1, request(prompt_of(5), 3))
    rig.submit(2, request(prompt_of(5, 1), 2))
    rig.run()
    first, *rest = rig.link.outputs(2)
    assert (first.queue_s, first.prefill_s) == (3.0, 1.0)
    assert all((out.queue_s, out.prefill_s) == (0.0, 0.0) for out in rest)
    stats = rig.engine.stats()
    assert stats.calls == 5
    assert stats.decode_tps == pytest.approx(1.0)
    assert isinstance(rig.backend, FakeBackend)
