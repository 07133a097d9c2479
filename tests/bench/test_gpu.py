"""bench/gpu.py on a machine without a GPU: parts in boxes, rows on disk, what fails is said; and the report of it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HOME = Path(__file__).parents[1]
BENCH = HOME / "bench"

import gpu  # noqa: E402  (conftest puts bench/ on the path)
import report  # noqa: E402
import rows  # noqa: E402
from parts import suite  # noqa: E402

PLANTED = """
import os, sys, time
from rows import Part

def rows(small):
    part = Part("{name}")
    yield part.check("sound", "")
    yield part.figure("three rounds", [1.0, 2.0, 4.0], "ms", engine="internlm3", context=16, rows=1, share=0.5)
    {then}
"""


def script(tmp_path, *arguments, parts=None):
    """bench/gpu.py as a program; `parts`: what stands in the place of its own, by name, as the end of its code."""
    program = ["import sys", f"sys.path[:0] = [{str(tmp_path)!r}, {str(BENCH)!r}]", "import gpu"]
    for name, then in (parts or {}).items():
        (tmp_path / f"planted_{name}.py").write_text(PLANTED.format(name=name, then=then))
    boxes = {name: (f"planted_{name}", 20 if "sleep" in then else 120) for name, then in (parts or {}).items()}
    if parts:
        program.append(f"gpu.PARTS = {{name: gpu.Box(*box) for name, box in {boxes}.items()}}")
        # A part's own process begins with this program, too.
        program.append(f"gpu.SCRIPT = {str(tmp_path / 'run.py')!r}")
    program.append("sys.exit(gpu.main())")
    (tmp_path / "run.py").write_text("\n".join(program))
    return subprocess.run([sys.executable, tmp_path / "run.py", *arguments], capture_output=True, text=True)


def test_parts_fail_by_themselves(tmp_path):
    """One is sound, one crashes behind its rows, one dies without a word, one never ends: all rows are kept."""
    out = tmp_path / "out"
    then = {
        "fine": "",
        "raising": "raise RuntimeError('a peer is not here')",
        "dying": "os._exit(11)",
        "endless": "time.sleep(10**6)  # sleep",
        "wrong": 'yield part.check("unsound", lambda: 1 / 0)',
    }
    done = script(tmp_path, "--out", out, "--small", parts=then)
    assert done.returncode == 1, done.stderr
    content = json.loads((out / "gpu.json").read_text())
    assert content["stamp"]["dry run"] and content["stamp"]["torch"] == torch.__version__
    found = [rows.Row(**row) for row in content["rows"]]
    for name in then:
        mine = {row.name: row for row in found if row.part == name}
        assert mine["sound"].state == "pass" and mine["three rounds"].value == 2.0
    said = {row.part: row.note for row in found if row.state == "FAIL"}
    assert said == {
        "raising": "ended with 1: RuntimeError: a peer is not here",
        "dying": "ended with 11: no word",
        "endless": "outlived its box of 20 s",
        "wrong": "ZeroDivisionError: division by zero",
    }
    assert all(note in done.stdout for note in said.values())

    again = script(tmp_path, "--out", out, "--small", "--part", "fine", parts={"fine": ""})
    assert again.returncode == 0, again.stdout


def test_a_call_has_its_minutes(tmp_path):
    """What begins too late is not run, and that is no success."""
    done = script(tmp_path, "--out", tmp_path / "out", "--small", "--minutes", "1e-9", parts={"fine": ""})
    assert done.returncode == 1 and "no time was left for it" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--part", "truht"], "there is no part 'truht': did you mean 'truth'?"),
        (["--minutes", "0"], "--minutes 0: more than none"),
    ],
)
def test_a_bad_argument_is_a_sentence(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path), *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "file" / "out"), "--small"])
    assert "can't be made" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 3
    assert "no GPU here" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_every_part_gives_its_rows():
    for box in gpu.PARTS.values():
        source = BENCH.joinpath(*box.module.split(".")).with_suffix(".py").read_text()
        assert "\ndef rows(small: bool) -> Iterator[Row]:\n" in source


@pytest.mark.parametrize("part", ["decode", "prompt", "ceilings", "truth"])
def test_a_dry_run(tmp_path, part):
    """The very code that a GPU machine runs, at a toy's shapes; Triton's ops in the interpreter."""
    done = script(tmp_path, "--out", tmp_path / "out", "--small", "--part", part)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [*rows.read(tmp_path / "out" / f"{part}.jsonl")]
    assert {row.state for row in found} <= {"pass", "figure", "not run"} and len(found) > 4


def test_truth_finds_a_wrong_kernel():
    """An op that is off by a hundredth, and a graph whose third replay does something else."""
    program = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
from parts import truth
from internlm3 import kernels

class Wrong:
    def __getattr__(self, name):
        op = getattr(kernels, name)
        return (lambda *a, **k: op(*a, **k) * 1.01) if name == "linear_add" else op

truth.kernels = Wrong()
print(truth._logits(True, 2, 20))

model = truth.random_model(True, 2)

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

print(truth._graphs(model, True, capture))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=interpreted())
    assert done.returncode == 0, done.stderr
    logits, graphs = done.stdout.splitlines()
    assert logits.startswith("off by") and graphs.startswith("answers [")


def interpreted():
    return {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def test_a_suites_report_is_read(tmp_path):
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.kernels.test_rope" name="test_a"/>'
        '<testcase classname="tests.kernels.test_rope" name="test_b"><failure message="wrong&#10;more"/></testcase>'
        '<testcase classname="tests.kernels.test_norm" name="test_c"><skipped/></testcase></testsuite></testsuites>'
    )
    found = [*suite.results(rows.Part("suite"), tmp_path / "report.xml")]
    assert [(row.name, row.state, row.note) for row in found] == [
        ("test_rope::test_b", "FAIL", "wrong"),
        ("test_rope: 1 tests", "pass", ""),
    ]


# -------------------------------------------------------------------- the report


def measured():
    made = []
    for context, count, time in ((128, 1, 5.0), (1024, 1, 6.0), (1024, 16, 8.0)):
        about = {"engine": "internlm3", "context": context, "rows": count, "share": 0.9}
        made.append(rows.Part("decode").figure(f"{count} rows, {context} held", [time] * 3, "ms", **about))
        made.append(rows.Part("peers").figure("ours", [time] * 3, "ms", **about))
        about = {**about, "engine": "transformers, eager"}
        made.append(rows.Part("peers").figure("theirs", [2 * time, 3 * time, 4 * time], "ms", **about))
    made.append(rows.Part("peers").missing("gone", "not installed", engine="gone", context=128, rows=1))
    return made


STAMP = {"device": "A GPU", "driver": "1", "torch": "2", "commit": "abc", "date": "2027-01-02T03:04:05"}


def record(tmp_path, **stamp):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"stamp": {**STAMP, **stamp}, "rows": [dataclasses.asdict(row) for row in measured()]}))
    return path


def test_the_tables_say_what_was_measured(tmp_path, capsys):
    assert report.main([str(record(tmp_path))]) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert "| 1024 | 6.00 ms, 90% | 8.00 ms, 90% |" in text and "| 128 | 5.00 ms, 90% | - |" in text
    assert "| transformers, eager | 15.00 ms, 3.00 x | 18.00 ms, 3.00 x | 24.00 ms, 3.00 x |" in text
    assert "| gone | not run | not run | not run |" in text and "- commit: abc" in text


def test_drawings(tmp_path):
    pytest.importorskip("matplotlib", reason="the plots are an extra")
    assert [path.name for path in report.draw(measured(), tmp_path)] == ["gpu-context.svg", "gpu-rows.svg"]
    assert "transformers, eager" in (tmp_path / "gpu-rows.svg").read_text()


def test_the_readmes_take_the_figures_between_their_marks(tmp_path, monkeypatch):
    for name in report.ABOVE:
        (tmp_path / name).write_text((HOME / name).read_text())
    monkeypatch.setattr(report, "ROOT", tmp_path)
    path = record(tmp_path)
    for _ in range(2):  # the second time over the first one's
        assert report.main([str(path), "--readme"]) == 0
    for name in report.ABOVE:
        text, before = (tmp_path / name).read_text(), (HOME / name).read_text()
        assert text.count("| transformers, eager |") == 1 and "driver 1, torch 2" in text
        begin, end = (before.index(mark) for mark in report.MARKS)
        assert text.startswith(before[:begin]) and text.endswith(before[end:])


@pytest.mark.parametrize(
    ("path", "said"),
    [("README.md", "is no record of bench/gpu.py"), ("nowhere.json", "is no record of bench/gpu.py")],
)
def test_what_is_no_record_is_refused(path, said, capsys):
    with pytest.raises(SystemExit):
        report.main([str(HOME / path)])
    assert said in capsys.readouterr().err


def test_a_dry_run_is_nothing_for_a_readme(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(record(tmp_path, **{"dry run": True})), "--readme"])
    assert "its figures mean nothing" in capsys.readouterr().err
