"""The scheduler's plans, for any slots, policy and cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.core import TILE_ROWS, Chunk, StepPlan
from swarmcpp.engine.scheduler import CostModel, Policy, Scheduler, SlotView

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


def view_of(slot: int, arrival: int, start: int, remaining: int) -> SlotView:
    """A slot whose whole prompt is still to be prefilled from `start`, a multiple of a tile."""
    return SlotView(slot, arrival, start, remaining, (start + remaining) // TILE_ROWS * TILE_ROWS)


@st.composite
def slot_views(draw: st.DrawFn) -> list[SlotView]:
    count = draw(st.integers(0, 32))
    arrivals = draw(st.permutations(range(count)))
    views = []
    for slot in range(count):
        start = draw(st.integers(0, 40)) * TILE_ROWS
        remaining = draw(st.one_of(st.just(0), st.integers(1, 3000)))
        views.append(view_of(slot, arrivals[slot], start, remaining))
    return views


schedulers = st.builds(Scheduler, policies, costs)


def rows_of(plan: StepPlan) -> int:
    return len(plan.decode) + sum(chunk.count for chunk in chunks_of(plan))


def chunks_of(plan: StepPlan) -> list[Chunk]:
    return [chunk for group in plan.prefill for chunk in group]


@given(schedulers, slot_views())
def test_a_plan_respects_every_limit(scheduler: Scheduler, slots: list[SlotView]) -> None:
    plan = scheduler.plan(slots)
    views = {view.slot: view for view in slots}
    assert plan.decode == tuple(Chunk(view.slot, view.start, 1, last=True) for view in slots if not view.remaining)
    chunks = chunks_of(plan)
    assert len({chunk.slot for chunk in chunks}) == len(chunks)
    for chunk in chunks:
        view = views[chunk.slot]
        assert 0 < chunk.count <= min(view.remaining, scheduler.policy.prefill_chunk_tokens)
        assert chunk.start == view.start
        assert chunk.last == (chunk.count == view.remaining)
    for group in plan.prefill:
        assert sum(chunk.count for chunk in group) <= scheduler.policy.max_rows
        assert len({chunk.count for chunk in group}) == 1
    if not scheduler.policy.batched_prefill_forward:
        assert len(chunks) <= 1


@given(policies, costs, st.integers(1, 3000), st.lists(st.integers(0, 3000), max_size=8))
def test_a_row_is_in_a_tile_or_not_whatever_runs_beside_it(
    policy: Policy, cost: CostModel, length: int, others: list[int]
) -> None:
    """The kernel that computes a row follows from its position in the prompt alone."""
    start = 0
    while start < length:
        mine = SlotView(0, 0, start, length - start, length // TILE_ROWS * TILE_ROWS)
        beside = [view_of(1 + slot, 1 + slot, 0, remaining) for slot, remaining in enumerate(others)]
        chunk = next(chunk for chunk in chunks_of(Scheduler(policy, cost).plan([mine, *beside])) if chunk.slot == 0)
        tiled = policy.prefill_chunk_tokens >= TILE_ROWS and start < length // TILE_ROWS * TILE_ROWS
        assert (chunk.count >= TILE_ROWS) == tiled
        assert chunk.count % TILE_ROWS == 0 or not tiled
        start += chunk.count


@given(schedulers, slot_views())
def test_a_plan_makes_progress(scheduler: Scheduler, slots: list[SlotView]) -> None:
    plan = scheduler.plan(slots)
    assert bool(rows_of(plan)) == bool(slots)
    assert bool(plan.prefill) == any(view.remaining for view in slots)


@given(schedulers, slot_views())
def test_the_oldest_prompt_gets_at_least_half_up_to_a_tile(scheduler: Scheduler, slots: list[SlotView]) -> None:
    prompts = [view for view in slots if view.remaining]
    if not prompts:
        return
    chunks = chunks_of(scheduler.plan(slots))
    oldest = min(prompts, key=lambda view: view.arrival)
    mine = next(chunk.count for chunk in chunks if chunk.slot == oldest.slot)
    total = sum(chunk.count for chunk in chunks)
    most = min(oldest.remaining, scheduler.policy.prefill_chunk_tokens)
    if oldest.start >= oldest.tile_end and scheduler.policy.prefill_chunk_tokens >= TILE_ROWS:
        most = min(most, scheduler.policy.tile - 1)
    assert mine > min(most, total // 2) - scheduler.policy.tile


@given(schedulers, slot_views())
def test_beside_decoding_slots_the_budget_holds(scheduler: Scheduler, slots: list[SlotView]) -> None:
    plan = scheduler.plan(slots)
    if not plan.decode or not plan.prefill:
        return
    rows = rows_of(plan) - len(plan.decode)
    seconds = scheduler.cost.decode_cost(len(plan.decode)) + rows * scheduler.cost.prefill_row_s
    assert rows <= scheduler.policy.tile or seconds <= scheduler.policy.prefill_budget_s * (1 + 1e-9)


@given(st.floats(1e-4, 0.01), st.floats(0.05, 1.0), st.integers(1, 8))
def test_the_budget_is_used_up_to_a_tile(row_s: float, budget_s: float, decoding: int) -> None:
    cost = CostModel(decode_s=((decoding, 0.02),), prefill_row_s=row_s)
    policy = Policy(prefill_chunk_tokens=100_000, prefill_budget_s=budget_s, max_rows=100_000)
    slots = [SlotView(slot, slot, 10, 0) for slot in range(decoding)] + [view_of(decoding, 99, 0, 90_000)]
    rows = chunks_of(Scheduler(policy, cost).plan(slots))[0].count
    assert rows == TILE_ROWS or 0.02 + (rows + TILE_ROWS) * row_s > budget_s * (1 - 1e-9)


def test_alone_a_prompt_gets_its_cap_whatever_the_budget() -> None:
    scheduler = Scheduler(Policy(prefill_budget_s=0.01, max_rows=512), CostModel(prefill_row_s=1.0))
    assert scheduler.plan([view_of(0, 0, 0, 300)]) == StepPlan((), ((Chunk(0, 0, 128, last=False),),))


def test_replayed_tokens_are_computed_as_the_decode_rows_that_they_were() -> None:
    """After the prompt's tiles come its tail and what was generated, in chunks below a tile."""
    resumed = SlotView(0, 0, 128, 200, tile_end=128)
    assert chunks_of(Scheduler(Policy()).plan([resumed])) == [Chunk(0, 128, TILE_ROWS - 1, last=False)]


def test_a_short_question_overtakes_a_long_document() -> None:
    scheduler = Scheduler(Policy(prefill_chunk_tokens=256), CostModel(prefill_row_s=0.4 / 256))
    slots = [view_of(0, 0, 0, 4000), SlotView(1, 1, 50, 0), view_of(2, 2, 0, 20), view_of(3, 3, 0, 4000)]
    taken = {chunk.slot: chunk.count for chunk in chunks_of(scheduler.plan(slots))}
    assert taken == {0: 128, 2: 20, 3: 64}
    assert scheduler.plan(slots).prefill[0] == (Chunk(2, 0, 20, last=True),)


def test_prompts_of_equal_chunks_share_a_call() -> None:
    slots = [view_of(slot, slot, 0, 128 if slot < 3 else 20) for slot in range(4)]
    plan = Scheduler(Policy(prefill_chunk_tokens=512)).plan(slots)
    assert [len(group) for group in plan.prefill] == [1, 3]


def test_one_prompt_per_step_without_batched_prefill() -> None:
    slots = [view_of(slot, 9 - slot, 0, 40) for slot in range(4)]
    together = Scheduler(Policy(prefill_chunk_tokens=160)).plan(slots)
    one = Scheduler(Policy(batched_prefill_forward=False)).plan(slots)
    assert {chunk.slot for chunk in chunks_of(together)} == {0, 1, 2, 3}
    assert one.prefill == ((Chunk(3, 0, 40, last=True),),)


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


def test_cost_is_learned_from_calls() -> None:
    one = (Chunk(0, 5, 1, last=True),)
    scheduler = Scheduler(Policy()).learned(one, 0.05, decode=True).learned(one * 8, 0.11, decode=True)
    cost = scheduler.cost
    assert CostModel().decode_cost(1) == 0.0
    assert (cost.decode_cost(1), cost.decode_cost(2), cost.decode_cost(8)) == (
        0.05,
        pytest.approx(0.05 + 0.06 / 7),
        0.11,
    )
    assert cost.decode_cost(10) == pytest.approx(0.11 * 1.2)
    prompt = (Chunk(0, 0, 100, last=False),)
    scheduler = scheduler.learned(prompt, 0.5, decode=False)
    assert scheduler.cost.prefill_row_s == pytest.approx(0.005)
    assert scheduler.learned(prompt, 1.0, decode=False).cost.prefill_row_s == pytest.approx(0.006)
    assert scheduler.cost.rows_within(0.3, 1) == 50
    assert scheduler.cost.decode_cost(10) == pytest.approx(0.12)


def test_a_handful_of_prompt_rows_teaches_nothing() -> None:
    cost = CostModel(prefill_row_s=0.005)
    assert cost.after_prefill(TILE_ROWS // 2 - 1, 1.0) == cost


@given(costs, st.integers(1, 512), st.floats(0.0, 10.0))
def test_learning_never_makes_a_cost_negative(cost: CostModel, rows: int, seconds: float) -> None:
    learned = cost.after_decode(rows, seconds).after_prefill(rows, seconds)
    assert learned.prefill_row_s >= 0.0
    assert all(value >= 0.0 for _, value in learned.decode_s)
    assert learned.rows_within(0.4, rows) >= 0
