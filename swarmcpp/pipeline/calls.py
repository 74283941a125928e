"""What is checked and converted where a stage is asked over the network. Pure: neither sockets nor tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from swarmcpp.core import MAX_OUTPUTS, GenerateRequest, Limits
from swarmcpp.errors import StageFailed, SwarmError, WireError, by_code
from swarmcpp.pipeline.contract import Pass, Passed, SequenceHolder, StageRef, StageTime
from swarmcpp.route.patience import MOST_S
from swarmcpp.supervisor.books import ComputeDone
from swarmcpp.telemetry import printable
from swarmcpp.wire.checks import check_request
from swarmcpp.wire.codec import RowEncoding
from swarmcpp.wire.peers import (
    MAX_MESSAGE,
    MAX_PARTS,
    Hop,
    OpenSequence,
    PassPart,
    PassReply,
    Reply,
    ResumeSequence,
    RunStage,
    SequenceReady,
    StoreSequence,
)

MAX_ID: Final = 2**31 - 1
MAX_EPOCH: Final = 2**31 - 1


class StageHost(SequenceHolder, Protocol):
    """One stage on this node, whose passes end at it."""

    def begin(
        self,
        parts: Sequence[PassPart],
        encoding: RowEncoding,
        rows: bytes | memoryview,
        reply: RowEncoding,
        done: ComputeDone,
    ) -> None:
        """Call `done` with what came out, rows encoded as `reply`, or with the error; not before `begin` has returned.
        Passes that succeed end in the order in which they were begun.

        Raises what `StageCaller` documents for its other methods.
        """
        ...

    async def close_sequence(self, sequence: bytes) -> None:
        """See `contract.StageCaller.close`."""
        ...


@dataclass(frozen=True, slots=True)
class StageBounds:
    """What a stage can take: tokens of a sequence and of the vocabulary (which only a tail needs), values of a row."""

    limits: Limits
    n_embd: int


def hop(ref: StageRef) -> Hop:
    """A stage as messages have it, beside the model's fingerprint."""
    return Hop(ref.node, ref.first, ref.last)


def run_message(ref: StageRef, work: Pass, limit_s: float) -> RunStage:
    """The request for a pass that begins at `ref`, and whose end is waited for so long."""
    onward = tuple(hop(each) for each in work.onward)
    return RunStage(ref.fingerprint, hop(ref), work.parts, work.encoding, onward, work.wire, limit_s)


def frames(rows: bytes | memoryview) -> list[memoryview]:
    """`rows` in pieces of the longest frame that a peer takes in a request: 512 rows of 8,192 floats are four."""
    view = memoryview(rows).cast("B")
    return [view[start : start + MAX_MESSAGE] for start in range(0, len(view), MAX_MESSAGE)]


def row_bytes(n_embd: int, encoding: RowEncoding) -> int:
    """Bytes of one row; in Q8_0 the last block of 32 values is filled up."""
    return 4 * n_embd if encoding == "f32" else 34 * math.ceil(n_embd / 32)


# -- the node of the stage ---------------------------------------------------------------------------------------------


def checked_open(message: OpenSequence, ref: StageRef, bounds: StageBounds) -> GenerateRequest | None:
    """The request of a peer's `open`, fit for this stage: None but for a tail.

    Raises WireError for numbers out of range, and what `wire.checks.check_request` does.
    """
    limits = bounds.limits
    _check_epoch(message.epoch)
    _check_within("n_tokens", message.n_tokens, 1, limits.ctx_size - 1)
    _check_within("the number of keys", len(message.keys), 0, message.n_tokens)
    if not ref.is_tail:
        return None
    if message.request is None:
        raise WireError(f"layers {ref.first} to {ref.last} sample, and are opened without a request; send it along")
    request = check_request(message.request, limits)
    if len(request.prompt) + len(request.generated) != message.n_tokens:
        raise WireError(
            f"a sequence of {message.n_tokens} tokens is opened with a request that has "
            f"{len(request.prompt)} and {len(request.generated)}; they must be the same"
        )
    return request


def check_call(message: ResumeSequence | StoreSequence, bounds: StageBounds) -> None:
    """Raise WireError unless the numbers of a peer's `resume` or `store` are in range."""
    _check_epoch(message.epoch)
    if isinstance(message, ResumeSequence):
        _check_within("n_tokens", message.n_tokens, 0, bounds.limits.ctx_size - 1)
    else:
        _check_within("the number of keys", len(message.keys), 0, bounds.limits.ctx_size)


def checked_pass(message: RunStage, payload: Sequence[memoryview], ref: StageRef, bounds: StageBounds) -> Pass:
    """The pass that a peer asks of stage `ref`, whose rows are of the right size. Raises WireError."""
    most, n_rows = bounds.limits.ctx_size, 0
    for part in message.parts:
        _check_epoch(part.epoch)
        _check_within("start", part.start, 0, most)
        _check_within("count", part.count, 1, min(MAX_PARTS, most - part.start))
        _check_within("outputs", part.outputs, 0, min(part.count, MAX_OUTPUTS))
        _check_within("the number of guesses", len(part.guesses), *[max(0, part.outputs - 1)] * 2)
        n_rows += part.count
    _check_within("the number of rows of a pass", n_rows, 1, MAX_PARTS)
    if len({part.sequence for part in message.parts}) != len(message.parts):
        raise WireError("a pass has a sequence in two parts; send one after the other")
    due, sent = n_rows * row_bytes(bounds.n_embd, message.encoding), sum(len(frame) for frame in payload)
    if due != sent:
        raise WireError(
            f"{n_rows} rows of {bounds.n_embd} values as {message.encoding} came in {sent} bytes instead of {due}"
        )
    if not 0 < message.limit_s <= MOST_S:
        raise WireError(f"limit_s is {message.limit_s:g}; allowed is more than 0, up to {MOST_S:g}")
    rows = payload[0] if len(payload) == 1 else b"".join(payload)
    onward = _checked_onward(message.onward, ref)
    return Pass(message.parts, message.encoding, rows, onward, message.wire, message.limit_s)


def _checked_onward(hops: Sequence[Hop], ref: StageRef) -> tuple[StageRef, ...]:
    """The stages after `ref`. Each begins where the one before it ends, up to the last layer: so none comes twice."""
    at = ref.last
    for each in hops:
        if not each.first == at < each.last:
            raise WireError(f"layers {each.first} to {each.last} are sent on to after layer {at}; send a whole route")
        at = each.last
    if at != ref.n_layers:
        raise WireError(f"a route ends at layer {at} of {ref.n_layers}; send a whole route")
    return tuple(StageRef(each.node, ref.fingerprint, each.first, each.last, ref.n_layers) for each in hops)


def _check_epoch(epoch: int) -> None:
    _check_within("epoch", epoch, 0, MAX_EPOCH)


def _check_within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise WireError(f"{name} is {value}; allowed is {low} to {high}")


# -- the node that asks ------------------------------------------------------------------------------------------------


def ready_tokens(reply: Reply, ref: StageRef, most: int) -> int:
    """The tokens of an answer to `open` and `resume`, at most `most`. Raises WireError."""
    if not isinstance(reply, SequenceReady) or not 0 <= reply.n_tokens <= most:
        raise WireError(f"{name(ref)} answers with {_short(reply)} where 0 to {most} tokens were expected")
    return reply.n_tokens


def passed(reply: Reply, ref: StageRef, work: Pass) -> Passed:
    """What a peer's answer to a pass from `ref` on says.

    Raises StageFailed when it says that the pass failed, of the node that it names if that has a part in it; and of
    the peer when this is no answer to that pass.
    """
    if not isinstance(reply, PassReply):
        raise _bad_answer(ref, _short(reply))
    if reply.code:
        nodes = {ref.node, *(each.node for each in work.onward)}
        raise StageFailed(
            " ".join(printable(reply.message).split()),
            node=reply.node if reply.node in nodes else ref.node,
            reason=reply.code if reply.code in by_code() else SwarmError.code,
        )
    wanted, stages = [part for part in work.parts if part.outputs], 1 + len(work.onward)
    told = [len(each) for each in reply.tokens]
    fits = len(told) == len(wanted) and all(
        (part.follows < 0) <= got <= part.outputs for got, part in zip(told, wanted, strict=True)
    )
    if not fits or not all(0 <= token.id <= MAX_ID for each in reply.tokens for token in each):
        raise _bad_answer(ref, f"tokens of {len(told)} parts, or some that are none, instead of {len(wanted)}")
    if len(reply.times) != stages or not all(math.isfinite(s) and s >= 0 for times in reply.times for s in times):
        raise _bad_answer(ref, f"{len(reply.times)} times of stages, or bad ones, instead of {stages}")
    return Passed(reply.tokens, tuple(StageTime(*times) for times in reply.times))


def _bad_answer(ref: StageRef, what: str) -> StageFailed:
    return StageFailed(f"{name(ref)} answers a pass with {what}", node=ref.node, reason=WireError.code)


def name(stage: StageRef | Hop) -> str:
    """A stage for people."""
    return f"the stage of layers {stage.first} to {stage.last} at node {stage.node}"


def _short(reply: Reply) -> str:
    return f"{reply.n_tokens} tokens" if isinstance(reply, SequenceReady) else f"a {type(reply).__name__}"
