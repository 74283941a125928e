"""How people type: greetings before a question, context, missing punctuation, typos. It makes many of one wording."""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.guide.wordlists import NOUNS

_CHATTER = tomllib.loads(Path(__file__).with_name("chatter.toml").read_text(encoding="utf-8"))

_BEFORE = (
    "hi, ",
    "hello, ",
    "hey, ",
    "hi! ",
    "hello! ",
    "please: ",
    "ok, ",
    "ok so ",
    "so, ",
    "and ",
    "now ",
    "sorry, ",
    "quick question: ",
    "a question: ",
    "one more thing: ",
    "another question: ",
    "next question: ",
    "I am new here. ",
    "I am new to this. ",
    "I just installed it. ",
    "I have two laptops. ",
    "My laptop is old. ",
    "I come from ollama. ",
    "I know llama.cpp a bit. ",
    "I forgot: ",
    "I was wondering, ",
    "can you tell me, ",
    "could you tell me, ",
    "do you know, ",
    "tell me, ",
    "help! ",
    "I need help. ",
    "stupid question maybe, but ",
    "just curious, ",
    "we use it at home. ",
    "we are three people in an office. ",
    "I read the docs but did not find it. ",
    "my friend asked me: ",
    "in short, ",
    "before I start: ",
    "hm, ",
    "well, ",
    "thanks! ",
    "great. ",
    "wait, ",
)
_AFTER = (
    " please",
    " pls",
    ", please",
    " thanks",
    ", thank you",
    " in swarmcpp",
    " with swarmcpp",
    " here",
    " exactly",
    " again",
    ", in one sentence",
    ", briefly",
    ", do you know",
    ", any idea",
    " actually",
)
_SLOT = re.compile(r"\{(\w+)\}")


def fill(form: str, words: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """`form` with each {name} replaced by one of its words. Raises KeyError for a name that `words` has not."""
    return _SLOT.sub(lambda match: rng.choice(words[match[1]]), form)


def _swap(word: str, rng: random.Random) -> str:
    """A slip of the fingers in a word of four letters or more."""
    at = rng.randrange(1, len(word) - 2)
    kind = rng.random()
    if kind < 0.4:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind < 0.75:
        return word[:at] + word[at + 1 :]
    return word[:at] + word[at] + word[at:]


def _typos(text: str, rng: random.Random, share: float) -> str:
    words = text.split(" ")
    return " ".join(
        _swap(word, rng) if word.isalpha() and len(word) > 3 and rng.random() < share else word for word in words
    )


def _drop(text: str, rng: random.Random, share: float) -> str:
    """Without some of its words: what is left must be enough, and makes a model look at all of them."""
    words = text.split(" ")
    if len(words) < 5:
        return text
    return " ".join(word for word in words if rng.random() >= share) or text


_FILLERS = ("just", "really", "the", "my", "a", "do", "this", "that", "maybe", "then", "also", "even", "some", "to")


def _fillers(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    words.insert(rng.randrange(len(words) + 1), rng.choice(_FILLERS))
    return " ".join(words)


_STRANGE = tuple(sorted({word for text in _CHATTER["before"] for word in re.findall("[a-z]+", text)} | set(NOUNS)))


def _stranger(text: str, rng: random.Random) -> str:
    """With a word that does not belong there: a model that knows few words meets many that it does not know."""
    words = text.split(" ")
    words.insert(rng.randrange(len(words) + 1), rng.choice(_STRANGE))
    return " ".join(words)


BEFORE = (*_BEFORE, *_CHATTER["before"])
AFTER = (*_AFTER, *_CHATTER["after"])
"""All that may stand around a question."""


def typed(ask: str, rng: random.Random, *, exact: bool = False) -> str:
    """`ask` as somebody may type it. `exact`: no word of it changes, as of words that are to be sorted."""
    text = ask
    if not exact and rng.random() < 0.12:
        text = _drop(text, rng, 0.2)
    if not exact and rng.random() < 0.08:
        text = _fillers(text, rng)
    if not exact and rng.random() < 0.10:
        text = _stranger(text, rng)
    if (after := rng.random()) < 0.20:
        text += rng.choice(_AFTER if after < 0.08 else _CHATTER["after"])
    if (before := rng.random()) < 0.40:
        text = rng.choice(_BEFORE if before < 0.15 else _CHATTER["before"]) + text
    if not exact and rng.random() < 0.08:
        text = _typos(text, rng, 0.15)
    case = rng.random()
    if case < 0.65:
        text = text[:1].upper() + text[1:]
    elif case < 0.85 and not exact:
        text = text.lower()
    end = rng.random()
    if text[-1:].isalnum() or text[-1:] in ")`":
        text += "?" if end < 0.62 else "." if end < 0.7 else " ?" if end < 0.72 else ""
    return text
