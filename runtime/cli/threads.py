"""How many threads a command computes with on a CPU."""

import os
import time
from pathlib import Path

import torch


def leave_busy_cores() -> None:
    """Takes a thread for each core that nothing else keeps busy, at least one. OMP_NUM_THREADS decides if it is set.

    Threads wait for each other at every product, so one that shares its core delays them all: with one busy process on
    two cores, a token takes a quarter of the time with one thread.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - running_elsewhere()))


def running_elsewhere() -> int:
    """The number of other threads on this machine that run all the time. 0 where the system does not report it."""
    try:
        return min(_running() for _ in range(5)) - 1  # ours
    except OSError:
        return 0


def _running() -> int:
    time.sleep(0.01)  # what runs for moments only is not there at each look
    return int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].split("/")[0])
