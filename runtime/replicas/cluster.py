"""The Ray cluster that replicas run on: the one that RAY_ADDRESS names, or this machine alone."""

from __future__ import annotations

import logging
import os

import ray


def connect() -> str | None:
    """Connects to the cluster that RAY_ADDRESS names, which is returned, or starts Ray on this machine alone.

    Without Ray's reports of usage and its lines about itself.
    """
    cluster = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    dashboard = None if cluster else False
    ray.init(cluster or "local", include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    return cluster


def gpus_each(device: str) -> int:
    """How many GPUs a replica gets: one, if the cluster has any and the model is to use them."""
    return int(device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1)


def check_this_machine(replicas: int, gpus: int) -> None:
    """Raises ValueError if there are too few GPUs or CPUs. Ray waits for machines that may come; here none will."""
    what = "GPU" if gpus else "CPU"
    if replicas > (there := int(ray.cluster_resources().get(what, 0))):
        name = f"{there} {what}{'s' * (there != 1)}"
        needs = f"{replicas} replicas need a {what} each" if replicas > 1 else f"a replica needs a {what}"
        raise ValueError(f"{needs}, and this machine has {name}: name a cluster by RAY_ADDRESS")
