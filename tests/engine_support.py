"""What tests of the engine, of llama.cpp's owners and of the supervisor share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_backend import FakeBackend, FakeLink

from swarmcpp.core import FinishReason, GenerateRequest, Sampled, SamplingParams, Token, TokenPart
from swarmcpp.engine.abortflag import AbortFlag
from swarmcpp.engine.backend import WholeBackend
from swarmcpp.engine.drafting import Drafter
from swarmcpp.engine.loop import Engine
from swarmcpp.engine.scheduler import Policy, Scheduler
from swarmcpp.engine.speculation import Speculation
from swarmcpp.testing import FakeClock
from swarmcpp.wire.engine import Submit, ToEngine

GREEDY = SamplingParams(temperature=0.0)


def request(
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    sampling: SamplingParams = GREEDY,
    generated: Sequence[int] = (),
) -> GenerateRequest:
    return GenerateRequest("r", "m", tuple(prompt), max_tokens, sampling, generated=tuple(generated))


def part_of(ids: Sequence[int], finish: FinishReason | None = None, **report: Any) -> TokenPart:
    return TokenPart(tuple(map(Token, ids)), finish, **report)


def sampled_of(*ids: int) -> Sampled:
    """A token of each part of a pass."""
    return tuple((Token(each),) for each in ids)


def ids_of(sampled: Sampled) -> list[int]:
    return [token.id for tokens in sampled for token in tokens]


def prompt_of(length: int, seed: int = 0, n_vocab: int = 90) -> tuple[int, ...]:
    """`length` token ids that differ between seeds."""
    return tuple((seed * 31 + index * (7 + seed)) % n_vocab for index in range(length))


def poll(condition: Callable[[], bool], what: str, deadline_s: float = 20.0) -> None:
    """Wait until `condition` holds; fails after the deadline. For other processes and threads only."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {deadline_s} s"
        time.sleep(0.005)


@dataclass(slots=True)
class Rig:
    """An engine on fakes for its link and clock, driven step by step."""

    engine: Engine
    backend: WholeBackend
    link: FakeLink
    clock: FakeClock
    abort: AbortFlag

    @property
    def fake(self) -> FakeBackend:
        assert isinstance(self.backend, FakeBackend)
        return self.backend

    def submit(self, serial: int, wanted: GenerateRequest) -> None:
        self.link.inbox.append(Submit(serial, wanted))

    def run(self, script: Mapping[int, Sequence[ToEngine]] | None = None, max_steps: int = 2000) -> None:
        """Step until nothing is left; `script` gives messages that arrive before the n-th step (from 0)."""
        script = dict(script or {})
        for step in range(max_steps):
            self.link.inbox.extend(script.pop(step, ()))
            self.engine.receive(0.0)
            if self.engine.busy:
                self.engine.step()
            elif not script:
                self.check_clean()
                return
        raise AssertionError(f"still busy after {max_steps} steps")

    def check_clean(self) -> None:
        """Nothing runs, so nothing may be held: slots, samplers, KV."""
        self.engine.check_integrity()
        assert self.engine.stats().slots_busy == 0
        assert self.engine.stats().waiting == 0
        assert all(self.backend.length(slot) == 0 for slot in range(self.backend.n_slots))
        if isinstance(self.backend, FakeBackend):
            assert self.backend.open_samplers == 0

    def tokens(self, serial: int) -> list[int]:
        return [token for part in self.link.outputs(serial) for token in part.ids]

    def finish(self, serial: int) -> str | None:
        """The one finish reason; checks that it is on the last token and only there."""
        outs: list[TokenPart] = self.link.outputs(serial)
        assert all(out.finish is None for out in outs[:-1]), "a token after the end"
        return outs[-1].finish if outs else None


RigMaker = Callable[..., Rig]


def make_rig(
    backend: WholeBackend,
    abort_file: Path,
    policy: Policy | None = None,
    clock: FakeClock | None = None,
    block_tokens: int = 0,
    drafters: Sequence[Drafter] = (),
) -> Rig:
    clock = clock or FakeClock()
    policy = policy or Policy(max_rows=backend.max_rows)
    link = FakeLink()
    abort = AbortFlag(abort_file, create=True)
    speculation = Speculation(drafters, gamma=4, max_rows=backend.max_outputs, n_ctx=backend.n_ctx)
    engine = Engine(backend, link, Scheduler(policy), abort, clock, block_tokens=block_tokens, speculation=speculation)
    return Rig(engine, backend, link, clock, abort)
