"""What a peer's request may ask for: an engine trusts its node, so the node checks what comes from others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from swarmcpp.core import MAX_GAMMA, GenerateRequest, Limits, SamplingParams
from swarmcpp.errors import BadRequest, PromptTooLong

MAX_TEXT: Final = 1000
"""Characters of an id, a model's name or a salt."""


def check_request(request: GenerateRequest, limits: Limits) -> GenerateRequest:
    """A peer's request, fit for this node's engine; what no engine would look at is cut.

    Raises BadRequest and PromptTooLong: an engine trusts its node, and a token beyond the vocabulary would end it.
    """
    for name in ("id", "model", "cache_salt", "drafter"):
        if len(getattr(request, name)) > MAX_TEXT:
            raise BadRequest(f"{name} has more than {MAX_TEXT} characters; shorten it", param=name)
    used = len(request.prompt) + len(request.generated)
    if used >= limits.ctx_size:
        raise PromptTooLong(
            f"{used} tokens of prompt and answer leave no room in a slot of {limits.ctx_size}; ask another node",
            param="prompt",
        )
    if not request.prompt:
        raise BadRequest("the prompt has no tokens; send at least one", param="prompt")
    _check_tokens("prompt", request.prompt, limits.n_vocab)
    _check_tokens("generated", request.generated, limits.n_vocab)
    prediction = request.prediction[: limits.ctx_size]
    _check_tokens("prediction", prediction, limits.n_vocab)
    _check_range("gamma", request.gamma, -1, MAX_GAMMA)
    _check_range("max_tokens", request.max_tokens, len(request.generated) + 1, 2**31 - 1)
    if request.deadline_s is not None:
        # A month: far beyond any answer, and a number that every timer takes.
        _check_range("deadline_s", request.deadline_s, 0, 30 * 86400)
    _check_stop(request.stop, limits)
    return replace(request, prediction=prediction, sampling=_checked_sampling(request.sampling, limits))


def _checked_sampling(params: SamplingParams, limits: Limits) -> SamplingParams:
    """The ranges that the API takes."""
    _check_range("temperature", params.temperature, 0, 100)
    _check_range("top_k", params.top_k, 0, 2**31 - 1)
    _check_range("top_p", params.top_p, 0, 1)
    _check_range("min_p", params.min_p, 0, 1)
    _check_range("seed", params.seed, 0, 2**32 - 1)
    _check_range("repeat_penalty", params.repeat_penalty, math.nextafter(0, 1), 100)
    _check_range("repeat_last_n", params.repeat_last_n, 0, 2**31 - 1)
    _check_range("presence_penalty", params.presence_penalty, -2, 2)
    _check_range("frequency_penalty", params.frequency_penalty, -2, 2)
    if len(params.logit_bias) > limits.n_vocab:
        raise BadRequest(
            f"logit_bias has {len(params.logit_bias)} entries for {limits.n_vocab} tokens; send fewer",
            param="logit_bias",
        )
    _check_tokens("logit_bias", [token for token, _ in params.logit_bias], limits.n_vocab)
    for _, bias in params.logit_bias:
        _check_range("logit_bias", bias, -100, 100)
    # llama.cpp allocates a ring of this size.
    return replace(params, repeat_last_n=min(params.repeat_last_n, limits.ctx_size))


def _check_stop(stops: Sequence[str], limits: Limits) -> None:
    if len(stops) > limits.max_stop:
        raise BadRequest(f"stop has {len(stops)} strings; at most {limits.max_stop} are allowed", param="stop")
    if not all(0 < len(stop.encode()) <= limits.max_stop_bytes for stop in stops):
        raise BadRequest(f"stop strings have 1 to {limits.max_stop_bytes} bytes; change them", param="stop")


def _check_tokens(name: str, tokens: Sequence[int], n_vocab: int) -> None:
    if not are_tokens(tokens, n_vocab):
        raise BadRequest(f"{name} names a token outside 0 to {n_vocab - 1}; send tokens of this model", param=name)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    # Written so that NaN fails.
    if not low <= value <= high:
        raise BadRequest(f"{name} is {value:g}; allowed is {low:g} to {high:g}", param=name)


def are_tokens(tokens: Sequence[int], n_vocab: int) -> bool:
    return not tokens or (min(tokens) >= 0 and max(tokens) < n_vocab)
