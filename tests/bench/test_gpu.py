"""bench.gpu on a machine without a GPU: parts in processes of their own, rows on disk, failures reported."""

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

from bench import ROOT, gpu
from bench.models import SIZES
from bench.parts import suite
from bench.record import Part, Record, load, read_rows
from bench.roofline import Roofline

PLANTED = """
import os, sys, time
from bench.record import Part

def rows(small{argument}):
    part = Part("{name}")
    yield part.check("sound", "")
    yield part.figure("three rounds", [1.0, 2.0, 4.0], "ms", engine="internlm3", context=16, share=0.5)
    {then}
"""


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Replaces the parts of bench.gpu, by name and the last line of their code."""

    def plant(
        parts: dict[str, str], seconds: int = 10**6, shares: Sequence[str] = (), of_model: Sequence[str] = ()
    ) -> None:
        limits = {}
        for name, then in parts.items():
            argument = ", name" * (name in of_model)
            (tmp_path / f"planted_{name}.py").write_text(PLANTED.format(name=name, argument=argument, then=then))
            limits[name] = gpu.Limit(f"planted_{name}", seconds, shares=name in shares, of_model=name in of_model)
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


# A megabyte that is read in a millisecond, and ceilings that a count of their runs makes better each time.
A_MEGABYTE = 'yield part.figure("step", [1.0], "ms", dtype="float16", bytes=10**6, flops=0)'
COUNTED = """
    from pathlib import Path
    from bench.roofline import Roofline
    runs = Path(__file__).with_name("runs")
    runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
    yield from Roofline(len(runs.read_text()) * 1e10, 1e9, {"float16": 1e12}).rows()
"""


@pytest.fixture
def in_process(tmp_path, monkeypatch):
    """Parts run in this process, which saves their start."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(part, out, small, model, seconds):
        sys.modules.pop(gpu.PARTS[part].module, None)
        (out / f"{part}.jsonl").unlink(missing_ok=True)
        try:
            gpu.work(part, out, small, model)
        except RuntimeError as error:
            return str(error)
        return ""

    monkeypatch.setattr(gpu, "run", run)


def test_all_parts_of_a_record_have_shares_of_one_ceiling(tmp_path, plant, in_process, capfd):
    """A part alone has them measured first, a later run of another part does not; new ones are those of all rows."""
    plant({"other": "", "one": A_MEGABYTE, "two": A_MEGABYTE, "ceilings": COUNTED.strip()}, shares=("one", "two"))

    def shares(*parts):
        assert gpu.main(["--out", str(tmp_path / "out"), "--small", "--part", *parts]) == 0
        ran = dict.fromkeys(line.split()[1] for line in capfd.readouterr().out.splitlines() if "sound" in line)
        rows = [row for row in load(tmp_path / "out" / "gpu.json").rows if row.name == "step"]
        return [*ran], {row.part: row.about["share"] for row in rows}

    assert shares("other") == (["other"], {})
    assert shares("one") == (["ceilings", "one"], {"one": 0.1})
    assert shares("other", "two") == (["other", "two"], {"one": 0.1, "two": 0.1})
    assert shares("two", "ceilings") == (["ceilings", "two"], {"one": 0.05, "two": 0.05})


def test_without_ceilings_a_part_has_no_shares(tmp_path, plant, in_process):
    plant({"one": A_MEGABYTE, "ceilings": "raise RuntimeError('no memory')"}, shares=("one",))
    assert gpu.main(["--out", str(tmp_path), "--small", "--part", "one"]) == 1
    rows = {(row.part, row.name): row for row in load(tmp_path / "gpu.json").rows}
    assert rows["one", "step"].value == 1.0 and "share" not in rows["one", "step"].about
    assert "no memory" in rows["ceilings", "the part itself"].note


def test_the_parts_with_shares_measure_no_ceiling():
    from bench.parts import ceilings

    for name, limit in gpu.PARTS.items():
        source = ROOT.joinpath(*limit.module.split(".")).with_suffix(".py").read_text()
        assert ("roofline.measure" in source) == (limit.module == ceilings.__name__)
        assert limit.shares == (name in ("ops", "decode", "quantised", "launch_profile", "first_token", "peers"))


@pytest.mark.parametrize("change", [{"device": "another GPU"}, {"dry run": False}])
def test_a_record_is_of_one_machine(tmp_path, plant, in_process, capsys, change):
    plant({"fine": ""})
    assert gpu.main(["--out", str(tmp_path), "--small"]) == 0
    record = load(tmp_path / "gpu.json")
    Record({**record.stamp, **change}, record.rows).save(tmp_path / "gpu.json")
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path), "--small"])
    assert ended.value.code == 2 and "name another folder, a record is of one machine" in capsys.readouterr().err


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
    assert gpu.run("endless", tmp_path, True, "internlm3-8b", 20.0) == "exceeded its limit of 20 s"
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
        (["--model", "llama-3-8b"], "there is no model 'llama-3-8b': did you mean 'llama-3.1-8b'?"),
        (["--model", "qwen3-8b", "--part", "trial"], "the part trial is of internlm3-8b only"),
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
        of_model = ", name: str" * limit.of_model
        assert f"\ndef rows(small: bool{of_model}) -> Iterator[Row]:\n" in source


def test_the_parts_of_another_model(tmp_path, plant, in_process, capsys):
    """Those that its shapes change, of its name, and the ceilings of their shares. A record is of one model."""
    plant(
        {"same": "", "of_model": 'yield part.check(name, "")', "ceilings": ""},
        shares=("of_model",),
        of_model=["of_model"],
    )
    arguments = ["--out", str(tmp_path / "out"), "--small"]
    assert gpu.main([*arguments, "--model", "Llama-3.1-8B"]) == 0
    record = load(tmp_path / "out" / "gpu.json")
    assert {row.part for row in record.rows} == {"of_model", "ceilings"}
    assert "llama-3.1-8b" in [row.name for row in record.rows]
    assert record.stamp["shapes"] == {"of": "Llama-3.1-8B", **SIZES["llama-3.1-8b"]._asdict()}
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert "has the record of Llama-3.1-8B: name another folder, a record is of one model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parts", "model"),
    [
        (["decode", "first_token", "launch_profile", "quantised"], "llama-3.1-8b"),
        (["correctness"], "internlm3-8b"),
        (["trial"], "internlm3-8b"),
    ],
)
def test_a_dry_run(tmp_path, parts, model, capfd):
    """The same code as on a GPU machine, at a toy model's shapes; Triton's ops run in the interpreter."""
    code = gpu.main(["--out", str(tmp_path), "--small", "--model", model, "--part", *parts])
    logs = [path.read_text() for path in tmp_path.glob("*.log")]
    assert code == 0, capfd.readouterr().out + "".join(logs)
    found = load(tmp_path / "gpu.json").rows
    assert {row.state for row in found} <= {"pass", "figure", "not run"}
    for part in parts:
        assert len([row for row in found if row.part == part]) > (0 if part == "launch_profile" else 3)
    if "trial" in parts:
        assert "the candidates compile for sm_90" in {row.name for row in found if row.state == "pass"}
    if "decode" in parts:
        ceilings = Roofline.of(found)
        shares = [row for row in found if "share" in row.about]
        assert {row.part for row in shares} == {"decode", "first_token", "quantised"}
        for row in shares:
            given = [row.about[key] for key in ("dtype", "bytes", "flops")]
            assert (row.about["bound"], row.about["share"]) == ceilings.share(*given, 1e3 * row.value)


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
print(correctness._logits(True, 1, 8, "internlm3-8b"))

model = correctness.random_model(True, layers=2)

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
