"""bench.report: records are read, compared, tabulated, drawn and put into the READMEs."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench import ROOT, plots, record, report
from bench.compare import compare
from bench.data_sheets import bandwidth, with_rates
from bench.models import shapes
from bench.record import Part, Record
from bench.roofline import Roofline

STAMP = {"device": "a GPU", "driver": "1", "torch": "2.13", "commit": "abc", "date": "2026-11-25T10:00:00"}
SHAPES = {"shapes": {"of": "InternLM3-8B", "hidden": 4096}}


def op_row(op, shape, tokens, context=None, engine="triton", rounds=(2.0, 2.1, 2.2), part="ops", unit="us", **about):
    about = {
        "op": op,
        "shape": shape,
        "dtype": "bfloat16",
        "tokens": tokens,
        "context": context,
        "engine": engine,
        **about,
    }
    return Part(part).figure(f"{shape}, {engine}", rounds, unit, **about)


def read(**about):
    return {"bound": "read", "share": 0.5, **about}


ATTENTION = [
    op_row("paged_attention", f"batch {batch}, context {context}", batch, context, engine, **read())
    for batch in (1, 16)
    for context in (128, 1024)
    for engine in ("triton", "SDPA")
]
NORMS = [
    op_row("rms_norm", "batch 1", 1),
    op_row("rms_norm", "batch 16", 16),
    op_row("rms_norm", "chunk 512", 512),
]


# --- records


def test_quartiles():
    figure = Part("ops").figure("x", [4.0, 1.0, 2.0, 3.0, 5.0], "us")
    assert figure.quartiles == (1.5, 3.0, 4.5) and figure.value == 3.0
    assert Part("ops").figure("x", [4.0], "us").quartiles == (4.0, 4.0, 4.0)
    assert Part("ops").figure("x", [9.0, 1.0], "us").quartiles == (1.0, 5.0, 9.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a record of bench/: it is not JSON; name one that a program of bench/ wrote"),
        ("[]", "is not a record of bench/: name one"),
        (
            '{"machine_info": {}, "benchmarks": []}',
            "it is one of pytest-benchmark, which `pytest-benchmark compare` reads",
        ),
        ('{"traceEvents": []}', "it is a trace of a profiler, which chrome://tracing and Perfetto read"),
        (
            '{"definition": "x", "workload": {}}\n{"definition": "x", "workload": {}}',
            "of the common form, which flashinf",
        ),
        ('{"part": "ops", "name": "x", "state": "pass"}\n{}', "one part of bench.gpu; name the gpu.json beside it"),
        ('{"stamp": {}, "rows": [], "format": 99}', "has record format 99, this version reads 2"),
        ('{"stamp": {}, "rows": []}', "has record format None"),
        ('{"stamp": {}, "rows": [{"a": 1}], "format": 2}', "is a damaged record"),
    ],
)
def test_files_that_are_not_records(content, message, tmp_path, capsys):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        record.load(tmp_path / "x.json")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "x.json")])
    assert message in capsys.readouterr().err


def test_a_missing_file(capsys):
    with pytest.raises(SystemExit):
        report.main(["a.json", "b.json"])
    assert "a.json can't be read: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_the_stored_records_can_be_read(path, capsys):
    assert report.main([str(path)]) == 0
    rows = [row for row in record.load(path).rows if "ceiling" not in row.about]
    assert len(capsys.readouterr().out.splitlines()) > len(rows) > 0


# --- comparison


def made(times, stamp=None, op="linear", read=1e9):
    rows = [*Roofline(read, 1e9, {"bfloat16": 1e12}).rows(), op_row(op, "batch 1", 1, rounds=times)]
    rows[-1] = Part("ops").figure(f"{op}, batch 1, bfloat16, triton", times, "us", **rows[-1].about)
    return Record({**STAMP, **SHAPES, **(stamp or {})}, rows)


@pytest.mark.parametrize(
    ("before", "after", "end"),
    [
        ([10.0, 10.1, 10.2], [5.0, 5.1, 5.2], "1.980x"),
        ([10.0, 12.0, 14.0], [11.0, 13.0, 15.0], "noise: rounds overlap"),
        ([10.0, 10.1, 10.2], [10.4, 10.5, 10.6], "noise: as the ceilings drift"),
    ],
)
def test_noise_is_named(before, after, end):
    assert compare(made(before), made(after, read=0.95e9))[-2].endswith(end)


def test_a_higher_rate_is_faster():
    before, after = (
        Record(STAMP, [Part("demo_model").figure("decode", [rate] * 3, "tokens/s")]) for rate in (10.0, 20.0)
    )
    assert compare(before, after)[-2].endswith("2.000x")


def test_differences_between_the_runs_are_listed(tmp_path, capsys):
    before, after = made([1.0]), made([1.0], {"torch": "2.14", "commit": "def"})
    lines = compare(before, after)
    assert lines[:2] == ["commit: abc -> def", "torch: 2.13 -> 2.14"]
    assert lines[-1] == "1 rows compared"
    before.save(tmp_path / "before.json")
    after.save(tmp_path / "after.json")
    assert report.main([str(tmp_path / "before.json"), str(tmp_path / "after.json")]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_a_record_under_load_is_named():
    quiet, busy = made([1.0], {"clocks": {"load average": 0.4}}), made([1.0], {"clocks": {"load average": 3.2}})
    warning = "warning: after was measured under load (load average 3.2): a change may be that of the load"
    assert compare(quiet, busy)[0] == warning
    assert not any("warning" in line for line in compare(quiet, quiet))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stamp": {"device": "another"}}, "the records are of two devices, a GPU and another"),
        ({"stamp": {"shapes": {"hidden": 64}}}, "the records are of two models' shapes"),
        ({"op": "embed"}, "the records have no row in common"),
    ],
)
def test_records_that_can_not_be_compared(change, message):
    with pytest.raises(ValueError, match=message):
        compare(made([1.0]), made([1.0], **change))


# --- plots


def test_lines_have_two_points_at_least():
    assert {key: [x.about["context"] for x in line] for key, line in plots.by("context", ATTENTION).items()} == {
        (engine, batch): [128, 1024] for engine in ("triton", "SDPA") for batch in ("batch 1", "batch 16")
    }
    assert {key: [x.about["tokens"] for x in line] for key, line in plots.by("tokens", ATTENTION).items()} == {
        (engine, f"batch, context {context}"): [1, 16] for engine in ("triton", "SDPA") for context in (128, 1024)
    }
    assert list(plots.by("tokens", NORMS)) == [("triton", "batch")]  # one chunk makes no line
    assert plots.by("context", NORMS) == {}


def test_what_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the plots are an extra")
    bound = op_row("linear", "chunk 512, o_proj", 512, rounds=[4.0], bound="matmul", share=0.7)
    missing = Part("ops").missing("x", "not installed", op="linear", shape="batch 1", engine="GemLite")
    made = Record({**STAMP, **SHAPES}, [*ATTENTION, *NORMS, bound, missing, *measured()])
    drawn = plots.draw(made, tmp_path / "plots")
    names = {path.name for path in drawn}
    assert names == {
        "share-bfloat16.svg",
        "paged_attention-context-bfloat16.svg",
        "paged_attention-tokens-bfloat16.svg",
        "rms_norm-tokens-bfloat16.svg",
        "decode_step-context-bfloat16.svg",
        "decode_step-tokens-bfloat16.svg",
    }
    text = {path.name: re.sub(r"\s+", " ", path.read_text("utf-8")) for path in drawn}
    share = text["share-bfloat16.svg"]
    for words in (
        "paged_attention, batch 1, context 128 (read)",
        "linear, chunk 512, o_proj (matmul)",
        "triton",
        "SDPA",
    ):
        assert words in share
    assert "GemLite" not in share and "transformers, eager" in text["decode_step-tokens-bfloat16.svg"]
    for name in names:
        assert "a GPU, commit abc, 2026-11-25; shapes of InternLM3-8B" in text[name]
    again = plots.draw(made, tmp_path / "again")
    assert [path.read_bytes() for path in drawn] == [path.read_bytes() for path in again]


def test_a_share_of_what_a_cache_may_have_served_is_not_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the plots are an extra")
    assert plots.draw(Record({**STAMP, **SHAPES}, NORMS[:1]), tmp_path / "plots") == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [(NORMS[:1], "nothing is drawn: no row has a share"), (ATTENTION[:1], "no lines are drawn: no op has two context")],
)
def test_a_plot_of_a_single_point_says_so(rows, message, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plots are an extra")
    Record({**STAMP, **SHAPES}, [replace(row, part="decode") for row in rows]).save(tmp_path / "x.json")
    assert report.main([str(tmp_path / "x.json"), "--plot", str(tmp_path / "plots")]) == 0
    assert message in capsys.readouterr().out


def test_the_ops_of_a_step_are_drawn_if_all_are_there(tmp_path):
    pytest.importorskip("matplotlib", reason="the plots are an extra")
    ops = [op_row(op, shape, 1) for op, shape in plots.STEP]
    assert [path.name for path in plots.draw(Record(STAMP, ops), tmp_path)] == ["decode_step-ops.svg"]


def test_a_folder_that_can_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--plot needs matplotlib: pip install 'internlm3"):
        plots.check(str(tmp_path))
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: name)
    plots.check(str(tmp_path / "new"))
    (tmp_path / "file").write_text("")
    for name in ("file", "none/new"):
        with pytest.raises(ValueError, match="can't be written: name a folder inside one that exists"):
            plots.check(str(tmp_path / name))


# --- tables and READMEs


def step(part, batch, context, rounds, engine="internlm3"):
    shape = f"batch {batch}, context {context}"
    return op_row("decode step", shape, batch, context, engine, rounds, part, "ms", **read(share=0.9))


def measured():
    rows = []
    for context, batch, time in ((128, 1, 5.0), (1024, 1, 6.0), (1024, 16, 8.0)):
        rows.append(step("decode", batch, context, [time] * 3))
        rows.append(step("peers", batch, context, [time] * 3))
        rows.append(step("peers", batch, context, [2 * time, 3 * time, 4 * time], "transformers, eager"))
    rows.append(Part("peers").missing("gone", "not installed", engine="gone", shape="batch 1, context 128"))
    rows.append(Part("first_token").figure("16 tokens", [9.0], "ms", tokens=16, **read(share=0.03)))
    return rows


def saved(tmp_path, **stamp):
    path = tmp_path / "gpu.json"
    Record({**STAMP, **stamp}, measured()).save(path)
    return str(path)


def test_the_tables_of_a_gpu_record(tmp_path):
    assert report.main([saved(tmp_path), "--markdown", str(tmp_path / "gpu.md"), "--csv", str(tmp_path / "x.csv")]) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert "| context | batch 1 | batch 16 |" in text
    assert "| 1024 | 6.00 ms, 90% | 8.00 ms, 90% |" in text and "| 128 | 5.00 ms, 90% | - |" in text
    assert "| transformers, eager | 15.00 ms, 3.00 x | 18.00 ms, 3.00 x | 24.00 ms, 3.00 x |" in text
    assert "| gone | not run | not run | not run |" in text and "- commit: abc" in text
    assert "| time to first token | 9.0 ms, 3% |" in text
    rows = [*csv.DictReader((tmp_path / "x.csv").open(encoding="utf-8"))]
    assert len(rows) == len(measured()) and rows[2]["median"] == "15.0" and rows[2]["engine"] == "transformers, eager"


def test_the_readmes_get_the_figures_between_their_marks(tmp_path):
    for name in report.ABOVE:
        (tmp_path / name).write_text((ROOT / name).read_text())
    path = saved(tmp_path)
    for _ in range(2):  # the second run replaces the figures of the first
        assert report.main([path, "--readme", str(tmp_path)]) == 0
    for name in report.ABOVE:
        text, before = (tmp_path / name).read_text(), (ROOT / name).read_text()
        assert text.count("| transformers, eager |") == 1 and "driver 1, torch 2" in text
        begin, end = (before.index(mark) for mark in report.MARKS)
        assert text.startswith(before[:begin]) and text.endswith(before[end:])


def test_the_readmes_have_the_figures_of_the_stored_record():
    """Tables, first lines and the text below the tables; shares are of the record's one ceiling, bytes over time."""
    stored = record.load(ROOT / "bench" / "results" / "2026-11-27-h200.json")
    ceilings = Roofline.of(stored.rows)
    step = next(
        row for row in stored.rows if row.part == "decode" and row.about.get("shape") == "batch 1, context 1024"
    )
    weights, tokens = 2 * (8_804_241_408 - 128_512 * 4096), 1024 * 49_152  # all but the embedding; bytes per token
    assert step.about["share"] == pytest.approx((weights + tokens) / ceilings.read / (step.value / 1e3))
    for row in stored.rows:
        assert ceilings.with_share(row) == row
        assert ("share" in row.about) == ("bytes" in row.about)
    for name, above in report.ABOVE.items():
        text = (ROOT / name).read_text("utf-8")
        assert report.into_readme(text, above, stored) == text
        first = next(line for line in text.splitlines() if "H200" in line)
        assert f"{step.value:.1f} ms" in first and f" {step.about['share']:.0%}" in first
        assert f"{ceilings.read / 1e12:.2f} TB/s" in text[text.index(report.MARKS[1]) :]


@pytest.mark.parametrize(
    ("stamp", "message"),
    [
        ({"dry run": True}, "its figures mean nothing"),
        ({}, "README.md can't be read: No such file"),
        ({"shapes": shapes("llama-3.1-8b")}, "is of Llama-3.1-8B: the"),
    ],
)
def test_records_that_the_readmes_refuse(tmp_path, capsys, stamp, message):
    with pytest.raises(SystemExit):
        report.main([saved(tmp_path, **stamp), "--readme", str(tmp_path)])
    assert message in capsys.readouterr().err


def machine(device, date, milliseconds=4.0, part="decode", **stamp):
    row = op_row("decode step", "batch 1, context 1024", 1, 1024, "internlm3", [milliseconds], part, "ms", bytes=16e9)
    return Record({**STAMP, "device": device, "date": date, **stamp}, [row])


def test_a_table_of_machines_has_the_newest_record_of_each(tmp_path, capsys):
    """Of each model. A record of another part, and a dry run, are no newer figures. Shares and tokens/s by hand."""
    made = [
        machine("NVIDIA H200", "2026-01-02", 4.0),
        machine("NVIDIA H200", "2026-01-01", 9.0),
        machine("NVIDIA H200", "2026-01-03", 9.0, part="first_token"),
        machine("NVIDIA H200", "2026-01-04", 9.0, **{"dry run": True}),
        machine("NVIDIA H200", "2026-01-01", 3.0, shapes=shapes("llama-3.1-8b")),
        machine("a new card", "2026-01-01", 5.0),
    ]
    paths = [str(tmp_path / f"{i}.json") for i in range(len(made))]
    for record_, path in zip(made, paths, strict=True):
        record_.save(path)
    assert report.main(paths) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "| NVIDIA H200 | InternLM3-8B | 2026-01-02, abc | - | 4.00 ms, 250 tokens/s, 83% of data sheet | - | - |",
        "| NVIDIA H200 | Llama-3.1-8B | 2026-01-01, abc | - | 3.00 ms, 333 tokens/s, 111% of data sheet | - | - |",
        "| a new card | InternLM3-8B | 2026-01-01, abc | - | 5.00 ms, 200 tokens/s | - | - |",
    ]
    for two, shown in (((0, 5), (0, 2)), ((0, 4), (0, 1))):  # of two machines, and of two models
        assert report.main([paths[i] for i in two]) == 0
        assert capsys.readouterr().out.splitlines()[2:] == [lines[i] for i in shown]


def test_a_record_that_can_not_be_read_is_left_out_of_the_table(tmp_path, capsys):
    paths = [str(tmp_path / f"{i}.json") for i in range(3)]
    machine("NVIDIA H200", "2026-01-02", 4.0).save(paths[0])
    Path(paths[1]).write_text('{"stamp": {}, "rows": [], "format": 1}')
    assert report.main(paths) == 0
    out, err = capsys.readouterr()
    assert "| NVIDIA H200 | InternLM3-8B | 2026-01-02" in out
    lines = [f"left out: {paths[1]} has record format 1", f"left out: {paths[2]} can't be read"]
    assert [line.startswith(start) for line, start in zip(err.splitlines(), lines, strict=True)] == [True, True]
    with pytest.raises(SystemExit):
        report.main(paths[1:] * 2)
    assert "none of the records can be read" in capsys.readouterr().err


def test_rates_of_a_decode_step():
    """Counted by hand; where the data sheet is not known there is no share of it. Text and Markdown have them."""
    (row,) = machine("NVIDIA H200", "2026-01-02", 4.0).rows
    known = with_rates(row, "NVIDIA H200")
    assert known.about["tokens/s"] == 250 and known.about["of data sheet"] == pytest.approx(16 / 4.8 / 4)
    assert "250 tokens/s; 83.3% of the data sheet" in str(known) and with_rates(known, "NVIDIA H200") == known
    assert with_rates(row, "a new card").about.keys() - row.about.keys() == {"tokens/s"}
    assert with_rates(NORMS[0], "NVIDIA H200") == NORMS[0]
    assert bandwidth("NVIDIA A100-SXM4-80GB") == 2.039e12 and bandwidth("NVIDIA H100 80GB HBM3") == 3.35e12


def test_a_record_shows_decode_steps_as_others_publish_theirs(tmp_path, capsys):
    made = machine("NVIDIA H200", "2026-01-02", 4.0)
    made.save(tmp_path / "x.json")
    assert report.main([str(tmp_path / "x.json"), "--markdown", str(tmp_path / "x.md")]) == 0
    assert "250 tokens/s; 83.3% of the data sheet" in capsys.readouterr().out
    line = "| decode | batch 1, context 1024, internlm3 | 4.00 ms, 250 tokens/s, 83% of data sheet |"
    assert line in (tmp_path / "x.md").read_text()


@pytest.mark.parametrize(
    ("more", "part", "message"),
    [(["--readme", "."], "decode", "only printed"), ([], "first_token", "no record has decode steps or ceilings")],
)
def test_no_table_of_machines(more, part, message, tmp_path, capsys):
    for name in "ab":
        machine(name, "2026-01-02", part=part).save(tmp_path / name)
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "a"), str(tmp_path / "b"), *more])
    assert message in capsys.readouterr().err


def test_the_stored_records_make_a_table_of_machines(capsys):
    assert report.main([*map(str, sorted((ROOT / "bench/results").glob("*.json")))]) == 0
    assert "| NVIDIA H200 | InternLM3-8B | 2026-11-27" in capsys.readouterr().out


def test_the_format_is_json_of_stamp_and_rows(tmp_path):
    content = json.loads(Path(saved(tmp_path)).read_text())
    assert content.keys() == {"format", "stamp", "rows"} and len(content["rows"]) == len(measured())
