"""How a plot is written down, and how one telling of it is made.

A plot is text. A block of lines is a beat: one of its lines is told. A beat that starts with `?` may be left out, with
`?7` it is told seven times in ten. `---` begins a new paragraph. Blocks that start with `@` are facts: one of the rows
is chosen for the whole story. Within a line `[a|b]` is one of both, `{slot}` is filled by the tale, and a line with
`{?tag}` is only told where the tag holds, with `{!tag}` only where it does not. `<pool>` is a line of
a pool.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{([A-Za-z_]+)\}")
MARKER = re.compile(r"\{([?!])([a-z ]+)\}")
POOL = re.compile(r"<([a-z]+)>$")
OPENING = ("<open>",)
"""Not left out to save room: stories would all begin alike."""
ARTICLE = re.compile(r"\b([Aa])n? (?=([A-Za-z]+))")
QUOTE = re.compile(r'"[^"]*"')
STOP_WITHIN = re.compile(r'[.!?](?!")')
SENTENCE_END = re.compile(r"(?<=[.!?])\"? +(?=[\"A-Z])|\n")

SOUNDS_LIKE_CONSONANT = ("one", "use", "uni")
SOUNDS_LIKE_VOWEL = ("hour", "honest")


class Tale(Protocol):
    """Who and what one story is about."""

    rng: random.Random
    tags: set[str]
    introduced: bool

    def value(self, slot: str) -> str | None:
        """The words for a slot, or None where this story has none."""


@dataclass(frozen=True)
class Beat:
    lines: tuple[str, ...]
    tenths: int = 10
    """In how many of ten tellings it occurs, where there is room for it."""

    @cached_property
    def words(self) -> float:
        """About how many words it adds."""
        return 1.1 * sum(len(line.split()) for line in self.lines) / len(self.lines)

    @cached_property
    def sentences(self) -> float:
        told = [MARKER.sub("", line).replace("{", "") for line in self.lines]
        return sum(count_sentences(line) for line in told) / len(told)


@dataclass(frozen=True)
class Fact:
    slots: tuple[str, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Plot:
    name: str
    kinds: frozenset[str]
    thing: str | None
    """The tag that its thing needs, or None for a plot without one."""
    place: str | None
    facts: tuple[Fact, ...]
    paragraphs: tuple[tuple[Beat, ...], ...]


def plot(name: str, kinds: frozenset[str], text: str, *, thing: str | None = None, place: str | None = None) -> Plot:
    """A plot from its text; a plot with a place or a thing names it in every telling."""
    facts: list[Fact] = []
    paragraphs: list[list[Beat]] = [[]]
    for block in re.split(r"\n\s*\n|\n(?=@)", text.strip()):
        lines = [line.strip() for line in block.splitlines()]
        if lines == ["---"]:
            paragraphs.append([])
        elif lines[0].startswith("@"):
            slots = tuple(slot.strip() for slot in lines[0][1:].split(","))
            facts.append(Fact(slots, tuple(lines[1:])))
        elif lines[0].startswith("?"):
            paragraphs[-1].append(Beat(tuple(lines[1:]), int(lines[0][1:] or 5)))
        else:
            paragraphs[-1].append(Beat(tuple(lines)))
    return Plot(name, kinds, thing, place, tuple(facts), tuple(tuple(beats) for beats in paragraphs))


def allowed(line: str, tale: Tale) -> bool:
    """Whether the line may be told here: markers hold, slots have words, and the hero is known or gets introduced."""
    if any((tag in tale.tags) != (sign == "?") for sign, tag in MARKER.findall(line)):
        return False
    if any(tale.value(slot.lower()) is None for slot in SLOT.findall(line) if slot.lower() != "intro"):
        return False
    return tale.introduced or "{a_hero}" in line or "ntro}" in line


def fill(line: str, tale: Tale) -> str:
    text = MARKER.sub("", line)
    while CHOICE.search(text):
        text = CHOICE.sub(lambda found: tale.rng.choice(found[1].split("|")), text, count=1)

    def words(found: re.Match[str]) -> str:
        value = tale.value(found[1].lower())
        if value is None:
            raise KeyError(f"nothing fills {found[0]} in {line!r}")
        value = fill(value, tale)
        return value[0].upper() + value[1:] if found[1][0].isupper() else value

    return SLOT.sub(words, text)


def settle(fact: Fact, tale: Tale) -> dict[str, str]:
    """One row of the fact, as slots."""
    rows = [row for row in fact.rows if allowed_row(row, tale)]
    if not rows:
        raise LookupError(f"no row of {fact.slots} fits {sorted(tale.tags)}")
    cells = [cell.strip() for cell in MARKER.sub("", tale.rng.choice(rows)).split(";")]
    return {slot: fill(cell, tale) for slot, cell in zip(fact.slots, cells, strict=True)}


def allowed_row(row: str, tale: Tale) -> bool:
    return all((tag in tale.tags) == (sign == "?") for sign, tag in MARKER.findall(row))


def expand(beat: Beat, pools: Mapping[str, tuple[str, ...]], tale: Tale) -> list[str]:
    """The lines of the beat that may be told here. A pool counts as one line: own lines say more about the plot."""
    lines: list[str] = []
    for line in beat.lines:
        pool = POOL.search(line)
        choices = pools[pool[1]] if pool and allowed_row(line, tale) else () if pool else (line,)
        choices = tuple(choice for choice in choices if allowed(choice, tale))
        if choices:
            lines.append(tale.rng.choice(choices))
    return lines


def shorten(told: Plot, rng: random.Random, max_words: float, max_sentences: float) -> list[list[Beat]]:
    """The beats to tell: those that the plot needs, and as many of the others as there is room for."""
    needed = [
        [beat for beat in beats if beat.tenths == 10 or rng.randrange(10) < beat.tenths] for beats in told.paragraphs
    ]
    extra = [beat for beats in needed for beat in beats if beat.tenths < 10 and beat.lines != OPENING]
    rng.shuffle(extra)
    while extra and (
        sum(beat.words for beats in needed for beat in beats) > max_words
        or sum(beat.sentences for beats in needed for beat in beats) > max_sentences
    ):
        left_out = extra.pop()
        needed = [[beat for beat in beats if beat is not left_out] for beats in needed]
    return needed


def tell(told: Plot, pools: Mapping[str, tuple[str, ...]], tale: Tale, max_words: float, max_sentences: float) -> str:
    """One telling: paragraphs of sentences, articles put right."""
    paragraphs = []
    for beats in shorten(told, tale.rng, max_words, max_sentences):
        parts = []
        for beat in beats:
            lines = expand(beat, pools, tale)
            if lines:
                parts.append(fill(tale.rng.choice(lines), tale))
            elif beat.tenths == 10:
                raise LookupError(f"{told.name}: nothing to tell of {beat.lines[0]!r} with {sorted(tale.tags)}")
        paragraphs.append(parts)
    return put_articles_right("\n".join(" ".join(parts) for parts in cut_anew(paragraphs, tale.rng)))


def cut_anew(paragraphs: list[list[str]], rng: random.Random) -> list[list[str]]:
    """Sometimes a paragraph fewer, sometimes one more for how it ends."""
    how = rng.random()
    if how < 0.25 and len(paragraphs) > 2:
        first = rng.randrange(len(paragraphs) - 1)
        return [*paragraphs[:first], paragraphs[first] + paragraphs[first + 1], *paragraphs[first + 2 :]]
    if how > 0.85 and len(paragraphs[-1]) > 1:
        return [*paragraphs[:-1], paragraphs[-1][:-1], paragraphs[-1][-1:]]
    return paragraphs


def put_articles_right(text: str) -> str:
    def article(found: re.Match[str]) -> str:
        word = found[2].lower()
        vowel = word.startswith(SOUNDS_LIKE_VOWEL if word[0] == "h" else tuple("aeiou"))
        vowel = vowel and not word.startswith(SOUNDS_LIKE_CONSONANT)
        return found[1] + ("n " if vowel else " ")

    return ARTICLE.sub(article, text)


def sentences(text: str) -> list[str]:
    """Cut at every full stop, also within a quotation."""
    return [part for part in SENTENCE_END.split(text) if part]


def count_sentences(text: str) -> int:
    """What somebody says at a time counts as one."""
    return len(sentences(QUOTE.sub(lambda quote: STOP_WITHIN.sub("", quote[0]), text)))
