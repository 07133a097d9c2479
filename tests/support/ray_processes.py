"""Processes of `internlm3 ... --replicas`, and of the replicas of a Ray that they start."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

# Prints the address of a cluster of four CPUs, and keeps it until standard input ends.
CLUSTER = """
import sys, ray
there = ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
print(there.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


def command_with_replicas(*args: object, **environment: str) -> subprocess.Popen[str]:
    """`internlm3 ARGS` in a process of its own, on a Ray of its own unless RAY_ADDRESS is given.

    Its output, errors included, is a pipe.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "internlm3", *map(str, args)]
    environment = {**inherited, "HF_HUB_OFFLINE": "1", **environment}
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job ignores Ctrl-C
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, preexec_fn=listens
    )


@contextlib.contextmanager
def ray_cluster() -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """The process of a Ray cluster, and the environment of its drivers."""
    address, command = "", [sys.executable, "-c", CLUSTER]
    environment = {"RAY_AUTH_MODE": "token"}
    while not address:  # Ray gives up starting after 30 seconds, on a busy machine too
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        assert process.stdout
        address = process.stdout.readline().strip()
    with process:
        yield process, {**environment, "RAY_ADDRESS": address}
        process.communicate()


def replicas_of(process: subprocess.Popen[Any], named: str) -> list[int]:
    """The process ids below a process whose command begins with a name."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")

    def below(pid: int) -> bool:
        return pid == process.pid or (pid in parents and below(parents[pid]))

    return [pid for pid, name in names.items() if name.startswith(named) and below(pid)]
