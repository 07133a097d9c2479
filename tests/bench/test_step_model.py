"""bench.step_model, in a process that can compile: times of launches whose cost is of one kind; records of devices."""

import json
import os
import subprocess
import sys

import pytest

from bench import ROOT

# A GPU that reads a byte per picosecond. Memory, L2, instructions and waits have different prices.
SCRIPT = """
import json, sys
from bench.step_model import DEVICES, Assumed, Cost, microseconds, with_record

def read(path):
    try:
        return {name: gpu.read for name, gpu in with_record(DEVICES, path).items()}
    except ValueError as error:
        return str(error)

gpu = Assumed(read=1e12, l2=2e12, gap=1.0, trip=2.0, clock=1e9, issued=4.0, issued_by_warp=1.0)
empty = Cost("", "", 1, 0, 0, 0, 0, 132, 4, 1, 10**6, 0)
launches = {name: [empty._replace(**each) for each in chain] for name, chain in json.loads(sys.argv[1]).items()}
times = {name: microseconds(chain, gpu) for name, chain in launches.items()}
print(json.dumps({"times": times, "records": [read(path) for path in sys.argv[2:]]}))
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


CEILING = {"part": "ceilings", "name": "read", "state": "figure", "unit": "GB/s", "about": {"ceiling": "read"}}
RECORDS = [  # stamp, rows, and the read bandwidth of each device or the error
    ("NVIDIA H100 80GB HBM3", [{**CEILING, "rounds": [2000]}], {"H100": 2e12, "H200": 4.5e12}),
    ("NVIDIA H100 80GB HBM3", [{**CEILING, "rounds": [1000, 9000, 3000]}], {"H100": 3e12, "H200": 4.5e12}),
    ("NVIDIA H100 80GB HBM3", [], "has no read bandwidth: name a record"),
    ("AMD EPYC", [{**CEILING, "rounds": [2000]}], "is of AMD EPYC; the model knows H100 and H200"),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    paths = [folder / f"{i}.json" for i in range(len(RECORDS))]
    for path, (device, rows, _) in zip(paths, RECORDS, strict=True):
        path.write_text(json.dumps({"format": 2, "stamp": {"device": device}, "rows": rows}))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(CHAINS), *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
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
def test_a_launch_takes_the_time_of_its_cost(result, chain, times):
    assert result["times"][chain] == pytest.approx(times)


@pytest.mark.parametrize("i", range(len(RECORDS)))
def test_a_record_sets_the_read_bandwidth_of_its_device(result, i):
    found, expected = result["records"][i], RECORDS[i][2]
    assert found == expected if isinstance(expected, dict) else expected in found
