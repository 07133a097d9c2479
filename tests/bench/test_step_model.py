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
from step_model import Assumed, Cost, microseconds
gpu = Assumed(read=1e12, l2=2e12, gap=1.0, trip=2.0, clock=1e9, issued=4.0, issued_by_warp=1.0)
empty = Cost("", "", 1, 0, 0, 0, 0, 132, 4, 1, 10**6, 0)
launches = {name: [empty._replace(**each) for each in chain] for name, chain in json.loads(sys.argv[2]).items()}
print(json.dumps({"times": {k: microseconds(v, gpu) for k, v in launches.items()}}))
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


CEILING = {"part": "ceilings", "name": "read", "state": "figure", "about": {"ceiling": "read"}}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"floor": {"read": 2e12, "copy": 1.0}}, {"H100": 2e12, "H200": 4.5e12}),
        ({"rows": [{**CEILING, "rounds": [x]} for x in (1000, 9000, 3000)]}, {"H100": 3e12, "H200": 4.5e12}),
        ({"rows": []}, "has no read rate: name a record"),
        ([], "has no read rate: name a record"),
        (
            {"floor": {"read": 2e12}, "stamp": {"device": "AMD EPYC"}},
            "is of AMD EPYC, and the model is of H100 and H200",
        ),
    ],
)
def test_a_record_gives_its_own_device_the_read_rate(tmp_path, record, expected):
    stamp = {"stamp": {"device": "NVIDIA H100 80GB HBM3"}}
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**stamp, **record} if isinstance(record, dict) else record))
    script = """
import json, sys
sys.path.insert(0, sys.argv[1])
from step_model import DEVICES, with_record
try:
    print(json.dumps({name: gpu.read for name, gpu in with_record(DEVICES, sys.argv[2]).items()}))
except ValueError as error:
    print(json.dumps(str(error)))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script, BENCH, path], env=environment, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found == expected if isinstance(expected, dict) else expected in found
