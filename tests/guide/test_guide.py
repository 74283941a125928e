"""The models that come with swarmcpp, asked in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from bench.guide.answers import Guide, opened
from bench.guide.exam import QUESTIONS, Story, questions, stories
from bench.guide.loss import loss
from bench.guide.speculation import Count, Speaker, plain, speculate
from swarmcpp.core import ChatMessage, SamplingParams
from swarmcpp.models.embedded import DRAFT, GUIDE, embedded_file
from swarmcpp.models.gguf_header import read_header

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def guide() -> Iterator[Guide]:
    with opened(embedded_file()) as model:
        yield model


def test_held_out_questions(guide: Guide) -> None:
    wrong = [(each.ask, answer) for each in questions() if not each.is_in(answer := guide.answer(each.ask))]
    assert len(wrong) <= 0.15 * len(questions()), wrong


def test_facts_that_are_missing_are_noticed(guide: Guide) -> None:
    assert QUESTIONS.is_file()
    said = guide.answer("hello")
    assert sum(each.is_in(said) for each in questions()) < 6


def test_stories_end_and_repeat_nothing(guide: Guide) -> None:
    told = stories(guide)
    assert len({story.text for story in told}) == 50
    assert sum(story.is_proper for story in told) >= 45, [story for story in told if not story.is_proper]


def test_what_a_proper_story_is() -> None:
    assert Story('She slept well. "Good night," he said.', True).is_proper
    assert not Story("She slept well. Then", True).is_proper
    assert not Story("She slept well.", False).is_proper
    assert not Story("The cat sat down there. It was late. The cat sat down there.", True).is_proper


def test_it_remembers_nothing_wrong_in_a_longer_conversation(guide: Guide) -> None:
    messages = [ChatMessage("user", "Hello"), ChatMessage("assistant", "Hello! What would you like to know?")]
    for ask, fact in (("What is 3 plus 4?", "3 plus 4 is 7"), ("Which port does it use?", "8080")) * 4:
        messages.append(ChatMessage("user", ask))
        said, ended = guide.chat(*messages, sampling=GREEDY)
        assert ended and fact in said
        messages.append(ChatMessage("assistant", said))


def test_sizes_and_one_vocabulary() -> None:
    guide, draft = (read_header(embedded_file(name)) for name in (GUIDE, DRAFT))
    sizes = [embedded_file(name).stat().st_size for name in (GUIDE, DRAFT)]
    assert sizes[0] <= 12e6 and sizes[1] <= sizes[0] / 6
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template", "llama.context_length"):
        assert guide.metadata[key] == draft.metadata[key]
    with pytest.raises(KeyError):
        embedded_file("guide")


def test_it_has_learned_what_it_was_taught() -> None:
    """Held-out documents; a model of random weights has 8 nats."""
    nats, counted = loss(embedded_file(), count=20)
    assert counted > 500 and nats < 0.3


def test_the_draft_guesses_well() -> None:
    with ExitStack() as stack:
        target, draft = (Speaker(embedded_file(name), stack) for name in (GUIDE, DRAFT))
        prompt = target.model.vocab.tokenize(
            "<|im_start|>user\nHow do I join?<|im_end|>\n<|im_start|>assistant\n", add_special=True, parse_special=True
        )
        alone, both = Count(), Count()
        rng = np.random.default_rng(0)
        plain(target, prompt, 0.0, rng, alone)
        speculate(target, draft, prompt, 0.0, rng, both)
        assert alone.texts == both.texts
        told = Count()
        speculate(
            target,
            draft,
            target.model.vocab.tokenize("Once upon a time", add_special=True, parse_special=False),
            0.8,
            rng,
            told,
        )
    assert both.accepted >= 0.7 * both.proposed and both.passes < alone.passes / 2
    assert told.accepted >= 0.7 * told.proposed > 0
