"""The model of a step gives the times that a launch of one kind of cost must take; in a process that compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
# A GPU that reads a byte in a picosecond; memory, L2, instructions and waits are told apart by their prices.
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from step_model import Assumed, Cost, microseconds, with_record
gpu = Assumed(read=1e12, l2=2e12, gap=1.0, trip=2.0, clock=1e9, issued=4.0, issued_by_warp=1.0)
empty = Cost("", "", 1, 0, 0, 0, 0, 132, 4, 1, 10**6, 0)
launches = {name: [empty._replace(**each) for each in chain] for name, chain in json.loads(sys.argv[2]).items()}
told = with_record(gpu, {"device": "H100", "floor": {"read": 2e12, "copy": 1.0}, "latency": {"trip": 3.0, "other": 1}})
print(json.dumps({"times": {k: microseconds(v, gpu) for k, v in launches.items()}, "told": told._asdict()}))
"""
CHAINS = {
    "nothing but the gap": [{}],
    "waits": [{"waits": 3}],
    "memory": [{"memory": 50 * 10**6, "loaded": 50 * 10**6}],
    "L2": [{"memory": 10**6, "loaded": 80 * 10**6}],
    "instructions": [{"instructions": 132 * 4 * 7000}],
    "one warp issues one at a time": [{"instructions": 132 * 7000, "warps": 1}],
    "too little on its way": [{"memory": 10**6, "flight": 1000, "programs": 1}],
    "first wave over the gap": [{"memory": 50 * 10**6, "early": 10 * 10**6, "loaded": 0}],
    "first wave in the predecessor's waits": [{"waits": 3}, {"memory": 50 * 10**6, "early": 4 * 10**6, "loaded": 0}],
    "but not while its programs queue": [{"waits": 3, "programs": 133}, {"memory": 50 * 10**6, "early": 4 * 10**6}],
}


@pytest.fixture(scope="module")
def said():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, BENCH, json.dumps(CHAINS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("chain", "times"),
    {
        "nothing but the gap": [1],
        "waits": [7],
        "memory": [51],
        "L2": [41],
        "instructions": [8],
        "one warp issues one at a time": [8],
        "too little on its way": [1 + 2000],  # 1000 bytes in 2 us
        "first wave over the gap": [50],
        "first wave in the predecessor's waits": [7, 1 + 46],
        "but not while its programs queue": [7, 50],
    }.items(),
)
def test_a_launch_takes_what_its_cost_says(said, chain, times):
    assert said["times"][chain] == pytest.approx(times)


def test_a_record_replaces_what_it_has_measured_and_nothing_else(said):
    assert said["told"] == {
        "read": 2e12, "l2": 2e12, "gap": 1.0, "trip": 3.0, "clock": 1e9, "issued": 4.0, "issued_by_warp": 1.0
    }  # fmt: skip
