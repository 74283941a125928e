"""Short stories for children, made from a seed: `story(random.Random(1), hero="cat", thing="ball")`.

A plot is chosen that the hero, the thing and the place can play a part in; a telling that is too long, too short or
says something twice is thrown away.
"""

from __future__ import annotations

import random
from functools import cache
from typing import TypeVar

from bench.guide.story_brave import BRAVE_PLOTS
from bench.guide.story_cast import Cast
from bench.guide.story_ends import POOLS
from bench.guide.story_engines import ENGINE_PLOTS
from bench.guide.story_grammar import Plot, count_sentences, sentences, settle, tell
from bench.guide.story_growing import GROWING_PLOTS
from bench.guide.story_helping import HELPING_PLOTS
from bench.guide.story_honest import HONEST_PLOTS
from bench.guide.story_lost import LOST_PLOTS
from bench.guide.story_making import MAKING_PLOTS
from bench.guide.story_rescues import RESCUE_PLOTS
from bench.guide.story_sharing import SHARING_PLOTS
from bench.guide.story_sky import SKY_PLOTS
from bench.guide.story_words import ALL_PLACES, ALL_THINGS, CAST, WALKERS, Hero, Place, Thing

PLOTS: tuple[Plot, ...] = (
    *LOST_PLOTS,
    *SHARING_PLOTS,
    *HELPING_PLOTS,
    *BRAVE_PLOTS,
    *HONEST_PLOTS,
    *MAKING_PLOTS,
    *GROWING_PLOTS,
    *ENGINE_PLOTS,
    *RESCUE_PLOTS,
    *SKY_PLOTS,
)
HEROES: tuple[str, ...] = tuple(hero.label for hero in CAST)
"""What a story can be about."""
THINGS: tuple[str, ...] = tuple(thing.label for thing in ALL_THINGS)
PLACES: tuple[str, ...] = tuple(place.label for place in ALL_PLACES)

MIN_WORDS, MAX_WORDS = 70, 170
MIN_SENTENCES, MAX_SENTENCES = 6, 16
SHORT_WORDS, LONG_WORDS = 90, 155
"""What a telling aims at."""
TIMES_NAMED = 2
"""A thing that was asked for and is named once only plays no real part."""
TELLINGS = 400
"""How many tellings are tried; a plot whose usual telling is long needs a few."""
THE_END = 0.4
"""How many of the tellings end so; those that fit are a few less."""

Named = TypeVar("Named", Hero, Thing, Place)


def story(rng: random.Random, hero: str | None = None, thing: str | None = None, place: str | None = None) -> str:
    """A story about the hero, in which the thing and the place play a part. Raises ValueError for one not listed."""
    who = _listed(hero, CAST) or rng.choice(CAST)
    what, where = _listed(thing, ALL_THINGS), _listed(place, ALL_PLACES)
    fitting = _fitting(who, what, where)
    if not fitting:
        raise ValueError(f"no plot for {who.label} with {thing} and {place}")
    for attempt in range(TELLINGS):
        # The same plot a few times, so that plots with a long telling are not told less often.
        if attempt % 20 == 0:
            chosen = rng.choice(fitting)
        text = _telling(rng, chosen, who, what, where)
        if fits(text) and (thing is None or text.count(thing) >= TIMES_NAMED):
            return text
    raise RuntimeError(f"no telling of {TELLINGS} about {who.label} with {thing} and {place} fits")


def fits(text: str) -> bool:
    """Whether the story is as long as it may be and says nothing twice."""
    said = sentences(text)
    return (
        MIN_WORDS <= len(text.split()) <= MAX_WORDS
        and MIN_SENTENCES <= count_sentences(text) <= MAX_SENTENCES
        and len({sentence.strip('"').lower() for sentence in said}) == len(said)
    )


def _listed(label: str | None, known: tuple[Named, ...]) -> Named | None:
    if label is None:
        return None
    for each in known:
        if each.label == label:
            return each
    raise ValueError(f"{label!r} is not one of {', '.join(each.label for each in known)}")


@cache
def _fitting(who: Hero, what: Thing | None, where: Place | None) -> tuple[Plot, ...]:
    kinds = {who.kind, who.noun}
    return tuple(
        plot
        for plot in PLOTS
        if plot.kinds & kinds and (what is None or plot.thing in what.tags) and (where is None or _takes(plot, where))
    )


def _telling(rng: random.Random, plot: Plot, who: Hero, what: Thing | None, where: Place | None) -> str:
    big = who.kind not in WALKERS
    if plot.thing is not None and what is None:
        what = rng.choice([each for each in ALL_THINGS if plot.thing in each.tags and not _alike(each, who)])
    if plot.place is not None and where is None:
        where = rng.choice([each for each in ALL_PLACES if _takes(plot, each) and not ("room" in each.tags and big)])
    cast = Cast(rng, who, what, where)
    for fact in plot.facts:
        cast.slots |= settle(fact, cast)
    text = tell(plot, POOLS, cast, rng.randint(SHORT_WORDS, LONG_WORDS), MAX_SENTENCES - 1)
    return f"{text} The end." if rng.random() < THE_END else text


def _takes(plot: Plot, where: Place) -> bool:
    return plot.place == "any" or plot.place in where.tags


def _alike(thing: Thing, who: Hero) -> bool:
    """A toy car for a car would be confusing."""
    return who.noun in thing.label
