"""The Ray cluster that replicas run on: the one that RAY_ADDRESS names, or this machine alone."""

from __future__ import annotations

import logging
import os

import ray
import torch

from .count import Count


def cluster() -> str | None:
    """What RAY_ADDRESS says; None: replicas run on this machine."""
    return os.environ.get("RAY_ADDRESS")


def connect(count: Count, device: str) -> int:
    """Connects to the cluster, or starts Ray on this machine alone: without reports of usage, and quietly.

    Args:
        device: of the model, "auto", "cpu" or "cuda".

    Returns how many GPUs each replica gets: one, if there are any and the model is to use them.

    Raises ValueError if this machine has too few GPUs or cores, and OSError if Ray does not start.
    """
    if address := cluster():
        ray.init(address, log_to_driver=False)
        return int(device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1)
    cores, gpus = len(os.sched_getaffinity(0)), 0 if device == "cpu" else torch.cuda.device_count()
    there, what = (gpus, "GPU") if gpus else (cores, "core")
    if count.least > there:  # Ray would wait for machines that may come
        needs = f"{count} need{'s' * (count.most == 1)} a {what} each"
        name = f"{there} {what}{'s' * (there != 1)}"
        raise ValueError(f"{needs}, and this machine has {name}: name a cluster by RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    room = {"num_cpus": max(cores, count.most), "num_gpus": gpus}
    try:
        ray.init("local", **room, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises this class itself
        raise OSError(f"Ray could not start: {error}") from error
    return int(gpus > 0)
