"""The generator of stories: what every one of them holds to, whatever its plot."""

from __future__ import annotations

import itertools
import random
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.guide import stories
from bench.guide.stories import HEROES, PLACES, PLOTS, THINGS, story
from bench.guide.story_grammar import Plot, count_sentences, put_articles_right, tell
from bench.guide.story_words import NAMES

SEEDS = 2000
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
SAID = re.compile(r"\b(said|asked|cried|called|laughed|shouted|whispered|thought|told|read|joked|sang|came)\b")


@cache
def told() -> tuple[str, ...]:
    return tuple(story(random.Random(seed)) for seed in range(SEEDS))


def pieces(text: str) -> list[str]:
    """Cut after every full stop, also within quotations; who says it, in lower case, is no piece."""
    parts = (part.strip('" ') for part in re.split(r'(?<=[.!?])"?\s+', text))
    return [part for part in parts if part and not part[0].islower()]


def test_there_is_something_to_ask_for() -> None:
    assert len(HEROES) == len(set(HEROES)) >= 30
    assert len(THINGS) == len(set(THINGS)) >= 25
    assert len(PLACES) == len(set(PLACES)) >= 25
    assert len({plot.name for plot in PLOTS}) == len(PLOTS) >= 20


def test_length() -> None:
    for text in told():
        assert 70 <= len(text.split()) <= 170, text
        assert 6 <= count_sentences(text) <= 16, text
        assert 2 <= text.count("\n") + 1 <= 4, text


def test_speech_counts_once() -> None:
    assert count_sentences('"No! Not now. Wait," said Tom. He ran.\n"Why?" he asked.') == 3


def test_nothing_is_said_twice() -> None:
    for text in told():
        # "said Tom." alone may come twice.
        whole = [piece for piece in pieces(text) if len(piece.split()) > 3]
        assert len(set(whole)) == len(whole), text


def test_clean_text() -> None:
    for text in told():
        assert text.isascii(), text
        assert text == text.strip(), text
        assert text.endswith((".", "!", "?", '"')), text
        assert not re.search(r"[{}\[\]<>|@;_]|  |\n\n| \n|\n | [.,!?]|[.,!?]{2}|\bNone\b", text), text
        assert text.count('"') % 2 == 0, text


def test_quotations_are_closed_within_their_paragraph() -> None:
    for text in told():
        assert all(paragraph.count('"') % 2 == 0 for paragraph in text.split("\n")), text


def test_a_and_an() -> None:
    # The letter that the teacher writes is no article.
    for text in told():
        for article, word in re.findall(r"\b([Aa]n?) ([A-Za-z]+)", text.replace("the letter A", "")):
            vowel = word[0] in "aeiou" and not word.startswith(("one", "uni", "use"))
            assert (article.lower() == "an") == vowel, text


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("a old owl saw an cat", "an old owl saw a cat"),
        ("A hour, a honest fox", "An hour, an honest fox"),
        ("an one, an useful hat, an horse", "a one, a useful hat, a horse"),
    ],
)
def test_articles_are_put_right(wrong: str, right: str) -> None:
    assert put_articles_right(wrong) == right


def test_sentences_begin_with_a_capital() -> None:
    for text in told():
        for paragraph in text.split("\n"):
            assert paragraph[0] == '"' or paragraph[0].isupper(), text
        for end, start in re.findall(r'([.!?]"?) ("?[^.!?]+)', text):
            if start.strip('"')[0].islower():
                # Only who says it may go on in lower case, and only behind a quotation.
                assert end.endswith('"'), text
                assert SAID.search(start), (start, text)


def test_no_word_twice_in_a_row() -> None:
    for text in told():
        for word, again in itertools.pairwise(re.findall(r"[A-Za-z']+|[.,!?\"]", text)):
            assert word != again or word == '"', text


def test_the_same_seed_tells_the_same_story() -> None:
    for seed in range(50):
        assert story(random.Random(seed)) == told()[seed]
        asked = [story(random.Random(seed), HEROES[seed % len(HEROES)], THINGS[seed % len(THINGS)]) for _ in range(2)]
        assert asked[0] == asked[1]


def test_stories_differ() -> None:
    assert len(set(told())) >= 1950
    assert len({text.split(".")[0] for text in told()}) > SEEDS * 0.8
    assert len({" ".join(text.split()[:2]) for text in told()}) > 20


def test_how_they_end() -> None:
    ends = sum(text.endswith("The end.") for text in told()) / SEEDS
    assert 0.25 < ends < 0.45
    last = {text.removesuffix(" The end.").split("\n")[-1] for text in told()}
    assert len(last) > SEEDS * 0.5


def test_simple_words() -> None:
    words = {word for text in told() for word in WORD.findall(text.lower())}
    assert 800 < len(words) < 1500


@pytest.mark.parametrize("hero", HEROES)
def test_what_was_asked_for_plays_a_part(hero: str) -> None:
    rng = random.Random(hero)
    for _ in range(6):
        thing, place = rng.choice(THINGS), rng.choice(PLACES)
        alone, both = story(rng, hero), story(rng, hero, thing, place)
        assert hero in alone.lower()
        assert all(wanted in both.lower() for wanted in (hero, thing, place)), both
        # A real part: the thing is there when it begins to matter and when it ends.
        assert both.lower().count(thing) >= 2, both


@pytest.mark.parametrize("thing", THINGS)
def test_a_thing_alone(thing: str) -> None:
    rng = random.Random(thing)
    assert all(thing in story(rng, thing=thing).lower() for _ in range(10))


@pytest.mark.parametrize("place", PLACES)
def test_a_place_alone(place: str) -> None:
    rng = random.Random(place)
    assert all(place in story(rng, place=place).lower() for _ in range(10))


def test_he_and_she_fit_the_hero() -> None:
    rng = random.Random(1)
    for _ in range(200):
        girl = story(rng, "girl", "ball")
        named = re.search(r"girl (?:named|called) (\w+)", girl)
        if named:
            assert not re.search(rf"\b{named[1]} [^.\"]*\bhimself\b", girl), girl
            assert named[1] in NAMES["f"]


@pytest.mark.parametrize("asked", [{"hero": "shark"}, {"thing": "sword"}, {"place": "moon base"}])
def test_what_is_not_listed_is_refused(asked: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        story(random.Random(1), **asked)


def test_every_plot_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def recorded(plot: Plot, *rest: Any) -> str:
        names.append(plot.name)
        return tell(plot, *rest)

    monkeypatch.setattr(stories, "tell", recorded)
    ended = Counter[str]()
    for seed in range(SEEDS):
        story(random.Random(seed))
        # The last telling is the one that was good enough.
        ended[names[-1]] += 1
    assert set(ended) == {plot.name for plot in PLOTS}
    assert max(ended.values()) < SEEDS * 0.1
