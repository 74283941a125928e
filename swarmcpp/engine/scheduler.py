"""What to compute next: pure functions of what the slots hold, what waits, and what steps have cost.

Nothing here touches llama.cpp or the clock, so every decision can be tested and replayed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

from swarmcpp.core import MAX_ROWS, TILE_ROWS, Chunk, StepPlan

ROW_SHARE = 0.1
"""Of a decode call of one row, what each further one adds until it is measured."""

_ALPHA = 0.2
"""Weight of the newest sample in the moving averages: five steps forget an old operating point."""


@dataclass(frozen=True, slots=True)
class SlotView:
    """What the scheduler may know of a busy slot.

    `start` tokens are in the KV and `remaining` more are to be prefilled (0: it decodes), of which those at positions
    below `tile_end` in tiles.
    """

    slot: int
    arrival: int
    start: int
    remaining: int
    tile_end: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """The switches and limits of the scheduler; rows are tokens, the budget is seconds."""

    prefill_chunk_tokens: int = 128
    prefill_budget_s: float = 0.7
    max_rows: int = MAX_ROWS
    continuous_batching: bool = True
    batched_prefill_forward: bool = True

    @property
    def tile(self) -> int:
        """Least rows of a step; chunks below a tile are all computed alike, so a small limit stays what it is."""
        return min(TILE_ROWS, self.prefill_chunk_tokens)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Moving averages of measured calls: seconds of a decode call by its rows, and seconds per prompt row."""

    decode_s: tuple[tuple[int, float], ...] = ()
    prefill_row_s: float = 0.0

    def decode_cost(self, rows: int) -> float:
        """Estimate of a decode call of `rows` rows; 0 before any was seen.

        Between two row counts that were seen on the line through both, below the least what that took. Above the
        greatest each further row takes what a row of a prompt does.
        """
        if not rows or not self.decode_s:
            return 0.0
        at = bisect_left(self.decode_s, rows, key=itemgetter(0))
        if at == len(self.decode_s):
            most, seconds = self.decode_s[-1]
            return seconds + (rows - most) * (self.prefill_row_s or ROW_SHARE * seconds)
        above, seconds = self.decode_s[at]
        if at == 0 or above == rows:
            return seconds
        below, least = self.decode_s[at - 1]
        return least + (seconds - least) * (rows - below) / (above - below)

    def after_decode(self, rows: int, seconds: float) -> CostModel:
        """The model after a decode call of `rows` rows took `seconds`."""
        seen = dict(self.decode_s)
        seen[rows] = _blend(seen.get(rows), seconds)
        return replace(self, decode_s=tuple(sorted(seen.items())))

    def after_prefill(self, rows: int, seconds: float) -> CostModel:
        """The model after a call of `rows` prompt rows took `seconds`; less than half a tile says little."""
        if rows < TILE_ROWS // 2:
            return self
        return replace(self, prefill_row_s=_blend(self.prefill_row_s or None, seconds / rows))

    def rows_within(self, budget_s: float, decode_rows: int) -> int:
        """Prompt rows that fit into `budget_s` beside a decode call of `decode_rows`; 0 when unknown or none."""
        if self.prefill_row_s <= 0.0:
            return 0
        rows = (budget_s - self.decode_cost(decode_rows)) / self.prefill_row_s
        # Within what any batch holds: a cost that rounds to nothing would give infinity.
        return int(min(max(rows, 0.0), 1e6))


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _ALPHA * (new - old)


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Plans steps under a policy. Immutable: what it learns is in the scheduler that `learned` returns."""

    policy: Policy
    cost: CostModel = field(default_factory=CostModel)

    def admissions(self, free_slots: int, busy_slots: int, waiting: int) -> int:
        """How many waiting requests get a slot now, first come first served."""
        if not self.policy.continuous_batching and busy_slots:
            # A static batch: nobody joins before the running batch has finished.
            return 0
        return min(free_slots, waiting)

    def plan(self, slots: Sequence[SlotView]) -> StepPlan:
        """The next step: a row for every decoding slot, then prompt chunks up to the row and time limits.

        Calls hold chunks of equal length only: llama.cpp would split others, and with them a tile.
        """
        decode = tuple(Chunk(view.slot, view.start, 1, last=True) for view in slots if not view.remaining)
        prompts = sorted((view for view in slots if view.remaining), key=lambda view: view.arrival)
        if not self.policy.batched_prefill_forward:
            prompts = prompts[:1]
        if not prompts:
            return StepPlan(decode=decode)
        chunks = self._share(prompts, self._prompt_rows(len(decode)))
        by_count: dict[int, list[Chunk]] = {}
        # Short ones first, so that their answers begin; by slot, since llama.cpp computes only neighbours together.
        for chunk in sorted(chunks, key=lambda chunk: (chunk.count, chunk.slot)):
            by_count.setdefault(chunk.count, []).append(chunk)
        return StepPlan(decode=decode, prefill=tuple(tuple(group) for group in by_count.values()))

    def learned(self, calls: Sequence[Chunk], seconds: float, *, decode: bool) -> Scheduler:
        """This scheduler after one call of these chunks took `seconds`."""
        rows = sum(chunk.count for chunk in calls)
        model = self.cost.after_decode(rows, seconds) if decode else self.cost.after_prefill(rows, seconds)
        return replace(self, cost=model)

    def _prompt_rows(self, decode_rows: int) -> int:
        """Prompt rows of the next step, at least a tile; the budget counts only where it keeps somebody waiting.

        More rows than a chunk would not be faster (measured), and a prompt that ends in this step waits for the rest.
        """
        rows = min(self.policy.max_rows, self.policy.prefill_chunk_tokens)
        if decode_rows:
            rows = min(rows, self.cost.rows_within(self.policy.prefill_budget_s, decode_rows))
        return max(self.policy.tile, rows)

    def _share(self, prompts: Sequence[SlotView], total: int) -> list[Chunk]:
        """Rows for each prompt: half for the oldest, the rest by shortest remaining prompt first.

        Shortest first keeps short questions quick beside a long document; the half keeps the document moving.
        """
        oldest = prompts[0]
        half = max(self.policy.tile, total // 2) if len(prompts) > 1 else total
        take = {oldest.slot: self._chunk_rows(oldest, half)}
        left = total - take[oldest.slot]
        for view in sorted(prompts[1:], key=lambda view: (view.remaining, view.arrival)):
            take[view.slot] = self._chunk_rows(view, left)
            left -= take[view.slot]
        take[oldest.slot] = self._chunk_rows(oldest, take[oldest.slot] + left)
        return [
            Chunk(view.slot, view.start, take[view.slot], last=take[view.slot] == view.remaining)
            for view in prompts
            if take[view.slot]
        ]

    def _chunk_rows(self, view: SlotView, limit: int) -> int:
        """Rows of a prompt's next chunk within `limit`: whole tiles before its `tile_end`, less than one after."""
        chunk = min(self.policy.prefill_chunk_tokens, limit)
        if self.policy.prefill_chunk_tokens < TILE_ROWS:
            return min(view.remaining, chunk)
        if view.start < view.tile_end:
            rows = min(view.tile_end - view.start, chunk)
            # From within a tile (blocks that are no whole tiles were reused) first to its end.
            inside = view.start % TILE_ROWS
            return min(rows, TILE_ROWS - inside) if inside else rows - rows % TILE_ROWS
        # All of a tail or none: ggml computes one row of a long sequence differently from two.
        rows = min(view.remaining, self.policy.prefill_chunk_tokens, TILE_ROWS - 1)
        return rows if rows <= limit else 0
