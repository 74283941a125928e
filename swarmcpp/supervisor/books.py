"""What a node writes down of a stage: the sequences that are open there, and the answers that its engine owes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from swarmcpp.core import GenerateRequest, Sampled
from swarmcpp.errors import SwarmError
from swarmcpp.kv.cache import Lease

Item = TypeVar("Item")


class Computed(NamedTuple):
    """What one stage made of a pass: tokens of each part with `outputs` at a tail, a frame of rows elsewhere; seconds
    of its call, and of waiting for it."""

    tokens: Sampled
    rows: bytes | None
    compute_s: float
    queue_s: float


ComputeDone = Callable[[Computed | SwarmError], None]
"""What is called with the end of one stage's part of a pass. It must not raise."""


GuessDone = Callable[[tuple[tuple[int, ...] | None, ...]], None]
"""What is called with the guesses of a draft model (see `wire.engine.Guessed`), none of them when its engine failed. It
must not raise."""


@dataclass(slots=True, eq=False)
class StageSequence:
    """A sequence. `offered` tokens may be resumed; `length`, or fewer while a pass is under way, are in its KV."""

    name: bytes
    serial: int
    last_used: float
    epoch: int = 0
    keys: tuple[bytes, ...] = ()
    request: GenerateRequest | None = None
    offered: int = 0
    length: int = 0
    lease: Lease | None = None
    placed: bool = False
    """Resumed in this epoch."""
    exact: bool = True
    """No quantised rows have come into it."""
    under_way: int = 0


@dataclass(slots=True)
class Placing:
    """A Place that waits for its answer. The lease keeps its blocks where they are until then."""

    opened: StageSequence
    lease: Lease | None
    future: asyncio.Future[int]


@dataclass(slots=True)
class Underway:
    """A Run that waits for its answer; `spans` are (sequence, start, count). `done` is called once."""

    spans: list[tuple[StageSequence, int, int]]
    n_bytes: int
    begun: float
    done: ComputeDone


@dataclass(slots=True)
class Waiting:
    """All that one engine process owes an answer for; by run, or by serial in the order of the messages."""

    passes: dict[int, Underway] = field(default_factory=dict)
    n_bytes: int = 0
    """Of rows in `passes`."""
    placing: dict[int, deque[Placing]] = field(default_factory=dict)
    storing: dict[int, deque[asyncio.Future[None]]] = field(default_factory=dict)
    guessing: deque[GuessDone] = field(default_factory=deque)

    @property
    def count(self) -> int:
        """Answers that are owed."""
        queued = sum(map(len, self.placing.values())) + sum(map(len, self.storing.values()))
        return len(self.passes) + queued + len(self.guessing)

    def futures(self) -> list[asyncio.Future[Any]]:
        """Those who wait for the end of anything but a pass."""
        placing = [each.future for queue in self.placing.values() for each in queue]
        storing = [future for queue in self.storing.values() for future in queue]
        return [*placing, *storing]


def next_of(queues: dict[int, deque[Item]], serial: int) -> Item | None:
    """The first that waits under a serial, taken out."""
    queue = queues.get(serial)
    if not queue:
        return None
    found = queue.popleft()
    if not queue:
        del queues[serial]
    return found
