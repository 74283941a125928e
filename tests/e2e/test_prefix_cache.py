"""What was read once is not read again: by a server, by the next one, after a crash, whatever befalls its file."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from serve_client import ask, completion, http_session, until_health
from serve_process import ServeProcess, launched, serving, wait_until

from swarmcpp.kv.arena import PAGE, Arena, ArenaGeometry, read_header

pytestmark = pytest.mark.e2e

ONLY_ASCII = {str(token): -100 for token in range(512) if not 33 <= token <= 126}
"""Every token of the synthetic vocabulary becomes one visible character."""

BLOCKS = 4
"""Of 64 tokens, in a prompt of 300."""


def prompt(seed: int, length: int = 300) -> list[int]:
    """Token ids."""
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(length)]


A, B, C = prompt(1), prompt(2), prompt(3)


@pytest.fixture(scope="module")
def module_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the CPU is probed once for all servers of this file."""
    return tmp_path_factory.mktemp("prefix")


@pytest.fixture
def data(module_data: Path) -> Path:
    """A data directory without an arena."""
    shutil.rmtree(module_data / "arena", ignore_errors=True)
    return module_data


def options(data: Path, *more: str, slots: int = 2) -> tuple[str, ...]:
    """Of a small server; `more` comes last and wins."""
    return ("--slots", str(slots), "--ctx-size", "512", "--data-dir", str(data), "--cache-size", "2M", *more)


def arena_file(data: Path) -> Path:
    (path,) = (data / "arena").glob("*.arena")
    return path


def stored(data: Path) -> int:
    """Blocks in the arena, as any process sees them."""
    path = arena_file(data)
    known = read_header(path)
    return Arena.count(path, known[0]) if known else 0


def wait_stored(data: Path, blocks: int) -> None:
    """Blocks are written just after their request's first token."""
    wait_until(lambda: stored(data) >= blocks, f"{blocks} blocks are stored", 10.0)


async def say(http: aiohttp.ClientSession, server: ServeProcess, tokens: list[int], **more: Any) -> tuple[str, int]:
    """The greedy answer to a prompt, and how many of its tokens were not computed."""
    body = completion(tokens, more.pop("max_tokens", 12), logit_bias=ONLY_ASCII, **more)
    status, answer = await ask(http, server.url, body)
    assert status == 200, answer
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(tokens)
    return str(answer["choices"][0]["text"]), int(usage["prompt_tokens_details"]["cached_tokens"])


@pytest.fixture(scope="module")
def texts(tiny: Path, module_data: Path) -> Iterator[dict[int, str]]:
    """Answers of a server without a cache, by length of the prompt for A and by place for A, B and C."""

    async def collect(server: ServeProcess) -> dict[int, str]:
        async with http_session() as http:
            found = {}
            for place, tokens in enumerate((A, B, C)):
                found[place], cached = await say(http, server, tokens)
                assert cached == 0
                assert await say(http, server, tokens) == (found[place], 0)
            return found

    env = {"SWARMCPP_INFERENCE_PREFIX_CACHE_ENABLED": "false"}
    with serving(tiny, *options(module_data), env=env) as server:
        found = asyncio.run(collect(server))
        assert not (module_data / "arena").exists() or not list((module_data / "arena").glob("*.arena"))
    assert len(set(found.values())) == 3
    yield found


def warnings(server: ServeProcess) -> list[str]:
    """What the server logged beside its start."""
    return [line for line in server.stderr.splitlines() if not line.startswith("loading ")]


# -- hits ------------------------------------------------------------------------------------------------------------


async def test_a_repeat_is_a_hit_now_and_after_a_restart(
    tiny: Path, data: Path, texts: dict[int, str], http: aiohttp.ClientSession
) -> None:
    with serving(tiny, *options(data)) as server:
        assert await say(http, server, A) == (texts[0], 0)
        assert await say(http, server, A) == (texts[0], 256)
        assert await say(http, server, [*A[:200], *B[:100]]) != (texts[0], 0)
        assert (await say(http, server, [*A[:70], *C]))[1] == 64
        assert await say(http, server, B) == (texts[1], 0)
        wait_stored(data, 2 * BLOCKS)
        server.terminate()
        assert warnings(server) == []
    with serving(tiny, *options(data)) as server:
        assert await say(http, server, A) == (texts[0], 256)
        assert await say(http, server, B) == (texts[1], 256)
        assert await say(http, server, C) == (texts[2], 0)
        status, metrics = await scrape(http, server)
        assert status == 200
        assert 'swarmcpp_prompt_tokens_cached_total{tier="arena"} 512.0' in metrics
        server.terminate()
        assert warnings(server) == []


async def scrape(http: aiohttp.ClientSession, server: ServeProcess) -> tuple[int, str]:
    async with http.get(f"{server.url}/metrics") as response:
        return response.status, await response.text()


async def test_the_first_repeat_after_kill_9_of_the_node_is_a_hit(
    tiny: Path, data: Path, texts: dict[int, str], http: aiohttp.ClientSession
) -> None:
    with serving(tiny, *options(data)) as server:
        assert await say(http, server, A) == (texts[0], 0)
        wait_stored(data, BLOCKS)
        server.kill()
    with serving(tiny, *options(data)) as server:
        assert await say(http, server, A) == (texts[0], 256)
        assert warnings(server) == []


async def test_the_first_repeat_after_kill_9_of_the_engine_is_a_hit(
    tiny: Path, data: Path, texts: dict[int, str], http: aiohttp.ClientSession
) -> None:
    with serving(tiny, *options(data)) as server:
        assert await say(http, server, A) == (texts[0], 0)
        wait_stored(data, BLOCKS)
        for deaths in (1, 2):
            server.kill_engine()
            await until_health(http, server.url, 30.0, status="ok", restarts=deaths)
            assert await say(http, server, A) == (texts[0], 256)
            assert await say(http, server, A) == (texts[0], 256)
        assert all("the engine died" in line for line in warnings(server)), server.stderr


async def test_the_next_turn_reads_only_the_new_message(tiny: Path, data: Path, http: aiohttp.ClientSession) -> None:
    with serving(tiny, *options(data)) as server:
        text, _ = await say(http, server, A, max_tokens=100)
        # The synthetic vocabulary's tokens for visible characters are their codes.
        turn = [*A, *(ord(character) for character in text), *B[:20]]
        _, cached = await say(http, server, turn)
        assert cached == (300 + 100 - 1) // 64 * 64
        wait_stored(data, 6)
        server.terminate()
    with serving(tiny, *options(data)) as server:
        assert (await say(http, server, turn))[1] == 384


async def test_requests_that_arrive_together_read_their_beginning_once(
    tiny: Path, data: Path, http: aiohttp.ClientSession
) -> None:
    prompts = [[*A[:256], *prompt(10 + place, 30)] for place in range(6)]
    env = {"SWARMCPP_INFERENCE_PREFIX_CACHE_ENABLED": "false"}
    with serving(tiny, *options(data, slots=6), env=env) as server:
        right = [await say(http, server, each) for each in prompts]
    with serving(tiny, *options(data, slots=6)) as server:
        found = await asyncio.gather(*(say(http, server, each) for each in prompts))
        assert [text for text, _ in found] == [text for text, _ in right]
        assert sorted(cached for _, cached in found) == [0, *[256] * 5]


# -- switches --------------------------------------------------------------------------------------------------------


async def test_no_arena_leaves_the_slots(
    tiny: Path, data: Path, texts: dict[int, str], http: aiohttp.ClientSession
) -> None:
    for _ in range(2):
        with serving(tiny, *options(data, "--cache-size", "0")) as server:
            server.wait_says("no cache on disk")
            assert await say(http, server, A) == (texts[0], 0)
            assert await say(http, server, A) == (texts[0], 256)
    assert not list((data / "arena").glob("*.arena"))


async def test_tenants_share_nothing(tiny: Path, data: Path, http: aiohttp.ClientSession) -> None:
    for expected in (0, 256):
        with serving(tiny, *options(data)) as server:
            assert (await say(http, server, A, cache_salt="one"))[1] == expected
            assert (await say(http, server, A, cache_salt="two"))[1] == expected
            assert (await say(http, server, A, cache_salt="one"))[1] == 256
            wait_stored(data, 2 * BLOCKS)


@pytest.mark.parametrize(
    ("size", "cached"),
    [("128", (128, 256)), ("32", (192, 288)), pytest.param("100", (100, 200), marks=pytest.mark.long)],
)
async def test_the_size_of_blocks(
    tiny: Path, data: Path, texts: dict[int, str], http: aiohttp.ClientSession, size: str, cached: tuple[int, int]
) -> None:
    env = {"SWARMCPP_INFERENCE_PREFIX_CACHE_BLOCK_TOKENS": size}
    for _ in range(2):
        with serving(tiny, *options(data), env=env) as server:
            text, first = await say(http, server, A)
            assert text == texts[0] or int(size) % 64
            for length, expected in zip((200, 300), cached, strict=True):
                await say(http, server, A[:length])
                assert (await say(http, server, A[:length]))[1] == expected
            wait_stored(data, cached[1] // int(size))
    assert first == cached[1]


async def test_one_entry_keeps_one_chain(
    tiny: Path, data: Path, texts: dict[int, str], http: aiohttp.ClientSession
) -> None:
    env = {"SWARMCPP_INFERENCE_PREFIX_CACHE_MAX_ENTRIES": "1"}
    with serving(tiny, *options(data), env=env) as server:
        assert await say(http, server, A) == (texts[0], 0)
        wait_stored(data, BLOCKS)
        assert await say(http, server, B) == (texts[1], 0)
        assert await say(http, server, B) == (texts[1], 256)
    with serving(tiny, *options(data), env=env) as server:
        assert stored(data) == BLOCKS
        assert await say(http, server, A) == (texts[0], 0)
    with serving(tiny, *options(data), env=env) as server:
        assert await say(http, server, B) == (texts[1], 0)
        assert await say(http, server, C) == (texts[2], 0)


async def test_two_nodes_on_one_directory(
    tiny: Path, data: Path, texts: dict[int, str], http: aiohttp.ClientSession
) -> None:
    with serving(tiny, *options(data)) as first, serving(tiny, *options(data)) as second:
        for server in (first, second):
            assert await say(http, server, A) == (texts[0], 0)
            assert await say(http, server, A) == (texts[0], 256)
        assert len(list((data / "arena").glob("*.arena"))) == 2
        assert warnings(first) == warnings(second) == []
        first.kill()
        second.kill()
    with serving(tiny, *options(data)) as first, serving(tiny, *options(data)) as second:
        for server in (first, second):
            assert await say(http, server, A) == (texts[0], 256)


# -- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, offsets: list[int]) -> None:
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([(byte or b"\0")[0] ^ 0x55]))


def geometry(path: Path) -> ArenaGeometry:
    known = read_header(path)
    assert known is not None
    return known[0]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "header": lambda path: flip(path, [9]),
    "table": lambda path: flip(path, list(range(PAGE, PAGE + 3000, 7))),
    "payloads": lambda path: flip(path, list(range(geometry(path).payload_start, geometry(path).file_bytes, 999))),
    "one value": lambda path: flip(path, [geometry(path).offset(geometry(path).n_blocks - 1) + 77]),
    "first value": lambda path: flip(path, [geometry(path).offset(0) + 77]),
    "cut to nothing": lambda path: path.open("r+b").close() or path.write_bytes(b""),
    "cut in the middle": lambda path: path.write_bytes(path.read_bytes()[: geometry(path).payload_start + 20_000]),
    "deleted": lambda path: path.unlink(),
    "another file": lambda path: path.write_bytes(b"not an arena" * 5000),
    "ones": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
}


SHORT = ("one value", "cut in the middle", "deleted")
MOSTLY_LONG = [each if each in SHORT else pytest.param(each, marks=pytest.mark.long) for each in DAMAGES]


@pytest.mark.parametrize("damage", MOSTLY_LONG)
async def test_damage_between_two_runs(
    tiny: Path, data: Path, texts: dict[int, str], http: aiohttp.ClientSession, damage: str
) -> None:
    with serving(tiny, *options(data)) as server:
        assert (await say(http, server, A))[0] == texts[0]
        wait_stored(data, BLOCKS)
    DAMAGES[damage](arena_file(data))
    with serving(tiny, *options(data)) as server:
        for tokens, text in zip((A, B, A, B), (texts[0], texts[1]) * 2, strict=True):
            assert (await say(http, server, tokens))[0] == text
        assert (await say(http, server, A))[1] == 256
        wait_stored(data, 2 * BLOCKS)
        server.terminate()
        assert len(warnings(server)) <= 1, server.stderr
    with serving(tiny, *options(data)) as server:
        assert await say(http, server, A) == (texts[0], 256)
        assert warnings(server) == []


@pytest.mark.parametrize("damage", MOSTLY_LONG)
async def test_damage_while_it_runs(
    tiny: Path, data: Path, texts: dict[int, str], http: aiohttp.ClientSession, damage: str
) -> None:
    """With one slot and three prompts in turn, every hit comes from the arena."""
    with serving(tiny, *options(data, slots=1)) as server:
        for place, tokens in enumerate((A, B, C)):
            assert (await say(http, server, tokens))[0] == texts[place]
        wait_stored(data, 3 * BLOCKS)
        assert await say(http, server, A) == (texts[0], 256)
        DAMAGES[damage](arena_file(data))
        for _ in range(3):
            for place, tokens in enumerate((A, B, C)):
                text, cached = await say(http, server, tokens)
                assert text == texts[place]
                assert cached in (0, 64, 128, 192, 256)
        assert cached == 256, "it recovers"
        server.terminate()
        assert len(warnings(server)) <= 1, server.stderr
    with serving(tiny, *options(data, slots=1)) as server:
        for _ in range(2):
            for place, tokens in enumerate((A, B, C)):
                assert (await say(http, server, tokens))[0] == texts[place]
        server.terminate()
        assert len(warnings(server)) <= 1, server.stderr


async def test_an_arena_that_is_deleted_before_its_engine_dies(
    tiny: Path, data: Path, texts: dict[int, str], http: aiohttp.ClientSession
) -> None:
    """The new engine cannot open what the node holds, so that the node opens a new one."""
    with serving(tiny, *options(data, slots=1)) as server:
        for place, tokens in enumerate((A, B)):
            assert await say(http, server, tokens) == (texts[place], 0)
        wait_stored(data, 2 * BLOCKS)
        arena_file(data).unlink()
        server.kill_engine()
        await until_health(http, server.url, 30.0, status="ok", restarts=1)
        for expected in (0, 256):
            for place, tokens in enumerate((A, B)):
                assert await say(http, server, tokens) == (texts[place], expected)
        assert stored(data) >= 2 * BLOCKS
        assert len(warnings(server)) <= 2, server.stderr


async def test_a_directory_that_cannot_be_written_costs_one_line(
    tiny: Path, data: Path, texts: dict[int, str], http: aiohttp.ClientSession
) -> None:
    (data / "arena").write_text("in the way")
    try:
        with serving(tiny, *options(data)) as server:
            assert await say(http, server, A) == (texts[0], 0)
            assert await say(http, server, A) == (texts[0], 256)
            server.terminate()
            assert len(warnings(server)) == 1, server.stderr
            assert "no cache on disk" in server.stderr
            assert "Traceback" not in server.stderr
    finally:
        (data / "arena").unlink()


# -- the same answers ------------------------------------------------------------------------------------------------

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog Max. One"
    " sunny day they found a big red ball under a tree. Lily threw the ball and Max ran to get it. Then a boy came and"
    " said that the ball was his. Lily was sad, but she wanted to be kind, so she gave the ball to the boy. "
)
NAMES = ("Tom", "Mia", "Ben", "Sue", "Max", "Anna", "Tim", "Sara", "Jack", "Lucy")
DEEDS = ("went to the park", "found a big box", "saw a red bird", "was very happy", "wanted to eat cake")
PAIRS = [(name, deed, ("Mom", "The cat")[number % 2]) for number, name in enumerate(NAMES) for deed in DEEDS]


async def test_a_hundred_answers_with_and_without_the_cache(
    trained: Path, data: Path, http: aiohttp.ClientSession
) -> None:
    """A prompt after another one with the same beginning, against the same prompt where nothing is reused."""
    shape = ("--slots", "4", "--ctx-size", "512", "--data-dir", str(data), "--cache-size", "32M")
    gate = asyncio.Semaphore(4)

    async def answer(server: ServeProcess, text: str) -> tuple[str, int]:
        async with gate:
            body = {"prompt": text, "max_tokens": 16, "temperature": 0}
            status, found = await ask(http, server.url, body)
        assert status == 200, found
        return found["choices"][0]["text"], found["usage"]["prompt_tokens_details"]["cached_tokens"]

    async def pair(server: ServeProcess, name: str, deed: str, other: str) -> tuple[str, str, int]:
        start = f"{name} had a story to tell. {STORY}{name} {deed}."
        first, _ = await answer(server, start)
        second, cached = await answer(server, f"{start} {other} said")
        return first, second, cached

    env = {"SWARMCPP_INFERENCE_PREFIX_CACHE_ENABLED": "false"}
    with serving(trained, *shape, env=env) as server:
        without = await asyncio.gather(*(pair(server, *names) for names in PAIRS))
    with serving(trained, *shape) as server:
        cached = await asyncio.gather(*(pair(server, *names) for names in PAIRS))
    assert len(PAIRS) == 50
    assert {found for *_, found in without} == {0}
    assert min(found for *_, found in cached) >= 64, "every second prompt is a hit"
    same = sum(a[:2] == b[:2] for a, b in zip(without, cached, strict=True))
    assert same >= 49, f"{same} of 50 pairs are the same"


async def test_a_server_that_is_killed_while_it_stores_is_no_obstacle(
    tiny: Path, data: Path, texts: dict[int, str], http: aiohttp.ClientSession
) -> None:
    draw = random.Random(5)
    for _ in range(4):
        with launched(tiny, *options(data)) as server:
            server.wait_listening()
            server.wait_ready()
            asks = [asyncio.create_task(say(http, server, tokens)) for tokens in (A, B, prompt(draw.randrange(10**6)))]
            await asyncio.sleep(draw.uniform(0.0, 0.2))
            server.kill()
            await asyncio.gather(*asks, return_exceptions=True)
    with serving(tiny, *options(data)) as server:
        for place, tokens in enumerate((A, B)):
            assert (await say(http, server, tokens))[0] == texts[place]
            assert await say(http, server, tokens) == (texts[place], 256)
        assert warnings(server) == []
