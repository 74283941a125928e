"""Trains both models on a corpus that corpus.py wrote. `python -m bench.guide.train CORPUS OUT`. Needs PyTorch.

The guide learns the corpus; the draft learns to say what the guide would say (distillation), since a draft is worth the
more the oftener the target agrees with it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.guide.corpus import BATCH
from bench.guide.network import CONTEXT, DRAFT, GUIDE, Network, Shape

ROWS = 64
"""Sequences of CONTEXT tokens in a step."""
WARM_UP = 100
GUIDE_RATE, DRAFT_RATE = 3e-3, 4e-3
"""Peak learning rates, found by trying."""
WEIGHT_DECAY = 0.1
LOG_EVERY = 50
IGNORED = -100


LOADERS = 8
"""Processes that put rows together; one is slower than the GPU."""


class Rows(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    """Rows of whole documents: each begins with one and is filled with the next ones, in an order drawn from `seed`."""

    def __init__(self, corpus: Path, seed: int) -> None:
        self.tokens = np.load(corpus / "tokens.npy", mmap_mode="r")
        self.learned = np.load(corpus / "learned.npy", mmap_mode="r")
        starts = np.load(corpus / "starts.npy")
        self.ends = np.append(starts[1:], len(self.tokens))
        self.starts = starts
        self.train = np.arange(len(starts) - BATCH)
        self.held_out = np.arange(len(starts) - BATCH, len(starts))
        self.seed = seed

    def rows(self, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens (CONTEXT + 1) and whether each is learned."""
        tokens, learned = np.zeros(CONTEXT + 1, np.int64), np.zeros(CONTEXT + 1, bool)
        at = 0
        for index in order:
            begin, end = self.starts[index], self.ends[index]
            count = min(end - begin, CONTEXT + 1 - at)
            tokens[at : at + count] = self.tokens[begin : begin + count]
            learned[at : at + count] = self.learned[begin : begin + count]
            at += count
            if at == CONTEXT + 1:
                yield tokens, learned
                tokens, learned, at = np.zeros_like(tokens), np.zeros_like(learned), 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets (ROWS, CONTEXT) for ever; targets that are not learned are IGNORED."""
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            made = self.rows(rng.permutation(self.train))
            while len(batch := [row for _, row in zip(range(ROWS), made, strict=False)]) == ROWS:
                yield as_tensors(batch)

    def batches(self) -> torch.utils.data.DataLoader[tuple[Tensor, Tensor]]:
        """The same, from LOADERS processes, each with an order of its own."""
        return torch.utils.data.DataLoader(self, batch_size=None, num_workers=LOADERS, prefetch_factor=4)


def as_tensors(batch: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    """Inputs and targets of rows."""
    tokens = torch.from_numpy(np.stack([row for row, _ in batch]))
    learned = torch.from_numpy(np.stack([row for _, row in batch]))
    return tokens[:, :-1].contiguous(), torch.where(learned, tokens, IGNORED)[:, 1:].contiguous()


def optimizer(network: Network, rate: float) -> torch.optim.Optimizer:
    """AdamW; norms do not decay."""
    matrices = [p for p in network.parameters() if p.ndim == 2]
    vectors = [p for p in network.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=torch.cuda.is_available())


def schedule(step: int, steps: int) -> float:
    """Share of the peak rate: a linear start, then a cosine down to a hundredth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


@torch.no_grad()
def held_out_loss(network: Network, rows: Rows, device: str) -> float:
    """Mean nats for each learned token of the held-out documents."""
    batch = list(rows.rows(rows.held_out))
    total, count = 0.0, 0
    for at in range(0, len(batch) - len(batch) % 8, 8):
        inputs, targets = (each.to(device) for each in as_tensors(batch[at : at + 8]))
        with torch.autocast(device, torch.bfloat16):
            logits = network(inputs)
        total += float(
            F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        )
        count += int((targets != IGNORED).sum())
    return total / count


def distance(logits: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
    """Cross entropy to the corpus, or to what `teacher` says, over the tokens that are learned."""
    wanted = targets.flatten() != IGNORED
    said = logits.flatten(0, 1)[wanted].float()
    if teacher is None:
        return F.cross_entropy(said, targets.flatten()[wanted])
    return F.cross_entropy(said, teacher.flatten(0, 1)[wanted].float().softmax(-1))


def train(
    shape: Shape, rows: Rows, seconds: float, rate: float, device: str, teacher: Network | None = None
) -> tuple[Network, list[dict[str, float]]]:
    """A network after about `seconds` of training, and its curve. The number of steps follows from the first ones."""
    torch.manual_seed(0)
    network = Network(shape).to(device)
    run = torch.compile(network) if device == "cuda" else network
    teach = torch.compile(teacher) if teacher is not None and device == "cuda" else teacher
    optimiser = optimizer(network, rate)
    curve: list[dict[str, float]] = []
    steps, begun, recent = 10**9, time.monotonic(), []
    for step, (inputs, targets) in enumerate(rows.batches()):
        if step == 20:
            # Compiled by now: what is left of the time, in steps.
            torch.cuda.synchronize() if device == "cuda" else None
            started = time.monotonic()
        if step == 40:
            torch.cuda.synchronize() if device == "cuda" else None
            each = (time.monotonic() - started) / 20
            steps = 40 + int((seconds - (time.monotonic() - begun)) / each)
            print(f"{each * 1000:.1f} ms a step, {steps} steps", flush=True)
        if step >= steps:
            break
        for group in optimiser.param_groups:
            group["lr"] = rate * schedule(step, steps)
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                told = teach(inputs) if teach is not None else None
            loss = distance(run(inputs), targets, told)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        recent.append(loss.detach())
        if step % LOG_EVERY == LOG_EVERY - 1:
            mean = float(torch.stack(recent).mean())
            recent.clear()
            curve.append({"step": step + 1, "tokens": (step + 1) * ROWS * CONTEXT, "loss": mean})
            if step % (10 * LOG_EVERY) == LOG_EVERY - 1:
                print(f"step {step + 1}: loss {mean:.4f}, {time.monotonic() - begun:.0f} s", flush=True)
    held_out = held_out_loss(network, rows, device)
    print(f"held out: {held_out:.4f} nats a token after {time.monotonic() - begun:.0f} s", flush=True)
    curve.append({"step": steps, "tokens": steps * ROWS * CONTEXT, "held_out": held_out})
    return network, curve


def save(network: Network, out: Path, name: str) -> None:
    """Weights as half precision, in two files by layer so that none is large."""
    tensors = {key: value.detach().half().cpu().numpy() for key, value in network.state_dict().items()}
    keys = sorted(tensors)
    for part, chosen in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :])):
        np.savez(out / f"{name}-{part}.npz", **{key: tensors[key] for key in chosen})
    (out / f"{name}.json").write_text(json.dumps(asdict(network.shape)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train swarmcpp-guide and its draft.")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=360, help="for the guide")
    parser.add_argument("--draft-seconds", type=float, default=100)
    chosen = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen.out.mkdir(parents=True, exist_ok=True)
    guide, curve = train(GUIDE, Rows(chosen.corpus, 1), chosen.seconds, GUIDE_RATE, device)
    save(guide, chosen.out, "guide")
    (chosen.out / "curves.json").write_text(json.dumps({"guide": curve}))
    if not chosen.draft_seconds:
        return
    draft, draft_curve = train(DRAFT, Rows(chosen.corpus, 2), chosen.draft_seconds, DRAFT_RATE, device, guide)
    save(draft, chosen.out, "draft")
    (chosen.out / "curves.json").write_text(json.dumps({"guide": curve, "draft": draft_curve}))


if __name__ == "__main__":
    main()
