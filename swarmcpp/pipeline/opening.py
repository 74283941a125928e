"""Opening a sequence on all stages of a chain at once, and giving it back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from swarmcpp.core import GenerateRequest
from swarmcpp.errors import NotReady, QueueFull, StageFailed, SwarmError
from swarmcpp.pipeline.contract import StageCaller, StageRef
from swarmcpp.pipeline.runs import Chain

logger = logging.getLogger(__name__)

OPEN_LIMIT_S = 60.0
"""A last resort, as loading blocks may take long: the callers have limits of their own."""


async def open_all(
    chain: Chain,
    caller: Callable[[StageRef], StageCaller],
    sequence: bytes,
    epoch: int,
    keys: Sequence[bytes],
    request: GenerateRequest,
) -> int:
    """Open `sequence` for `request` on every stage; tokens of prompt and `generated` that all of them now hold.

    Raises QueueFull (it is open nowhere then), and StageFailed for everything else.
    """
    n_tokens = len(request.prompt) + len(request.generated)

    async def on_all(ask: Callable[[StageRef, StageCaller], Awaitable[int]]) -> int:
        found = await asyncio.gather(*(_answer(ask, stage, caller) for stage in chain), return_exceptions=True)
        errors = [each for each in found if isinstance(each, BaseException)]
        if errors:
            # What is wrong before what is only busy.
            raise min(errors, key=lambda error: (isinstance(error, QueueFull), _is_starting(error)))
        return max(0, min(each for each in found if isinstance(each, int)))

    try:
        position = await on_all(
            lambda stage, there: there.open(sequence, epoch, keys, request if stage.is_tail else None, n_tokens)
        )
    except QueueFull:
        await close_all(chain, caller, sequence)
        raise
    position = min(position, n_tokens - 1)
    return min(position, await on_all(lambda _, there: there.resume(sequence, epoch, position)))


def _is_starting(error: BaseException) -> bool:
    return isinstance(error, StageFailed) and error.reason == NotReady.code


async def _answer(
    ask: Callable[[StageRef, StageCaller], Awaitable[int]],
    stage: StageRef,
    caller: Callable[[StageRef], StageCaller],
) -> int:
    try:
        async with asyncio.timeout(OPEN_LIMIT_S):
            return await ask(stage, caller(stage))
    except (QueueFull, StageFailed):
        raise
    except SwarmError as error:
        raise StageFailed(f"{stage.node}: {error}", node=stage.node, reason=error.code) from error
    except TimeoutError:
        raise StageFailed(
            f"{stage.node} did not open a sequence within {OPEN_LIMIT_S:g} s", node=stage.node, reason="peer_timeout"
        ) from None


async def close_all(chain: Chain, caller: Callable[[StageRef], StageCaller], sequence: bytes) -> None:
    """Close `sequence` on every stage. Stages that cannot be reached sweep it some time."""
    await _quietly(chain, caller, lambda there: there.close(sequence))


async def store_all(
    chain: Chain, caller: Callable[[StageRef], StageCaller], sequence: bytes, epoch: int, keys: Sequence[bytes]
) -> None:
    """Store the blocks of `keys` on every stage, where that can be done."""
    await _quietly(chain, caller, lambda there: there.store(sequence, epoch, keys))


async def _quietly(
    chain: Chain, caller: Callable[[StageRef], StageCaller], ask: Callable[[StageCaller], Awaitable[None]]
) -> None:
    async def one(stage: StageRef) -> None:
        try:
            async with asyncio.timeout(OPEN_LIMIT_S):
                await ask(caller(stage))
        except (SwarmError, TimeoutError) as error:
            logger.debug("%s: %s", stage.node, error)

    await asyncio.gather(*(one(stage) for stage in chain))
