"""Counters and histograms of the API, in Prometheus' text form. One registry per server, nothing global."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from swarmcpp.core import NodeSnapshot, Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# From a warm small model (tens of ms) to a long prompt on a slow CPU (minutes).
_TTFT_BUCKETS_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
# From 500 tokens/s to half a token/s.
_TPOT_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2)


class Metrics:
    """What one API server counts. Used on the event loop's thread."""

    def __init__(self, snapshot: Callable[[], NodeSnapshot]) -> None:
        self.registry = CollectorRegistry()
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        self._requests = counter(
            "swarmcpp_requests",
            "HTTP requests by endpoint and outcome: ok, cancelled (the client left), slow_client, or an error code.",
            ("endpoint", "outcome"),
        )
        self._ttft = histogram(
            "swarmcpp_time_to_first_token_seconds",
            "From a parsed request to the first token of each of its choices.",
            buckets=_TTFT_BUCKETS_S,
        )
        self._tpot = histogram(
            "swarmcpp_time_per_output_token_seconds",
            "Mean time between the tokens of one choice after its first.",
            buckets=_TPOT_BUCKETS_S,
        )
        self._prompt = counter("swarmcpp_prompt_tokens", "Prompt tokens of finished choices.")
        self._cached = counter(
            "swarmcpp_prompt_tokens_cached",
            "Prompt tokens that were not computed again, by where they came from.",
            ["tier"],
        )
        self._lookups = counter(
            "swarmcpp_prefix_lookups",
            "Finished choices by where the beginning of their prompt came from; miss: nowhere.",
            ["tier"],
        )
        self._routed = counter(
            "swarmcpp_routed_requests",
            "Choices that had a first token, by where they ran (local or peer) and outcome: ok, cancelled (the client "
            "left), or an error code.",
            ("route", "outcome"),
        )
        self._completion = counter("swarmcpp_completion_tokens", "Tokens generated, also of choices that were cut off.")
        self._guessed = counter(
            "swarmcpp_guessed_tokens",
            "Tokens of finished choices that were guessed ahead and verified, by outcome: accepted or rejected.",
            ["outcome"],
        )
        self.registry.register(_SnapshotCollector(snapshot))

    def request(self, endpoint: str, outcome: str) -> None:
        """Count one HTTP request. Both labels come from small fixed sets, never from the client."""
        self._requests.labels(endpoint, outcome).inc()

    def first_token(self, seconds: float) -> None:
        """Count the first token of a choice."""
        self._ttft.observe(seconds)

    def routed(self, route: str, outcome: str) -> None:
        """Count the end of a choice that had begun at `route`. A peer's name is no label: there is no end of them."""
        self._routed.labels(route.partition(" ")[0], outcome).inc()

    def choice(self, tokens: int, seconds: float, usage: Usage | None) -> None:
        """Count the end of a choice: `tokens` seen, `seconds` from the first to the last, usage when it finished."""
        if tokens > 1:
            self._tpot.observe(seconds / (tokens - 1))
        self._completion.inc(usage.completion_tokens if usage else tokens)
        if usage:
            self._prompt.inc(usage.prompt_tokens)
            if usage.cached_tokens:
                self._cached.labels(usage.cached_tier).inc(usage.cached_tokens)
            self._guessed.labels("accepted").inc(usage.accepted)
            self._guessed.labels("rejected").inc(usage.drafted - usage.accepted)
            self._lookups.labels(usage.cached_tier or "miss").inc()

    def render(self) -> bytes:
        """The text of GET /metrics."""
        return generate_latest(self.registry)


class _SnapshotCollector(Collector):
    """Gauges read from the node when a scrape asks, so that nothing has to be kept in step."""

    def __init__(self, snapshot: Callable[[], NodeSnapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask a node that is still starting for its state."""
        return []

    def collect(self) -> Iterator[Metric]:
        now = self._snapshot()
        gauges = {
            "ready": ("1 when requests are accepted.", now.state == "ready"),
            "queue_length": ("Requests that wait for a slot.", now.queued),
            "requests_running": ("Requests that have a slot.", now.running),
            "slots": ("Slots of all engines.", now.slots),
            "slots_busy": ("Slots in use.", now.slots_busy),
            "ctx_size": ("Tokens that one slot holds.", now.ctx_size),
            "prefill_tokens_per_second": ("Moving average of prompt processing.", now.prefill_tps),
            "decode_tokens_per_second": ("Moving average of generation, all streams together.", now.decode_tps),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"swarmcpp_{name}", text, value=float(value))
        yield CounterMetricFamily("swarmcpp_engine_restarts", "Engines started again after a crash.", now.restarts)
