"""What to compute next: pure functions of what the slots hold, what waits, and what steps have cost.

Nothing here touches llama.cpp or the clock, so every decision can be tested and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from swarmcpp.core import DecodeRow, PrefillChunk, StepPlan

TILE_ROWS = 16
"""Chunks are whole tiles: llama.cpp's repacked matmul kernels work on rows in multiples of 4 to 16."""

MIN_CHUNK_ROWS = 32
"""Least prompt rows of a step while others decode: fewer cost nearly as much, since the weights are read anyway."""

_ALPHA = 0.2
"""Weight of the newest sample in the moving averages: five steps forget an old operating point."""


@dataclass(frozen=True, slots=True)
class SlotView:
    """What the scheduler may know of a busy slot; `remaining` prompt tokens from `start`, 0 when it decodes."""

    slot: int
    arrival: int
    start: int
    remaining: int


@dataclass(frozen=True, slots=True)
class Policy:
    """The switches and limits of the scheduler; rows are tokens, the budget is seconds."""

    prefill_chunk_tokens: int = 128
    prefill_budget_s: float = 0.4
    max_rows: int = 512
    continuous_batching: bool = True
    batched_prefill_forward: bool = True


@dataclass(frozen=True, slots=True)
class CostModel:
    """Moving averages of measured steps: seconds of a pure decode step by its rows, seconds per prompt row."""

    decode_s: tuple[tuple[int, float], ...] = ()
    prefill_row_s: float = 0.0

    def decode_cost(self, rows: int) -> float:
        """Estimate of a pure decode step of `rows` rows, from the nearest row count seen; 0 before any."""
        if not rows or not self.decode_s:
            return 0.0
        return min(self.decode_s, key=lambda seen: (abs(seen[0] - rows), seen[0]))[1]

    def learn(self, plan: StepPlan, seconds: float) -> CostModel:
        """The model after a step of `plan` took `seconds`."""
        decode_rows, prefill_rows = len(plan.decode), plan.rows - len(plan.decode)
        if not prefill_rows:
            seen = dict(self.decode_s)
            seen[decode_rows] = _blend(seen.get(decode_rows), seconds)
            return replace(self, decode_s=tuple(sorted(seen.items())))
        if prefill_rows < TILE_ROWS:
            return self
        # A row costs something even if the decode part was estimated too high.
        row_s = max(seconds - self.decode_cost(decode_rows), seconds / 10) / prefill_rows
        return replace(self, prefill_row_s=_blend(self.prefill_row_s or None, row_s))

    def rows_within(self, budget_s: float, decode_rows: int) -> int:
        """Prompt rows that fit into `budget_s` beside `decode_rows`, in whole tiles, at least MIN_CHUNK_ROWS."""
        if self.prefill_row_s <= 0.0:
            return MIN_CHUNK_ROWS
        rows = int((budget_s - self.decode_cost(decode_rows)) / self.prefill_row_s)
        return max(MIN_CHUNK_ROWS, rows - rows % TILE_ROWS)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _ALPHA * (new - old)


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Plans steps under a policy. Immutable; `learned` returns the scheduler that knows one more step."""

    policy: Policy
    cost: CostModel = field(default_factory=CostModel)

    def admissions(self, free_slots: int, busy_slots: int, waiting: int) -> int:
        """How many waiting requests get a slot now, first come first served."""
        if not self.policy.continuous_batching and busy_slots:
            # A static batch: nobody joins before the running batch has finished.
            return 0
        return min(free_slots, waiting)

    def plan(self, slots: Sequence[SlotView]) -> StepPlan:
        """The next step: every decoding slot's row, then prompt chunks up to the row and time limits."""
        decode = tuple(DecodeRow(view.slot) for view in slots if not view.remaining)
        prompts = sorted((view for view in slots if view.remaining), key=lambda view: view.arrival)
        if not prompts:
            return StepPlan(decode=decode)
        per_prompt = self.policy.prefill_chunk_tokens
        total = self.policy.max_rows - len(decode)
        if decode:
            total = min(total, per_prompt, self.cost.rows_within(self.policy.prefill_budget_s, len(decode)))
        if not self.policy.batched_prefill_forward:
            prompts = prompts[:1]
        return StepPlan(decode=decode, prefill=_share(prompts, total, per_prompt))

    def learned(self, plan: StepPlan, seconds: float) -> Scheduler:
        """This scheduler after a step of `plan` took `seconds`."""
        return replace(self, cost=self.cost.learn(plan, seconds))


def _share(prompts: Sequence[SlotView], total: int, per_prompt: int) -> tuple[PrefillChunk, ...]:
    """Rows for each prompt: half for the oldest, the rest by shortest remaining prompt first.

    Shortest first keeps short questions quick beside a long document; the half keeps the document moving.
    """
    take = dict.fromkeys((view.slot for view in prompts), 0)
    oldest = prompts[0]
    take[oldest.slot] = min(oldest.remaining, per_prompt, max(1, total // 2) if len(prompts) > 1 else total)
    left = total - take[oldest.slot]
    for view in sorted(prompts, key=lambda view: (view.remaining, view.arrival)):
        more = min(left, min(view.remaining, per_prompt) - take[view.slot])
        take[view.slot] += more
        left -= more
    return tuple(
        PrefillChunk(view.slot, view.start, take[view.slot], last=take[view.slot] == view.remaining)
        for view in prompts
        if take[view.slot]
    )
