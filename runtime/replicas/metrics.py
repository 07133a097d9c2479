"""The metrics of all replicas together: each reports its own to one actor, where the ingress reads them.

The ingress can't ask a replica that has all the requests it may have: that would wait like another request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from ray.actor import ActorHandle
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..server.model_routes import PROMETHEUS

# Seconds from one report of a replica to the next, and those after which it is taken for gone.
EVERY, GONE = 1.0, 10.0


class MetricsStore:
    """An actor that has the last report of each replica."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, list[Metric]]] = {}

    def report(self, replica: str, metrics: list[Metric]) -> None:
        self._reports[replica] = time.monotonic(), metrics

    def reports(self) -> dict[str, list[Metric]]:
        """The metrics of each replica, by its id."""
        since = time.monotonic() - GONE
        self._reports = {replica: report for replica, report in self._reports.items() if report[0] > since}
        return {replica: metrics for replica, (_, metrics) in self._reports.items()}


def report(store: ActorHandle, replica: str, collect: Callable[[], list[Metric]]) -> None:
    """Reports what `collect` returns, as long as this process lives."""

    def go_on() -> None:
        while True:
            store.report.remote(replica, collect())
            time.sleep(EVERY)

    threading.Thread(target=go_on, name="internlm3-metrics", daemon=True).start()


class MetricsOfAll:
    """An ASGI app that answers with the metrics of every replica, whose id is the label replica."""

    def __init__(self, store: ActorHandle):
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        registry = CollectorRegistry()
        registry.register(_Together((await self._store.reports.remote()).items()))
        await Response(generate_latest(registry), media_type=PROMETHEUS)(scope, receive, send)


class _Together(Collector):
    """The metrics of several replicas, each with its id."""

    def __init__(self, replicas: Iterable[tuple[str, list[Metric]]]):
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, metrics in self._replicas:
            for metric in metrics:
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                family.samples += [
                    sample._replace(labels={**sample.labels, "replica": replica}) for sample in metric.samples
                ]
        yield from families.values()
