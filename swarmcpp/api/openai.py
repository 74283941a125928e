"""OpenAI request bodies to queries. Pure: bytes and limits in, a frozen `Query` or a BadRequest out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import msgspec

from swarmcpp.api import fields
from swarmcpp.api.fields import JsonObject, show
from swarmcpp.core import MAX_GAMMA, ChatMessage, DrafterName, Limits, SamplingParams
from swarmcpp.errors import BadRequest, PromptTooLong, UnsupportedField

SeedSource = Callable[[int], int]
"""`random.Random().getrandbits`: draws a seed for a request that gives none."""

SEED_MODULUS = 2**32 - 1
"""Seeds of llama.cpp's samplers are 32 bits, and 0xFFFFFFFF asks them for a random one: it is never used here."""

MAX_SEQUENCES = 256
"""Prompts times n of one body. Admission bounds what runs; this bounds what one body can ask for."""

MAX_SALT = 256
"""Characters. A salt is a name or a random string of a tenant, not a document."""

DRAFTERS = ("none", *get_args(DrafterName))
MAX_TEMPERATURE = 100.0
MAX_PENALTY = 100.0
MAX_INT = 2**31 - 1
"""llama.cpp's integers are 32 bits."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_MESSAGE_FIELDS = frozenset({"role", "content", "name"})
_MESSAGE_ELSEWHERE = frozenset(
    {
        "tool_calls",
        "tool_call_id",
        "function_call",
        "refusal",
        "audio",
        "annotations",
        "reasoning",
        "reasoning_content",
    }
)

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """One checked request body: `messages` of a "chat", or `prompts` (text or token ids, n choices each) of "text"."""

    kind: Literal["chat", "text"]
    model: str | None
    """None: the node's default model."""
    messages: tuple[ChatMessage, ...]
    prompts: tuple[Prompt, ...]
    n: int
    stream: bool
    include_usage: bool
    max_tokens: int | None
    """None: the rest of the context."""
    stop: tuple[str, ...]
    sampling: SamplingParams
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    prediction: Prompt = ""
    """What the answer will be, as the client thinks."""
    drafter: str = ""
    gamma: int = -1
    """See `core.GenerateRequest`."""

    @property
    def sequences(self) -> int:
        """Choices of the answer."""
        return self.n * max(1, len(self.prompts))

    def sampling_of(self, choice: int) -> SamplingParams:
        """Sampling of choice `choice` of a prompt: that of the query, with its own seed."""
        return replace(self.sampling, seed=(self.sampling.seed + choice) % SEED_MODULUS)


LimitsOf = Callable[[str | None], Limits]
"""Model -> what a request for it may ask for; None is the default model, and limits of an unknown one do not matter."""


def parse_chat(body: bytes, limits_of: LimitsOf, draw_seed: SeedSource) -> Query:
    """The query of a POST /v1/chat/completions body. Raises BadRequest and UnsupportedField."""
    return _query("chat", body, limits_of, draw_seed)


def parse_text(body: bytes, limits_of: LimitsOf, draw_seed: SeedSource) -> Query:
    """The query of a POST /v1/completions body. Raises BadRequest and UnsupportedField."""
    return _query("text", body, limits_of, draw_seed)


def too_long(what: str, ctx_size: int, param: str) -> PromptTooLong:
    """The refusal of a prompt of which `what` says how long it is."""
    return PromptTooLong(
        f"{what} and a slot holds {ctx_size} tokens, at least one of them for the answer; shorten it, or start the "
        "server with a larger --ctx-size",
        param=param,
    )


def decode_object(body: bytes) -> JsonObject:
    """A JSON object from UTF-8 bytes. Raises BadRequest, also for NaN, lone surrogates and deep nesting."""
    try:
        obj = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise BadRequest("the body is not UTF-8; encode it so") from error
    except RecursionError as error:
        raise BadRequest("the body's JSON is nested too deeply") from error
    except msgspec.DecodeError as error:
        hint = "; NaN and Infinity are not JSON numbers" if b"NaN" in body or b"Infinity" in body else ""
        raise BadRequest(f"the body is not valid JSON: {error}{hint}") from error
    if not isinstance(obj, dict):
        raise BadRequest(f"the body must be a JSON object, not {show(obj)}")
    return obj


def _query(kind: Literal["chat", "text"], body: bytes, limits_of: LimitsOf, draw_seed: SeedSource) -> Query:
    obj = decode_object(body)
    fields.check_known(obj, fields.CHAT_FIELDS if kind == "chat" else fields.TEXT_FIELDS)
    model = fields.typed(obj, "model", str)
    limits = limits_of(model)
    messages = _messages(obj.get("messages"), limits) if kind == "chat" else ()
    prompts = _prompts(obj.get("prompt"), limits) if kind == "text" else ()
    if model == "":
        raise BadRequest("model is empty; name one of GET /v1/models, or leave it out", param="model")
    if fields.flag(obj, "echo"):
        raise fields.unsupported("echo", True)
    stream = fields.flag(obj, "stream")
    drafter, gamma = _speculative(obj)
    query = Query(
        kind=kind,
        model=model,
        messages=messages,
        prompts=prompts,
        n=fields.integer(obj, "n", 1, limits.max_choices) or 1,
        stream=stream,
        include_usage=_include_usage(obj, stream),
        max_tokens=_max_tokens(obj),
        stop=_stop(obj.get("stop"), limits),
        sampling=_sampling(obj, limits, draw_seed),
        cache_salt=_cache_salt(obj),
        prediction=_prediction(obj, limits),
        drafter=drafter,
        gamma=gamma,
    )
    if query.sequences > MAX_SEQUENCES:
        raise _too_many(f"{len(prompts)} prompts times n = {query.n}")
    return query


def _cache_salt(obj: JsonObject) -> str:
    salt = fields.typed(obj, "cache_salt", str) or ""
    if len(salt) > MAX_SALT:
        raise BadRequest(f"cache_salt has {len(salt)} characters; at most {MAX_SALT} are taken", param="cache_salt")
    return salt


def _prediction(obj: JsonObject, limits: Limits) -> Prompt:
    """OpenAI's predicted outputs; token ids are taken as well, as in prompts."""
    value = fields.typed(obj, "prediction", dict)
    if value is None:
        return ""
    if value.get("type") != "content":
        kind = show(value.get("type"))
        raise UnsupportedField(f'prediction.type is {kind}; only "content" is known', param="prediction")
    content = value.get("content")
    if isinstance(content, list) and all(type(each) is int for each in content):
        return _token_ids(content[: limits.ctx_size - 1], limits, "prediction")
    return _content(content, "prediction")


def _speculative(obj: JsonObject) -> tuple[str, int]:
    """The drafter that a request wants, and the most guesses at a time; nothing is asked of OpenAI's clients."""
    value = fields.typed(obj, "speculative", dict) or {}
    for name in value:
        if name not in ("drafter", "gamma"):
            raise UnsupportedField(f"speculative has {show(name)}; it may have drafter and gamma", param="speculative")
    drafter = fields.typed(value, "drafter", str) or ""
    if drafter and drafter not in DRAFTERS:
        names = ", ".join(DRAFTERS)
        raise BadRequest(f"speculative.drafter is {show(drafter)}; it must be one of {names}", param="speculative")
    gamma = fields.integer(value, "gamma", 0, MAX_GAMMA)
    return drafter, -1 if gamma is None else gamma


def _too_many(what: str) -> BadRequest:
    return BadRequest(f"{what} are more than the {MAX_SEQUENCES} answers of one request; send several", param="prompt")


def _sampling(obj: JsonObject, limits: Limits, draw_seed: SeedSource) -> SamplingParams:
    base = SamplingParams()
    top_k = fields.integer(obj, "top_k", -1, MAX_INT)
    last_n = fields.integer(obj, "repeat_last_n", -1, MAX_INT)
    if last_n is None:
        last_n = base.repeat_last_n
    return SamplingParams(
        temperature=fields.number(obj, "temperature", base.temperature, 0.0, MAX_TEMPERATURE),
        # 0 and -1 both switch top-k off in llama.cpp.
        top_k=base.top_k if top_k is None else max(top_k, 0),
        top_p=fields.number(obj, "top_p", base.top_p, 0.0, 1.0),
        min_p=fields.number(obj, "min_p", base.min_p, 0.0, 1.0),
        seed=_seed(obj, draw_seed),
        repeat_penalty=_repeat_penalty(obj, base.repeat_penalty),
        # -1 means the whole context, as in llama.cpp; more than that is never looked at.
        repeat_last_n=limits.ctx_size if last_n == -1 else min(last_n, limits.ctx_size),
        presence_penalty=fields.number(obj, "presence_penalty", base.presence_penalty, -2.0, 2.0),
        frequency_penalty=fields.number(obj, "frequency_penalty", base.frequency_penalty, -2.0, 2.0),
        logit_bias=_logit_bias(obj, limits),
        ignore_eos=fields.flag(obj, "ignore_eos"),
    )


def _seed(obj: JsonObject, draw_seed: SeedSource) -> int:
    seed = fields.integer(obj, "seed", -(2**63), 2**64 - 1)
    if seed is None or seed == -1:
        seed = draw_seed(32)
    return seed % SEED_MODULUS


def _repeat_penalty(obj: JsonObject, default: float) -> float:
    llama = fields.number(obj, "repeat_penalty", default, 0.0, MAX_PENALTY, above=True)
    other = fields.number(obj, "repetition_penalty", llama, 0.0, MAX_PENALTY, above=True)
    if obj.get("repeat_penalty") is not None and llama != other:
        raise BadRequest(
            f"repeat_penalty is {llama:g} and repetition_penalty {other:g}; they mean the same, give one of them",
            param="repetition_penalty",
        )
    return other


def _logit_bias(obj: JsonObject, limits: Limits) -> tuple[tuple[int, float], ...]:
    biases: list[tuple[int, float]] = []
    entries = fields.typed(obj, "logit_bias", dict) or {}
    if len(entries) > limits.n_vocab:
        raise BadRequest(f"logit_bias has {len(entries)} entries for {limits.n_vocab} tokens", param="logit_bias")
    for key, value in entries.items():
        # Ten digits hold every 32-bit id; the canonical form keeps "7" and "07" from naming one token twice.
        token = int(key) if len(key) <= 10 and key.isascii() and key.isdigit() else -1
        if not 0 <= token < limits.n_vocab or str(token) != key:
            raise BadRequest(
                f"logit_bias names token {show(key)}; token ids are 0 to {limits.n_vocab - 1}", param="logit_bias"
            )
        biases.append((token, fields.bounded(f"logit_bias[{token}]", value, -100.0, 100.0)))
    return tuple(sorted(biases))


def _max_tokens(obj: JsonObject) -> int | None:
    old = fields.integer(obj, "max_tokens", 1, MAX_INT)
    new = fields.integer(obj, "max_completion_tokens", 1, MAX_INT)
    if old is not None and new is not None and old != new:
        raise BadRequest(
            f"max_tokens is {old} and max_completion_tokens {new}; they mean the same, give one of them",
            param="max_completion_tokens",
        )
    return old if new is None else new


def _include_usage(obj: JsonObject, stream: bool) -> bool:
    options = fields.typed(obj, "stream_options", dict)
    if options is None:
        return False
    if not stream:
        raise BadRequest("stream_options needs stream = true; leave one out or set the other", param="stream_options")
    for name, value in options.items():
        if name != "include_usage" and not (name == "include_obfuscation" and value in (None, False)):
            raise UnsupportedField(
                f"stream_options has {show(name)}, which is not supported yet; leave it out", param="stream_options"
            )
    return fields.flag(options, "include_usage")


def _stop(value: object, limits: Limits) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = value if isinstance(value, list) else [value]
    if len(stops) > limits.max_stop:
        raise BadRequest(f"stop has {len(stops)} strings; at most {limits.max_stop} are allowed", param="stop")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise BadRequest(f"stop must be non-empty strings, not {show(stop)}", param="stop")
        size = len(stop.encode())
        if size > limits.max_stop_bytes:
            raise BadRequest(
                f"a stop string has {size} bytes; at most {limits.max_stop_bytes} are allowed", param="stop"
            )
    return tuple(dict.fromkeys(stops))


def _messages(value: object, limits: Limits) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        raise BadRequest(f"messages must be a list of at least one message, not {show(value)}", param="messages")
    # Refused before any work is done on them: no template makes less than a token of a message.
    if len(value) >= limits.ctx_size:
        raise too_long(f"the prompt has {len(value)} messages", limits.ctx_size, "messages")
    return tuple(_message(item, f"messages[{index}]") for index, item in enumerate(value))


def _message(item: object, where: str) -> ChatMessage:
    if not isinstance(item, dict):
        raise BadRequest(f"{where} must be an object, not {show(item)}", param=where)
    for name, value in item.items():
        if name in _MESSAGE_FIELDS:
            continue
        if name not in _MESSAGE_ELSEWHERE or value not in (None, False, "", [], {}):
            raise UnsupportedField(f"{where} has {show(name)}, which is not supported yet; leave it out", param=where)
    role = item.get("role")
    if not isinstance(role, str):
        raise BadRequest(f"{where}.role must be a string, not {show(role)}", param=where)
    if role not in _ROLES:
        raise UnsupportedField(f"{where}.role {show(role)} is not supported; use {', '.join(_ROLES)}", param=where)
    return ChatMessage(_ROLES[role], _content(item.get("content"), where), fields.typed(item, "name", str))


def _content(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{where}.content must be a string or a list of parts, not {show(value)}", param=where)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is not None and kind != "text":
            raise UnsupportedField(f"{where}.content has a part of type {show(kind)}; only text works", param=where)
        text = part.get("text") if kind is not None else None
        if not isinstance(text, str):
            raise BadRequest(f'{where}.content parts must be {{"type": "text", "text": ...}}', param=where)
        for name in part:
            if name not in ("type", "text"):
                raise UnsupportedField(f"{where}.content has a part with {show(name)}; leave it out", param=where)
        texts.append(text)
    # Joined as llama.cpp's server joins parts for a template that wants one string.
    return "\n".join(texts)


def _prompts(value: object, limits: Limits) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise BadRequest(
            f"prompt must be a string, a list of token ids, or a list of either, not {show(value)}", param="prompt"
        )
    if isinstance(value[0], str | list) and len(value) > MAX_SEQUENCES:
        raise _too_many(f"{len(value)} prompts")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) for item in value):
        return tuple(_token_ids(item, limits) for item in value)
    return (_token_ids(value, limits),)


def _token_ids(value: list[object], limits: Limits, param: str = "prompt") -> tuple[int, ...]:
    if not value:
        raise BadRequest(f"{param} has an empty list of token ids; give at least one token", param=param)
    if len(value) >= limits.ctx_size:
        raise too_long(f"the {param} has {len(value)} tokens", limits.ctx_size, param)
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < limits.n_vocab:
            raise BadRequest(f"{param} has {show(token)}; token ids are 0 to {limits.n_vocab - 1}", param=param)
    return tuple(value)  # type: ignore[arg-type]
