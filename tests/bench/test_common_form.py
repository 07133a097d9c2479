"""Definitions, workloads and solutions of the common form: read, exported, checked; the traces that come of it."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench import strict, verify
from bench.cases import Size, cases
from bench.common_form import definition as definitions
from bench.common_form.__main__ import main
from bench.common_form.export import OPS, export
from bench.workers import Worker

CHEATS = Path(__file__).parent / "cheats"
TINY = Size(hidden=64, intermediate=96, vocabulary=130, heads=4, kv_heads=2, head_dim=16)
STATUSES = {"PASSED", "INCORRECT_SHAPE", "INCORRECT_NUMERICAL", "INCORRECT_DTYPE", "RUNTIME_ERROR", "COMPILE_ERROR"}

# As the format's documentation shows a definition; the op and the code are ours.
SCALED_SUM = {
    "name": "scaled_sum_n6",
    "op_type": "misc",
    "axes": {
        "M": {"type": "var"},
        "N": {"type": "const", "value": 6},
        "half": {"type": "expr", "expression": "N // 2"},
    },
    "inputs": {
        "a": {"shape": ["M", "N"], "dtype": "float32"},
        "b": {"shape": ["half"], "dtype": "float16"},
        "scale": {"shape": None, "dtype": "float32"},
    },
    "outputs": {"c": {"shape": ["M", "half"], "dtype": "float32"}, "total": {"shape": [], "dtype": "float32"}},
    "reference": "def run(a, b, scale):\n    c = a[:, :3] * b.float() + a[:, 3:] * scale\n    return c, c.sum()\n",
}
RIGHT = "    c = a[:, :3] * b.float() + a[:, 3:] * scale\n"
INPUTS = {"a": {"type": "random"}, "b": {"type": "random"}, "scale": {"type": "scalar", "value": 0.5}}


def workload(inputs=INPUTS, axes=None, key="one"):
    return {"uuid": key, "axes": {"M": 4} if axes is None else axes, "inputs": inputs}


def solution(code, **spec):
    spec = {"language": "python", "target_hardware": ["LOCAL"], "entry_point": "main.py::run", **spec}
    sources = [{"path": "main.py", "content": code}]
    return {"name": "mine", "definition": "scaled_sum_n6", "author": "me", "spec": spec, "sources": sources}


def returning(body=RIGHT, values="c, c.sum()", **spec):
    code = f"import torch\n\n\ndef run(a, b, scale):\n{body}    return {values}\n"
    return solution(code, destination_passing_style=False, **spec)


pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    """The same inputs in every run: a kernel's rounding is out of bounds once in some hundred thousand elements."""
    torch.manual_seed(3)
    monkeypatch.setattr(strict, "_random", random.Random(3))


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a solution; returns the exit code, the traces and what was printed."""

    def call(given, lines=None, of=SCALED_SUM):
        paths = [tmp_path / name for name in ("definition.json", "workloads.jsonl", "solution.json")]
        lines = [workload()] if lines is None else lines
        texts = [json.dumps(of), "\n".join(map(json.dumps, lines)), json.dumps(given)]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, "utf-8")
        out = tmp_path / "trace.jsonl"
        code = main(["run", *map(str, paths), "--trace", str(out), "--seed", "3"])
        return code, [json.loads(line) for line in out.read_text().splitlines()], capsys.readouterr().out

    return call


def status(traces):
    (found,) = traces
    evaluation = found["evaluation"]
    # Which statuses have errors and times is a rule of the format.
    assert (evaluation["correctness"] is not None) == (evaluation["status"] in ("PASSED", "INCORRECT_NUMERICAL"))
    assert (evaluation["performance"] is not None) == (evaluation["status"] == "PASSED")
    assert evaluation["status"] in STATUSES
    return evaluation["status"]


def test_exported_ops_run_and_pass(tmp_path, capsys):
    """A round trip of every definition: files that `export` wrote, ours as the solution, a trace for each workload."""
    files = export(tmp_path, TINY)
    assert {json.loads(path.read_text())["name"] for path in files[::3]} == {path.stem for path in files[::3]}
    for definition, workloads, ours in zip(files[::3], files[1::3], files[2::3], strict=True):
        lines = workloads.read_text().splitlines()
        workloads.write_text("\n".join(lines[:2]))
        out = tmp_path / "out.jsonl"
        code = main(["run", str(definition), str(workloads), str(ours), "--trace", str(out), "--seed", "3"])
        assert code == 0, capsys.readouterr().out
        traces = [json.loads(line) for line in out.read_text().splitlines()]
        for trace, line in zip(traces, lines, strict=False):
            assert trace.keys() == {"definition", "workload", "solution", "evaluation"}
            assert trace["workload"] == json.loads(line)["workload"]
            evaluation = trace["evaluation"]
            assert evaluation["status"] == "PASSED"
            assert evaluation.keys() == {
                "status", "log", "correctness", "performance", "environment", "timestamp"
            }  # fmt: skip
            assert evaluation["environment"]["libs"]["torch"] == torch.__version__
            times = evaluation["performance"]
            assert times["speedup_factor"] == pytest.approx(times["reference_latency_ms"] / times["latency_ms"])
        assert len(traces) == 2


def test_exported_references_mean_our_ops(tmp_path):
    """At a second size too, in float16: the code takes its sizes from its arguments."""
    by_op = {path.parent.name: definitions.read(str(path)) for path in export(tmp_path, TINY)[::3]}
    size = TINY._replace(hidden=48, intermediate=40)
    for case in cases(size, [torch.float16], batches=(3,), chunks=()):
        if case.op in OPS and case.stored == "dense":
            run = definitions.Reference(by_op[OPS[case.op].op_type]).run
            inputs = [*by_op[OPS[case.op].op_type].inputs]
            error = verify.error_of(
                case.op,
                case.arguments(torch.device("cpu")),
                lambda given, run=run, inputs=inputs: run(*[given[name] for name in inputs]),
            )
            assert error == "", case.op


@pytest.mark.parametrize(
    ("given", "wanted", "words"),
    [
        (returning(), "PASSED", ""),
        (returning(values="[c, c.sum()]", language=None, languages=["pytorch"]), "PASSED", ""),
        (returning(values="{'total': c.sum(), 'c': c, 'time': 3.0}"), "PASSED", ""),
        (solution(f"def run(a, b, scale, c, total):\n{RIGHT.replace('c =', 'c[:] =')}    total.copy_(c.sum())\n"),
         "PASSED", ""),
        (returning(RIGHT + "    c[-1, -1] += 0.01\n"), "INCORRECT_NUMERICAL", "at [3, 2]"),
        (returning("    c = (a[:, :3].half() * b + a[:, 3:].half() * scale).float()\n"),
         "INCORRECT_NUMERICAL", "float32"),
        (returning(values="c * torch.nan, c.sum()"), "INCORRECT_NUMERICAL", "nan instead of"),
        (returning(values="c, c.sum()[None]"), "INCORRECT_SHAPE", "total has shape [1], must have []"),
        (returning(values="c"), "INCORRECT_SHAPE", "returns 1 outputs, must be c, total"),
        (returning(values="{'total': c.sum()}"), "INCORRECT_SHAPE", "returns 1 outputs, must be c, total"),
        (returning(values="c.double(), c.sum()"), "INCORRECT_DTYPE", "c is torch.float64, must be torch.float32"),
        (returning("    raise RuntimeError('no kernel image')\n"), "RUNTIME_ERROR", "no kernel image"),
        (returning(RIGHT + "    a += 1\n"), "INCORRECT_NUMERICAL", "changed its input a"),
        (solution("import nowhere_at_all\n", destination_passing_style=False), "COMPILE_ERROR", "nowhere_at_all"),
    ],
)  # fmt: skip
def test_a_trace_says_what_a_solution_does(run, given, wanted, words):
    code, traces, printed = run(given)
    assert status(traces) == wanted, printed
    assert words in traces[0]["evaluation"]["log"]
    assert wanted in printed and code == (wanted != "PASSED")
    found = traces[0]["evaluation"]["correctness"]
    if words == "nan instead of":
        assert found == {"max_relative_error": "NaN", "max_absolute_error": "NaN"}
    elif words == "at [3, 2]":
        assert found["max_absolute_error"] == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize(
    "name", ["honest", "kept_by_pointer", "kept_by_content", "only_if_poisoned", "lazy_output", "replaced_timer",
             "rewritten_check", "found_by_gc", "falls_back"],
)  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="the cheats are played for a CPU")
def test_cheats_do_not_pass(run, tmp_path, name):
    """The files that bench.ops must refuse, as solutions of an exported definition."""
    path, workloads, _ = (path for path in export(tmp_path, TINY) if "rmsnorm" in str(path))
    of = json.loads(path.read_text())
    spec = {"entry_point": "main.py::rms_norm", "destination_passing_style": False}
    given = {**solution((CHEATS / f"{name}.py").read_text(), **spec), "definition": of["name"]}
    lines = [json.loads(workloads.read_text().splitlines()[1])]
    _, traces, printed = run(given, lines, of)
    assert (status(traces) == "PASSED") == (name == "honest"), printed


def test_a_solution_that_replaces_the_reference_is_refused(run):
    code = "import sys\nfound = sys.modules['bench.common_form.loaded_reference']\nfound.run = lambda a, b, scale: 0\n"
    given = returning()
    given["sources"] += [{"path": "late/other.py", "content": code}]
    given["sources"][0]["content"] = "import late.other\n" + given["sources"][0]["content"]
    _, traces, _ = run(given)
    assert status(traces) == "RUNTIME_ERROR"
    assert "it replaces bench.common_form.loaded_reference.run" in traces[0]["evaluation"]["log"]


def test_inputs_from_files_and_from_the_definition(run, tmp_path):
    """Stored tensors, and inputs that a function of the reference makes; one bad workload stops no other."""
    (tmp_path / "blob").mkdir()
    save_file({"stored": torch.arange(3).half(), "odd": torch.ones(4).half()}, tmp_path / "blob" / "b.safetensors")
    stored = {"type": "safetensors", "path": "blob/b.safetensors", "tensor_key": "stored"}
    of = {**SCALED_SUM, "custom_inputs_entrypoint": "make"}
    of["reference"] = (
        "import torch\n\n\ndef make(axes, device):\n    ones = torch.ones(axes['half'], dtype=torch.float16)\n"
        "    return {'a': torch.randn(axes['M'], axes['N']), 'b': ones, 'scale': 2.0}\n\n\n" + of["reference"]
    )
    custom = {name: {"type": "custom"} for name in INPUTS}
    lines = [
        workload({**INPUTS, "b": stored}, key="stored"),
        {"definition": "scaled_sum_n6", "workload": workload(custom, key="custom"), "solution": None},
        workload({**INPUTS, "b": {**stored, "tensor_key": "odd"}}),
        workload({**INPUTS, "b": {**stored, "path": "nowhere.safetensors"}}),
        workload({**INPUTS, "a": {"type": "custom"}}),
        workload(axes={}),
        workload(axes={"M": 10**12}),
        workload(axes={"M": 2}, key="last"),
    ]
    code, traces, printed = run(returning(), lines, of)
    assert [(trace["workload"]["uuid"], status([trace])) for trace in traces] == [
        ("stored", "PASSED"), ("custom", "PASSED"), ("last", "PASSED")
    ]  # fmt: skip
    skipped = [line for line in printed.splitlines() if line.startswith("not run")]
    place = f"{tmp_path / 'workloads.jsonl'}"
    for line, words in zip(
        skipped,
        (
            f"{place}:3: the input b is torch.float16 [4], must be torch.float16 [3]",
            f"{place}:4: inputs.b.path: there is no file nowhere.safetensors",
            f"{place}:5: inputs: either all or none",
            f"{place}:6: axes.M: is missing",
            f"{place}:7: the check needs about",
        ),
        strict=True,
    ):
        assert words in line
    assert code == 1


def test_a_solution_that_ends_its_process_fails_one_workload(run, monkeypatch):
    """In a process of its own, in which the next workload passes."""
    monkeypatch.setattr("bench.common_form.__main__.Worker", Worker)
    ends = "    import os\n    if a.shape[0] == 4:\n        os._exit(3)\n"
    code, traces, printed = run(returning(ends + RIGHT), [workload(), workload(axes={"M": 2}, key="two")])
    assert code == 1 and [status([trace]) for trace in traces] == ["RUNTIME_ERROR", "PASSED"], printed
    assert "it ended its process, exit code 3" in traces[0]["evaluation"]["log"]


def test_a_reference_may_return_its_outputs_by_name(run):
    of = {**SCALED_SUM, "reference": SCALED_SUM["reference"].replace("c, c.sum()", "{'total': c.sum(), 'c': c}")}
    _, traces, printed = run(returning(), of=of)
    assert status(traces) == "PASSED", printed


def test_a_reference_that_fails_is_not_the_solutions_fault(run):
    of = {**SCALED_SUM, "reference": "def run(a, b, scale):\n    assert a.shape[0] < 3, 'too many'\n" + RIGHT
          + "    return c, c.sum()\n"}  # fmt: skip
    code, traces, printed = run(returning(), [workload(), workload(axes={"M": 2}, key="two")], of)
    assert code == 1 and [trace["workload"]["uuid"] for trace in traces] == ["two"]
    assert "definition.json: reference: AssertionError: too many" in printed


@pytest.mark.parametrize(
    ("part", "field", "value", "words"),
    [
        ("definition", "name", None, "definition.json: name: must be a string, and is null"),
        ("definition", "axes", {}, "definition.json: inputs.a.shape: there is no axis 'M'"),
        ("definition", "axes", {"M": {"type": "size"}}, "axes.M.type: is 'size': there are const, var and expr"),
        ("definition", "outputs", {}, "definition.json: outputs: is empty"),
        ("definition", "op_type", "sampling", "op_type: is sampling, whose outputs are random"),
        ("definition", "outputs", {"c": {"shape": ["M"], "dtype": "float8_e4m3fn"}}, "outputs.c.dtype: float8_e4m3fn"),
        ("definition", "reference", "def run(a:\n", "definition.json: reference: SyntaxError"),
        ("definition", "reference", "x = 1\n", "definition.json: reference: the reference has no function 'run'"),
        ("definition", "reference", "def run(a, b):\n    pass\n", "run(a, b) does not take the inputs a, b, scale"),
        ("solution", "definition", "other", "solution.json: definition: is 'other'"),
        ("solution", "sources", [], "solution.json: spec.entry_point: must be FILE.py::FUNCTION"),
        ("solution", "sources", [{"path": "../main.py", "content": "1"}], "sources[0].path: '../main.py' must be"),
        ("solution", "spec", {"language": "cuda"}, "solution.json: spec.language: cuda can't run here"),
        ("solution", "spec", {"languages": ["triton", "tlx"]}, "solution.json: spec.languages: tlx can't run here"),
        ("solution", "spec", {"language": "python", "entry_point": "main.py::go", "destination_passing_style": False},
         "solution.json: spec.entry_point: main.py has no function 'go'"),
        ("solution", "spec", {"language": "python", "entry_point": "main.py::run"},
         "spec.entry_point: run does not take a, b, scale, c, total by position"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_the_field(run, capsys, part, field, value, words):
    of, given = dict(SCALED_SUM), returning()
    (of if part == "definition" else given)[field] = value
    with pytest.raises(SystemExit) as end:
        run(given, of=of)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("N // 4", "shape"),
        ("N.real", "must be arithmetic"),
        ("N // 0", "can't be computed"),
        ("N / 4", "must be a size"),
    ],
)
def test_an_axis_that_can_not_be_computed(run, expression, words):
    of = {**SCALED_SUM, "axes": {**SCALED_SUM["axes"], "half": {"type": "expr", "expression": expression}}}
    code, _, printed = run(returning(), of=of)
    assert code == 1
    assert words in printed, printed
