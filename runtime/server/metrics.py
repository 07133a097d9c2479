"""Metrics for Prometheus, under vLLM's names with the prefix internlm3."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from ..api.async_llm import AsyncLLM
from .usage import Usage

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What a server counts, in a registry of its own.

    Args:
        model: the label model_name.
        llm: returns the AsyncLLM, None while it is loading.
    """

    def __init__(self, model: str, llm: Callable[[], AsyncLLM | None]):
        self._registry, self._model = CollectorRegistry(), model
        self._gauge("num_requests_running", "Answers that are decoded", lambda: _of(llm(), "running"))
        self._gauge("num_requests_waiting", "Answers that wait for a slot", lambda: _of(llm(), "waiting"))
        self._gauge("kv_cache_usage_perc", "Share of the KV cache that is in use, 0 to 1", lambda: _used(llm()))
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens that were looked up in the KV cache")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens that were in the KV cache")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens")
        self._generated = self._counter("generation_tokens", "Generated tokens")
        self._ended = Counter(
            "internlm3:request_success", "Requests that have ended", ("model_name", "finished_reason"),
            registry=self._registry,
        )  # fmt: skip
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token")
        self._each = self._histogram("inter_token_latency_seconds", "Mean time between two tokens of an answer")
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to its last token")
        self._prefill = self._histogram("request_prefill_time_seconds", "From the start of prefill to the first token")
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last")

    def finished(self, usage: Usage, reasons: Sequence[str | None]) -> None:
        """Counts a request; `reasons`: why each of its answers ended."""
        self._queries.inc(usage.prompt)
        self._hits.inc(usage.cached)
        self._prompt.inc(usage.prompt)
        self._generated.inc(usage.generated)
        for reason in reasons:
            self._ended.labels(self._model, reason).inc()
        timings = usage.timings
        self._first.observe(timings.first_token)
        self._whole.observe(timings.first_token + timings.decode)
        self._prefill.observe(timings.prompt)
        self._decode.observe(timings.decode)
        if usage.generated > len(reasons):
            self._each.observe(timings.decode * len(reasons) / (usage.generated - len(reasons)))

    def broken_off(self) -> None:
        """Counts a request whose client has gone, or that took too long."""
        self._ended.labels(self._model, "abort").inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> list[Metric]:
        """All metrics as they are."""
        return list(self._registry.collect())

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        gauge = Gauge(f"internlm3:{name}", text, ("model_name",), registry=self._registry)
        gauge.labels(self._model).set_function(value)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"internlm3:{name}", text, ("model_name",), registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str) -> Histogram:
        every = Histogram(f"internlm3:{name}", text, ("model_name",), registry=self._registry, buckets=_SECONDS)
        return every.labels(self._model)


def _of(llm: AsyncLLM | None, name: str) -> float:
    if llm is None:
        return 0.0
    return llm.waiting if name == "waiting" else llm.llm.engine.running


def _used(llm: AsyncLLM | None) -> float:
    pages = None if llm is None else llm.llm.engine.pages
    return 0.0 if pages is None else 1 - pages.free / len(pages)
