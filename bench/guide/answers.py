"""swarmcpp-guide (or any GGUF) asked in this process: greedy answers, and stories at a temperature. No server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swarmcpp.core import ChatMessage, GenerateRequest, Rows, SamplingParams
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.chat import ChatCodec
from swarmcpp.llama.context import Context, ContextOptions, Model
from swarmcpp.models.gguf_header import read_header

CONTEXT = 2048
MOST = 400
"""Tokens of an answer; stories have about 200."""


class Guide:
    """One model with one slot. Use `opened`."""

    def __init__(self, model: Model, context: Context, template: str | None) -> None:
        self.backend = LlamaBackend(model, context)
        self.codec = ChatCodec(model.vocab, template)
        self._eog = model.vocab.eog_tokens

    def chat(self, *messages: ChatMessage, sampling: SamplingParams) -> tuple[str, bool]:
        """The answer to a conversation, and whether it ended by itself."""
        prompt = self.codec.tokenize_chat(messages)
        request = GenerateRequest("exam", "", tuple(prompt), MOST, sampling)
        backend = self.backend
        backend.truncate(0, 0)
        sampler = backend.sampler(request)
        said: list[int] = []
        try:
            backend.decode([Rows(0, 0, prompt, outputs=1)])
            while len(said) < MOST:
                token = backend.sample(sampler, 0).id
                if token in self._eog:
                    return self.text(said), True
                backend.decode([Rows(0, len(prompt) + len(said), [token], outputs=1)])
                said.append(token)
        finally:
            sampler.close()
        return self.text(said), False

    def text(self, tokens: list[int]) -> str:
        """What tokens say."""
        return b"".join(map(self.codec.piece, tokens)).decode("utf-8", "replace")

    def answer(self, question: str) -> str:
        """The greedy answer to one question."""
        return self.chat(ChatMessage("user", question), sampling=SamplingParams(temperature=0.0))[0]


@contextmanager
def opened(path: Path) -> Iterator[Guide]:
    """The model at `path` on one thread, with the plain kernels, which are safe on every CPU."""
    model = Model(path, use_extra_bufts=False)
    context = Context(model, ContextOptions(n_ctx=CONTEXT, n_seqs=1, n_threads=1))
    template = read_header(path).metadata.get("tokenizer.chat_template")
    try:
        yield Guide(model, context, template if isinstance(template, str) else None)
    finally:
        context.close()
        model.close()
