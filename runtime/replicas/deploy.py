"""Runs replicas on a Ray cluster until a signal: then what is under way finishes, and the replicas end."""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
import time
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.deployment import Application

from ..server.listen import listen
from ..server.settings import Settings
from .cluster import cluster, connect
from .count import Count
from .ingress import Ingress
from .metrics import MetricsStore
from .replica import Replica

APP = "internlm3"
# Requests of one session go to one replica, while that is there and has room.
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
# The streams that one replica of the ingress should have.
_STREAMS = 64
_LOGS = "/tmp/ray/session_latest/logs/serve"


def application(options: dict[str, Any], settings: Settings, count: Count, gpus: int) -> Application:
    """The application of Ray Serve: replicas, and the ingress before them.

    Args:
        options: of LLM, for every replica; max_batch_size is one of them.
        gpus: that a replica has, 0 or 1.
    """
    rows = options["max_batch_size"]
    scale: dict[str, Any] = {"num_replicas": count.most}
    if count.least < count.most:
        limits = {"min_replicas": count.least, "max_replicas": count.most, "initial_replicas": count.least}
        scale = {"autoscaling_config": AutoscalingConfig(**limits, target_ongoing_requests=rows)}
    replicas = serve.deployment(Replica).options(
        max_ongoing_requests=2 * rows,  # as many as are decoded together, and as many that wait for a slot
        max_queued_requests=settings.max_waiting,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        graceful_shutdown_timeout_s=settings.drain_seconds,
        max_constructor_retry_count=1,
        **scale,
    )
    # Forwarding what a replica sends is little work: one process is enough for many streams.
    streams = {"min_replicas": 1, "max_replicas": count.most, "target_ongoing_requests": _STREAMS}
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="Ingress",
        max_ongoing_requests=settings.max_connections,
        autoscaling_config=AutoscalingConfig(**streams),
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    store = ray.remote(MetricsStore).options(num_cpus=0, max_restarts=-1).remote()
    return ingress.bind(replicas.bind(options, settings, store), settings, store)


def serve_replicas(options: dict[str, Any], settings: Settings, port: int, count: Count) -> None:
    """Serves until a signal, on the cluster that RAY_ADDRESS names, or on this machine.

    Never returns: raises KeyboardInterrupt after SIGINT, and SystemExit after SIGTERM, when what was under way has
    finished, or has had its time; on this machine a second signal ends all at once. Raises ValueError if this machine
    has too little for `count`, and OSError if the port is taken, or if Ray or a replica can't start.
    """
    if not cluster():
        for each in listen(settings.host, port):  # at once, instead of after Ray's start
            each.close()
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    gpus = connect(count, options["device"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # after Ray's own
    try:
        # A Serve that was running keeps its own host and port, and says so.
        where = "" if cluster() else f" at http://{settings.host}:{port}"
        print(f"internlm3: starts {count} of {settings.model}; logs are below {_LOGS}", file=sys.stderr)
        serve.start(http_options=HTTPOptions(host=settings.host, port=port), logging_config={"log_level": "WARNING"})
        drained = False
        try:
            _run(application(options, settings, count, gpus))
            print(f"internlm3: ready{where}", file=sys.stderr)
            try:
                threading.Event().wait()
            finally:
                _drain(settings.drain_seconds)
                drained = True
        finally:
            # Replicas end by themselves, in up to drain_seconds, unless their Ray ends with them.
            if drained or cluster():
                serve.delete(APP)
    finally:
        ray.shutdown()


def _drain(seconds: float) -> None:
    """Has new requests refused, and waits for those under way."""
    end, ingress = time.monotonic() + seconds, serve.get_deployment_handle("Ingress", APP)
    while any(ingress.broadcast("drain").results()) and time.monotonic() < end:
        time.sleep(0.1)


def _run(app: Application) -> None:
    """Deploys, and waits until all replicas are there. Raises OSError with what a replica raised."""
    try:
        serve.run(app, name=APP, route_prefix="/")
    except RuntimeError as error:
        messages = [each.message for each in serve.status().applications[APP].deployments.values()]
        raised = [line for message in messages for line in message.splitlines() if re.match(r"[\w.]+: ", line)]
        raise OSError(f"a replica could not start: {raised[-1] if raised else error}") from None
