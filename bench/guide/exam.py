"""The exam of swarmcpp-guide: held-out questions and stories. `python -m bench.guide.exam [--out EXAM.md]`."""

from __future__ import annotations

import argparse
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.guide.answers import Guide, opened
from swarmcpp.core import ChatMessage, SamplingParams
from swarmcpp.models.embedded import embedded_file

QUESTIONS = Path(__file__).resolve().parents[2] / "tests" / "guide" / "questions.toml"
STORIES = 50
TEMPERATURE = 0.8
ENDS = (".", "!", "?", '"')


@dataclass(frozen=True, slots=True)
class Question:
    """`facts`: of each group one must occur in the answer."""

    ask: str
    facts: tuple[tuple[str, ...], ...]

    def is_in(self, answer: str) -> bool:
        """Whether an answer has the facts; case, backticks and white space do not count."""
        plain = " ".join(answer.lower().replace("`", "").split())
        return all(any(" ".join(fact.lower().split()) in plain for fact in group) for group in self.facts)


@dataclass(frozen=True, slots=True)
class Story:
    """What was told, and whether the model ended it itself."""

    text: str
    ended: bool

    @property
    def is_proper(self) -> bool:
        """It ends, with the end of a sentence, and no sentence of it comes twice."""
        sentences = [each.strip() for each in re.split(r"(?<=[.!?])\s+|\n", self.text) if each.strip()]
        # Short calls such as "Help!" may be said again, as people do.
        twice = [each for each, count in Counter(sentences).items() if count > 1 and len(each.split()) > 3]
        return self.ended and self.text.rstrip().endswith(ENDS) and not twice


def questions() -> tuple[Question, ...]:
    """The held-out questions."""
    found = tomllib.loads(QUESTIONS.read_text(encoding="utf-8"))["question"]
    return tuple(Question(each["ask"], tuple(tuple(group) for group in each["facts"])) for each in found)


def stories(guide: Guide, count: int = STORIES) -> list[Story]:
    """Stories at TEMPERATURE, each with a seed of its own."""
    ask = ChatMessage("user", "Tell me a story.")
    return [
        Story(*guide.chat(ask, sampling=SamplingParams(temperature=TEMPERATURE, seed=seed))) for seed in range(count)
    ]


def report(asked: Sequence[tuple[Question, str]], told: Sequence[Story]) -> str:
    """The exam as a page of Markdown."""
    right = sum(question.is_in(answer) for question, answer in asked)
    proper = sum(story.is_proper for story in told)
    lines = [
        "# Exam of swarmcpp-guide",
        "",
        f"{right} of {len(asked)} held-out questions are answered with the fact that was asked for (greedy); "
        f"{proper} of {len(told)} stories at temperature {TEMPERATURE} end properly and repeat no sentence. Made by",
        "`python -m bench.guide.exam --out bench/guide/EXAM.md`.",
        "",
        "| | question | answer |",
        "|---|---|---|",
    ]
    cells = ((question, answer.replace("\n", " ").replace("|", "\\|")) for question, answer in asked)
    lines += [
        f"| {'yes' if question.is_in(answer) else 'no'} | {question.ask} | {answer} |" for question, answer in cells
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Ask, and print or write the page."""
    parser = argparse.ArgumentParser(description="Examine swarmcpp-guide.")
    parser.add_argument("--model", type=Path, default=embedded_file())
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    with opened(chosen.model) as guide:
        asked = [(question, guide.answer(question.ask)) for question in questions()]
        told = stories(guide)
    page = report(asked, told)
    if chosen.out:
        chosen.out.write_text(page, encoding="utf-8")
    print(page if chosen.out is None else page.split("|")[0])
    for story in told[:5]:
        print(story.text, end="\n\n")


if __name__ == "__main__":
    main()
