"""Drafters: what guesses the next tokens of an answer, so that one pass can verify several of them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from swarmcpp.core import DrafterName, GenerateRequest
from swarmcpp.engine.sequence import Generation

NGRAM: Final = 3
"""Tokens that must be the same for a place to be looked at: two are in most texts by chance."""

CHAIN: Final = 8
"""Places with the same n-gram that are compared, the latest first."""

LONGEST_MATCH: Final = 32
"""More tokens in common say nothing more."""

AROUND: Final = 48
"""Tokens of a prediction, after the place where it went wrong, in which the answer may come back to it."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Guesses at the next tokens. `run` tokens in a row just before them were as whoever guesses had it: the more, the
    likelier these are."""

    tokens: tuple[int, ...] = ()
    run: int = 0


NOTHING: Final = Draft()


class Drafter(Protocol):
    """Guesses for all sequences that decode. Used by one thread."""

    name: DrafterName
    free: bool
    """It computes next to nothing: its drafts are made before it is known whether they are used."""

    def draft(self, asked: Sequence[tuple[Generation, int]]) -> list[Draft]:
        """For each generation up to so many tokens that may follow its last one, or what is assumed to follow that; a
        draft may be empty."""
        ...

    def seconds(self, count: int, gamma: int) -> float:
        """What guessing `gamma` tokens for `count` sequences is expected to take."""
        ...

    def forget(self, generation: Generation) -> None:
        """It has ended, or goes on elsewhere."""
        ...


class NgramIndex:
    """Where each n-gram of a growing list of tokens occurred, as chains of positions from the latest to the first."""

    def __init__(self, n: int = NGRAM) -> None:
        self._n = n
        self._latest: dict[int, int] = {}
        self._earlier: list[int] = []
        """For position p (of the token behind an n-gram), at p - n: the one before with the same n-gram, or -1."""

    def match(self, tokens: Sequence[int], tail: Sequence[int]) -> tuple[int, int]:
        """The position in `tokens` behind the longest match with the end of `tail`, of equal ones the latest, and how
        many tokens are the same (LONGEST_MATCH at most); (-1, 0) if there is none.

        `tokens` may be `tail` itself. It may only have grown since the last call.
        """
        n = self._n
        for position in range(n + len(self._earlier), len(tokens)):
            key = hash(tuple(tokens[position - n : position]))
            self._earlier.append(self._latest.get(key, -1))
            self._latest[key] = position
        best, longest = -1, 0
        if len(tail) < n:
            return best, longest
        end = tuple(tail[len(tail) - n :])
        at = self._latest.get(hash(end), -1)
        for _ in range(CHAIN):
            if at < 0:
                break
            length = _common_end(tokens, at, tail) if tuple(tokens[at - n : at]) == end else 0
            if length > longest:
                best, longest = at, length
                if length == LONGEST_MATCH:
                    break
            at = self._earlier[at - n]
        return best, longest


def _common_end(tokens: Sequence[int], position: int, tail: Sequence[int]) -> int:
    most = min(LONGEST_MATCH, position, len(tail))
    length, end = 0, len(tail)
    while length < most and tokens[position - 1 - length] == tail[end - 1 - length]:
        length += 1
    return length


def continuation(tokens: Sequence[int], position: int, count: int) -> tuple[int, ...]:
    """`count` tokens from `position` on; behind the end of `tokens` it goes round, as text that repeats itself does."""
    period = len(tokens) - position
    return tuple(tokens[position + index % period] for index in range(count)) if period > 0 else ()


class _Follower(Protocol):
    """What a look-up keeps of one generation."""

    def draft(self, generation: Generation, most: int) -> Draft:
        """Up to `most` tokens that may follow."""
        ...


class _Lookup:
    """A drafter that computes nothing, but follows each generation."""

    free = True

    def __init__(self) -> None:
        self._followers: dict[int, _Follower] = {}

    def draft(self, asked: Sequence[tuple[Generation, int]]) -> list[Draft]:
        """See `Drafter`."""
        return [self._follower(generation).draft(generation, most) for generation, most in asked]

    def _follower(self, generation: Generation) -> _Follower:
        found = self._followers.get(generation.serial)
        if found is None:
            found = self._followers[generation.serial] = self._follow(generation)
        return found

    def _follow(self, generation: Generation) -> _Follower:
        raise NotImplementedError

    def seconds(self, count: int, gamma: int) -> float:
        """See `Drafter`."""
        return 0.0

    def forget(self, generation: Generation) -> None:
        """See `Drafter`."""
        self._followers.pop(generation.serial, None)


class _Repeating:
    """What followed the longest earlier match of a text's end."""

    def __init__(self) -> None:
        self._index = NgramIndex()

    def draft(self, generation: Generation, most: int) -> Draft:
        """See `_Follower`."""
        text: Sequence[int] = generation.tokens
        tail = text
        if generation.assumed:
            text, tail = [*text, *generation.assumed], [*text[-LONGEST_MATCH:], *generation.assumed]
        position, length = self._index.match(generation.tokens, tail)
        return Draft(continuation(text, position, most), length) if length else NOTHING


class NgramDrafter(_Lookup):
    """What followed the longest earlier match of an answer's end, in its prompt and in itself."""

    name: DrafterName = "ngram"

    def _follow(self, generation: Generation) -> _Follower:
        return _Repeating()


class _Following:
    """How far an answer follows the text that was predicted."""

    def __init__(self, request: GenerateRequest) -> None:
        self._prediction = request.prediction
        self._begin = self._read = len(request.prompt)
        """Where the answer begins in a generation's tokens, and how many of these were compared."""
        self._at = 0
        """The next token if the answer goes on as predicted."""
        self._right = 1
        """Tokens in a row that were as predicted."""

    def draft(self, generation: Generation, most: int) -> Draft:
        """See `_Follower`."""
        if not self._prediction:
            return NOTHING
        tokens, assumed = generation.tokens, tuple(generation.assumed)
        for place in range(self._read, len(tokens)):
            self._step(tokens[max(self._begin, place - 1) : place + 1])
        self._read = len(tokens)
        at = self._at + len(assumed)
        if self._prediction[self._at : at] != assumed:
            return NOTHING
        return Draft(self._prediction[at : at + most], self._right)

    def _step(self, last: Sequence[int]) -> None:
        """Compare the next token, the last one of `last`, which has the one before it as well."""
        token, prediction = last[-1], self._prediction
        if self._at < len(prediction) and prediction[self._at] == token:
            self._at += 1
            self._right += 1
            return
        self._right = 0
        near = range(max(2, self._at - AROUND), min(self._at + AROUND, len(prediction)))
        back = [at for at in near if prediction[at - 2 : at] == tuple(last)]
        if back:
            self._at, self._right = min(back, key=lambda at: abs(at - self._at)), 2
        elif self._at < len(prediction):
            # One token was put in place of another.
            self._at += 1


class PredictionDrafter(_Lookup):
    """What the client says that the answer will be, but for some changes: OpenAI's predicted outputs."""

    name: DrafterName = "prediction"

    def _follow(self, generation: Generation) -> _Follower:
        return _Following(generation.request)


def lookups(*, ngram: bool) -> tuple[Callable[[], Drafter], ...]:
    """Makers of the drafters that compute nothing."""
    return (PredictionDrafter, NgramDrafter) if ngram else (PredictionDrafter,)
