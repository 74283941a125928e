"""Any order of submits, cancels, aborts and steps, with guesses right and wrong: every request gets its own tokens and
exactly one end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from engine_support import Rig, make_rig, prompt_of, request
from fake_backend import FakeBackend, continuation
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swarmcpp.core import GenerateRequest, SamplingParams
from swarmcpp.engine.drafting import NgramDrafter, PredictionDrafter
from swarmcpp.engine.modeldrafter import ModelDrafter
from swarmcpp.engine.scheduler import Policy
from swarmcpp.testing import FakeClock
from swarmcpp.wire.engine import Cancel

N_CTX = 64
EOG = 3


class Schedules(RuleBasedStateMachine):
    """Drives an engine on the strict fake and keeps its own books of what each request should get."""

    policy = Policy()
    draft_vocab = 97
    directory: Path

    def __init__(self) -> None:
        super().__init__()
        clock = FakeClock()
        backend = FakeBackend(
            n_slots=3, n_ctx=N_CTX, max_rows=48, max_outputs=16, eog_tokens=frozenset({EOG}), clock=clock
        )
        # With the same vocabulary it says what the target says, also what that samples; and it has a slot less.
        self.draft = FakeBackend(n_slots=2, n_ctx=N_CTX, n_vocab=self.draft_vocab, clock=clock)
        model = ModelDrafter("draft", self.draft, 97, clock)
        drafters = (PredictionDrafter(), NgramDrafter(), model)
        self.rig: Rig = make_rig(backend, self.directory / "abort", self.policy, clock, drafters=drafters)
        self.requests: dict[int, GenerateRequest] = {}
        self.cancelled: dict[int, int] = {}

    @rule(
        length=st.integers(0, 70),
        max_tokens=st.integers(1, 12),
        generated=st.integers(0, 5),
        temperature=st.sampled_from([0.0, 1.0]),
        ignore_eos=st.booleans(),
        seed=st.integers(0, 3),
        wrong=st.lists(st.booleans(), max_size=14),
        gamma=st.integers(-1, 6),
    )
    def submit(
        self,
        length: int,
        max_tokens: int,
        generated: int,
        temperature: float,
        ignore_eos: bool,
        seed: int,
        wrong: list[bool],
        gamma: int,
    ) -> None:
        serial = len(self.requests) + 1
        sampling = SamplingParams(temperature=temperature, ignore_eos=ignore_eos, seed=seed)
        fresh = request(prompt_of(length, seed), max_tokens, sampling=sampling)
        before = expected(fresh)[0][: min(generated, max_tokens - 1)]
        if EOG in before and not ignore_eos:
            before = before[: before.index(EOG)]
        # As many tokens are predicted as there are flags, wrong where one says so.
        told = continuation(fresh, len(wrong), n_vocab=97)
        prediction = tuple(token ^ flag for token, flag in zip(told, wrong, strict=True))
        plain = request(fresh.prompt, max_tokens, sampling=sampling, generated=before)
        self.requests[serial] = replace(plain, prediction=prediction, gamma=gamma)
        self.rig.submit(serial, self.requests[serial])

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        serial = data.draw(st.integers(1, len(self.requests)))
        self.rig.link.inbox.append(Cancel(serial))
        self.rig.engine.receive(0.0)
        self.cancelled.setdefault(serial, len(self.rig.tokens(serial)))

    @rule(after=st.integers(1, 3))
    def abort_a_decode(self, after: int) -> None:
        self.rig.fake.abort_at.add(self.rig.fake.decodes + after)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.rig.engine.receive(0.0)
            if self.rig.engine.busy:
                self.rig.engine.step()

    @invariant()
    def books_are_right(self) -> None:
        self.rig.engine.check_integrity()
        assert self.rig.fake.open_samplers == self.rig.engine.stats().slots_busy
        assert self.draft.open_samplers <= min(2, self.rig.engine.stats().slots_busy)

    def teardown(self) -> None:
        try:
            self.rig.run()
            for serial in self.requests:
                self._check(serial)
            assert self.draft.open_samplers == 0
            assert not any(self.draft.kv)
        finally:
            self.rig.abort.close()

    def _check(self, serial: int) -> None:
        wanted = self.requests[serial]
        tokens, finish = self.rig.tokens(serial), self.rig.finish(serial)
        refusals = [refused for refused in self.rig.link.refusals() if refused.serial == serial]
        if not 0 < len(wanted.prompt) + len(wanted.generated) < N_CTX:
            assert (len(refusals), tokens) == (1, [])
            return
        assert not refusals
        whole, reason = expected(wanted)
        rest = whole[len(wanted.generated) :]
        if serial in self.cancelled and finish is None:
            assert tokens == rest[: self.cancelled[serial]], "tokens after a cancel"
            return
        assert (tokens, finish) == (rest, reason)


def expected(wanted: GenerateRequest) -> tuple[list[int], str]:
    """Every token of a request's answer, and how it ends."""
    room = min(wanted.max_tokens, N_CTX - len(wanted.prompt))
    tokens = continuation(wanted, max(room, 0), n_vocab=97)
    if EOG in tokens and not wanted.sampling.ignore_eos:
        return tokens[: tokens.index(EOG) + 1], "stop"
    return tokens, "length"


@pytest.mark.parametrize(
    ("policy", "draft_vocab"),
    [
        (Policy(prefill_chunk_tokens=16, max_rows=48), 97),
        (Policy(prefill_chunk_tokens=7, max_rows=48, continuous_batching=False, batched_prefill_forward=False), 50),
    ],
    ids=["defaults", "switched off, and a draft that is mostly wrong"],
)
def test_any_schedule(policy: Policy, draft_vocab: int, tmp_path: Path) -> None:
    machine = type("Machine", (Schedules,), {"policy": policy, "draft_vocab": draft_vocab, "directory": tmp_path})
    machine.TestCase.settings = settings(
        max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    machine.TestCase().runTest()
