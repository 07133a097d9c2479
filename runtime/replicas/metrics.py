"""GET /metrics of all replicas together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..server.model_routes import PROMETHEUS


class MetricsOfAll:
    """An ASGI app that answers with the metrics of every replica, whose id is the label replica."""

    def __init__(self, replicas: DeploymentHandle):
        self._replicas = replicas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = await self._replicas.broadcast("metrics").results_async()
        registry = CollectorRegistry()
        registry.register(_Together(found))
        await Response(generate_latest(registry), media_type=PROMETHEUS)(scope, receive, send)


class _Together(Collector):
    """The metrics of several replicas, each with its id."""

    def __init__(self, replicas: Iterable[tuple[str, Sequence[Metric]]]):
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
