"""Typed, bounded reading of JSON objects, and the tables of fields that exist elsewhere and not here.

A field is supported, accepted because it changes nothing, or refused by name. Nothing is accepted and ignored.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from swarmcpp.errors import BadRequest, UnsupportedField

T = TypeVar("T")

JsonObject = dict[str, Any]

# Bounded in every direction: an error message repeats little of what a client sent, and a deeply nested value must
# not recurse.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring = 2, 3, 3, 40

COMMON_FIELDS = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repeat_penalty",
        "repetition_penalty",
        "repeat_last_n",
        "logit_bias",
        "ignore_eos",
        "model",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "stop",
        "stream",
        "stream_options",
        "echo",
        "cache_salt",
        "prediction",
        "speculative",
    }
)
CHAT_FIELDS = COMMON_FIELDS | {"messages"}
TEXT_FIELDS = COMMON_FIELDS | {"prompt"}

FREE_FORM: Mapping[str, type] = {"user": str, "metadata": dict}
"""Fields of OpenAI's accounts that are accepted with any value, since they change nothing."""

KNOWN_ELSEWHERE: Mapping[str, tuple[Any, ...]] = {
    # OpenAI
    "store": (),
    "service_tier": ("auto", "default"),
    "tools": (),
    "tool_choice": ("none",),
    "functions": (),
    "function_call": ("none",),
    "parallel_tool_calls": (),
    "response_format": ({"type": "text"},),
    "logprobs": (),
    "top_logprobs": (0,),
    "best_of": (1,),
    "suffix": (),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "verbosity": (),
    "web_search_options": (),
    # llama.cpp's server
    "adaptive_decay": (),
    "adaptive_target": (),
    "add_generation_prompt": (True,),
    "backend_sampling": (),
    "cache_prompt": (True,),
    "chat_format": (),
    "chat_template_kwargs": (),
    "continue_final_message": (),
    "dry_allowed_length": (),
    "dry_base": (),
    "dry_multiplier": (0, 0.0),
    "dry_penalty_last_n": (),
    "dry_sequence_breakers": (),
    "dynatemp_exponent": (),
    "dynatemp_range": (0, 0.0),
    "grammar": (),
    "grammar_lazy": (),
    "grammar_triggers": (),
    "grammar_type": (),
    "id_slot": (-1,),
    "json_schema": (),
    "lora": (),
    "min_keep": (0,),
    "mirostat": (0,),
    "mirostat_eta": (),
    "mirostat_tau": (),
    "n_cache_reuse": (0,),
    "n_cmpl": (1,),
    "n_discard": (0,),
    "n_indent": (0,),
    "n_keep": (0,),
    "n_predict": (),
    "n_probs": (0,),
    "parse_tool_calls": (),
    "post_sampling_probs": (),
    "preserved_tokens": (),
    "reasoning_budget_tokens": (-1,),
    "reasoning_format": ("none",),
    "response_fields": (),
    "return_progress": (),
    "return_tokens": (),
    "samplers": (),
    "sse_ping_interval": (),
    "t_max_predict_ms": (),
    "t_max_prompt_ms": (),
    "timings_per_token": (),
    "top_n_sigma": (-1, -1.0),
    "typical_p": (1, 1.0),
    "verbose": (),
    "xtc_probability": (0, 0.0),
    "xtc_threshold": (),
}
"""Fields that OpenAI's API or llama.cpp's server have and this server does not, each with the values that ask for
nothing. null, false and empty values ask for nothing in every one of them but `MEANINGFUL_WHEN_FALSE`."""

MEANINGFUL_WHEN_FALSE = frozenset({"parallel_tool_calls", "cache_prompt", "add_generation_prompt"})

_REMEDY: Mapping[str, str] = {
    "n_predict": "use max_tokens",
    "n_cmpl": "use n",
    "best_of": "use n",
    "response_format": 'only {"type": "text"} is supported',
    "store": "answers are never stored; leave it out",
    "service_tier": 'use "auto" or leave it out',
}


def show(value: object) -> str:
    """A client's value for an error message: short, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return _SHORT.repr(value)


def check_known(body: JsonObject, supported: frozenset[str]) -> None:
    """Refuse the first field of `body` that this server would ignore. Raises UnsupportedField."""
    for name, value in body.items():
        if name in supported:
            continue
        if name in FREE_FORM:
            if value is not None and not isinstance(value, FREE_FORM[name]):
                raise BadRequest(f"{name} must be {_NAMES[FREE_FORM[name]]}, not {show(value)}", param=name)
        elif name in KNOWN_ELSEWHERE:
            if not _asks_nothing(name, value, KNOWN_ELSEWHERE[name]):
                raise unsupported(name, value)
        else:
            known = ", ".join(sorted(supported))
            raise UnsupportedField(f"unknown field {show(name)}; supported fields: {known}", param=name)


def unsupported(name: str, value: object) -> UnsupportedField:
    """The refusal of a field that exists elsewhere."""
    remedy = _REMEDY.get(name, "leave it out")
    return UnsupportedField(f"{name} = {show(value)} is not supported yet; {remedy}", param=name)


def _asks_nothing(name: str, value: object, no_ops: tuple[Any, ...]) -> bool:
    if value is None:
        return True
    if name not in MEANINGFUL_WHEN_FALSE and (value is False or value in ("", [], {})):
        return True
    # The type is compared too, because False == 0 and True == 1 in Python and not in JSON.
    return any(type(value) is type(no_op) and value == no_op for no_op in no_ops)


_NAMES: Mapping[type, str] = {str: "a string", dict: "an object", list: "a list", bool: "true or false"}


def typed(body: JsonObject, name: str, kind: type[T]) -> T | None:
    """`body[name]` when it is of the JSON type `kind`; None when absent or null. Raises BadRequest."""
    value = body.get(name)
    if value is None or isinstance(value, kind):
        return value
    raise BadRequest(f"{name} must be {_NAMES[kind]}, not {show(value)}", param=name)


def flag(body: JsonObject, name: str) -> bool:
    """A boolean that is false when absent or null. Raises BadRequest."""
    return typed(body, name, bool) or False


def integer(body: JsonObject, name: str, low: int, high: int) -> int | None:
    """An integer in [low, high]; None when absent or null. Raises BadRequest."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadRequest(f"{name} must be an integer, not {show(value)}", param=name)
    if not low <= value <= high:
        raise BadRequest(f"{name} is {show(value)}; it must be from {low} to {high}", param=name)
    return value


def number(body: JsonObject, name: str, default: float, low: float, high: float, *, above: bool = False) -> float:
    """A finite number in [low, high], or in (low, high] when `above`; `default` when absent. Raises BadRequest."""
    value = body.get(name)
    if value is None:
        return default
    return bounded(name, value, low, high, above=above)


def bounded(name: str, value: object, low: float, high: float, *, above: bool = False) -> float:
    """`value` as a finite number in the range, for the field `name`. Raises BadRequest."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise BadRequest(f"{name} must be a number, not {show(value)}", param=name)
    # The range is checked before float(): an integer of 400 digits has no float.
    if (isinstance(value, float) and not math.isfinite(value)) or not low <= value <= high or (above and value == low):
        span = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise BadRequest(f"{name} is {show(value)}; it must be {span}", param=name)
    return float(value)
