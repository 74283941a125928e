"""Results to OpenAI's JSON. Pure. Rates and milliseconds in `timings` are named as llama.cpp's server names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from swarmcpp.core import Done, ModelInfo, NodeSnapshot, Started, Usage
from swarmcpp.errors import SwarmError

JsonObject = dict[str, Any]

DONE_EVENT = b"data: [DONE]\n\n"

encode = msgspec.json.encode

MAX_ROUTE = 80
"""Characters of one route in a header,"""

MAX_CHAIN = 200
"""and of one through stages."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer repeats."""

    id: str
    kind: Literal["chat", "text"]
    model: str
    created: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished choice."""

    index: int
    text: str
    done: Done


def completion(head: Head, choices: Sequence[Choice], usage: Usage) -> JsonObject:
    """A `chat.completion` or `text_completion`. `timings` is at the top for one choice, else in each choice."""
    is_chat = head.kind == "chat"
    items: list[JsonObject] = []
    for choice in choices:
        item: JsonObject = {"index": choice.index, "logprobs": None, "finish_reason": choice.done.reason}
        if is_chat:
            item["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
        else:
            item["text"] = choice.text
        items.append(item)
    result = _object(head, "chat.completion" if is_chat else "text_completion", items)
    result["usage"] = usage_json(usage)
    for choice, item in zip(choices, items, strict=True):
        (result if len(items) == 1 else item)["timings"] = timings_json(choice.done)
    return result


class ChunkWriter:
    """Server-sent events of one choice of a streamed answer.

    The JSON around a token's text is encoded once per choice: a token costs the encoding of its own text.
    """

    __slots__ = ("_after", "_before", "_head", "_index", "_with_usage")

    def __init__(self, head: Head, index: int, *, with_usage: bool) -> None:
        self._head = head
        self._index = index
        self._with_usage = with_usage
        sample = self._event({"content": ""} if head.kind == "chat" else "", None)
        # The marker cannot occur inside a JSON string (its quotes would be escaped there), so the split is exact.
        marker = b'"content":""' if head.kind == "chat" else b'"text":""'
        before, _, after = sample.partition(marker)
        self._before = before + marker[:-2]
        self._after = after

    def start(self) -> bytes:
        """What comes before the first text: the role of a chat message; nothing for a text completion."""
        if self._head.kind == "text":
            return b""
        return self._event({"role": "assistant", "content": ""}, None)

    def text(self, text: str) -> bytes:
        """One delta."""
        return self._before + encode(text) + self._after

    def finish(self, done: Done) -> bytes:
        """The chunk with `finish_reason` (and `timings`)."""
        return self._event({} if self._head.kind == "chat" else "", done)

    def _event(self, delta: JsonObject | str, done: Done | None) -> bytes:
        item: JsonObject = {"index": self._index, "logprobs": None, "finish_reason": done.reason if done else None}
        item["delta" if self._head.kind == "chat" else "text"] = delta
        chunk = _chunk(self._head, [item])
        if self._with_usage:
            chunk["usage"] = None
        if done is not None:
            chunk["timings"] = timings_json(done)
        return sse(chunk)


def usage_chunk(head: Head, usage: Usage) -> bytes:
    """The event without choices that carries `usage`, the last before [DONE]."""
    return sse(_chunk(head, []) | {"usage": usage_json(usage)})


def sse(obj: JsonObject) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(obj) + b"\n\n"


def total_usage(per_prompt: Iterable[Sequence[Usage]]) -> Usage:
    """Usage of a whole answer: each prompt counts once, however many choices it has; every choice's tokens count."""
    prompt = cached = completion_tokens = drafted = accepted = 0
    for usages in per_prompt:
        prompt += usages[0].prompt_tokens
        cached += usages[0].cached_tokens
        completion_tokens += sum(usage.completion_tokens for usage in usages)
        drafted += sum(usage.drafted for usage in usages)
        accepted += sum(usage.accepted for usage in usages)
    return Usage(prompt, completion_tokens, cached, drafted=drafted, accepted=accepted)


def usage_json(usage: Usage) -> JsonObject:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted,
            "rejected_prediction_tokens": usage.drafted - usage.accepted,
        },
    }


def timings_json(done: Done) -> JsonObject:
    """`timings` of one finished choice; `prompt_n` counts the tokens that were computed, `cache_n` the others."""
    usage, times = done.usage, done.timings
    computed = usage.prompt_tokens - usage.cached_tokens
    return {
        "queue_ms": times.queue_s * 1000,
        "cache_n": usage.cached_tokens,
        "prompt_n": computed,
        **_pace("prompt", computed, times.prefill_s),
        "predicted_n": usage.completion_tokens,
        **_pace("predicted", usage.completion_tokens, times.decode_s),
        "draft_n": usage.drafted,
        "draft_n_accepted": usage.accepted,
    }


def _pace(name: str, tokens: int, seconds: float) -> JsonObject:
    return {
        f"{name}_ms": seconds * 1000,
        f"{name}_per_token_ms": seconds * 1000 / tokens if tokens else 0.0,
        f"{name}_per_second": tokens / seconds if seconds > 0 else 0.0,
    }


def route_headers(started: Sequence[Started | None], done: Done | None = None) -> dict[str, str]:
    """`x-swarm-route`: the distinct routes of the choices that have begun. `Server-Timing`: of the first one of them.

    `done` is the end of the first choice, once it is known; without any Started its times must do.
    """
    begun = [each for each in started if each is not None]
    headers: dict[str, str] = {}
    if begun:
        headers["x-swarm-route"] = ", ".join(dict.fromkeys(route_text(each.route) for each in begun))
    stages: dict[str, float] = {}
    if begun:
        stages = {"queue": begun[0].queue_s, "fetch": begun[0].fetch_s, "prefill": begun[0].prefill_s}
    elif done:
        stages = {"queue": done.timings.queue_s, "prefill": done.timings.prefill_s}
    if done:
        stages["decode"] = done.timings.decode_s
    if stages:
        headers["Server-Timing"] = ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in stages.items())
    return headers


def route_text(route: str) -> str:
    """A route as it can stand in a header and in a line of the log. Names of peers are theirs to choose; those in a
    chain of stages, where commas divide them, have none."""
    refused, size = ("", MAX_CHAIN) if route.startswith("stages ") else (",", MAX_ROUTE)
    return "".join(char if " " <= char <= "~" and char not in refused else "_" for char in route[:size])


def error_body(error: SwarmError) -> JsonObject:
    """OpenAI's error form."""
    return {"error": {"message": str(error), "type": error.kind, "code": error.code, "param": error.param}}


def model_json(model: ModelInfo) -> JsonObject:
    """One model, with llama.cpp's `meta` beside OpenAI's fields."""
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "swarmcpp",
        "meta": {
            "n_vocab": model.n_vocab,
            "n_ctx_train": model.n_ctx_train,
            "n_params": model.n_params,
            "size": model.size_bytes,
            "architecture": model.architecture,
            "description": model.description,
        },
    }


def model_list(models: Iterable[ModelInfo]) -> JsonObject:
    """GET /v1/models."""
    return {"object": "list", "data": [model_json(model) for model in models]}


def health_json(snapshot: NodeSnapshot) -> JsonObject:
    """GET /health: what the node is doing, without its paths."""
    return {
        "status": "ok" if snapshot.state == "ready" else snapshot.state,
        "state": snapshot.state,
        "detail": snapshot.detail,
        "model": snapshot.model.id if snapshot.model else None,
        "slots": snapshot.slots,
        "slots_busy": snapshot.slots_busy,
        "queued": snapshot.queued,
        "restarts": snapshot.restarts,
    }


def _chunk(head: Head, choices: list[JsonObject]) -> JsonObject:
    return _object(head, "chat.completion.chunk" if head.kind == "chat" else "text_completion", choices)


def _object(head: Head, name: str, choices: list[JsonObject]) -> JsonObject:
    return {"id": head.id, "object": name, "created": head.created, "model": head.model, "choices": choices}
