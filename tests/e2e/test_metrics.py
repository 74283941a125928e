"""GET /metrics of a real server after known traffic."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_client import ask, completion, listen, until_health
from serve_process import serving

pytestmark = pytest.mark.e2e

Samples = dict[tuple[str, str], float]


async def scrape(http: aiohttp.ClientSession, url: str) -> Samples:
    """Values by sample name and outcome, of the endpoint of text completions where there is one."""
    async with http.get(f"{url}/metrics") as response:
        assert response.status == 200
        text = await response.text()
    return {
        (sample.name, sample.labels.get("outcome", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("endpoint", "/v1/completions") == "/v1/completions" and "le" not in sample.labels
    }


async def test_traffic_is_counted(tiny: Path, data_dir: Path, http: aiohttp.ClientSession) -> None:
    with serving(tiny, "--slots", "2", "--ctx-size", "512", "--data-dir", str(data_dir)) as server:
        url = server.url
        await asyncio.gather(*(listen(http, url, completion([number, 2, 3], 10)) for number in range(5)))
        assert (await ask(http, url, completion("a", 10, n=2)))[0] == 200
        assert (await ask(http, url, completion([], 10)))[0] == 400
        assert (await ask(http, url, completion("a", 10, tools=[{}])))[0] == 400
        assert (await ask(http, url, completion("a", 10, model="other")))[0] == 404
        found = await scrape(http, url)
        requests = {outcome: value for (name, outcome), value in found.items() if name == "swarmcpp_requests_total"}
        assert requests == {"ok": 6, "invalid_request": 1, "unsupported_field": 1, "model_not_found": 1}
        assert found["swarmcpp_time_to_first_token_seconds_count", ""] == 7
        assert found["swarmcpp_time_per_output_token_seconds_count", ""] == 7
        assert found["swarmcpp_completion_tokens_total", ""] == 70
        # Each choice counts: five prompts of three tokens, two of one.
        assert found["swarmcpp_prompt_tokens_total", ""] == 17
        assert found["swarmcpp_slots", ""] == 2
        assert found["swarmcpp_slots_busy", ""] == found["swarmcpp_queue_length", ""] == 0
        assert found["swarmcpp_ready", ""] == 1
        assert found["swarmcpp_decode_tokens_per_second", ""] > 0
        assert found["swarmcpp_engine_restarts_total", ""] == 0

        server.kill_engine()
        assert (await ask(http, url, completion("a", 10)))[0] == 200
        await until_health(http, url, state="ready", restarts=1)
        found = await scrape(http, url)
        assert found["swarmcpp_engine_restarts_total", ""] == 1
        assert found["swarmcpp_requests_total", "ok"] == 7
