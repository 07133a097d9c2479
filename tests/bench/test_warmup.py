"""After the launches that kernels.triton.warmup lists, no request compiles anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
TARGETS = ("sm_80", "sm_90")


@pytest.fixture(scope="module")
def said():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("counted_compilations.py"), BENCH, *TARGETS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_requests_compile_nothing_behind_the_warm_up(said, target):
    assert said[target]["new"] == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_warm_up_is_short(said, target):
    """A second or two each, once a machine: what compiles more has a reason that stands here.

    Two of 50 are attention's for one sequence alone, whose tiles are its own.
    """
    assert len(said[target]["warm"]) <= 50, said[target]["warm"]
