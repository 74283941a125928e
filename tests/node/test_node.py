"""A node of two models: each request goes to the one that it names, and the swarm's models are asked like its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_runner import FakeHosted, FakeRunner
from swarm_support import HOST, until

from swarmcpp.commands.swarm import in_swarm
from swarmcpp.config import Config, ServerConfig, StorageConfig, SwarmConfig
from swarmcpp.core import ChatMessage, Done, Event, GenerateRequest, Limits, Started, TextEvent
from swarmcpp.errors import BadConfig, Cancelled, EngineFailed, NotReady, QueueFull, UnknownModel
from swarmcpp.models.synthetic import Shape, write_model
from swarmcpp.node.member import Swarm
from swarmcpp.node.node import Node
from swarmcpp.supervisor.process import EngineStatus
from swarmcpp.swarm.identity import SwarmKey
from swarmcpp.swarm.store import SwarmStore

SMALL = Shape("small", "llama", 1, 32, 2, 1, 64, 512, 300)
LARGE = Shape("large", "llama", 2, 32, 2, 1, 64, 512, 320)
THIRD = Shape("third", "llama", 1, 64, 2, 1, 64, 512, 300)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("models")
    small, large = (write_model(directory / f"{each.name}.gguf", each, quant="Q8_0") for each in (SMALL, LARGE))
    return small, large


@dataclass
class Two:
    """A node with both models, which answer with their own names."""

    node: Node
    small: FakeHosted
    large: FakeHosted
    swarm: Swarm | None = None

    async def ask(self, model: str, **changes: object) -> list[Event]:
        async with asyncio.timeout(60), aclosing(self.node.generate(request(model, **changes))) as events:
            return [event async for event in events]


def request(model: str, **changes: object) -> GenerateRequest:
    fields: dict[str, object] = {"id": "r", "prompt": (1, 2, 3), "max_tokens": 20}
    return GenerateRequest(model=model, **(fields | changes))  # type: ignore[arg-type]


def text_of(events: list[Event]) -> str:
    assert isinstance(events[-1], Done) and sum(isinstance(each, Done) for each in events) == 1
    return "".join(each.text for each in events if isinstance(each, TextEvent))


def route_of(events: list[Event]) -> str:
    assert isinstance(events[0], Started)
    return events[0].route


@asynccontextmanager
async def hosting(
    models: tuple[Path, Path], config: Config | None = None, swarm: Swarm | None = None
) -> AsyncIterator[Two]:
    small = FakeHosted(models[0], FakeRunner("small", ctx_size=100), swarm)
    large = FakeHosted(models[1], FakeRunner("large", ctx_size=200), swarm)
    async with AsyncExitStack() as stack:
        for each in (small, large):
            stack.push_async_callback(each.close)
            await each.open()
        yield Two(Node(config or Config(), [small, large], swarm), small, large, swarm)


@pytest.fixture
async def two(models: tuple[Path, Path]) -> AsyncIterator[Two]:
    async with hosting(models) as found:
        yield found


async def test_a_request_goes_to_the_model_that_it_names(two: Two) -> None:
    for hosted in (two.large, two.small):
        for name in (hosted.info.id, hosted.info.path, f"{hosted.info.id}.gguf"):
            events = await two.ask(name)
            assert (text_of(events), route_of(events)) == (hosted.info.id, "local")
    assert [each.model for each in two.small.fake.requests] == ["small", two.small.info.path, "small.gguf"]


async def test_all_models_are_listed_the_default_first(two: Two) -> None:
    assert [each.id for each in two.node.models()] == ["small", "large"]
    assert [each.n_vocab for each in two.node.models()] == [300, 320]


async def test_each_model_has_limits_and_a_state_of_its_own(two: Two) -> None:
    assert two.node.limits("small") == Limits(ctx_size=100, n_vocab=300)
    assert two.node.limits("large.gguf") == Limits(ctx_size=200, n_vocab=320)
    assert two.node.limits() == two.node.limits("small")
    two.large.fake.status = EngineStatus(state="failed", detail="it died")
    assert (two.node.snapshot().state, two.node.snapshot("large").state) == ("ready", "failed")
    assert two.node.snapshot("large").model == two.large.info
    with pytest.raises(NotReady, match="it died"):
        await two.node.tokenize_text("large", "a")
    assert await two.node.tokenize_text("small", "a") == (97,)


async def test_text_is_read_with_the_vocabulary_of_its_model(two: Two) -> None:
    chat = [ChatMessage("user", "hello")]
    assert two.large.codec and two.small.codec
    assert two.large.codec.n_vocab == 320
    await two.small.close()
    assert await two.node.tokenize_chat("large", chat) == tuple(two.large.codec.tokenize_chat(chat))
    with pytest.raises(NotReady):
        await two.node.tokenize_chat("small", chat)


async def test_an_unknown_model_is_refused_with_the_names_of_those_that_are_served(two: Two) -> None:
    for refused in (two.ask("other"), two.node.tokenize_text("other", "a"), two.node.tokenize_chat("other", [])):
        with pytest.raises(UnknownModel, match="'other' is not served here; this node serves 'small', 'large'"):
            await refused


async def test_a_model_that_still_loads_keeps_nobody_from_the_other_one(models: tuple[Path, Path]) -> None:
    small, large = FakeHosted(models[0], FakeRunner("small")), FakeHosted(models[1], FakeRunner("large"))
    node = Node(Config(), [small, large])
    await large.open()
    assert (node.snapshot().state, node.snapshot("large").state) == ("starting", "ready")
    with pytest.raises(NotReady):
        await node.tokenize_text("small", "a")
    assert text_of(await Two(node, small, large).ask("large")) == "large"
    await large.close()


def test_two_models_of_one_name_are_refused(models: tuple[Path, Path]) -> None:
    with pytest.raises(BadConfig, match="small"):
        Node(Config(), [FakeHosted(models[0], FakeRunner("a")), FakeHosted(models[0], FakeRunner("b"))])


async def test_a_deadline_and_a_stop_string_end_the_work(two: Two) -> None:
    assert text_of(await two.ask("large", stop=("g",))) == "lar"
    assert two.large.fake.ahead == 0
    two.large.fake.gate.clear()
    with pytest.raises(Cancelled, match=r"longer than its limit of 0.01 s"):
        await two.ask("large", deadline_s=0.01)
    assert two.large.fake.ahead == 0


async def test_a_reader_who_leaves_stops_the_work_at_once(two: Two) -> None:
    events = two.node.generate(request("large"))
    assert isinstance(await anext(events), Started)
    assert (two.large.fake.ahead, two.small.fake.ahead) == (1, 0)
    await events.aclose()
    assert two.large.fake.ahead == 0


# -- in a swarm --------------------------------------------------------------------------------------------------------


def config_of(data: Path, name: str) -> Config:
    return Config(
        server=ServerConfig(port=0),
        storage=StorageConfig(data_dir=data),
        swarm=SwarmConfig(enabled=True, host=HOST, port=0, name=name, discovery=False),
    )


@dataclass
class Pair:
    """Ann, who has both models, and a node that has one file of its own or none of them."""

    ann: Two
    bob: Node
    swarm: Swarm
    own: list[FakeHosted]

    async def ask(self, model: str) -> list[Event]:
        return await Two(self.bob, self.ann.small, self.ann.large).ask(model)


@asynccontextmanager
async def pair(models: tuple[Path, Path], tmp_path: Path, *own: tuple[Path, FakeRunner]) -> AsyncIterator[Pair]:
    key, ann_config, bob_config = SwarmKey.new(), config_of(tmp_path / "a", "Ann"), config_of(tmp_path / "b", "Bob")
    async with (
        in_swarm(ann_config, SwarmStore(tmp_path / "a"), key, (), lan=False) as ann,
        hosting(models, ann_config, ann) as two,
        in_swarm(bob_config, SwarmStore(tmp_path / "b"), key, ann.capability().addresses, lan=False) as bob,
        AsyncExitStack() as stack,
    ):
        hosted = [FakeHosted(path, runner, bob) for path, runner in own]
        for each in hosted:
            stack.push_async_callback(each.close)
            await each.open()
        await until(lambda: len(list(bob.models.offers())) == 2, "Bob knows what Ann has")
        yield Pair(two, Node(bob_config, hosted, bob), bob, hosted)


@pytest.fixture
def third(models: tuple[Path, Path]) -> Path:
    path = models[0].with_name("third.gguf")
    return path if path.exists() else write_model(path, THIRD, quant="Q8_0")


@pytest.fixture
def namesake(tmp_path: Path) -> Path:
    return write_model(tmp_path / "large.gguf", THIRD, quant="Q8_0")


async def test_what_a_peer_serves_is_listed_and_asked_by_name(
    models: tuple[Path, Path], third: Path, tmp_path: Path
) -> None:
    async with pair(models, tmp_path, (third, FakeRunner("third"))) as found:
        assert [each.id for each in found.bob.models()] == ["third", "small", "large"]
        assert found.bob.limits("large") == Limits(ctx_size=200, n_vocab=320)
        for name, route in (("large", "peer Ann"), ("small", "peer Ann"), ("third", "local")):
            assert await found.bob.tokenize_text(name, "a") == (97,)
            events = await found.ask(name)
            assert (text_of(events), route_of(events)) == (name, route)
        assert [each.model for each in found.ann.large.fake.requests] == ["large"]
        with pytest.raises(UnknownModel, match="'third'"):
            await found.ask("fourth")


async def test_a_node_tells_of_each_model_whether_it_can_be_had(
    models: tuple[Path, Path], third: Path, tmp_path: Path
) -> None:
    async with pair(models, tmp_path, (third, FakeRunner("third"))) as found:
        two = found.ann
        assert two.swarm
        two.small.fake.ahead, two.large.fake.ahead = 1, 2
        told = two.swarm.capability()
        assert ([each.id for each in told.models], told.state) == (["small", "large"], "ready")
        assert [each.ctx_size for each in told.models] == [100, 200]
        assert told.load.slots_busy == 3
        two.small.fake.status = EngineStatus(state="failed")
        told = two.swarm.capability()
        assert ([each.id for each in told.models], told.state) == (["large"], "ready")
        two.large.fake.status = EngineStatus(state="restarting")
        assert two.swarm.capability().state == "failed"


async def test_what_fails_here_goes_on_at_a_peer(models: tuple[Path, Path], tmp_path: Path) -> None:
    failing = FakeRunner("large", ctx_size=200, fail_at=(2, EngineFailed("it died")))
    async with pair(models, tmp_path, (models[1], failing)) as found:
        assert [each.id for each in found.bob.models()] == ["large", "small"]
        events = await found.ask("large")
        assert (text_of(events), route_of(events)) == ("large", "local")
        (there,) = found.ann.large.fake.requests
        assert there.generated == (ord("l"), ord("a"))
        # The last failure is told when nobody is left.
        found.ann.large.fake.fail_at = (3, QueueFull("no room", retry_after=1.0))
        with pytest.raises(QueueFull, match="no room"):
            await found.ask("large")
        assert found.swarm.requests.running() == ()


async def test_a_name_that_is_taken_here_is_not_a_peers(
    models: tuple[Path, Path], namesake: Path, tmp_path: Path
) -> None:
    async with pair(models, tmp_path, (namesake, FakeRunner("mine"))) as found:
        assert [(each.id, each.n_vocab) for each in found.bob.models()] == [("large", 300), ("small", 300)]
        assert text_of(await found.ask("large")) == "mine"
        assert found.bob.limits("large") == Limits(ctx_size=256, n_vocab=300)


async def test_a_reader_who_leaves_stops_the_work_wherever_it_runs(
    models: tuple[Path, Path], third: Path, tmp_path: Path
) -> None:
    async with pair(models, tmp_path, (third, FakeRunner("third"))) as found:
        for model, runner in (("large", found.ann.large.fake), ("third", found.own[0].fake)):
            # Between two tokens, and while one is waited for.
            events = found.bob.generate(request(model))
            assert isinstance(await anext(events), Started)
            runner.gate.clear()
            await events.aclose()
            assert found.swarm.requests.running() == ()
            if model == "third":
                assert runner.ahead == 0, "not at some later time"
            await until(lambda runner=runner: runner.ahead == 0, "it stopped")  # type: ignore[misc]
            events = found.bob.generate(request(model))
            waiting = asyncio.ensure_future(anext(events))
            await until(lambda runner=runner: runner.ahead == 1, "it runs")  # type: ignore[misc]
            assert [each.request.model for each in found.swarm.requests.running()] == [model]
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda runner=runner: runner.ahead == 0, "it stopped")  # type: ignore[misc]
            assert found.swarm.requests.running() == ()
