"""bench.step_model, in a process that can compile: a measured record is reproduced, launches are read from their code.

launches-17ac267.json has the launches that the record of an H200 measured, as `bench.step_launches` reads them from the
kernels of that commit, compiled for sm_90 with the record's Triton: older kernels than those of this checkout.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections import defaultdict

import pytest

from bench import ROOT
from bench.record import load

RECORD = ROOT / "bench" / "results" / "2026-11-27-h200.json"
LAUNCHES = ROOT / "tests" / "bench" / "launches-17ac267.json"
SCRIPT = """
import json, sys
from bench import step_launches
from bench.simulation import Programs, Work
from bench.step_launches import Shape, StepLaunch
from bench.step_model import DEVICES, H200, predict, with_record

def launch(op, kernel, per_layer, programs):
    works = {name: Work(*programs[name]) for name in ("before", "after", "tile") if name in programs}
    return StepLaunch(op, kernel, per_layer, Programs(**{**programs, **works}))

def rates(path):
    try:
        return {name: gpu.read / 1e6 for name, gpu in with_record(DEVICES, path).items()}
    except ValueError as error:
        return str(error)

def compiled(shape, *ops):
    chosen = [each for each in step_launches.step(shape) if each[0].op in ops and "down" not in each[0].shape]
    return {x.kernel: x.programs._asdict() for x in step_launches.compiled(shape, chosen)}

shapes = json.load(open(sys.argv[1]))["shapes"]
print(json.dumps({
    "steps": {shape: predict([launch(*each) for each in found], H200) for shape, found in shapes.items()},
    "read": compiled(Shape(1, 1024), "embed", "paged_attention", "linear_add"),
    "int4": compiled(Shape(4, 1024, weights="int4"), "linear_add"),
    "parts": {
        each.op + ", " + each.shape: each.stored for each, _ in step_launches.step(Shape(4, 1024, weights="float8"))
    },
    "last": [[each.op for each, _ in step_launches.step(Shape(batch, 1024))][-1] for batch in (1, 8, 9)],
    "cublas": compiled(Shape(128, 1024), "embed", "linear_add"),
    "records": [rates(path) for path in sys.argv[2:]],
}))
"""
CEILING = {"part": "ceilings", "name": "read", "state": "figure", "unit": "GB/s", "about": {"ceiling": "read"}}
H100, H200 = 4.76 * 3.35 / 4.92, 4.76  # TB/s, without a record
RECORDS = [  # stamp, rows, and the read bandwidth of each device or the error
    ("NVIDIA H100 80GB HBM3", [{**CEILING, "rounds": [2000]}], {"H100": 2, "H200": H200}),
    ("NVIDIA H200", [{**CEILING, "rounds": [1000, 9000, 3000]}], {"H100": H100, "H200": 3}),
    ("NVIDIA H100 80GB HBM3", [], "has no read bandwidth: name a record"),
    ("AMD EPYC", [{**CEILING, "rounds": [2000]}], "is of AMD EPYC; the model knows H100 and H200"),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    paths = [folder / f"{i}.json" for i in range(len(RECORDS))]
    for path, (device, rows, _) in zip(paths, RECORDS, strict=True):
        path.write_text(json.dumps({"format": 2, "stamp": {"device": device}, "rows": rows}))
    command = [sys.executable, "-c", SCRIPT, str(LAUNCHES), *map(str, paths)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SHAPES = json.loads(LAUNCHES.read_text("utf-8"))["shapes"]


@pytest.mark.parametrize(
    ("shape", "most"),
    {"1, 1024": 0.03, "1, 32768": 0.03, "4, 1024": 0.05, "16, 1024": 0.05, "16, 32768": 0.05}.items(),
)
def test_measured_steps_are_reproduced(result, shape, most):
    name = "batch {}, context {}, internlm3".format(*shape.split(", "))
    measured = next(row.value for row in load(RECORD).rows if row.part == "decode" and row.name == name)
    predicted, _ = result["steps"][shape]
    assert predicted / 1e3 == pytest.approx(measured, rel=most)


@pytest.mark.parametrize("shape", ["1, 1024", "1, 32768", "4, 1024", "16, 1024"])
def test_measured_launches_are_reproduced(result, shape):
    """Those of a layer and of lm_head: within 2 us, lm_head within 7%. The worst is attention at batch size 16."""
    prefix = "batch {}, context {}: ".format(*shape.split(", "))
    rounds = {}  # by kernel and programs; launches that have both in common take turns
    for row in load(RECORD).rows:
        if row.part == "launch_profile" and row.name.startswith(prefix) and not row.name.endswith("a step"):
            kernel, grid = row.name.removeprefix(prefix).split()
            rounds[kernel, math.prod(map(int, grid.split("x")))] = row.rounds
    alike = defaultdict(list)
    for launch, time in zip(SHAPES[shape], result["steps"][shape][1], strict=True):
        op, kernel, per_layer, programs = launch
        if per_layer or op == "rms_norm_linear":
            alike[kernel, programs["number"]].append(time)
    assert len(alike) == {"1": 6, "4": 7, "16": 7}[shape.split(", ")[0]]
    for key, times in alike.items():
        for i, time in enumerate(times):
            measured = statistics.median(rounds[key][i :: len(times)])
            assert time == pytest.approx(measured, rel=0.07, abs=2), key


def test_launches_are_read_from_their_machine_code(result):
    embed, attend, combine, linear = (
        result["read"][name] for name in ("_embed", "_attend", "_combine", "_linear_few_rows")
    )
    row = 4096 * 2
    # Two rows of W for each program, all before the wait.
    assert linear["number"] == 2048 and linear["early"] == 2 * row and linear["late"] == 0
    assert linear["trigger"] == "start" and not linear["scattered"]
    # Length and page numbers, keys and values, trigger, wait. One tile of 64 keys each.
    assert attend["number"] == 17 * 2 and attend["trigger"] == "loads" and attend["before"][0] == 2
    assert attend["early"] == pytest.approx(1024 * 1024 / attend["number"]) and attend["late"] == 0
    assert combine["cached"] >= 17 * 128 and combine["cached"] < 128 * 128
    assert embed["trigger"] == "wait" and embed["early"] == 0 and embed["late"] * embed["number"] == row


def test_launches_of_quantised_weights_are_read_from_their_machine_code(result):
    """o_proj: words of 4 bits, and a scale of 4 bytes for each group of 128. All bytes come in the loop."""
    linear = result["int4"]["_linear_quantised"]
    nbytes = 4096 * 4096 // 2 + 4096 * 32 * 4
    assert linear["early"] == 0 and linear["late"] * linear["number"] == pytest.approx(nbytes)
    # Two iterations of four blocks of 512 columns; the words of all are prefetched.
    assert linear["tiles"] == 2 and linear["warps"] == 4
    assert linear["prefetched"] * linear["number"] == pytest.approx(4096 * 4096 // 2)
    # Per block four slices, each of 8 steps of 16 columns that add to the same sum.
    assert linear["tile"][3] == 8


def test_a_step_has_the_weights_that_are_asked_for(result):
    found = {name: stored for name, stored in result["parts"].items() if stored != "dense"}
    assert sorted(found.values()) == ["float8"] * 4 + ["int8"]
    assert [name for name, stored in found.items() if stored == "int8"] == ["rms_norm_linear, batch 4, lm_head int8"]


def test_a_step_of_few_sequences_ends_with_their_drafts(result):
    assert result["last"] == ["draft", "draft", "advance"]


def test_a_step_with_cublas_is_left_out(result):
    assert result["cublas"] == {}


@pytest.mark.parametrize("i", range(len(RECORDS)))
def test_a_record_sets_the_read_bandwidth_of_its_device(result, i):
    found, expected = result["records"][i], RECORDS[i][2]
    assert found == pytest.approx(expected) if isinstance(expected, dict) else expected in found
