"""The network of both models: llama.cpp's architecture `llama` in PyTorch, with names of tensors as GGUF has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_BASE = 10000.0
NORM_EPS = 1e-5
CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes; heads are `n_embd // n_head` wide, and every one has keys and values of its own."""

    n_embd: int
    n_layer: int
    n_head: int
    n_ff: int
    n_vocab: int = 3072


GUIDE = Shape(n_embd=256, n_layer=12, n_head=4, n_ff=768)
DRAFT = Shape(n_embd=128, n_layer=5, n_head=2, n_ff=384)


def rope(n_positions: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, (n_positions, width / 2), of rotary embeddings (Su et al. 2021)."""
    frequencies = ROPE_BASE ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(n_positions, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbours turned, as llama.cpp has them for `llama` (not halves, as in Hugging Face's code)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_head = shape.n_head
        self.attn_norm = nn.RMSNorm(shape.n_embd, NORM_EPS)
        self.attn_q = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.attn_k = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.attn_v = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.attn_output = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.n_embd, NORM_EPS)
        self.ffn_gate = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.ffn_up = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.ffn_down = nn.Linear(shape.n_ff, shape.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (batch, positions, n_embd)."""
        batch, length, width = x.shape
        normed = self.attn_norm(x)
        q, k, v = (
            projection(normed).view(batch, length, self.n_head, -1).transpose(1, 2)
            for projection in (self.attn_q, self.attn_k, self.attn_v)
        )
        seen = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.attn_output(seen.transpose(1, 2).reshape(batch, length, width))
        normed = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(normed)) * self.ffn_up(normed))


class Network(nn.Module):
    """Tokens (batch, positions) to logits (batch, positions, n_vocab); the output head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.blk = nn.ModuleList(Layer(shape) for _ in range(shape.n_layer))
        self.output_norm = nn.RMSNorm(shape.n_embd, NORM_EPS)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
                scale = 0.02 / (2 * shape.n_layer) ** 0.5 if residual else 0.02
                nn.init.normal_(parameter, std=scale)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = rope(tokens.shape[1], self.shape.n_embd // self.shape.n_head, tokens.device)
        x = self.token_embd(tokens)
        for layer in self.blk:
            x = layer(x, cos, sin)
        return F.linear(self.output_norm(x), self.token_embd.weight)
