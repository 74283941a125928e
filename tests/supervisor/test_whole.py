"""The supervisor with real engine processes: deaths, resumption, giving up, and leaving nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_support import GREEDY, poll, prompt_of, request
from trained_models import BEGINNINGS

from swarmcpp.core import KvLayout, SamplingParams, TokenPart
from swarmcpp.errors import BadModel, EngineFailed, NotReady, PromptTooLong, WireError
from swarmcpp.kv.arena import Arena
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.kv.keys import KvIdentity
from swarmcpp.llama.vocab import VocabModel
from swarmcpp.models.synthetic import TINY, Shape, write_model
from swarmcpp.supervisor.process import MAX_CRASHES, MAX_KILLS, EngineStatus
from swarmcpp.supervisor.whole import EngineStream, EngineSupervisor
from swarmcpp.wire.engine import EngineOptions

pytestmark = pytest.mark.e2e

DEADLINE_S = 60.0
ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("supervisor") / "tiny.gguf", TINY, quant="Q8_0")


def options(model: Path, slots: int = 2, ctx_size: int = 512, budget_s: float = 0.4) -> EngineOptions:
    return EngineOptions(
        model_path=str(model),
        ctx_size=ctx_size,
        slots=slots,
        threads=1,
        # The plain kernels are safe on every CPU.
        use_extra_bufts=False,
        q8_kernel=False,
        attention_kernel=False,
        prefill_chunk_tokens=128,
        prefill_budget_s=budget_s,
        continuous_batching=True,
        batched_prefill_forward=True,
    )


class Sleeps:
    """Records the pauses before launches and takes none of them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)


@asynccontextmanager
async def supervised(engine: EngineOptions, **how: Any) -> AsyncIterator[EngineSupervisor]:
    """A started supervisor; whatever happens its process is gone afterwards."""
    pids: set[int] = set()
    on_change: Callable[[EngineStatus], None] = how.pop("on_change", lambda status: None)

    def note(status: EngineStatus) -> None:
        pids.add(status.pid)
        on_change(status)

    supervisor = EngineSupervisor(engine, on_change=note, **how)
    supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.close()
        for pid in pids - {0}:
            poll(lambda pid=pid: gone(pid), f"engine {pid} is gone")  # type: ignore[misc]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def ready(supervisor: EngineSupervisor) -> None:
    await asyncio.wait_for(supervisor.wait_ready(), DEADLINE_S)


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.005)


async def collect(stream: EngineStream) -> list[TokenPart]:
    async def all_of() -> list[TokenPart]:
        return [out async for out in stream]

    return await asyncio.wait_for(all_of(), DEADLINE_S)


async def tokens_of(stream: EngineStream) -> list[int]:
    outs = await collect(stream)
    assert [out.finish is not None for out in outs] == [False] * (len(outs) - 1) + [True]
    return [token for out in outs for token in out.ids]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


# -- life --------------------------------------------------------------------------------------------------------


async def test_requests_run_and_finish(tiny: Path) -> None:
    async with supervised(options(tiny)) as supervisor:
        early = supervisor.submit(request(prompt_of(5), 4, sampling=ENDLESS))
        await ready(supervisor)
        assert (supervisor.status.slots, supervisor.status.ctx_size) == (2, 512)
        assert supervisor.status.resident_bytes > 0
        streams = [supervisor.submit(request(prompt_of(5), 4, sampling=ENDLESS)) for _ in range(5)]
        first, *others = [await tokens_of(stream) for stream in [early, *streams]]
        assert len(first) == 4
        assert others == [first] * 5
        assert supervisor.active == 0
        assert supervisor.stats.slots_busy == 0


async def test_a_refusal_ends_only_its_request(tiny: Path) -> None:
    async with supervised(options(tiny)) as supervisor:
        await ready(supervisor)
        too_long = supervisor.submit(request(prompt_of(512)))
        fine = supervisor.submit(request(prompt_of(5), 3, sampling=ENDLESS))
        with pytest.raises(PromptTooLong):
            await collect(too_long)
        assert len(await tokens_of(fine)) == 3
        assert supervisor.active == 0


async def test_cancel_of_waiting_and_running(tiny: Path) -> None:
    async with supervised(options(tiny, slots=1)) as supervisor:
        await ready(supervisor)
        running = supervisor.submit(request(prompt_of(5), 400, sampling=ENDLESS))
        waiting, cancelled = (supervisor.submit(request(prompt_of(6), 3, sampling=ENDLESS)) for _ in range(2))
        await until(lambda: bool(running.ready), "the first request runs")
        supervisor.cancel(cancelled)
        supervisor.cancel(running)
        supervisor.cancel(running)
        assert len(await tokens_of(waiting)) == 3
        assert cancelled.tokens == []
        assert len(running.tokens) < 400
        assert supervisor.active == 0


async def test_cancel_in_mid_prefill_frees_the_engine_at_once(tmp_path: Path) -> None:
    """A prompt of several seconds; the next request does not wait for it, nor for its running step."""
    shape = Shape("slow", "llama", 8, 512, 8, 2, 1408, 4096, 512)
    model = write_model(tmp_path / "slow.gguf", shape, quant="Q8_0")
    async with supervised(options(model, slots=1, ctx_size=4096)) as supervisor:
        await ready(supervisor)

        async def calls_so_far(prompt: Sequence[int]) -> int:
            await tokens_of(supervisor.submit(request(prompt, 1, sampling=ENDLESS)))
            return supervisor.stats.calls

        whole = await calls_so_far(prompt_of(2000))
        assert whole > 10
        stream = supervisor.submit(request(prompt_of(2000), 1, sampling=ENDLESS))
        incarnation = supervisor._incarnation
        assert incarnation
        await until(lambda: bool(incarnation.abort._words[1]), "a step runs")
        supervisor.cancel(stream)
        assert incarnation.abort._words[0], "the running step is asked to end"
        assert await calls_so_far(prompt_of(5)) < whole * 5 / 4


async def test_close_ends_the_process_and_fails_streams(tiny: Path) -> None:
    async with supervised(options(tiny)) as supervisor:
        await ready(supervisor)
        pid = supervisor.status.pid
        stream = supervisor.submit(request(prompt_of(5), 400, sampling=ENDLESS))
        await until(lambda: bool(stream.ready), "the request runs")
        await supervisor.close()
        assert gone(pid)
        with pytest.raises(NotReady, match="shutting down"):
            await collect(stream)
        with pytest.raises(NotReady):
            supervisor.submit(request(prompt_of(5)))
        with pytest.raises(NotReady):
            await ready(supervisor)


async def test_close_while_the_engine_starts(tiny: Path) -> None:
    for turns in (0, 1, 2, 5):
        async with supervised(options(tiny)) as supervisor:
            for _ in range(turns):
                await asyncio.sleep(0)
            waiter = asyncio.create_task(supervisor.wait_ready())
            await asyncio.sleep(0)
            await supervisor.close()
            with pytest.raises(NotReady):
                await waiter


def test_the_engine_dies_with_its_node(tiny: Path) -> None:
    """kill -9 of the node: nobody is left to stop the engine, and it goes all the same."""
    script = f"""
import asyncio, sys
sys.path[:0] = {[str(path) for path in Path(__file__).parents[:2]]!r}
from pathlib import Path
from test_whole import EngineSupervisor, options
async def main():
    supervisor = EngineSupervisor(options(Path({str(tiny)!r})))
    supervisor.start()
    await supervisor.wait_ready()
    print(supervisor.status.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    with subprocess.Popen(python(script), stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout
        pid = int(node.stdout.readline())
        assert not gone(pid)
        node.kill()
        node.wait()
        poll(lambda: gone(pid), "the engine is gone")


# -- deaths ------------------------------------------------------------------------------------------------------


@posix
async def test_killed_in_mid_generation_streams_go_on_with_the_same_tokens(unquantised: Path) -> None:
    vocab = VocabModel(unquantised)
    prompts = [vocab.vocab.tokenize(text, add_special=True, parse_special=False) for text in BEGINNINGS[:4]]
    vocab.close()
    async with supervised(options(unquantised, slots=4)) as supervisor:
        await ready(supervisor)
        asked = [request(prompt, 120, sampling=ENDLESS) for prompt in prompts]
        expected = [await tokens_of(supervisor.submit(one)) for one in asked]
        assert len({tuple(tokens) for tokens in expected}) == 4

        streams = [supervisor.submit(one) for one in asked]
        others = [asyncio.create_task(tokens_of(stream)) for stream in streams[1:]]
        seen: list[int] = []
        pids = {supervisor.status.pid}
        async for out in streams[0]:
            seen += out.ids
            if len(seen) in (1, 2, 40, 90):
                await until(lambda: supervisor.status.pid not in (0, *pids) or len(pids) == 1, "a new engine")
                pids.add(supervisor.status.pid)
                os.kill(supervisor.status.pid, signal.SIGKILL)
        assert seen == expected[0]
        assert [await other for other in others] == expected[1:]
        assert supervisor.status.restarts >= 3
        assert supervisor.active == 0


@posix
async def test_an_engine_that_dies_while_its_arena_is_opened_leaves_it_to_the_next(tiny: Path, tmp_path: Path) -> None:
    go = threading.Event()
    opened: list[PrefixCache] = []

    def open_cache(layout: KvLayout) -> PrefixCache:
        arena = Arena.open(tmp_path, bytes(32), layout.token_bytes * 64, 1 << 20, 0)
        assert arena is not None
        opened.append(PrefixCache(arena, KvIdentity(bytes(32), 64, (1, 1))))
        assert go.wait(DEADLINE_S)
        return opened[-1]

    async with supervised(options(tiny), open_cache=open_cache, sleep=Sleeps()) as supervisor:
        await until(lambda: len(opened) == 1, "the arena is being opened")
        first = supervisor.status.pid
        psutil.Process(first).kill()
        await until(lambda: supervisor.status.pid not in (0, first), "the next engine is started")
        go.set()
        await ready(supervisor)
        assert supervisor.cache is opened[0]
    assert len(opened) == 1
    assert not opened[0].in_place(), "it is closed"


async def test_close_while_the_arena_is_opened(tiny: Path, tmp_path: Path) -> None:
    go = threading.Event()
    opened: list[PrefixCache] = []

    def open_cache(layout: KvLayout) -> PrefixCache:
        arena = Arena.open(tmp_path, bytes(32), layout.token_bytes * 64, 1 << 20, 0)
        assert arena is not None
        opened.append(PrefixCache(arena, KvIdentity(bytes(32), 64, (1, 1))))
        assert go.wait(DEADLINE_S)
        return opened[-1]

    async with supervised(options(tiny), open_cache=open_cache) as supervisor:
        await until(lambda: len(opened) == 1, "the arena is being opened")
        closing = asyncio.create_task(supervisor.close())
        await until(lambda: supervisor.status.state == "stopped", "it is closing")
        go.set()
        await closing
        assert not opened[0].in_place(), "it is closed"


@posix
async def test_an_idle_engine_that_is_killed_is_replaced(tiny: Path) -> None:
    states: list[str] = []
    sleeps = Sleeps()
    async with supervised(options(tiny), on_change=lambda status: states.append(status.state), sleep=sleeps) as one:
        await ready(one)
        first = one.status.pid
        os.kill(first, signal.SIGKILL)
        await until(lambda: one.status.state != "ready", "the death is noticed")
        assert "SIGKILL" in one.status.detail
        meanwhile = one.submit(request(prompt_of(5), 3, sampling=ENDLESS))
        assert len(await tokens_of(meanwhile)) == 3
        assert (one.status.state, one.status.restarts) == ("ready", 1)
        assert one.status.pid != first
    # The first restart is immediate.
    assert sleeps.seconds == [0.0, 0.0]
    assert list(dict.fromkeys(states)) == ["starting", "ready", "restarting", "stopped"]


async def test_a_model_that_kills_its_engine_is_given_up(tiny: Path) -> None:
    sleeps = Sleeps()
    command = python("import sys; print('ggml: no such kernel', file=sys.stderr); sys.exit(3)")
    async with supervised(options(tiny), command=command, sleep=sleeps) as supervisor:
        stream = supervisor.submit(request(prompt_of(5)))
        with pytest.raises(EngineFailed) as caught:
            await ready(supervisor)
        for part in (str(tiny), f"{MAX_CRASHES} times", "exit code 3: ggml: no such kernel"):
            assert part in str(caught.value)
        assert supervisor.status.state == "failed"
        assert supervisor.status.detail == str(caught.value)
        assert sleeps.seconds == [0.0, 0.0, 0.5]
        with pytest.raises(EngineFailed):
            await collect(stream)
        with pytest.raises(NotReady):
            supervisor.submit(request(prompt_of(5)))


@posix
async def test_kills_from_outside_get_more_tries(tiny: Path) -> None:
    sleeps = Sleeps()
    command = (sys.executable, "-S", "-E", "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    async with supervised(options(tiny), command=command, sleep=sleeps) as supervisor:
        with pytest.raises(EngineFailed, match=f"{MAX_KILLS} times in a row .SIGKILL"):
            await ready(supervisor)
    assert sleeps.seconds == [0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]


async def test_a_bad_model_is_not_tried_again(tmp_path: Path) -> None:
    sleeps = Sleeps()
    for name, content in (("empty.gguf", b""), ("other.gguf", b"PK\x03\x04" * 1000)):
        (tmp_path / name).write_bytes(content)
        async with supervised(options(tmp_path / name), sleep=sleeps) as supervisor:
            stream = supervisor.submit(request(prompt_of(5)))
            with pytest.raises(BadModel, match=name):
                await ready(supervisor)
            assert (supervisor.status.state, supervisor.status.restarts) == ("failed", 0)
            with pytest.raises(NotReady, match=name):
                await collect(stream)
    assert sleeps.seconds == [0.0, 0.0]


async def test_a_command_that_does_not_exist_is_a_failure(tiny: Path, tmp_path: Path) -> None:
    async with supervised(options(tiny), command=(str(tmp_path / "absent"),)) as supervisor:
        with pytest.raises(EngineFailed, match="absent"):
            await ready(supervisor)
        assert supervisor.status.state == "failed"


RUBBISH = """
import json, sys, time
from swarmcpp.supervisor.framing import HEADER
from swarmcpp.supervisor.workerlink import WorkerLink
link = WorkerLink(json.loads(sys.stdin.readline()))
frame = {frame!r}
link._socket.sendall(HEADER.pack(len(frame), 0xFFFFFFFF) + frame)
time.sleep(600)
"""


@pytest.mark.parametrize("frame", [b"rubbish", b"", b"\x01\xff", b"\x02\x80"])
async def test_an_engine_that_sends_rubbish_is_a_crashed_one(tiny: Path, frame: bytes) -> None:
    sleeps = Sleeps()
    async with supervised(options(tiny), command=python(RUBBISH.format(frame=frame)), sleep=sleeps) as supervisor:
        with pytest.raises(EngineFailed, match=f"{MAX_CRASHES} times in a row .*(decode|version|frame)"):
            await ready(supervisor)
    assert len(sleeps.seconds) == MAX_CRASHES


async def test_an_engine_that_floods_its_stderr_cannot_block(tiny: Path) -> None:
    command = python("import sys; sys.stderr.write('x' * 1_000_000 + '\\nlast words\\n'); sys.exit(4)")
    async with supervised(options(tiny), command=command, sleep=Sleeps()) as supervisor:
        with pytest.raises(EngineFailed, match="exit code 4: last words"):
            await ready(supervisor)


# A worker without a model: prompt (7,) gets one token for each engine that sees it, prompt (13,) kills the engine.
SCRIPTED = """
import json, os, sys
from swarmcpp.core import EngineStats, Token, TokenPart
from swarmcpp.supervisor.workerlink import WorkerLink
from swarmcpp.wire.engine import Fault, LoadProgress, Ready, StepOut, Submit, TokenOut
link = WorkerLink(json.loads(sys.stdin.readline()))
link.send(LoadProgress(0.0))
link.receive(60.0)
link.send(Ready(64, 2, 1, 1))
while True:
    message = link.receive(60.0)
    if not isinstance(message, Submit):
        break
    request = message.request
    if request.prompt == (13,):
        break
    count = len(request.generated)
    finish = "length" if count + 1 == request.max_tokens else None
    link.send(StepOut((TokenOut(message.serial, TokenPart((Token(100 + count),), finish)),), EngineStats(2, 1, 0)))
link.send(Fault("decode_failed", "poison"))
link.close()
sys.exit(1)
"""


async def test_a_request_that_kills_engines_does_not_take_the_others_along(tiny: Path) -> None:
    async with supervised(options(tiny), command=python(SCRIPTED), sleep=Sleeps()) as supervisor:
        await ready(supervisor)
        good = supervisor.submit(request((7,), MAX_CRASHES + 1, sampling=GREEDY))
        poison = supervisor.submit(request((13,), 5))
        with pytest.raises(EngineFailed, match=f"died {MAX_CRASHES} times on this request .poison"):
            await collect(poison)
        assert await tokens_of(good) == [100 + index for index in range(MAX_CRASHES + 1)]
        await ready(supervisor)
        assert supervisor.active == 0


async def test_a_request_that_cannot_be_handed_over_leaves_nothing_behind(tiny: Path) -> None:
    async with supervised(options(tiny)) as supervisor:
        early = supervisor.submit(request((2**70,)))
        await ready(supervisor)
        with pytest.raises(WireError, match="cannot encode"):
            await collect(early)
        with pytest.raises(WireError, match="cannot encode"):
            supervisor.submit(request((2**70,)))
        assert supervisor.active == 0
        assert len(await tokens_of(supervisor.submit(request(prompt_of(5), 2, sampling=ENDLESS)))) == 2


@pytest.fixture(autouse=True)
def no_directory_is_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sockets and abort flags live in temporary directories; each is gone after its engine."""
    import tempfile

    made: list[Path] = []
    real = tempfile.mkdtemp

    def mkdtemp(*args: Any, **kwargs: Any) -> str:
        made.append(Path(real(*args, **kwargs)))
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    yield
    assert not [path for path in made if path.name.startswith("swarmcpp-") and path.exists()]
