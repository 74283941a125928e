"""Helpers of the tests of llama.cpp's owners."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine_support import request

from swarmcpp.core import Rows, SamplingParams
from swarmcpp.llama.backend import LlamaBackend

BackendMaker = Callable[..., LlamaBackend]


def generate(
    backend: LlamaBackend,
    prompt: Sequence[int],
    count: int,
    sampling: SamplingParams,
    generated: Sequence[int] = (),
) -> list[int]:
    """`count` tokens after `prompt` and `generated`, in slot 0.

    The prompt is computed as one chunk and every later token as a row of its own, `generated` too, so that a resumed
    request sees bit-identical logits.
    """
    backend.truncate(0, 0)
    sampler = backend.sampler(request(prompt, count, sampling=sampling, generated=generated))
    try:
        tokens = list(generated)
        backend.decode([Rows(0, 0, list(prompt), outputs=1)])
        for index, token in enumerate(generated):
            backend.decode([Rows(0, len(prompt) + index, [token], outputs=1)])
        while len(tokens) < len(generated) + count:
            tokens.append(backend.sample(sampler, 0).id)
            backend.decode([Rows(0, len(prompt) + len(tokens) - 1, [tokens[-1]], outputs=1)])
        return tokens[len(generated) :]
    finally:
        sampler.close()
