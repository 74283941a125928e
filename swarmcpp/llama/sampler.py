"""llama.cpp's sampler chain for one request."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import llama_cpp.llama_cpp as c

from swarmcpp._native import largest_f32
from swarmcpp.core import SamplingParams
from swarmcpp.llama.context import Context
from swarmcpp.llama.vocab import Vocab


class Sampler:
    """Owner of one chain: logit bias, penalties, top-k, top-p, min-p, temperature, then a seeded draw (or greedy).

    The order is that of llama.cpp's server. Close it when the request ends.
    """

    def __init__(self, params: SamplingParams, vocab: Vocab, prompt: Sequence[int], generated: Sequence[int]) -> None:
        chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        self._chain: Any = chain
        biases = list(params.logit_bias)
        if params.ignore_eos:
            biases += [(token, -math.inf) for token in sorted(vocab.eog_tokens)]
        if biases:
            array = (c.llama_logit_bias * len(biases))(*(c.llama_logit_bias(token, bias) for token, bias in biases))
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_logit_bias(vocab.n_vocab, len(biases), array))
        penalties = (params.repeat_penalty, params.frequency_penalty, params.presence_penalty)
        if params.repeat_last_n and penalties != (1.0, 0.0, 0.0):
            c.llama_sampler_chain_add(
                chain, c.llama_sampler_init_penalties(vocab.n_vocab, params.repeat_last_n, *penalties)
            )
        # Those that decide nothing but which tokens are out of the question need no chain.
        self._banned: list[int] | None = None
        if params.temperature <= 0 and penalties == (1.0, 0.0, 0.0) and all(bias == -math.inf for _, bias in biases):
            self._banned = [token for token, _ in biases if 0 <= token < vocab.n_vocab]
        self._n_vocab = vocab.n_vocab
        self._draw: Any = None
        if params.temperature <= 0:
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_greedy())
        else:
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_top_k(params.top_k))
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_top_p(params.top_p, 1))
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_min_p(params.min_p, 1))
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_temp(params.temperature))
            self._draw = c.llama_sampler_init_dist(params.seed)
            c.llama_sampler_chain_add(chain, self._draw)
        self._catch_up(params, prompt, generated)

    def _catch_up(self, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> None:
        # Penalties look back over repeat_last_n tokens, prompt included, as llama.cpp's server counts them.
        self._looks_back = params.repeat_last_n > 0
        for token in prompt[-params.repeat_last_n :] if self._looks_back else ():
            c.llama_sampler_accept(self._chain, token)
        # A resumed request goes on with the random numbers that it would have drawn: one per token so far.
        self.follow(generated)

    def follow(self, tokens: Sequence[int]) -> None:
        """Be as if it had drawn `tokens`."""
        one = c.llama_token_data(0, 0.0, 1.0)
        candidates = c.llama_token_data_array(ctypes.pointer(one), 1, -1, True)
        for token in tokens:
            if self._looks_back:
                c.llama_sampler_accept(self._chain, token)
            if self._draw is not None:
                c.llama_sampler_apply(self._draw, ctypes.byref(candidates))

    def copy(self) -> Sampler:
        """One that draws what this one would draw next, and leaves it as it is. It cannot `follow`."""
        copied = object.__new__(Sampler)
        copied._chain = c.llama_sampler_clone(self._chain)
        copied._banned, copied._n_vocab = self._banned, self._n_vocab
        return copied

    def sample(self, context: Context, row: int) -> int:
        """Draw and accept the token after batch row `row` of the last decode."""
        if self._banned is not None:
            found = largest_f32(context.logits_address(row), self._n_vocab, self._banned)
            if found >= 0:
                return found
        return int(c.llama_sampler_sample(self._chain, context.pointer, row))

    def close(self) -> None:
        """Free the chain and its samplers."""
        if self._chain:
            c.llama_sampler_free(self._chain)
            self._chain = None
