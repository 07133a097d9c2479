"""bench.gpu on a machine without a GPU: parts in processes of their own, rows on disk, failures reported."""

import os
import subprocess
import sys

import pytest
import torch

from bench import ROOT, gpu
from bench.parts import suite
from bench.record import Part, load, read_rows

PLANTED = """
import os, sys, time
from bench.record import Part

def rows(small):
    part = Part("{name}")
    yield part.check("sound", "")
    yield part.figure("three rounds", [1.0, 2.0, 4.0], "ms", engine="internlm3", context=16, share=0.5)
    {then}
"""


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Replaces the parts of bench.gpu, by name and the last line of their code."""

    def plant(parts: dict[str, str], seconds: int = 10**6) -> None:
        limits = {}
        for name, then in parts.items():
            (tmp_path / f"planted_{name}.py").write_text(PLANTED.format(name=name, then=then))
            limits[name] = gpu.Limit(f"planted_{name}", seconds)
        program = ["import sys", "from bench import gpu", f"sys.path.insert(0, {str(tmp_path)!r})"]
        program += [f"gpu.PARTS = {{name: gpu.Limit(name, 0) for name in {[*parts]}}}"]
        program += ["gpu.PARTS = {name: gpu.Limit(f'planted_{name}', 0) for name in gpu.PARTS}", "sys.exit(gpu.main())"]
        monkeypatch.setattr(gpu, "PARTS", limits)
        monkeypatch.setattr(gpu, "COMMAND", [sys.executable, "-c", "\n".join(program)])

    return plant


def test_parts_fail_by_themselves(tmp_path, plant, capfd):
    """One is sound, one raises after its rows, one exits without a message, one finds an error: all rows are kept."""
    parts = {
        "fine": "",
        "raising": "raise RuntimeError('a peer is not here')",
        "dying": "os._exit(11)",
        "wrong": 'yield part.check("unsound", lambda: 1 / 0)',
    }
    plant(parts)
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out), "--small"]) == 1
    record = load(out / "gpu.json")
    assert record.stamp["dry run"] and record.stamp["torch"] == torch.__version__
    for name in parts:
        mine = {row.name: row for row in record.rows if row.part == name}
        assert mine["sound"].state == "pass" and mine["three rounds"].value == 2.0
    notes = {row.part: row.note for row in record.rows if row.state == "FAIL"}
    assert notes == {
        "raising": "exit code 1: RuntimeError: a peer is not here",
        "dying": "exit code 11: no output",
        "wrong": "ZeroDivisionError: division by zero",
    }
    printed = capfd.readouterr().out
    assert all(note in printed for note in notes.values())

    plant({"fine": ""})
    assert gpu.main(["--out", str(out), "--small", "--part", "fine"]) == 0


def test_a_part_that_exceeds_its_limit_is_killed(tmp_path, plant, monkeypatch):
    """Its rows are kept. The limit ends as soon as they are written: no clock decides."""
    plant({"endless": "time.sleep(10**6)"})

    class Process(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            while len([*read_rows(tmp_path / "endless.jsonl")]) < 2:
                assert self.poll() is None
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    assert gpu.run("endless", tmp_path, True, 20.0) == "exceeded its limit of 20 s"
    assert [row.name for row in read_rows(tmp_path / "endless.jsonl")] == ["sound", "three rounds"]


def test_a_part_that_starts_too_late_is_a_failure(tmp_path, plant, capsys):
    plant({"fine": ""})
    assert gpu.main(["--out", str(tmp_path / "out"), "--small", "--minutes", "1e-9"]) == 1
    assert "no time was left for it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "correctnes"], "there is no part 'correctnes': did you mean 'correctness'?"),
        (["--minutes", "0"], "--minutes 0 must be positive"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path), *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_that_cannot_be_created(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "file" / "out"), "--small"])
    assert "can't be created" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 3
    assert "no GPU found" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_every_part_yields_rows():
    for limit in gpu.PARTS.values():
        source = ROOT.joinpath(*limit.module.split(".")).with_suffix(".py").read_text()
        assert "\ndef rows(small: bool) -> Iterator[Row]:\n" in source


@pytest.mark.parametrize("part", ["decode", "first_token", "ceilings", "correctness"])
def test_a_dry_run(tmp_path, part, capfd):
    """The same code as on a GPU machine, at a toy model's shapes; Triton's ops run in the interpreter."""
    code = gpu.main(["--out", str(tmp_path), "--small", "--part", part])
    assert code == 0, capfd.readouterr().out + (tmp_path / f"{part}.log").read_text()
    found = [*read_rows(tmp_path / f"{part}.jsonl")]
    assert {row.state for row in found} <= {"pass", "figure", "not run"} and len(found) > 3


def test_the_correctness_part_finds_a_wrong_kernel():
    """An op that is off by a hundredth, and a graph whose third replay does something else."""
    program = """
from types import SimpleNamespace
from bench.parts import correctness
from internlm3.kernels import triton

class Wrong:
    def __getattr__(self, name):
        op = getattr(triton, name)
        return (lambda *a, **k: op(*a, **k) * 1.01) if name == "linear_add" else op

correctness.kernels = SimpleNamespace(for_device=lambda device: Wrong())
print(correctness._logits(True, 1, 8))

model = correctness.random_model(True, 2)

def capture():
    def make(step):
        step()
        calls = []
        def replay():
            calls.append(1)
            if len(calls) == 3:
                model.model.norm.weight.neg_()
            step()
            if len(calls) == 3:
                model.model.norm.weight.neg_()
        return replay
    return make

print(correctness._graphs(model, True, capture))
"""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    logits, graphs = done.stdout.splitlines()
    assert logits.startswith("off by") and graphs.startswith("answers [")


def test_the_report_of_the_suite_is_read(tmp_path):
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.kernels.test_rope" name="test_a"/>'
        '<testcase classname="tests.kernels.test_rope" name="test_b"><failure message="wrong&#10;more"/></testcase>'
        '<testcase classname="tests.kernels.test_norm" name="test_c"><skipped/></testcase></testsuite></testsuites>'
    )
    found = [*suite.results(Part("suite"), tmp_path / "report.xml")]
    assert [(row.name, row.state, row.note) for row in found] == [
        ("test_rope::test_b", "FAIL", "wrong"),
        ("test_rope: 1 tests", "pass", ""),
    ]
