"""What /metrics shows after known requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from swarmcpp.api.answers import Answer, plan
from swarmcpp.api.metrics import Metrics
from swarmcpp.api.openai import parse_chat
from swarmcpp.api.replies import Head
from swarmcpp.api.server import RunningServer
from swarmcpp.core import Event, GenerateRequest, Started
from swarmcpp.errors import EngineFailed
from swarmcpp.testing import FakeClock, FakeService

Serve = Callable[..., Awaitable[RunningServer]]


def samples(text: str) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            labels = ",".join(one.labels.values())
            yield f"{one.name}({labels})" if labels else one.name, one.value


async def test_scrape(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(script="abc", max_running=4))
    for body in ({"prompt": "hello", "n": 2}, {"prompt": "hello", "tools": [{}]}):
        async with http.post(server.url + "/v1/completions", json=body):
            pass
    async with http.get(server.url + "/v1/some/unknown/path"):
        pass
    async with http.get(server.url + "/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        shown = dict(samples(await response.text()))
    expected = {
        "swarmcpp_requests_total(/v1/completions,ok)": 1,
        "swarmcpp_requests_total(/v1/completions,unsupported_field)": 1,
        "swarmcpp_requests_total(unmatched,not_found)": 1,
        "swarmcpp_prompt_tokens_total": 10,
        "swarmcpp_completion_tokens_total": 6,
        "swarmcpp_time_to_first_token_seconds_count": 2,
        "swarmcpp_time_per_output_token_seconds_count": 2,
        "swarmcpp_slots": 4,
        "swarmcpp_slots_busy": 0,
        "swarmcpp_queue_length": 0,
        "swarmcpp_requests_running": 0,
        "swarmcpp_prefill_tokens_per_second": 100,
        "swarmcpp_decode_tokens_per_second": 10,
        "swarmcpp_engine_restarts_total": 0,
        "swarmcpp_ready": 1,
    }
    assert {name: shown.get(name) for name in expected} == expected


async def test_times_are_those_of_the_clock() -> None:
    clock = FakeClock()

    class Slow(FakeService):
        def __init__(self) -> None:
            super().__init__(script="abcde")

        async def _step(self, index: int) -> None:
            clock.advance(3.0 if index == 0 else 0.5)

    service = Slow()
    metrics = Metrics(service.snapshot)
    query = parse_chat(b'{"messages": [{"role": "user", "content": "x"}]}', service.limits, lambda bits: 0)
    head = Head("id", "chat", "fake", 0)
    requests: tuple[GenerateRequest, ...] = await plan(service, query, head)
    await Answer(service, query, head, requests, metrics=metrics, clock=clock).reply()
    shown = dict(samples(metrics.render().decode()))
    assert shown["swarmcpp_time_to_first_token_seconds_sum"] == 3.0
    assert shown["swarmcpp_time_per_output_token_seconds_sum"] == 0.5


async def test_choices_are_counted_by_where_they_ran_and_not_by_name(serve: Serve, http: aiohttp.ClientSession) -> None:
    class Placed(FakeService):
        async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
            seed = request.sampling.seed
            yield Started("local" if seed == 0 else f"peer box{seed}")
            async with aclosing(FakeService.generate(self, request)) as events:
                async for event in events:
                    yield event

    service = Placed()
    server = await serve(service)
    for seed, n in ((0, 4), (5, 1)):
        async with http.post(server.url + "/v1/completions", json={"prompt": "a", "seed": seed, "n": n}):
            pass
    service.fail_at = (2, EngineFailed("the engine died"))
    async with http.post(server.url + "/v1/completions", json={"prompt": "a", "seed": 1}):
        pass
    async with http.get(server.url + "/metrics") as response:
        shown = dict(samples(await response.text()))
    assert {name: value for name, value in shown.items() if name.startswith("swarmcpp_routed_requests_total")} == {
        "swarmcpp_routed_requests_total(ok,local)": 1,
        "swarmcpp_routed_requests_total(ok,peer)": 4,
        "swarmcpp_routed_requests_total(engine_failed,peer)": 1,
    }
