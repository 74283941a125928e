"""Conversations to prompts, by the chat template that the GGUF carries.

A template is code from a file that somebody else made, so it runs in Jinja's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from swarmcpp.core import ChatMessage
from swarmcpp.errors import BadRequest
from swarmcpp.llama.vocab import Vocab

DEFAULT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML: used for a model that carries no template, as llama.cpp's server does."""

_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)
"""What a template's code can raise while it renders: a macro may call itself, a string may be multiplied."""


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None, **_ignored: Any) -> str:
    # Not Jinja's own filter: that one escapes for HTML, and templates mean plain JSON.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class ChatCodec:
    """A model's vocabulary together with its chat template. Thread-safe."""

    def __init__(self, vocab: Vocab, template: str | None) -> None:
        self._vocab = vocab
        self.n_vocab = vocab.n_vocab
        self.tokenize = vocab.tokenize
        self.piece = vocab.piece
        self._bos = vocab.special_text(vocab.bos)
        self._eos = vocab.special_text(vocab.eos)
        self._template_error = ""
        try:
            self._template = _environment().from_string(template or DEFAULT_TEMPLATE)
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            # The model still serves raw completions; only chats have to say why they cannot work. The latter two come
            # from Python's own compiler, on nesting that Jinja accepts.
            self._template_error = str(error)
            self._template = _environment().from_string(DEFAULT_TEMPLATE)

    def render_chat(self, messages: Sequence[ChatMessage], extra: dict[str, Any] | None = None) -> str:
        """The prompt that asks for the next assistant message. Raises BadRequest when the template refuses."""
        if self._template_error:
            raise BadRequest(
                f"the model's chat template cannot be compiled ({self._template_error}); use /v1/completions"
            )
        try:
            text = self._template.render(
                messages=[_as_dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self._bos,
                eos_token=self._eos,
                **(extra or {}),
            )
        except _TEMPLATE_FAILURES as error:
            raise BadRequest(
                f"the model's chat template refuses this conversation: {error}", param="messages"
            ) from error
        # The tokenizer adds BOS itself; many templates write it too.
        if self._bos and self._vocab.adds_bos:
            text = text.removeprefix(self._bos)
        return text

    def tokenize_chat(self, messages: Sequence[ChatMessage], extra: dict[str, Any] | None = None) -> list[int]:
        """Prompt tokens of a conversation. Raises BadRequest."""
        return self._vocab.tokenize(self.render_chat(messages, extra), add_special=True, parse_special=True)

    def tokenize_text(self, text: str, *, begins: bool = True) -> list[int]:
        """Prompt tokens of a raw completion; control tokens in it are read as such, as llama.cpp's server does. Of text
        that does not begin anything there are neither those that a prompt begins with nor control tokens."""
        return self._vocab.tokenize(text, add_special=begins, parse_special=begins)


def _as_dict(message: ChatMessage) -> dict[str, str]:
    entry = {"role": message.role, "content": message.content}
    if message.name is not None:
        entry["name"] = message.name
    return entry
