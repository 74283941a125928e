"""What the corpus teaches is true and well-formed."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import click
import pytest
import typer

from bench.guide import phrasing
from bench.guide.corpus import SPECIAL, documents, pieces
from bench.guide.dialogs import SYSTEM, Turn, conversation, topics
from bench.guide.exam import questions
from bench.guide.phrasing import fill, typed
from bench.guide.skills import counting, sorting, sums, unknown
from bench.guide.wordlists import NUMBERS
from swarmcpp.cli import app

VERB = re.compile(r"`swarmcpp ([a-z]+)")
FLAG = re.compile(r"`(?:swarmcpp [^`]*)?(--[a-z-]+)")


def commands() -> dict[str, click.Command]:
    group = typer.main.get_command(app)
    assert hasattr(group, "commands")
    return dict(group.commands)


def test_answers_name_only_commands_and_flags_that_exist() -> None:
    verbs = commands()
    flags = {
        name
        for command in verbs.values()
        for option in command.params
        for name in (*option.opts, *option.secondary_opts)
    }
    flags |= {"--version", "--help"}
    seen: set[str] = set()
    for topic in topics()[1]:
        for answer in topic.answer:
            for verb in VERB.findall(answer):
                assert verb in verbs, f"{topic.name}: swarmcpp {verb}"
                seen.add(verb)
            assert set(FLAG.findall(answer)) <= flags, f"{topic.name}: {answer}"
    assert seen == set(verbs), "every command is explained"


def test_every_wording_can_be_filled() -> None:
    words, every = topics()
    rng = random.Random(1)
    for topic in every:
        assert len(topic.ask) >= 15 and topic.answer
        for form in topic.ask:
            assert "{" not in fill(form, words, rng)


def plain(text: str) -> str:
    """What is left of a text when punctuation and case do not count."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def test_no_wording_makes_a_question_of_the_exam() -> None:
    """Whatever fills its slots, and whatever chatter stands around it."""
    words, every = topics()
    chatter = [plain(text) for text in (*phrasing.BEFORE, *phrasing.AFTER)]
    held_out = {plain(question.ask) for question in questions()}
    assert len(held_out) == 60
    for text in filter(None, chatter):
        held_out |= {each.removeprefix(text).strip() for each in held_out if each.startswith(f"{text} ")}
        held_out |= {each.removesuffix(text).strip() for each in held_out if each.endswith(f" {text}")}
    for topic in every:
        for form in topic.ask:
            parts = re.split(r"\{(\w+)\}", form)
            pattern = " *".join(
                f"(?:{'|'.join(plain(word) for word in words[part])})" if index % 2 else plain(part)
                for index, part in enumerate(parts)
                if index % 2 or plain(part)
            )
            made = [each for each in held_out if re.fullmatch(pattern, each)]
            assert not made, f"{topic.name}: {form}"


@pytest.mark.parametrize("seed", range(200))
def test_skills_are_right(seed: int) -> None:
    rng = random.Random(seed)
    _, counted = counting(rng)
    numbers = [int(each) for each in counted.rstrip(".").split(", ")]
    assert {b - a for a, b in pairwise(numbers)} in ({1}, {-1})
    ask, in_order = sorting(rng)
    words = in_order.rstrip(".").split(", ")
    assert words == sorted(words) and all(re.search(rf"\b{word}\b", ask) for word in words)
    _, result = sums(rng)
    match = re.fullmatch(r"(\d+) (plus|minus|times) (\d+) is (\d+)\.", result)
    assert match
    a, sign, b, c = match.groups()
    assert {"plus": int(a) + int(b), "minus": int(a) - int(b), "times": int(a) * int(b)}[sign] == int(c) >= 0
    assert "do not know" in unknown(rng)[1]


def test_numbers_in_words_are_in_order() -> None:
    assert (NUMBERS[0], NUMBERS[7], NUMBERS[20]) == ("zero", "seven", "twenty")


@pytest.mark.parametrize("seed", range(50))
def test_words_that_matter_are_typed_as_they_are(seed: int) -> None:
    rng = random.Random(seed)
    asked = typed("sort these words: pear, apple, kiwi", rng, exact=True)
    assert "ort these words: pear, apple, kiwi" in asked


def test_conversations_alternate() -> None:
    rng = random.Random(4)
    for _ in range(300):
        turns = conversation(rng)
        if turns[0].role == "system":
            assert turns.pop(0).text in SYSTEM
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert all(turn.text and turn.text == turn.text.strip() for turn in turns)
        assert not any(mark in turn.text for turn in turns for mark in SPECIAL)


def test_only_answers_are_learned() -> None:
    turns = [Turn("user", "Hi"), Turn("assistant", "Hello!")]
    assert pieces(turns) == [
        ("<|im_start|>user\n", False),
        ("Hi<|im_end|>", False),
        ("\n", False),
        ("<|im_start|>assistant\n", False),
        ("Hello!<|im_end|>", True),
        ("\n", False),
    ]


def test_a_seed_gives_the_same_documents() -> None:
    first, again, other = (list(documents(seed, 30)) for seed in (5, 5, 6))
    assert first == again != other
    assert all(any(wanted for _, wanted in document) for document in first)
