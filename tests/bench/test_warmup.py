"""After the launches that kernels.triton.warmup lists, no request compiles anything."""

import json
import os
import subprocess
import sys

import pytest

from bench import ROOT

TARGETS = ("sm_80", "sm_90")


@pytest.fixture(scope="module")
def compiled():
    """What the warm-up compiles on each target, and what requests compile after it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.counted_compilations", *TARGETS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("weights", ["bfloat16", "quantised"])
@pytest.mark.parametrize("target", TARGETS)
def test_requests_compile_nothing_after_the_warm_up(compiled, target, weights):
    assert compiled[f"{target}, {weights}"]["new"] == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_warm_up_is_short(compiled, target):
    """Each compiles for a second or two, once per machine. A higher count needs a reason here.

    Two are attention's for a single sequence, which has tiles of its own. Ten are the linear layers' for 17 to 32 rows,
    and for 33 to 64. Two write a new request's state. Six are for drafts: two make them, and penalties (of three sets
    of stages) and `advance` read them.
    """
    assert len(compiled[f"{target}, bfloat16"]["warm"]) <= 63, compiled[f"{target}, bfloat16"]["warm"]
    # Of quantised weights two paddings in the place of four, and `_dequantise` of each matrix.
    assert len(compiled[f"{target}, quantised"]["warm"]) <= 57, compiled[f"{target}, quantised"]["warm"]
