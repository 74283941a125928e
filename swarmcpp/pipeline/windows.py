"""Windows of guesses that the passes of a lane verify: how wide, and how many on their way at the same time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Final

from swarmcpp.core import MAX_OUTPUTS, Chunk, Clock, TokenPart
from swarmcpp.engine.drafting import Drafter
from swarmcpp.engine.scheduler import CostModel
from swarmcpp.engine.speculation import Plan, Speculation
from swarmcpp.pipeline.guessing import AskedDrafter, AskGuesses
from swarmcpp.pipeline.runs import ModelFacts, PipelinePolicy, Run

MOST_WINDOWS: Final = 8
"""Of one stream on their way: further ones are hardly ever right."""


class Windows:
    """Guesses for the runs of one lane. Seconds are of passes; `slowest` are those of the slowest stage by rows. `ask`
    reaches a draft model, if the policy has one."""

    def __init__(self, policy: PipelinePolicy, facts: ModelFacts, ask: AskGuesses, clock: Clock) -> None:
        self._asked = AskedDrafter(ask, facts.n_vocab, clock)
        drafters: list[Drafter] = [make() for make in policy.drafters]
        if policy.draft:
            drafters.append(self._asked)
        self._speculation = Speculation(drafters, gamma=policy.gamma, max_rows=MAX_OUTPUTS, n_ctx=facts.ctx_size)
        self._most = MOST_WINDOWS if policy.ahead else 1
        self._round = CostModel()
        """From the head round to the head, when nothing else is on its way or the chain is full."""
        self._gamma = 0
        """Guesses of each chunk of the last decode pass."""

    def plan(self, chunks: Sequence[Chunk], runs: Mapping[int, Run], rounds: int, slowest: CostModel) -> Plan | None:
        """What to verify with the decode rows of a micro-batch, one of `rounds`."""
        cost = self._round if rounds <= 1 else self._shared(rounds, slowest)
        return self._speculation.plan(chunks, runs.__getitem__, cost)

    def ask(self, plan: Plan | None, done: Callable[[], None]) -> bool:
        """Have the guesses of a plan made by a model; False when it needs none, or nobody makes them. Then, as after
        `done`, it is for `widened`."""
        return plan is not None and plan.drafter is self._asked and self._asked.ask(plan.wanted, done)

    def widened(self, chunks: Sequence[Chunk], plan: Plan | None) -> tuple[tuple[Chunk, ...], ...]:
        """The decode rows of a micro-batch with the guesses of its plan; a group is a pass."""
        groups = self._speculation.groups(chunks, plan)
        self._gamma = len(groups[-1][0].guesses) if groups else 0
        return groups

    def _shared(self, rounds: int, slowest: CostModel) -> CostModel:
        """Where micro-batches follow one another a pass takes the time in which the slowest stage makes room for it."""
        known = dict(slowest.decode_s)
        times = ((rows, max(seconds / rounds, known.get(rows, 0.0))) for rows, seconds in self._round.decode_s)
        return replace(self._round, decode_s=tuple(times))

    def further(self, run: Run, slowest: CostModel) -> Chunk | None:
        """A window behind those of the only stream that are on their way, on the guess that these hold: while a round
        takes longer than its slowest stage, that has nothing else to do."""
        rows = 1 + self._gamma
        stage_s = slowest.decode_cost(rows)
        if not self._gamma or not run.flying or stage_s <= 0:
            return None
        wanted = min(self._most, ceil(self._round.decode_cost(rows) / stage_s))
        return self._speculation.further(run.place, run, self._gamma) if run.flying < wanted else None

    def learn(self, rows: int, seconds: float) -> None:
        """A decode pass of `rows` rows took so long from the head round to the head."""
        self._round = self._round.after_decode(rows, seconds)

    def verified(self, run: Run, part: TokenPart) -> TokenPart:
        """Tokens that came of a decode chunk of `run` and are accepted; they, with the counts of its guesses."""
        part = self._speculation.verified(run, part)
        if not run.came(part.ids):
            self._speculation.void(run)
        return part

    def forget(self, run: Run) -> None:
        """It has ended, or goes on elsewhere."""
        self._speculation.forget(run)
