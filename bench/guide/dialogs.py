"""Conversations: questions about swarmcpp, small talk, skills and stories, one after the other."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.guide.phrasing import fill, typed
from bench.guide.skills import SKILLS
from bench.guide.stories import HEROES, PLACES, THINGS, story

HERE = Path(__file__).parent
TOPICS = HERE / "topics.toml"
MORE = "more_*.toml"
"""Further wordings of the topics, beside TOPICS."""

CHATTER = {
    "hello": "hello",
    "how": "how-are-you",
    "thanks": "thanks",
    "bye": "bye",
    "praise": "praise",
    "complain": "complaint",
    "sorry": "sorry",
    "who": "who-are-you",
    "able": "what-can-you-do",
}
"""Arrays of chatter.toml that are wordings of a topic."""

SYSTEM = (
    "You are a helpful assistant.",
    "You are the swarmcpp guide.",
    "You are a helpful guide to swarmcpp.",
    "You are a helpful, harmless and honest assistant.",
    "Answer briefly.",
    "You are a friendly assistant. Answer in one sentence.",
    "You help people with swarmcpp.",
)
"""What clients say before a conversation. It changes nothing: the model is too small to follow it."""

LONG = 0.04
"""Share of long conversations, so that late positions of the context are trained too."""


@dataclass(frozen=True, slots=True)
class Turn:
    """`role` is that of the chat template: system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Topic:
    """Wordings of one question, with {slots}, and its answers."""

    name: str
    ask: tuple[str, ...]
    answer: tuple[str, ...]


@cache
def topics() -> tuple[Mapping[str, Sequence[str]], tuple[Topic, ...]]:
    """Words for the slots, and all topics. Raises KeyError where one lacks a part, or a wording is for none."""
    found = _read(TOPICS)
    asks: dict[str, list[str]] = {each["name"]: list(each["ask"]) for each in found["topic"]}
    for path in sorted(HERE.glob(MORE)):
        for each in _read(path)["more"]:
            asks[each["name"]] += each["ask"]
    chatter = _read(HERE / "chatter.toml")
    for key, name in CHATTER.items():
        asks[name] += chatter[key]
    made = tuple(Topic(each["name"], tuple(asks[each["name"]]), tuple(each["answer"])) for each in found["topic"])
    return found["words"], made


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


_TELL = (
    "tell me a story",
    "tell me a story please",
    "can you tell me a story",
    "I want to hear a story",
    "write a story",
    "write a short story",
    "a story please",
    "do you know a story",
    "make up a story",
    "tell a bedtime story",
    "my child wants a story",
    "read me a story",
    "I would like a story",
    "can you write a story for my daughter",
    "time for a story",
    "story time",
    "tell me something nice",
    "tell the kids a story",
    "invent a little story",
    "give me a story",
)
_ABOUT = (
    " about {hero}",
    " with {hero}",
    " about {hero}",
    " where {hero} is the hero",
    " in which {hero} plays a part",
)
_ALSO = (" and {thing}", " who has {thing}", " with {thing}", " that finds {thing}")
_WHERE = (" in {place}", " that happens in {place}", ", it should happen in {place}")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _story_exchange(rng: random.Random) -> tuple[str, str]:
    ask, hero, thing, place = rng.choice(_TELL), None, None, None
    if rng.random() < 0.75:
        hero = rng.choice(HEROES)
        ask += rng.choice(_ABOUT).format(hero=_a(hero))
        if rng.random() < 0.3:
            thing = rng.choice(THINGS)
            ask += rng.choice(_ALSO).format(thing=_a(thing))
        elif rng.random() < 0.2:
            place = rng.choice(PLACES)
            ask += rng.choice(_WHERE).format(place=f"the {place}")
    return typed(ask, rng, exact=True), story(rng, hero, thing, place)


def _topic_exchange(rng: random.Random) -> tuple[str, str]:
    words, every = topics()
    topic = rng.choice(every)
    return typed(fill(rng.choice(topic.ask), words, rng), rng), rng.choice(topic.answer)


def _skill_exchange(rng: random.Random) -> tuple[str, str]:
    skill = rng.choices([each for each, _ in SKILLS], [weight for _, weight in SKILLS])[0]
    ask, answer = skill(rng)
    return typed(ask, rng, exact=True), answer


def exchange(rng: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    kind = rng.random()
    if kind < 0.80:
        return _topic_exchange(rng)
    if kind < 0.97:
        return _skill_exchange(rng)
    return _story_exchange(rng)


def conversation(rng: random.Random) -> list[Turn]:
    """One to four questions with their answers, seldom many; some after a system message."""
    turns = [Turn("system", rng.choice(SYSTEM))] if rng.random() < 0.25 else []
    count = rng.randint(8, 24) if rng.random() < LONG else rng.choice((1, 1, 1, 2, 2, 3, 4))
    for _ in range(count):
        ask, answer = exchange(rng)
        turns += [Turn("user", ask), Turn("assistant", answer)]
    return turns
