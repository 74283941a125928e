"""How well the draft guesses for swarmcpp-guide: speculative sampling (Leviathan et al. 2023) on answers and stories.

`python -m bench.guide.speculation`. Prints a table and writes JSON. Both sides sample in numpy and are timed in
alternation in this process, on one thread. Acceptance is of the guesses that the target looked at: those behind the
first one that it refuses are not. It says when greedy answers differ with the draft.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.guide.exam import TEMPERATURE, questions
from swarmcpp.core import MAX_ROWS, ChatMessage
from swarmcpp.llama.chat import ChatCodec
from swarmcpp.llama.context import Batch, Context, ContextOptions, Model
from swarmcpp.models.embedded import DRAFT, GUIDE, embedded_file
from swarmcpp.models.gguf_header import read_header

GAMMA = 4
ROUNDS = 5
PROMPTS = 20
MOST = 300

Floats = npt.NDArray[np.float64]


class AllRows(Batch):
    """A batch whose every row is an output."""

    def add_all(self, start: int, tokens: Sequence[int]) -> None:
        """Append tokens of sequence 0 from position `start`."""
        self.add(0, start, tokens, outputs=len(tokens))


class Speaker:
    """A model with one sequence, which follows `tokens`."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.model = Model(path, use_extra_bufts=False)
        stack.callback(self.model.close)
        self._context = Context(self.model, ContextOptions(n_ctx=2048, n_seqs=1, n_threads=1, outputs=MAX_ROWS))
        stack.callback(self._context.close)
        self._batch = AllRows(512)
        self.held = 0

    def next(self, tokens: Sequence[int], last: int, temperature: float) -> list[Floats]:
        """Distributions after each of the `last` newest of `tokens`; what the KV lacks of them is computed."""
        start = min(self.held, len(tokens) - last)
        self._context.truncate(0, start)
        self._batch.clear()
        self._batch.add_all(start, tokens[start:])
        self._context.decode(self._batch)
        self.held = len(tokens)
        count = len(tokens) - start
        return [distribution(self._context.logits(row), temperature) for row in range(count - last, count)]


def distribution(logits: npt.NDArray[np.float32], temperature: float) -> Floats:
    """Probabilities at a temperature; at 0 all of it on the largest."""
    if temperature <= 0:
        made = np.zeros(len(logits))
        made[int(np.argmax(logits))] = 1.0
        return made
    scaled = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return scaled / scaled.sum()


@dataclass(slots=True)
class Count:
    """Tokens that the draft proposed, that were accepted, and that were said in all, in `passes` of the target."""

    proposed: int = 0
    accepted: int = 0
    said: int = 0
    passes: int = 0
    texts: list[tuple[int, ...]] = field(default_factory=list)


def draw(chances: Floats, rng: np.random.Generator) -> int:
    """A token."""
    return int(rng.choice(len(chances), p=chances / chances.sum()))


def plain(target: Speaker, prompt: Sequence[int], temperature: float, rng: np.random.Generator, count: Count) -> None:
    """One token a pass."""
    tokens = list(prompt)
    target.held = 0
    while len(tokens) < len(prompt) + MOST:
        token = draw(target.next(tokens, 1, temperature)[0], rng)
        count.passes += 1
        tokens.append(token)
        if token in target.model.vocab.eog_tokens:
            break
    count.said += len(tokens) - len(prompt)
    count.texts.append(tuple(tokens[len(prompt) :]))


def speculate(
    target: Speaker, draft: Speaker, prompt: Sequence[int], temperature: float, rng: np.random.Generator, count: Count
) -> None:
    """GAMMA guesses a pass, of which those are kept that leave the target's distribution as it is."""
    tokens, eog = list(prompt), target.model.vocab.eog_tokens
    target.held = draft.held = 0
    while len(tokens) < len(prompt) + MOST and not (len(tokens) > len(prompt) and tokens[-1] in eog):
        guessed, chances = list(tokens), []
        for _ in range(GAMMA):
            chances.append(draft.next(guessed, 1, temperature)[0])
            guessed.append(draw(chances[-1], rng))
        true = target.next(guessed, GAMMA + 1, temperature)
        count.passes += 1
        for index in range(GAMMA):
            token = guessed[len(tokens)]
            count.proposed += 1
            if rng.random() < true[index][token] / chances[index][token]:
                count.accepted += 1
                tokens.append(token)
                if token in eog:
                    break
                continue
            tokens.append(draw(np.maximum(true[index] - chances[index], 0.0), rng))
            break
        else:
            tokens.append(draw(true[GAMMA], rng))
        target.held, draft.held = min(target.held, len(tokens) - 1), min(draft.held, len(tokens) - 1)
    count.said += len(tokens) - len(prompt)
    count.texts.append(tuple(tokens[len(prompt) :]))


def timed(work: Callable[[Sequence[int], Count], None], prompts: Sequence[Sequence[int]]) -> tuple[Count, float]:
    """What came of all prompts, and tokens per second."""
    count, begun = Count(), time.perf_counter()
    for prompt in prompts:
        work(prompt, count)
    return count, count.said / (time.perf_counter() - begun)


def compare(target: Speaker, draft: Speaker, prompts: Sequence[Sequence[int]], temperature: float) -> dict[str, float]:
    """Medians over ROUNDS rounds in alternation; the first round warms up."""
    rates: dict[str, list[float]] = {"plain": [], "draft": []}
    total = Count()
    for round_ in range(-1, ROUNDS):
        rng = np.random.default_rng(1 + round_)
        alone, slow = timed(lambda prompt, count, rng=rng: plain(target, prompt, temperature, rng, count), prompts)  # type: ignore[misc]
        both, fast = timed(
            lambda prompt, count, rng=rng: speculate(target, draft, prompt, temperature, rng, count),  # type: ignore[misc]
            prompts,
        )
        if temperature <= 0 and alone.texts != both.texts:
            same = sum(a == b for a, b in zip(alone.texts, both.texts, strict=True))
            print(f"{same} of {len(prompts)} greedy texts are the same")
        if round_ >= 0:
            rates["plain"].append(slow)
            rates["draft"].append(fast)
            total.proposed += both.proposed
            total.accepted += both.accepted
            total.passes += both.passes
            total.said += both.said
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "acceptance": total.accepted / total.proposed,
        "tokens_per_pass": total.said / total.passes,
        "plain_tps": medians["plain"],
        "draft_tps": medians["draft"],
        "speed_up": medians["draft"] / medians["plain"],
    }


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description="Measure the draft of swarmcpp-guide.")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with ExitStack() as stack:
        target, draft = (Speaker(embedded_file(name), stack) for name in (GUIDE, DRAFT))
        template = read_header(embedded_file()).metadata["tokenizer.chat_template"]
        codec = ChatCodec(target.model.vocab, str(template))
        asked = [codec.tokenize_chat([ChatMessage("user", each.ask)]) for each in questions()[:PROMPTS]]
        story = [codec.tokenize_chat([ChatMessage("user", "Tell me a story.")])] * PROMPTS
        found = {"answers, greedy": compare(target, draft, asked, 0.0)}
        found[f"stories, temperature {TEMPERATURE}"] = compare(target, draft, story, TEMPERATURE)
    for name, row in found.items():
        print(
            f"{name}: {row['acceptance']:.1%} of guesses accepted (gamma {GAMMA}), {row['tokens_per_pass']:.2f} tokens "
            f"a pass, {row['plain_tps']:.0f} -> {row['draft_tps']:.0f} tokens/s: {row['speed_up']:.2f}x"
        )
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
