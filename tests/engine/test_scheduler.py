"""The scheduler's plans, for any slots, policy and cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.core import DecodeRow, PrefillChunk, StepPlan
from swarmcpp.engine.scheduler import MIN_CHUNK_ROWS, TILE_ROWS, CostModel, Policy, Scheduler, SlotView

costs = st.builds(
    CostModel,
    decode_s=st.dictionaries(st.integers(1, 32), st.floats(1e-4, 2.0), max_size=4).map(
        lambda seen: tuple(sorted(seen.items()))
    ),
    prefill_row_s=st.one_of(st.just(0.0), st.floats(1e-6, 0.5)),
)
policies = st.builds(
    Policy,
    prefill_chunk_tokens=st.integers(1, 600),
    prefill_budget_s=st.floats(0.01, 5.0),
    max_rows=st.integers(64, 512),
    continuous_batching=st.booleans(),
    batched_prefill_forward=st.booleans(),
)


@st.composite
def slot_views(draw: st.DrawFn) -> list[SlotView]:
    count = draw(st.integers(0, 32))
    arrivals = draw(st.permutations(range(count)))
    views = []
    for slot in range(count):
        start = draw(st.integers(0, 3000))
        remaining = draw(st.one_of(st.just(0), st.integers(1, 3000)))
        views.append(SlotView(slot, arrivals[slot], start, remaining))
    return views


schedulers = st.builds(Scheduler, policies, costs)


@given(schedulers, slot_views())
def test_a_plan_respects_every_limit(scheduler: Scheduler, slots: list[SlotView]) -> None:
    plan = scheduler.plan(slots)
    views = {view.slot: view for view in slots}
    assert plan.rows <= scheduler.policy.max_rows
    assert plan.decode == tuple(DecodeRow(view.slot) for view in slots if not view.remaining)
    assert len({chunk.slot for chunk in plan.prefill}) == len(plan.prefill)
    for chunk in plan.prefill:
        view = views[chunk.slot]
        assert 0 < chunk.count <= min(view.remaining, scheduler.policy.prefill_chunk_tokens)
        assert chunk.start == view.start
        assert chunk.last == (chunk.count == view.remaining)
    if not scheduler.policy.batched_prefill_forward:
        assert len(plan.prefill) <= 1


@given(schedulers, slot_views())
def test_a_plan_makes_progress_for_everybody_that_it_may(scheduler: Scheduler, slots: list[SlotView]) -> None:
    plan = scheduler.plan(slots)
    prompts = [view for view in slots if view.remaining]
    assert bool(plan.rows) == bool(slots)
    assert bool(plan.prefill) == bool(prompts)


@given(schedulers, slot_views())
def test_the_oldest_prompt_gets_at_least_half(scheduler: Scheduler, slots: list[SlotView]) -> None:
    prompts = [view for view in slots if view.remaining]
    if not prompts:
        return
    plan = scheduler.plan(slots)
    oldest = min(prompts, key=lambda view: view.arrival)
    mine = next((chunk.count for chunk in plan.prefill if chunk.slot == oldest.slot), 0)
    total = sum(chunk.count for chunk in plan.prefill)
    assert mine >= min(oldest.remaining, scheduler.policy.prefill_chunk_tokens, max(1, total // 2))


@given(schedulers, slot_views())
def test_beside_decoding_slots_the_budget_holds(scheduler: Scheduler, slots: list[SlotView]) -> None:
    plan = scheduler.plan(slots)
    if not plan.decode or not plan.prefill:
        return
    rows = plan.rows - len(plan.decode)
    assert rows <= scheduler.policy.prefill_chunk_tokens
    seconds = scheduler.cost.decode_cost(len(plan.decode)) + rows * scheduler.cost.prefill_row_s
    assert rows <= MIN_CHUNK_ROWS or seconds <= scheduler.policy.prefill_budget_s * (1 + 1e-9)


@given(st.floats(1e-4, 0.01), st.floats(0.05, 1.0), st.integers(1, 8))
def test_the_budget_is_used_up_to_a_tile(row_s: float, budget_s: float, decoding: int) -> None:
    cost = CostModel(decode_s=((decoding, 0.02),), prefill_row_s=row_s)
    policy = Policy(prefill_chunk_tokens=100_000, prefill_budget_s=budget_s, max_rows=100_000)
    slots = [SlotView(slot, slot, 10, 0) for slot in range(decoding)] + [SlotView(decoding, 99, 0, 90_000)]
    plan = Scheduler(policy, cost).plan(slots)
    rows = plan.prefill[0].count
    assert rows == MIN_CHUNK_ROWS or 0.02 + (rows + TILE_ROWS) * row_s > budget_s * (1 - 1e-9)


def test_alone_a_prompt_gets_its_cap_whatever_the_budget() -> None:
    scheduler = Scheduler(Policy(prefill_budget_s=0.01, max_rows=512), CostModel(prefill_row_s=1.0))
    assert scheduler.plan([SlotView(0, 0, 0, 300)]) == StepPlan((), (PrefillChunk(0, 0, 128, last=False),))


def test_a_short_question_overtakes_a_long_document() -> None:
    scheduler = Scheduler(Policy(max_rows=512), CostModel(prefill_row_s=0.4 / 128))
    slots = [SlotView(0, 0, 0, 4000), SlotView(1, 1, 50, 0), SlotView(2, 2, 0, 20), SlotView(3, 3, 0, 4000)]
    plan = scheduler.plan(slots)
    taken = {chunk.slot: chunk.count for chunk in plan.prefill}
    assert plan.prefill[0].slot == 0
    assert taken[0] >= sum(taken.values()) // 2
    assert taken[2] == 20


def test_one_prompt_per_step_without_batched_prefill() -> None:
    slots = [SlotView(slot, 9 - slot, 0, 40) for slot in range(4)]
    together = Scheduler(Policy()).plan(slots)
    one = Scheduler(Policy(batched_prefill_forward=False)).plan(slots)
    assert {chunk.slot for chunk in together.prefill} == {0, 1, 2, 3}
    assert one.prefill == (PrefillChunk(3, 0, 40, last=True),)


@pytest.mark.parametrize(
    ("continuous", "free", "busy", "waiting", "expected"),
    [
        (True, 3, 1, 5, 3),
        (True, 3, 1, 2, 2),
        (True, 0, 4, 2, 0),
        (False, 3, 1, 5, 0),
        (False, 4, 0, 5, 4),
        (False, 4, 0, 1, 1),
    ],
)
def test_admissions(continuous: bool, free: int, busy: int, waiting: int, expected: int) -> None:
    scheduler = Scheduler(Policy(continuous_batching=continuous))
    assert scheduler.admissions(free, busy, waiting) == expected


def decode_plan(rows: int) -> StepPlan:
    return StepPlan(tuple(DecodeRow(slot) for slot in range(rows)))


def mixed_plan(decode: int, prompt: int) -> StepPlan:
    return replace(decode_plan(decode), prefill=(PrefillChunk(99, 0, prompt, last=False),))


def test_cost_is_learned_from_steps() -> None:
    cost = CostModel()
    assert cost.decode_cost(1) == 0.0
    cost = cost.learn(decode_plan(1), 0.05).learn(decode_plan(8), 0.11)
    assert (cost.decode_cost(1), cost.decode_cost(2), cost.decode_cost(8)) == (0.05, 0.05, 0.11)
    cost = cost.learn(mixed_plan(1, 100), 0.55)
    assert cost.prefill_row_s == pytest.approx(0.005)
    assert cost.learn(mixed_plan(1, 100), 1.05).prefill_row_s == pytest.approx(0.006)


def test_a_handful_of_prompt_rows_teaches_nothing() -> None:
    cost = CostModel(prefill_row_s=0.005)
    assert cost.learn(mixed_plan(1, TILE_ROWS - 1), 1.0) == cost


@given(costs, st.integers(0, 32), st.integers(0, 512), st.floats(0.0, 10.0))
def test_learning_never_makes_a_cost_negative(cost: CostModel, decode: int, prompt: int, seconds: float) -> None:
    plan = mixed_plan(decode, prompt) if prompt else decode_plan(max(1, decode))
    learned = cost.learn(plan, seconds)
    assert learned.prefill_row_s >= 0.0
    assert all(value >= 0.0 for _, value in learned.decode_s)
    assert learned.rows_within(0.4, decode) >= MIN_CHUNK_ROWS
