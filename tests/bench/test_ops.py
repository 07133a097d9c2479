"""The microbenchmarks' tool, on a CPU and at tiny shapes: no time here is held to anything, only what is said of it."""

import csv
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import checking
import peers
import pytest
import record
import torch
import work
from cases import Inputs, Size, cases, read_size
from internlm3 import kernels
from timing import Floor

BENCH = Path(__file__).parents[1] / "bench"
TINY = Size(hidden=32, intermediate=48, vocabulary=70, heads=4, kv_heads=2, head_dim=16)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="dry runs of what a CPU does")


@pytest.fixture(scope="module")
def tool():
    """bench/kernels.py, by another name than the package's."""
    spec = importlib.util.spec_from_file_location("bench_tool", BENCH / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_tool"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path):
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 70,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


@pytest.fixture
def fast(monkeypatch, tool):
    """No floor is measured, and no compiler runs."""
    floor = Floor(1e9, 1e9, {"bfloat16": 1e12, "float16": 1e12, "float32": 1e12})
    monkeypatch.setattr(tool, "measure_floor", lambda *_: floor)
    monkeypatch.delitem(peers.PEERS, "torch.compile")
    return floor


def fails(tool, capsys, *arguments):
    """The one sentence with which the tool refuses these arguments."""
    with pytest.raises(SystemExit) as end:
        tool.main([*map(str, arguments)])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""  # nothing was measured
    return err.splitlines()[-1].split("error: ")[1]


# --- cases


def test_every_op_has_a_case():
    assert {case.op for case in cases()} == set(kernels.__all__)


def test_cases_are_told_apart():
    every = list(cases(TINY, [torch.bfloat16, torch.float32], [1, 2], [3], [64, 100]))
    assert len({(case.op, case.shape, case.dtype) for case in every}) == len(every)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_reference_takes_every_case(dtype):
    """At lengths that are no multiples of a page, and a chunk at the end of more."""
    device = torch.device("cpu")
    for case in cases(TINY, [dtype], [1, 3], [5], [100]):
        arguments = case.arguments(device)
        assert (
            checking.error_of(case.op, arguments, lambda given, op=case.op: getattr(checking.reference, op)(**given))
            == ""
        )


def test_the_shapes_of_a_checkpoint(config):
    assert read_size(config) == read_size(config / "config.json") == TINY


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read"),
        ("[1]", "is no JSON object"),
        ("{", "is no JSON object"),
        ('{"num_attention_heads": 4}', "has hidden_size None, and the shapes need a positive integer there"),
        ('{"num_attention_heads": 4, "hidden_size": "wide"}', "has hidden_size 'wide'"),
    ],
)
def test_no_checkpoint(content, message, tmp_path, tool, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert message in fails(tool, capsys, "--config", tmp_path)


# --- bytes and operations


def test_bytes_and_operations():
    """Counted by hand at tiny shapes."""
    make = Inputs(TINY, torch.bfloat16, torch.device("cpu"))
    of = {
        (case.op, case.shape): case.arguments(make.device) for case in cases(TINY, rows=[2], chunks=[3], contexts=[100])
    }

    def amounts(op, shape):
        arguments = of[op, shape]
        return work.moved(op, arguments, getattr(checking.reference, op)(**arguments)), work.operations(op, arguments)

    assert amounts("embed", "2 rows") == (2 * 8 + 2 * 2 * 32 * 2, 0)
    assert amounts("rms_norm", "2 rows") == ((2 * 32 + 32 + 2 * 32) * 2, 0)
    assert amounts("swiglu", "2 rows") == ((2 * 96 + 2 * 48) * 2, 0)
    assert amounts("linear_add", "2 rows, down") == ((2 * 48 + 32 * 48 + 2 * 2 * 32) * 2, 2 * 2 * 48 * 32)
    # 2 sequences of 100 tokens on 2 pages of 64: whole pages are counted, as they lie in memory.
    pages = 2 * 2 * 2 * 2 * 64 * 16 * 2
    assert amounts("paged_attention", "2 rows, 100 held") == (
        pages + 2 * 2 * 4 * 16 * 2 + 2 * 2 * 4 + 2 * 4,
        4 * 4 * 16 * 200,
    )
    assert amounts("paged_attention", "3 tokens, 100 held")[1] == 4 * 4 * 16 * (98 + 99 + 100)
    qkv, written = (4 + 4) * 16, 3 * 2 * 2 * 16
    assert (
        amounts("rope_and_cache", "3 tokens, 100 held")[0] == (3 * qkv + written + 3 * 4 * 16) * 2 + 8 * 4 + 2 * 4 + 4
    )


def test_what_is_bound_by_arithmetic_is_held_to_products():
    floor = Floor(1e12, 1e12, {"bfloat16": 1e14})
    assert floor.share("bfloat16", 10**6, 10**6, 2.0) == ("read", 0.5)
    name, share = floor.share("bfloat16", 10**6, 10**9, 20.0)
    assert (name, round(share, 9)) == ("matmul", 0.5)


# --- the tool


def test_list_times_nothing(tool, capsys):
    assert tool.main(["--list", "--op", "paged_attention", "--rows", "1", "4", "--context", "128", "131072"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shapes = ["1 row, 128 held", "1 row, 131072 held", "4 rows, 128 held", "4 rows, 131072 held"]
    assert [line[24:49].strip() for line in lines] == shapes
    assert all("reference, SDPA, FlashInfer" in line for line in lines)


def test_rows_and_record(tool, fast, config, tmp_path, capsys):
    """Rows are printed; the record has every round; the CSV follows from it."""
    written, table = tmp_path / "run.json", tmp_path / "run.csv"
    chosen = ["--op", "linear", "paged_attention", "--rows", "2", "--context", "100", "--dtype", "float32"]
    written_to = ["--rounds", "3", "--seed", "5", "--json", str(written), "--csv", str(table)]
    assert tool.main(["--config", str(config), *chosen, *written_to]) == 0
    out = capsys.readouterr().out
    assert "these figures say nothing of Triton's" in out
    assert "FlashInfer      not timed: not installed: pip install flashinfer-python" in out
    loaded = record.load(written)
    timed = {(x.op, x.engine): x for x in loaded.figures if x.rounds}
    assert timed.keys() == {
        ("linear", "reference"), ("linear", "PyTorch"), ("paged_attention", "reference"), ("paged_attention", "SDPA")
    }  # fmt: skip
    assert all(len(x.rounds) == 3 and x.shape and x.dtype == "float32" for x in timed.values())
    assert {"date", "commit", "device", "driver", "clocks", "torch", "command", "seed"} <= loaded.stamp.keys()
    assert loaded.stamp["shapes"]["hidden"] == 32
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert len(rows) == len(loaded.figures)
    for row, figure in zip(rows, loaded.figures, strict=True):
        assert (row["op"], row["engine"], row["note"]) == (figure.op, figure.engine, figure.note)
        if figure.rounds:
            assert float(row["us"]) == figure.microseconds
            assert float(row["GB/s"]) == pytest.approx(figure.bytes / figure.microseconds / 1e3)
            assert row["cache"] == "warm" and row["floor"] in ("", "matmul")
    capsys.readouterr()
    assert tool.main(["--read", str(written)]) == 0  # the same rows again
    assert capsys.readouterr().out.splitlines()[-len(rows) :] == [tool.line(x, fast) for x in loaded.figures]


def test_quartiles():
    figure = record.Figure("linear", "1 row", "bfloat16", 1, None, "triton", 1000, 0, True, [4.0, 1.0, 2.0, 3.0, 5.0])
    assert figure.quartiles == (1.5, 3.0, 4.5)
    assert record.Figure("linear", "1 row", "bfloat16", 1, None, "triton", rounds=[4.0]).quartiles == (4.0, 4.0, 4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "linaer"], "there is no op 'linaer': did you mean 'linear'?"),
        (["--op", "zzz"], "there is no op 'zzz': there are advance, embed"),
        (["--engine", "flashinfr"], "there is no engine 'flashinfr': did you mean 'FlashInfer'?"),
        (["--dtype", "bf16"], "there is no dtype 'bf16': did you mean 'bfloat16'?"),
        (["--rows", "0"], "'0': a whole number from 1 on"),
        (["--context", "1k"], "'1k': a whole number from 1 on"),
        (["--rounds", "0"], "'0': a whole number from 1 on"),
        (["--chunk", "2048"], "--chunk 2048 is more than the --context 1024 that holds it"),
        (["--op", "sample", "--chunk", "8"], "nothing to time: sample is of decode alone; ask for --rows"),
        (["--json", "/no/where/x.json"], "/no/where/x.json can't be written: name a file in a folder that there is"),
        (["--kernel", "nothing.py"], "nothing.py is no file: name a Python file with a function of an op's name"),
        (["--compare", "a.json", "b.json"], "a.json can't be read: No such file or directory"),
    ],
)
def test_bad_arguments_fail_before_anything_is_measured(arguments, message, tool, capsys):
    assert message in fails(tool, capsys, *arguments)


def test_pytest_benchmark_reads_the_same_cases_and_says_what_it_times():
    """It runs in a process of its own, as by hand; what it holds to the table's median is in bench/test_kernels.py."""
    command = [Path(sys.executable).with_name("pytest"), "-q", BENCH / "test_kernels.py", "-k", "advance or embed"]
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCH.parent, env=environment)
    assert done.returncode == 0, done.stdout
    assert "the plain PyTorch of the ops, a small model's shapes; not Triton" in done.stdout
    assert "test_kernel[embed, 512 tokens]" in done.stdout
    assert "6 passed" in done.stdout


# --- comparison


FLOOR = Floor(1e9, 1e9, {"bfloat16": 1e12})
STAMP = {"device": "a GPU", "torch": "2.13", "commit": "abc", "date": "today", "shapes": {"hidden": 32}}


def made(times, stamp=None, op="linear", floor=FLOOR):
    figure = record.Figure(op, "1 row", "bfloat16", 1, None, "triton", 1000, 0, True, times)
    return record.Record(STAMP | (stamp or {}), floor, [figure])


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([10.0, 10.1, 10.2], [5.0, 5.1, 5.2], "1.980x"),
        ([10.0, 12.0, 14.0], [11.0, 13.0, 15.0], "noise: rounds overlap"),
        ([10.0, 10.1, 10.2], [10.4, 10.5, 10.6], "noise: as the floors drift"),
    ],
)
def test_what_is_noise_is_said(before, after, said):
    slower = Floor(0.95e9, 1e9, {"bfloat16": 1e12})
    row = record.compare(made(before), made(after, floor=slower))[-2]
    assert row.endswith(said)


def test_differences_of_the_runs_are_named():
    lines = record.compare(made([1.0]), made([1.0], {"torch": "2.14", "commit": "def"}))
    assert lines[:2] == ["commit: abc -> def", "torch: 2.13 -> 2.14"]
    assert lines[-1] == "1 rows compared"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stamp": {"device": "another"}}, "the records are of two devices, a GPU and another"),
        ({"stamp": {"shapes": {"hidden": 64}}}, "the records are of two models' shapes"),
        ({"op": "embed"}, "the records have no row in common"),
    ],
)
def test_records_that_do_not_compare(change, message):
    with pytest.raises(ValueError, match=message):
        record.compare(made([1.0]), made([1.0], **change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON: name a record that --json wrote"),
        ("[]", "is no record of bench/kernels.py"),
        (
            '{"stamp": {}, "floor": {}, "figures": [], "format": 99}',
            "is a record of format 99, and this version reads 1",
        ),
        ('{"stamp": {}, "floor": {}, "figures": []}', "is a record of format None"),
        ('{"stamp": {}, "floor": {"a": 1}, "figures": [], "format": 1}', "is a damaged record"),
    ],
)
def test_no_record(content, message, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        record.load(tmp_path / "x.json")


# --- peers


def test_every_peer_is_of_known_ops():
    for name, about in peers.PEERS.items():
        assert about.ops and set(about.ops) <= set(kernels.__all__), name


@pytest.mark.parametrize("name", ["PyTorch", "cuBLAS", "SDPA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_a_peer_computes_is_the_op(name, dtype):
    """Those whose functions a CPU can call."""
    for case in cases(TINY, [dtype], [1, 3], [5], [100]):
        if case.op in peers.PEERS[name].ops:
            arguments = case.arguments(torch.device("cpu"))
            run = lambda given, op=case.op: peers.PEERS[name].make(op, given)()  # noqa: E731
            assert checking.error_of(case.op, arguments, run) == "", (case.op, case.shape)


def run_with(tool, make, config, capsys, more=()):
    """The row of a peer of this making."""
    peers.PEERS["other"] = peers.Peer(("rms_norm",), make, "torch", "torch", False)
    try:
        arguments = ["--config", str(config), "--op", "rms_norm", "--rows", "2", "--rounds", "1", *more]
        assert tool.main(arguments) == 0
    finally:
        del peers.PEERS["other"]
    return next(x for x in capsys.readouterr().out.splitlines() if " other " in x)


def wrong(op, arguments):
    return lambda: checking.reference.rms_norm(**arguments) * 1.2


def broken(op, arguments):
    raise RuntimeError("no such kernel\nand a long story")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (wrong, "WRONG, not timed: the result (bfloat16 [2, 32]) is wrong at"),
        (broken, "not timed: RuntimeError: no such kernel"),
    ],
)
def test_a_peer_that_fails_is_a_row_that_says_so(make, said, tool, fast, config, capsys):
    row = run_with(tool, make, config, capsys)
    assert said in row and "long story" not in row


def test_a_peer_that_is_never_ready_is_one_too(tool, fast, config, capsys, monkeypatch):
    monkeypatch.setattr(peers, "SECONDS", 1)
    row = run_with(tool, lambda op, arguments: signal.pause, config, capsys, ["--engine", "other"])
    assert "not timed: not ready after 1 seconds" in row


def test_torch_compile_serves_many_shapes(monkeypatch):
    """More than the eight that it keeps of one function. What it generates is its own affair, and takes long."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for rows in range(1, 11):
        (case,) = (case for case in cases(TINY, rows=[rows], chunks=[]) if case.op == "embed")
        arguments = case.arguments(torch.device("cpu"))
        run = peers.make("torch.compile", "embed", arguments, torch.device("cpu"))
        assert torch.equal(run(), checking.reference.embed(**arguments))


# --- one's own kernel


NORM = """
import torch
def rms_norm(x, weight, eps):
    y = torch.empty_like(x)
    {body}
    return y
"""
RIGHT = "y.copy_(x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).mul_(weight)"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (RIGHT, None),
        ("raise RuntimeError('out of luck')", "not timed: RuntimeError: out of luck"),
        ("pass", "WRONG, not timed: the result (bfloat16 [2, 32]) is wrong at 64 of 64 places, worst at"),
        (RIGHT + "; y = y[:1]", "the result has shape [1, 32], must have [2, 32]"),
        (RIGHT + "; y = y.float()", "the result is torch.float32, must be torch.bfloat16"),
        (RIGHT + "; y = (y, y)", "it returns a tensor, a tensor, and the op a tensor"),
        (RIGHT + "; y = None", "it returns None, and the op a tensor"),
        (RIGHT + "; x.mul_(2)", "the kernel changed its input x"),
        (RIGHT + "; x.as_strided((1,), (1,), x.storage_offset() + 64).zero_()", "the kernel wrote outside its x"),
        (RIGHT + "; y.as_strided((1,), (1,), y.storage_offset() - 1).zero_()", "the kernel wrote outside its output"),
        (RIGHT + "; y[1, 7] += 1", "is wrong at 1 of 64 places, worst at [1, 7]"),
    ],
)  # fmt: skip
def test_own_kernel(body, said, tool, fast, config, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text(NORM.format(body=body))
    code = tool.main(["--config", str(config), "--kernel", str(mine), "--rows", "2", "--rounds", "1", "--seed", "3"])
    out = capsys.readouterr().out
    (row,) = [x for x in out.splitlines() if " mine.py " in x]
    assert all(x.startswith("rms_norm") for x in out.splitlines() if "bfloat16 " in x and "floor" not in x)
    if said is None:
        assert code == 0 and row.endswith("warm")
    else:
        assert code == 1 and said in row
        assert "the same inputs again: --seed 3" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def rms_nrom(x): pass",
            "has no function of an op's name; there is no op 'rms_nrom': did you mean 'rms_norm'?",
        ),
        ("x = 1", "has no function of an op's name"),
        ("1 / 0", "raises ZeroDivisionError when it is loaded: division by zero"),
        ("def f(:", "raises SyntaxError when it is loaded"),
        ("from internlm3.kernels.reference import rms_norm", "has no function of an op's name"),
    ],
)
def test_a_file_without_a_kernel(text, message, tool, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    assert message in fails(tool, capsys, "--kernel", tmp_path / "mine.py")


def test_fuzz_takes_an_own_kernel_through_the_cases(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def rms_norm(x, weight, eps):\n    raise RuntimeError('it was called')\n")
    command = [
        sys.executable,
        BENCH.parent / "tests" / "fuzz.py",
        "--kernel",
        mine,
        "--dtype",
        "float16",
        "--seed",
        "5",
    ]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "RuntimeError: it was called" in done.stdout and "dtype=torch.float16" in done.stdout
    again = f'again: make fuzz ARGS="--op rms_norm --dtype float16 --kernel {mine} --seed 5"'
    assert done.stdout.splitlines()[-1] == again


def test_own_kernel_of_an_op_that_writes(tool, fast, config, tmp_path, capsys):
    """k and v enter the pages as the reference writes them, and nothing beside."""
    mine = tmp_path / "mine.py"
    whole = """
from internlm3.kernels import reference
def rope_and_cache(**arguments):
    q = reference.rope_and_cache(**arguments)
    {then}
    return q
"""
    for then, code, said in (
        ("pass", 0, "warm"),
        ("arguments['v_cache'][0, 0, 0] += 1", 1, "v_cache (bfloat16 [4, 2, 64, 16]) is wrong at"),
        ("arguments['seq_lens'] += 1", 1, "the kernel changed its input seq_lens"),
    ):
        mine.write_text(whole.format(then=then))
        arguments = ["--config", str(config), "--kernel", str(mine), "--rows", "2", "--context", "100", "--rounds", "1"]
        assert tool.main(arguments) == code
        (row,) = [x for x in capsys.readouterr().out.splitlines() if " mine.py " in x]
        assert said in row
