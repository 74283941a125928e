"""Stages of a small model in this process, each behind its loop, and a head that drives them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from engine_support import ids_of

from swarmcpp.core import GenerateRequest, Sampled
from swarmcpp.engine.stageloop import StageLoop
from swarmcpp.llama.context import ContextOptions, Model
from swarmcpp.llama.rows import encode_rows
from swarmcpp.llama.stage import EmbeddingTable, LlamaStage, StageContext
from swarmcpp.models.slicing import write_slice
from swarmcpp.models.synthetic import Shape, write_model
from swarmcpp.testing import FakeClock
from swarmcpp.wire.codec import Buffer, RowEncoding
from swarmcpp.wire.engine import FromEngine, Place, Placed, Ran, Run, RunPart, ToEngine

N_LAYERS, N_EMBD, N_VOCAB = 4, 64, 512
OPTIONS = ContextOptions(n_ctx=512, n_seqs=4, n_threads=1)
FINGERPRINT = bytes(range(32))

Answer = TypeVar("Answer", bound=FromEngine)


def stage_model(directory: Path) -> Path:
    return write_model(
        directory / "random.gguf", Shape("random", "llama", N_LAYERS, N_EMBD, 4, 2, 128, N_VOCAB, 512), quant="Q8_0"
    )


def cut(path: Path, first: int, last: int) -> Path:
    """The slice [first, last) of a model, made once."""
    target = path.with_name(f"{first}-{last}.gguf")
    return target if target.exists() else write_slice(path, first, last, target, fingerprint=FINGERPRINT)


@dataclass(slots=True)
class StageInbox:
    """A `StageLink` whose node is a test."""

    inbox: deque[ToEngine] = field(default_factory=deque)
    frame: bytes | None = None
    sent: list[tuple[FromEngine, bytes | None]] = field(default_factory=list)

    def receive(self, timeout_s: float, poll_s: float = 0.0) -> ToEngine | None:
        return self.inbox.popleft() if self.inbox else None

    def send(self, message: FromEngine, frame: Buffer | None = None) -> None:
        self.sent.append((message, None if frame is None else bytes(frame)))


class Stage:
    """One slice with its loop."""

    def __init__(self, path: Path, first: int, last: int, *, block_tokens: int = 64) -> None:
        self.model = Model(cut(path, first, last), use_extra_bufts=False)
        self.context = StageContext(self.model, OPTIONS, is_tail=last == N_LAYERS)
        self.backend = LlamaStage(self.model, self.context, block_tokens)
        self.layout = self.backend.learn()
        self.link = StageInbox()
        self.loop = StageLoop(self.backend, self.link, FakeClock(), block_tokens=block_tokens)

    def ask(self, message: ToEngine, kind: type[Answer], frame: Buffer | None = None) -> tuple[Answer, bytes | None]:
        """The one answer to a message."""
        self.loop.handle(message, frame)
        answer, rows = self.link.sent.pop()
        assert not self.link.sent
        assert isinstance(answer, kind)
        self.loop.check_integrity()
        return answer, rows

    def place(self, serial: int, request: GenerateRequest | None = None, tokens: int = 0) -> Placed:
        return self.ask(Place(serial=serial, tokens=tokens, request=request), Placed)[0]

    def slots(self) -> dict[int, int]:
        return {serial: opened.slot for serial, opened in self.loop._sequences.items()}

    def close(self) -> None:
        self.context.close()
        self.model.close()


class Chain:
    """The stages of a model, and the head's side: embeddings in, token ids out."""

    def __init__(self, path: Path, cuts: Sequence[int] = (0, 2, N_LAYERS), wire: RowEncoding = "f32") -> None:
        self.table = EmbeddingTable(path)
        self.stages = [Stage(path, first, last) for first, last in pairwise(cuts)]
        self.wire = wire
        self._runs = 0

    def place(self, serial: int, request: GenerateRequest, tokens: int = 0) -> None:
        for stage in self.stages:
            placed = stage.place(serial, request if stage is self.stages[-1] else None, tokens)
            assert (placed.code, placed.tokens) == ("", tokens)

    def run(
        self,
        work: Mapping[int, tuple[int, Sequence[int]]],
        *,
        outputs: int = 1,
        places: Mapping[int, int] = MappingProxyType({}),
    ) -> dict[int, int]:
        """Compute (start, tokens) of each serial in one pass; the token after each."""
        parts = tuple(
            RunPart(serial, start, len(tokens), outputs, places.get(serial, -1))
            for serial, (start, tokens) in work.items()
        )
        told = self.pass_on(parts, [token for _, each in work.values() for token in each])
        return dict(zip(work, ids_of(told), strict=True)) if outputs else {}

    def window(self, serial: int, start: int, tokens: Sequence[int], follows: int = -1) -> list[int]:
        """One pass over a token and guesses at what follows it; the tokens that came."""
        part = RunPart(serial, start, len(tokens), len(tokens), guesses=tuple(tokens[1:]), follows=follows)
        return ids_of(self.pass_on((part,), tokens))

    def pass_on(self, parts: tuple[RunPart, ...], tokens: Sequence[int]) -> Sampled:
        """Compute these rows at one stage after another."""
        frame: Buffer | None = encode_rows(self.table.rows(tokens), "f32")
        encoding: RowEncoding = "f32"
        for stage in self.stages:
            self._runs += 1
            run = Run(run=self._runs, parts=parts, encoding=encoding, reply=self.wire)
            ran, frame = stage.ask(run, Ran, frame)
            assert (ran.run, ran.code, ran.message) == (self._runs, "", "")
            encoding = self.wire
        assert frame is None
        return ran.tokens

    def greedy(self, requests: Mapping[int, GenerateRequest], steps: int) -> dict[int, list[int]]:
        """`steps` tokens of each serial, whose prompts are computed one by one and whose answers together."""
        told: dict[int, list[int]] = {}
        for serial, request in requests.items():
            self.place(serial, request)
            told[serial] = [self.run({serial: (0, request.prompt)})[serial]]
        self.go_on(requests, told, steps)
        return told

    def go_on(
        self,
        requests: Mapping[int, GenerateRequest],
        told: dict[int, list[int]],
        steps: int,
        places: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """Decode the `told` until each has `steps` tokens."""
        while any(len(tokens) < steps for tokens in told.values()):
            work = {
                serial: (len(requests[serial].prompt) + len(tokens) - 1, tokens[-1:]) for serial, tokens in told.items()
            }
            for serial, token in self.run(work, places=places).items():
                told[serial].append(token)

    def close(self) -> None:
        for stage in self.stages:
            stage.close()


def resumed(request: GenerateRequest, generated: Sequence[int]) -> GenerateRequest:
    return replace(request, generated=tuple(generated))
