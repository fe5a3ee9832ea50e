"""What is measured, for Prometheus. Request times are taken in the server; the engine's counts are asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moesaic.serving.parent import resident_bytes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

REASONS = {
    "completions": ("stop", "length", "error"), "rejected": ("queue_full", "invalid"),
    "aborts": ("disconnect", "timeout", "slow_reader", "shutdown", "error"),
}  # fmt: skip
"""Series that are there from the beginning: the first of a kind would else be no increase, and raise no alarm."""


class Metrics:
    """A registry of its own, so that several servers in one process do not share counts."""

    def __init__(self, *, expert_series: bool = False) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per series, which nobody reads
        self.registry = registry = CollectorRegistry()
        self.engine = EngineCollector(expert_series)
        registry.register(self.engine)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"moesaic_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"moesaic_{name}", text, buckets=buckets, registry=registry)

        self.http = counter("http_requests", "HTTP requests by route and status", "route", "status")
        self.completions = counter("completions", "Completions that ended, by reason", "reason")
        self.aborted = counter("aborts", "Completions that were cut off, by reason", "reason")
        self.rejected = counter("rejected", "Requests that were not taken, by reason", "reason")
        for made, name in ((self.completions, "completions"), (self.aborted, "aborts"), (self.rejected, "rejected")):
            for reason in REASONS[name]:
                made.labels(reason)
        self.prompt = counter("prompt_tokens", "Tokens of prompts taken")
        self.generated = counter("generated_tokens", "Tokens sent to clients")
        self.stale = counter("stale_scrapes", "Scrapes that show an earlier state of the engine, busy in a long step")
        self.lost_logs = counter("log_records_lost", "Log records that could not be written")
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to a completion's first token", FIRST)
        self.between_tokens = histogram("inter_token_seconds", "Between two tokens of a completion", BETWEEN)
        self.whole = histogram("request_seconds", "From a request's arrival to the end of a completion", WHOLE)

    def finished(self, reason: str, seconds: float) -> None:
        self.completions.labels(reason).inc()
        self.whole.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """The engine's newest counts. expert_series: one series per expert too; else its layers' balance only."""

    def __init__(self, expert_series: bool) -> None:
        self.stats: Mapping[str, Any] = {}
        self.expert_series = expert_series

    def collect(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily("moesaic_resident_bytes", "Memory of a process", labels=["process"])
        memory.add_metric(["server"], resident_bytes())
        if self.stats:
            memory.add_metric(["engine"], self.stats["resident"])
            yield from self.counts(self.stats)
        yield memory

    def counts(self, stats: Mapping[str, Any]) -> Iterator[Metric]:
        queried, hits = stats["prefix_queried"], stats["prefix_hits"]
        used, blocks = stats["kv_blocks_used"], stats["kv_blocks"]
        yield gauge("queue_requests", "Completions waiting in the engine", stats["waiting"])
        yield gauge("running_requests", "Completions being computed", stats["running"])
        yield gauge("kv_blocks", "Blocks of the KV cache", blocks)
        yield gauge("kv_blocks_used", "Blocks that requests hold", used)
        yield gauge("kv_use_ratio", "Part of the KV cache that requests hold", used / max(1, blocks))
        yield total("prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache", queried)
        yield total("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache", hits)
        yield gauge("prefix_cache_hit_ratio", "Part of the tokens looked up that were found", hits / max(1, queried))
        yield total("preemptions", "Requests that lost their KV blocks and were computed again", stats["preemptions"])
        yield total("engine_steps", "Forward passes", stats["steps"])
        yield total("near_ties", "Tokens that a rounding could have turned; 0 when deterministic", stats["near_ties"])
        yield total("expert_sampled_steps", "Steps in which experts' choices were counted", stats["counted_steps"])
        yield from self.experts(stats["experts"])

    def experts(self, layers: list[tuple[int, list[int]]]) -> Iterator[Metric]:
        balance = GaugeMetricFamily("moesaic_expert_balance", "Load of the busiest expert over the mean; 1 is even",
                                    labels=["layer"])  # fmt: skip
        unused = GaugeMetricFamily("moesaic_experts_unused", "Experts that no sampled token chose", labels=["layer"])
        load = CounterMetricFamily("moesaic_expert_load_sampled", "Sampled choices of each expert",
                                   labels=["layer", "expert"])  # fmt: skip
        for layer, counts in layers:
            balance.add_metric([str(layer)], max(counts) * len(counts) / max(1, sum(counts)))
            unused.add_metric([str(layer)], counts.count(0))
            for expert, count in enumerate(counts):
                load.add_metric([str(layer), str(expert)], count)
        yield balance
        yield unused
        if self.expert_series:
            yield load


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"moesaic_{name}", text, value=value)


def total(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"moesaic_{name}", text, value=value)
