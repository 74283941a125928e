"""Speculative decoding: how many guesses of which drafter one pass verifies, from what passes cost and what came of
earlier guesses. Pure but for the drafters.

A pass over 1 + gamma rows of a sequence yields a token for each guess that was right and one more, which its sampler
draws position by position as it would have without guesses (Leviathan et al. 2023, "Fast inference from transformers
via speculative decoding", with a target that decides alone: what comes out is what plain decoding gives).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from operator import mul
from typing import Final

import msgspec

from swarmcpp.core import MAX_GAMMA, Chunk, DrafterName, Token, TokenPart
from swarmcpp.engine.drafting import NOTHING, Draft, Drafter
from swarmcpp.engine.scheduler import CostModel
from swarmcpp.engine.sequence import Generation
from swarmcpp.telemetry import diag

logger = logging.getLogger(__name__)

PRIOR: Final = 0.6
"""Acceptance of a drafter of which nothing is known."""

PRIOR_WEIGHT: Final = 2.0
"""Guesses that the prior counts as."""

MEMORY: Final = 0.95
"""What a guess counts after the next one of its kind: twenty forget another kind of text."""

MEMORY_OF_ALL: Final = 0.995
"""The same for what all requests have in common."""

LONGEST_RUN: Final = 32
"""More tokens in a row that were foreseen say nothing more."""

LADDER: Final = (1, 2, 3, 5, 7, 11, 15, 23)
"""Numbers of guesses that are weighed, beside the most that there may be. With the row before them most are whole tiles
of 8 or 16 rows, in which kernels compute."""

WORTH: Final = 1.02
"""What speculation must win by on paper: its measures are moving averages of few passes."""

TRIAL_SHARE: Final = 0.01
"""Of the time may go into guesses that do not seem to pay, to learn whether they do by now."""

HOPE: Final = 0.4
"""How likely all guesses before it must be for a chunk to go out before they are verified: it costs a stage's time that
nobody else wants, and what the next chunk waits for it."""

MOST_SAVED: Final = 5.0
"""Passes that trials may take at once: what was saved up while there was nothing to try is not all spent."""


class Acceptance:
    """How often guesses were right when all before them were: moving averages, by the tokens in a row just before that
    were foreseen, in the draft and in what it goes on from.

    A guess at a later position has a longer run, and so has the first one of a draft that goes on from a long match: in
    text that is copied either is right for the same reason. Runs count in powers of two.
    """

    def __init__(self, prior: Acceptance | None = None, memory: float = MEMORY) -> None:
        self._prior = prior
        self._memory = memory
        kinds = 1 + _kind(LONGEST_RUN)
        self._right = [0.0] * kinds
        self._tried = [0.0] * kinds

    def rates(self, run: int, gamma: int) -> list[float]:
        """For each of `gamma` positions of a draft that goes on from `run` tokens."""
        by_kind = self._by_kind()
        return [by_kind[_kind(run + position)] for position in range(gamma)]

    def _by_kind(self) -> list[float]:
        """For each kind of run. Where nothing is known a longer one is like the next shorter one."""
        priors = self._prior._by_kind() if self._prior else None
        rates: list[float] = []
        for kind, (right, tried) in enumerate(zip(self._right, self._tried, strict=True)):
            prior = priors[kind] if priors else rates[-1] if rates else PRIOR
            rates.append((right + PRIOR_WEIGHT * prior) / (tried + PRIOR_WEIGHT))
        return rates

    def note(self, run: int, gamma: int, accepted: int) -> None:
        """Of `gamma` guesses the first `accepted` were right; of those behind the first wrong one nothing is known."""
        for position in range(min(gamma, accepted + 1)):
            kind = _kind(run + position)
            self._right[kind] = self._memory * self._right[kind] + (position < accepted)
            self._tried[kind] = self._memory * self._tried[kind] + 1
        if self._prior:
            self._prior.note(run, gamma, accepted)


def _kind(run: int) -> int:
    return min(run, LONGEST_RUN).bit_length()


def expected(rates: Sequence[float]) -> list[float]:
    """Tokens that guesses are expected to bring beside the one that comes anyway, for each number of guesses from 1."""
    return list(accumulate(accumulate(rates, mul)))


@dataclass(slots=True, eq=False)
class Candidate:
    """What could be guessed for one chunk: the best draft of those that cost nothing."""

    chunk: Chunk
    generation: Generation
    most: int
    draft: Draft = NOTHING
    drafter: Drafter | None = None
    brings: Sequence[float] = ()
    """See `expected`."""

    def gain(self, gamma: int) -> float:
        """Expected tokens of `gamma` rows beside its first one."""
        return self.brings[min(gamma, len(self.brings)) - 1] if self.brings and gamma else 0.0

    def widened(self, gamma: int) -> Chunk:
        """Its chunk with `gamma` guesses. llama.cpp computes sequences together that have equally many rows, so a short
        draft is filled up; a guess like any other, if not a good one."""
        guesses = self.draft.tokens[:gamma]
        last = guesses[-1] if guesses else self.generation.tokens[-1]
        guesses += (last,) * (gamma - len(guesses))
        return replace(self.chunk, count=1 + gamma, guesses=guesses)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Verify `gamma` guesses of each of `wide`; those of `asked` are to be had from `drafter` first."""

    wide: Sequence[Candidate]
    gamma: int
    tokens: float
    """That are expected of it, with those of the chunks that are not widened."""
    seconds: float
    drafter: Drafter | None = None
    asked: Sequence[Candidate] = ()

    @property
    def rate(self) -> float:
        """Expected tokens/s."""
        return self.tokens / self.seconds

    @property
    def wanted(self) -> list[tuple[Generation, int]]:
        """What its drafter is asked for."""
        return [(each.generation, self.gamma) for each in self.asked]


def drawn_tokens(guesses: Sequence[int], draw: Callable[[int], Token]) -> list[Token]:
    """What a sampler draws after each output of a chunk (counted from 0), up to the first that no guess foresaw."""
    tokens = [draw(0)]
    for output, guess in enumerate(guesses, 1):
        if tokens[-1].id != guess:
            break
        tokens.append(draw(output))
    return tokens


@dataclass(frozen=True, slots=True)
class _Used:
    """Guesses of a chunk that is being verified."""

    drafter: DrafterName
    run: int
    count: int


class Speculation:
    """Widens decode chunks by guesses and learns from what became of them. Used by one thread.

    `gamma` is the most that drafters guess which compute something. `max_rows` bounds the rows of a call that has
    guesses, `n_ctx` the positions of a sequence.
    """

    def __init__(self, drafters: Sequence[Drafter], *, gamma: int, max_rows: int, n_ctx: int) -> None:
        self._drafters = tuple(drafters)
        self._gamma = gamma
        self._max_rows = max_rows
        self._n_ctx = n_ctx
        self._of_all: dict[DrafterName, Acceptance] = {}
        self._of_one: dict[int, dict[DrafterName, Acceptance]] = {}
        self._used: dict[int, list[_Used]] = {}
        """For each generation what is being verified, in its order."""
        self._trial_s = 0.0

    def widen(
        self, chunks: Sequence[Chunk], generations: Callable[[int], Generation], cost: CostModel
    ) -> tuple[tuple[Chunk, ...], ...]:
        """Decode chunks in groups of equally many rows, each for one call; those that have guesses come last."""
        return self.groups(chunks, self.plan(chunks, generations, cost))

    def plan(self, chunks: Sequence[Chunk], generations: Callable[[int], Generation], cost: CostModel) -> Plan | None:
        """What to verify with decode chunks, and who is to guess it; None: nothing."""
        base_s = cost.decode_cost(len(chunks))
        candidates = self._candidates(chunks, generations) if self._drafters else []
        plan = self._ordered(candidates)
        # Without any measure yet nothing can be weighed.
        if plan is None and candidates and base_s > 0:
            plan = self._chosen(candidates, len(chunks), base_s, cost)
        return plan

    def groups(self, chunks: Sequence[Chunk], plan: Plan | None) -> tuple[tuple[Chunk, ...], ...]:
        """The chunks under a plan, see `widen`."""
        wide = self._drafted(plan) if plan else {}
        rest = tuple(chunk for chunk in chunks if chunk.slot not in wide)
        guessed = tuple(wide[chunk.slot] for chunk in chunks if chunk.slot in wide)
        return tuple(group for group in (rest, guessed) if group)

    def _drafted(self, plan: Plan) -> dict[int, Chunk]:
        """The chunks of a plan with their guesses, by slot."""
        gamma = plan.gamma
        if plan.drafter:
            drafts = plan.drafter.draft(plan.wanted)
            for each, draft in zip(plan.asked, drafts, strict=True):
                each.draft, each.drafter = draft, plan.drafter
            gamma = min(gamma, max(len(each.draft.tokens) for each in plan.wide))
        if gamma < 1:
            return {}
        for each in plan.wide:
            if each.drafter and each.draft.tokens:
                used = _Used(each.drafter.name, each.draft.run, min(gamma, len(each.draft.tokens)))
                self._used.setdefault(each.generation.serial, []).append(used)
        return {each.chunk.slot: each.widened(gamma) for each in plan.wide}

    def _ordered(self, candidates: Sequence[Candidate]) -> Plan | None:
        """What requests say that name a drafter and a number: that is not weighed. None if there are none; of those
        that differ, what the first one says."""
        forced = [each for each in candidates if each.generation.request.drafter and each.generation.request.gamma > 0]
        if not forced:
            return None
        wanted = forced[0].generation.request
        wide = [each for each in forced if each.generation.request.drafter == wanted.drafter and each.most > 0]
        drafter = next((each for each in self._drafters if each.name == wanted.drafter), None)
        if drafter is None or not wide or not (drafter.free is False or any(each.brings for each in wide)):
            return None
        return Plan(wide, self._room(wide), 0.0, 1.0, None if drafter.free else drafter, wide)

    def _chosen(self, candidates: Sequence[Candidate], n_chunks: int, base_s: float, cost: CostModel) -> Plan | None:
        """The plan with the most tokens per second; None when the chunks as they are have that."""
        plans = [*self._lookups(candidates, n_chunks, cost), *self._drafts(candidates, n_chunks, cost)]
        best = max(plans, key=lambda each: each.rate, default=None)
        self._trial_s = min(self._trial_s + TRIAL_SHARE * base_s, MOST_SAVED * base_s)
        if best is None or best.rate > WORTH * n_chunks / base_s:
            return best
        costs = best.seconds - base_s
        if costs > self._trial_s:
            return None
        self._trial_s -= max(0.0, costs)
        return best

    def _lookups(self, candidates: Sequence[Candidate], n_chunks: int, cost: CostModel) -> Iterator[Plan]:
        """The best drafts alone, as many as there are."""
        found = sorted((each for each in candidates if each.brings), key=lambda each: -each.brings[-1])
        for count in range(1, len(found) + 1):
            wide = found[:count]
            room = min(self._room(wide), max(len(each.brings) for each in wide))
            rest_s = cost.decode_cost(n_chunks - count)
            for gamma in (*(each for each in LADDER if each < room), room):
                if gamma > 0:
                    tokens = n_chunks + sum(each.gain(gamma) for each in wide)
                    yield Plan(wide, gamma, tokens, rest_s + cost.decode_cost(count * (1 + gamma)))

    def _drafts(self, candidates: Sequence[Candidate], n_chunks: int, cost: CostModel) -> Iterator[Plan]:
        """Drafts of those that compute, for all that have no better ones."""
        for drafter in self._drafters:
            wide = [each for each in candidates if not drafter.free and self._may(drafter, each)]
            if not wide:
                continue
            room = min(self._room(wide), self._gamma)
            known = [expected(self._acceptance(each.generation, drafter.name).rates(0, room)) for each in wide]
            rest_s = cost.decode_cost(n_chunks - len(wide))
            for gamma in range(1, room + 1):
                gains = [(brings[gamma - 1], each.gain(gamma)) for each, brings in zip(wide, known, strict=True)]
                asked = [each for each, (own, free) in zip(wide, gains, strict=True) if own > free]
                if asked:
                    seconds = rest_s + cost.decode_cost(len(wide) * (1 + gamma)) + drafter.seconds(len(asked), gamma)
                    yield Plan(wide, gamma, n_chunks + sum(map(max, gains)), seconds, drafter, asked)

    def _room(self, wide: Sequence[Candidate]) -> int:
        """Guesses that each of these may have at most."""
        return min(self._max_rows // len(wide) - 1, *(each.most for each in wide))

    @staticmethod
    def _may(drafter: Drafter, candidate: Candidate) -> bool:
        return candidate.most > 0 and candidate.generation.request.drafter in ("", drafter.name)

    def _candidates(self, chunks: Sequence[Chunk], generations: Callable[[int], Generation]) -> list[Candidate]:
        found = []
        for chunk in chunks:
            generation = generations(chunk.slot)
            # The last token that may come needs no guess, and no row behind the end of the sequence has a place.
            most = min(generation.to_come - 1, self._n_ctx - chunk.start - 1, MAX_GAMMA)
            asked = generation.request.gamma
            found.append(Candidate(chunk, generation, most if asked < 0 else min(most, asked)))
        for drafter in self._drafters:
            wanted = [each for each in found if drafter.free and self._may(drafter, each)]
            drafts = drafter.draft([(each.generation, each.most) for each in wanted]) if wanted else []
            for each, draft in zip(wanted, drafts, strict=True):
                if not draft.tokens:
                    continue
                rates = self._acceptance(each.generation, drafter.name).rates(draft.run, len(draft.tokens))
                brings = expected(rates)
                if not each.brings or brings[-1] > each.brings[-1]:
                    each.draft, each.drafter, each.brings = draft, drafter, brings
        return found

    def _acceptance(self, generation: Generation, drafter: DrafterName) -> Acceptance:
        own = self._of_one.setdefault(generation.serial, {})
        if drafter not in own:
            own[drafter] = Acceptance(self._of_all.setdefault(drafter, Acceptance(memory=MEMORY_OF_ALL)))
        return own[drafter]

    def verified(self, generation: Generation, part: TokenPart) -> TokenPart:
        """Learn from the tokens that came of the generation's last chunk; they, with the counts of its guesses."""
        used = self._used.get(generation.serial)
        if not used:
            return part
        said = used.pop(0)
        name, count = said.drafter, said.count
        accepted = min(len(part.tokens) - 1, count)
        request = generation.request.id
        diag(logger, "speculation", request=request, drafter=name, run=said.run, drafted=count, accepted=accepted)
        # What would have followed the last token nobody knows.
        self._acceptance(generation, name).note(said.run, accepted if part.finish else count, accepted)
        return msgspec.structs.replace(part, drafted=count, accepted=accepted)

    def further(self, slot: int, generation: Generation, gamma: int) -> Chunk | None:
        """A chunk behind those of the generation that are being verified, on the guess that they hold: what is
        `assumed`, and one token more. None when that is not likely, or nobody guesses so far ahead."""
        start = len(generation.tokens) + len(generation.assumed)
        used = self._used.get(generation.serial)
        most = min(gamma, generation.to_come - len(generation.assumed) - 2, self._n_ctx - start - 1)
        if not used or most < 1:
            return None
        first, last = used[0], used[-1]
        # The token that comes with each chunk beside its guesses has been guessed as well.
        rates = self._acceptance(generation, last.drafter).rates(first.run, len(generation.assumed) + 1)
        if prod(rates) < HOPE:
            return None
        drafter = next(each for each in self._drafters if each.name == last.drafter)
        tokens = drafter.draft([(generation, 1 + most)])[0].tokens if drafter.free else ()
        if len(tokens) < 2:
            return None
        used.append(_Used(last.drafter, first.run + len(generation.assumed) + 1, len(tokens) - 1))
        return Chunk(slot, start, len(tokens), last=True, guesses=tokens[1:], follows=tokens[0])

    def void(self, generation: Generation) -> None:
        """Nothing that is being verified of it holds."""
        self._used.pop(generation.serial, None)

    def forget(self, generation: Generation) -> None:
        """It has ended, or goes on elsewhere."""
        self._of_one.pop(generation.serial, None)
        self._used.pop(generation.serial, None)
        for drafter in self._drafters:
            drafter.forget(generation)


NONE: Final = Speculation((), gamma=0, max_rows=0, n_ctx=0)
"""Without drafters nothing is guessed and nothing kept."""
