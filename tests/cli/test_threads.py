"""Threads of a command: one for each core that is not busy."""

import subprocess
import sys

import pytest
import torch

from internlm3.runtime.cli import threads


@pytest.fixture
def machine(monkeypatch):
    """A CPU of 4 cores, with so many running threads at each look, ours included. Returns the thread counts set."""
    taken = []

    def machine(*running):
        looks = iter([*running] * 5)
        monkeypatch.setattr(threads, "_running", lambda: next(looks))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        monkeypatch.setattr(torch, "set_num_threads", taken.append)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        return taken

    return machine


@pytest.mark.parametrize(
    ("running", "count"), [((1,), 4), ((2,), 3), ((4,), 1), ((9,), 1), ((5, 1, 3, 2, 1), 4), ((3, 9, 2, 4, 2), 3)]
)
def test_a_thread_for_each_core_that_is_not_busy(machine, running, count):
    """What runs for a moment is no load."""
    taken = machine(*running)
    threads.leave_busy_cores()
    assert taken == [count]


def test_the_environment_decides(machine, monkeypatch):
    taken = machine(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    threads.leave_busy_cores()
    assert taken == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_busy_process_is_seen():
    code = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as busy:
        assert busy.stdout
        busy.stdout.readline()
        # The machine may run other things, and stop some.
        assert any(threads.running_elsewhere() >= 1 for _ in range(20))
        busy.kill()
