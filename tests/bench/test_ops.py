"""bench.ops on a CPU at tiny shapes: what it measures, checks, prints and refuses. No test depends on a time."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import ROOT, harness, measure, ops, peers, record, roofline, tables, verify
from bench.cases import DENSE, FORMS, Inputs, Size, cases, read_size
from bench.roofline import Roofline
from internlm3 import kernels
from internlm3.kernels import cpu, reference

TINY = Size(hidden=32, intermediate=48, vocabulary=70, heads=4, kv_heads=2, head_dim=16)
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests of what happens on a CPU"),
    pytest.mark.usefixtures("in_this_process"),
]


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
def fast(monkeypatch):
    """Skips measuring the ceilings, and the compiler."""
    ceilings = Roofline(1e9, 1e9, {"bfloat16": 1e12, "float16": 1e12, "float32": 1e12})
    monkeypatch.setattr(roofline, "measure", lambda *_: ceilings)
    monkeypatch.delitem(peers.PEERS, "torch.compile")


def fails(capsys, *arguments):
    """The error message for these arguments."""
    with pytest.raises(SystemExit) as end:
        ops.main([*map(str, arguments)])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""  # nothing was measured
    return err.splitlines()[-1].split("error: ")[1]


# --- cases


def test_every_op_has_a_case():
    assert {case.op for case in cases()} == set(kernels.__all__)


def test_cases_have_distinct_names():
    every = list(cases(TINY, [torch.bfloat16, torch.float32], [1, 2], [3], [64, 100]))
    assert len({(case.op, case.shape, case.dtype) for case in every}) == len(every)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_reference_takes_every_case(dtype):
    """At lengths that are not multiples of a page, and for a chunk at the end of a longer context."""
    device = torch.device("cpu")
    for case in cases(TINY, [dtype], [1, 3], [5], [100]):
        arguments = case.arguments(device)
        assert verify.error_of(case.op, arguments, lambda given, op=case.op: getattr(reference, op)(**given)) == ""


def test_honest_results_that_are_far_off_are_right():
    """The furthest of many: a row whose gate and up are both large, with rounded factors."""
    seeds = {"rms_norm_swiglu": range(40), "rms_norm_qkv_rope_cache": range(10)}
    for case in cases(TINY, batches=[], chunks=[512], contexts=[512]):
        for seed in seeds.get(case.op, ()):
            torch.manual_seed(seed)
            arguments = case.arguments(torch.device("cpu"))
            run = lambda given, op=case.op: getattr(cpu, op)(**given)  # noqa: E731
            assert verify.error_of(case.op, arguments, run) == "", (case.op, case.shape, seed)


@pytest.mark.parametrize("strict", [False, True])
def test_the_check_leaves_its_arguments_as_they_are(strict):
    """Those in float32 and those that the op writes too: what the kernel is compared with is drawn from them."""
    device = torch.device("cpu")
    for case in cases(TINY, [torch.float32], [1, 3], [5], [100]):
        arguments = case.arguments(device)
        before = verify.copies(arguments, torch.clone)
        run = lambda given, op=case.op: getattr(kernels.for_device(device), op)(**given)  # noqa: E731
        assert verify.error_of(case.op, arguments, run, strict) == "", (case.op, case.shape)
        for (_, x), (_, kept) in zip(harness.tensors_in(arguments), harness.tensors_in(before), strict=True):
            assert harness.same_bits(x, kept), (case.op, case.shape)


def test_the_shapes_of_a_checkpoint(config):
    assert read_size(config) == read_size(config / "config.json") == TINY


@pytest.mark.parametrize(
    ("name", "layers", "parameters"), [("llama-3.1-8b", 32, 8030261248), ("Qwen3-8B", 36, 8190735360 - 36 * 2 * 128)]
)
def test_the_shapes_of_a_model_by_name(name, layers, parameters):
    """They add up to the parameters that its authors publish: without Qwen3's norms of heads, which no op has."""
    size = read_size(name)
    norms = 2 * size.hidden
    products = size.hidden * (size.qkv + size.heads * size.head_dim + 3 * size.intermediate)
    assert layers * (products + norms) + 2 * size.vocabulary * size.hidden + size.hidden == parameters


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read"),
        ("[1]", "is not a JSON object"),
        ("{", "is not a JSON object"),
        ('{"num_attention_heads": 4}', "has hidden_size None: it must be a positive integer"),
        ('{"num_attention_heads": 4, "hidden_size": "wide"}', "has hidden_size 'wide'"),
    ],
)
def test_no_checkpoint(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert message in fails(capsys, "--config", tmp_path)


# --- bytes and operations


def test_bytes_and_operations():
    """Counted by hand at tiny shapes."""
    make = Inputs(TINY, torch.bfloat16, torch.device("cpu"))
    of = {
        (case.op, case.shape): case.arguments(make.device)
        for case in cases(TINY, batches=[2], chunks=[3], contexts=[100])
    }

    def amounts(op, shape):
        arguments = of[op, shape]
        return roofline.bytes_moved(op, arguments, getattr(reference, op)(**arguments)), roofline.flops(op, arguments)

    assert amounts("embed", "batch 2") == (2 * 8 + 2 * 2 * 32 * 2, 0)
    assert amounts("rms_norm", "batch 2") == ((2 * 32 + 32 + 2 * 32) * 2, 0)
    assert amounts("swiglu", "batch 2") == ((2 * 96 + 2 * 48) * 2, 0)
    assert amounts("linear_add", "batch 2, down_proj") == ((2 * 48 + 32 * 48 + 2 * 2 * 32) * 2, 2 * 2 * 48 * 32)
    # 2 sequences of 100 tokens on 2 pages of 64, whose other slots are not read.
    tokens = 2 * 2 * 2 * 100 * 16 * 2
    assert amounts("paged_attention", "batch 2, context 100") == (
        tokens + 2 * 2 * 4 * 16 * 2 + 2 * 2 * 4 + 2 * 4,
        4 * 4 * 16 * 200,
    )
    assert amounts("paged_attention", "chunk 3, context 100")[1] == 4 * 4 * 16 * (98 + 99 + 100)
    qkv, written = (4 + 4) * 16, 3 * 2 * 2 * 16
    assert (
        amounts("rope_and_cache", "chunk 3, context 100")[0] == (3 * qkv + written + 3 * 4 * 16) * 2 + 8 * 4 + 2 * 4 + 4
    )


@pytest.mark.parametrize(("stored", "weight"), [("int4", 32 * 64 // 2 + 3 * 32 * 4), ("int8", 32 * 64 + 32 * 4)])
def test_bytes_and_operations_of_a_quantised_weight(stored, weight):
    """Its words and scales once: of 48 columns, which are 3 groups of 16, and padding up to 64."""
    (case,) = (c for c in cases(TINY, batches=[2], chunks=[]) if c.shape == f"batch 2, down_proj {stored}")
    arguments = case.arguments(torch.device("cpu"))
    result = reference.linear_add(**arguments)
    assert case.stored == stored
    moved, operations = roofline.bytes_moved(case.op, arguments, result), roofline.flops(case.op, arguments)
    assert (moved, operations) == (weight + (2 * 48 + 2 * 2 * 32) * 2, 2 * 2 * 48 * 32)


@pytest.mark.parametrize("stored", FORMS)
def test_what_is_wrong_with_a_quantised_product_is_found(stored):
    (case,) = (c for c in cases(TINY, batches=[2], chunks=[]) if c.shape == f"batch 2, o_proj {stored}")
    arguments = case.arguments(torch.device("cpu"))
    kept = arguments["weight"].words.clone()

    def error(change, strict=False):
        def run(given):
            change(given)
            return kernels.for_device(torch.device("cpu")).linear_add(**given)

        return verify.error_of(case.op, arguments, run, strict)

    def wrong_zero(given):
        weight = given["weight"]
        given["weight"] = weight._replace(scales=2 * weight.scales)

    def writes(tensor):
        return lambda given: tensor(given["weight"]).view(-1)[-1:].add_(1)

    assert error(lambda given: None) == error(lambda given: None, strict=True) == ""
    assert "the result (bfloat16 [2, 32]) is wrong" in error(wrong_zero)
    for changed in (lambda weight: weight.words, lambda weight: weight.scales):
        late = lambda given, changed=changed: writes(changed)(given)  # noqa: E731
        assert error(late) != "" and "weight" in error(late, strict=True)
    assert torch.equal(arguments["weight"].words, kept)


def test_the_slower_of_reading_and_multiplying_bounds_an_op():
    ceilings = Roofline(1e12, 1e12, {"bfloat16": 1e14})
    assert ceilings.share("bfloat16", 10**6, 10**6, 2.0) == ("read", 0.5)
    name, share = ceilings.share("bfloat16", 10**6, 10**9, 20.0)
    assert (name, round(share, 9)) == ("matmul", 0.5)


# --- the tool


def test_list_measures_nothing(capsys):
    assert ops.main(["--list", "--op", "paged_attention", "--batch", "1", "4", "--context", "128", "131072"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shapes = ["batch 1, context 128", "batch 1, context 131072", "batch 4, context 128", "batch 4, context 131072"]
    assert [line[24:62].strip() for line in lines] == shapes
    assert all("cpu, SDPA, FlashInfer" in line for line in lines)


def test_columns_have_a_space_between_them():
    for case in cases(batches=[16], chunks=[4096], contexts=[131072]):
        assert tables.columns(case.op, case.shape, "bfloat16").split() == [case.op, *case.shape.split(), "bfloat16"]


def test_rows_and_record(fast, config, tmp_path, capsys):
    """Rows are printed; the record has every round, and prints the same rows."""
    path = tmp_path / "run.json"
    chosen = ["--op", "linear", "paged_attention", "--batch", "2", "--context", "100", "--dtype", "float32"]
    assert ops.main(["--config", str(config), *chosen, "--rounds", "3", "--seed", "5", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "these figures say nothing about Triton's kernels" in out
    assert "FlashInfer      not timed: not installed: pip install flashinfer-python" in out
    loaded = record.load(path)
    rows = [row for row in loaded.rows if row.part == "ops"]
    timed = {(row.about["op"], row.about["engine"]): row for row in rows if row.rounds}
    assert timed.keys() == {
        ("linear", "cpu"), ("linear", "PyTorch"), ("paged_attention", "cpu"), ("paged_attention", "SDPA")
    }  # fmt: skip
    for row in timed.values():
        assert len(row.rounds) == 3 and row.about["dtype"] == "float32" and not row.about["cold"]
        assert row.about["GB/s"] == pytest.approx(row.about["bytes"] / row.value / 1e3)
        assert row.about.get("bound", "matmul") == "matmul"
    assert {"date", "commit", "device", "driver", "clocks", "torch", "command", "seed"} <= loaded.stamp.keys()
    assert loaded.stamp["shapes"]["hidden"] == 32
    assert tables.text(loaded).splitlines()[-len(rows) :] == out.splitlines()[-len(rows) :]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "linaer"], "there is no op 'linaer': did you mean 'linear'?"),
        (["--op", "zzz"], "there is no op 'zzz': there are advance, count_prompt"),
        (["--engine", "flashinfr"], "there is no engine 'flashinfr': did you mean 'FlashInfer'?"),
        (["--dtype", "bf16"], "there is no dtype 'bf16': did you mean 'bfloat16'?"),
        (["--batch", "0"], "'0' is not a positive integer"),
        (["--context", "1k"], "'1k' is not a positive integer"),
        (["--rounds", "0"], "'0' is not a positive integer"),
        (["--chunk", "2048"], "--chunk 2048 is longer than the --context 1024 that includes it"),
        (["--op", "sample", "--chunk", "8"], "nothing to time: sample runs in decode steps only; pass --batch"),
        (["--json", "/no/where/x.json"], "/no/where/x.json can't be written: name a file in a folder that exists"),
        (["--kernel", "cpu"], "cpu is not a Python file: its name must end in .py"),
        (["--kernel", "nothing.py"], "nothing.py does not exist: name a Python file with a function named like an op"),
    ],
)
def test_bad_arguments_fail_before_anything_is_measured(arguments, message, capsys):
    assert message in fails(capsys, *arguments)


def test_pytest_benchmark_reports_the_same_cases():
    """In a process of its own, as a user runs it; it asserts by itself that its median is that of the table."""
    command = [str(Path(sys.executable).with_name("pytest")), "-q", "bench/pytest_benchmark", "-k", "advance or embed"]
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout
    assert "the ops' PyTorch backend, a small model's shapes; not Triton" in done.stdout
    assert "test_op[embed, chunk 512]" in done.stdout
    assert "9 passed" in done.stdout


# --- peers


def test_peers_implement_known_ops():
    for name, about in peers.PEERS.items():
        assert about.ops and set(about.ops) <= set(kernels.__all__), name
        assert about.weights and set(about.weights) <= {DENSE, *FORMS}, name


def test_only_peers_that_take_a_quantised_weight_are_asked(capsys):
    """cuBLAS is not shown as failing."""
    assert ops.main(["--list", "--op", "linear_add", "--batch", "1"]) == 0
    found = {line[24:62].strip(): {*line[72:].split(", ")} for line in capsys.readouterr().out.splitlines()}
    eager = {"cpu", "PyTorch", "torch.compile"}
    assert found["batch 1, o_proj"] == {*eager, "cuBLAS", "GemLite"}
    assert found["batch 1, o_proj int4"] == found["batch 1, o_proj int8"] == {*eager, "torch packed", "GemLite"}
    assert found["batch 1, o_proj float8"] == eager


@pytest.mark.parametrize("name", ["PyTorch", "cuBLAS", "SDPA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_peer_computes_the_op(name, dtype):
    """Those that can run on a CPU."""
    for case in cases(TINY, [dtype], [1, 3], [5], [100]):
        if peers.PEERS[name].takes(case):
            arguments = case.arguments(torch.device("cpu"))
            run = lambda given, op=case.op: peers.PEERS[name].make(op, given)()  # noqa: E731
            assert verify.error_of(case.op, arguments, run) == "", (case.op, case.shape)


@pytest.mark.parametrize("stored", ["int4", "int8"])
def test_kernels_of_pytorch_take_a_quantised_weight(stored):
    """With zero points of 3 instead of 7, since a multiple of 8 could be taken for another."""
    size = TINY._replace(hidden=256)
    (case,) = (c for c in cases(size, batches=[3], chunks=[]) if c.shape == f"batch 3, o_proj {stored}")
    arguments = case.arguments(torch.device("cpu"))
    if stored == "int4":
        arguments["weight"].scales.view(torch.int32).bitwise_xor_(4)
        assert arguments["weight"].unpacked()[2].unique().tolist() == [3]
    run = lambda given: peers.PEERS["torch packed"].make("linear_add", given)()  # noqa: E731
    assert verify.error_of(case.op, arguments, run) == ""


def run_with(make, config, capsys, more=()):
    """The row of a peer that is made by `make`."""
    peers.PEERS["other"] = peers.Peer(("rms_norm",), make, "torch", "torch", False)
    try:
        arguments = ["--config", str(config), "--op", "rms_norm", "--batch", "2", "--rounds", "1", *more]
        assert ops.main(arguments) == 0
    finally:
        del peers.PEERS["other"]
    return next(x for x in capsys.readouterr().out.splitlines() if " other " in x)


def wrong(op, arguments):
    return lambda: verify.reference.rms_norm(**arguments) * 1.2


def broken(op, arguments):
    raise RuntimeError("no such kernel\nand a long story")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wrong, "WRONG, not timed: the result (bfloat16 [2, 32]) is wrong at"),
        (broken, "not timed: RuntimeError: no such kernel"),
    ],
)
def test_the_failure_of_a_peer_is_reported_in_its_row(make, message, fast, config, capsys):
    row = run_with(make, config, capsys)
    assert message in row and "long story" not in row


def test_a_peer_that_is_never_ready_is_reported_in_its_row(fast, config, capsys, monkeypatch):
    monkeypatch.setattr(peers, "SECONDS", 1)
    row = run_with(lambda op, arguments: signal.pause, config, capsys, ["--engine", "other"])
    assert "not timed: not ready after 1 seconds" in row


def test_torch_compile_serves_many_shapes(monkeypatch):
    """More than the eight that it keeps per function. The eager backend saves the time of generating code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for batch in range(1, 11):
        (case,) = (case for case in cases(TINY, batches=[batch], chunks=[]) if case.op == "embed")
        arguments = case.arguments(torch.device("cpu"))
        run = peers.make("torch.compile", "embed", arguments, torch.device("cpu"))
        assert torch.equal(run(), verify.reference.embed(**arguments))


# --- user kernels


NORM = """
import torch
def rms_norm(x, weight, eps):
    y = torch.empty_like(x)
    {body}
    return y
"""
RIGHT = "y.copy_(x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).mul_(weight)"


@pytest.mark.parametrize(
    ("body", "message"),
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
def test_user_kernel(body, message, fast, config, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text(NORM.format(body=body))
    code = ops.main(["--config", str(config), "--kernel", str(mine), "--batch", "2", "--rounds", "1", "--seed", "3"])
    out = capsys.readouterr().out
    (row,) = [x for x in out.splitlines() if " mine.py " in x]
    assert all(x.startswith("rms_norm") for x in out.splitlines() if "bfloat16 " in x and not x.startswith("ceilings"))
    if message is None:
        assert code == 0 and row.endswith("warm")
    else:
        assert code == 1 and message in row
        assert "run the same inputs again with --seed 3" in out


@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_linear", "rms_norm_swiglu", "rms_norm_qkv_rope_cache"])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-4])
def test_a_wrong_eps_is_found(op, eps):
    for case in cases(TINY, [torch.bfloat16, torch.float16, torch.float32], [2], [5], [64]):
        if case.op == op:
            run = lambda given, op=case.op: getattr(reference, op)(**given | {"eps": eps})  # noqa: E731
            assert "the result" in verify.error_of(op, case.arguments(torch.device("cpu")), run), case


LINEAR_ADD = """
from internlm3.kernels import reference
{import_}
def linear_add(x, weight, residual):
    return reference.linear_add(x, weight, residual)
"""
KNOWS = "from internlm3.kernels.quantised import QuantisedWeight"


@pytest.mark.parametrize(("import_", "rows"), [("", 2), (KNOWS, 9)])
def test_a_user_kernel_gets_quantised_weights_if_it_knows_them(import_, rows, config, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text(LINEAR_ADD.format(import_=import_))
    assert ops.main(["--list", "--kernel", str(mine), "--batch", "1"]) == 0
    assert sum(" mine.py" in line for line in capsys.readouterr().out.splitlines()) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def rms_nrom(x): pass",
            "has no function named like an op; it has rms_nrom; there is no op 'rms_nrom': did you mean 'rms_norm'?",
        ),
        ("x = 1", "has no function named like an op"),
        ("1 / 0", "raises ZeroDivisionError when it is run: division by zero"),
        ("def f(:", "raises SyntaxError when it is run"),
        (
            "from internlm3.kernels.reference import rms_norm",
            "has no function named like an op: its rms_norm is this project's own, imported",
        ),
        ("import nowhere", "raises ModuleNotFoundError when it is run: No module named 'nowhere'"),
        ("from . import nothing", "no known parent package: a file without __init__.py beside it is in no package"),
        ("import sys; sys.exit('bye')", "raises SystemExit when it is run: bye"),
        (
            "class rms_norm: pass",
            "rms_norm is a class: a function is needed, such as the apply of an autograd.Function",
        ),
        ("rms_norm = 3", "rms_norm is of type int: a function is needed"),
        (
            "def rms_norm(x, weight): pass",
            "rms_norm(x, weight) does not take the arguments of the op: rms_norm(x, weight, eps)",
        ),
    ],
)
def test_a_file_without_a_kernel(text, message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    assert message in fails(capsys, "--kernel", tmp_path / "mine.py")


WAYS = {
    "a module beside it": "from beside import norm\ndef rms_norm(x, weight, eps): return norm(x, weight, eps)\n",
    "an op from elsewhere": "from beside import norm as rms_norm\n",
    "other names": "import beside\ndef rms_norm(hidden, w, e): return beside.norm(hidden, w, e)\n",
    "another order": "import beside\ndef rms_norm(eps, weight, x): return beside.norm(x, weight, eps)\n",
    "a partial": "import functools, beside\nrms_norm = functools.partial(beside.scaled, 1.0)\n",
    "a custom op": "import torch, beside\n"
    "@torch.library.custom_op('mine::rms_norm', mutates_args=())\n"
    "def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:\n"
    "    return beside.norm(x, weight, eps)\n",
    "an autograd function": "import torch, beside\n"
    "class Norm(torch.autograd.Function):\n"
    "    @staticmethod\n"
    "    def forward(ctx, x, weight, eps): return beside.norm(x, weight, eps)\n"
    "rms_norm = Norm.apply\n",
    "a relative import": "from .beside import norm\ndef rms_norm(x, weight, eps): return norm(x, weight, eps)\n",
}
BESIDE = """
def scaled(scale, x, weight, eps):
    y = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return y.to(x.dtype) * weight * scale
def norm(x, weight, eps):
    return scaled(1.0, x, weight, eps)
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_file_is_taken_as_people_write_them(way, fast, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    folder = tmp_path / f"package_{[*WAYS].index(way)}"
    folder.mkdir()
    (folder / "mine.py").write_text(WAYS[way])
    (folder / "beside.py").write_text(BESIDE)
    if way == "a relative import":
        (folder / "__init__.py").write_text("")
    arguments = ["--config", str(config), "--kernel", str(folder / "mine.py"), "--batch", "2", "--rounds", "1"]
    code = ops.main([*arguments, "--seed", "3", "--engine", "FlashInfer"])
    out = capsys.readouterr().out
    (row,) = [x for x in out.splitlines() if " mine.py " in x]
    assert code == 0 and row.endswith("warm"), out


def test_code_in_a_module_beside_the_file_is_looked_at(fast, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "fallback.py").write_text(
        "def norm(x, weight, eps):\n"
        "    try:\n        raise RuntimeError('no binary')\n    except RuntimeError:\n"
        "        return (x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight\n"
    )
    (tmp_path / "mine.py").write_text("from fallback import norm as rms_norm\n")
    arguments = ["--config", str(config), "--kernel", str(tmp_path / "mine.py"), "--batch", "2", "--rounds", "1"]
    assert ops.main([*arguments, "--seed", "3", "--engine", "FlashInfer"]) == 1
    assert "REFUSED: it catches RuntimeError in line 3 (no binary)" in capsys.readouterr().out


TUNED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton, triton.language as tl
@triton.autotune([triton.Config({"BLOCK": block}) for block in (16, 32)], key=["n"])
@triton.jit
def _glu(x, y, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * n + i, mask=i < n).to(tl.float32)
    up = tl.load(x + row * 2 * n + n + i, mask=i < n)
    tl.store(y + row * n + i, (gate * tl.sigmoid(gate)).to(up.dtype) * up, mask=i < n)
def swiglu(gate_up):
    rows, n = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((rows, n), dtype=gate_up.dtype, device=gate_up.device)
    _glu[lambda given: (rows, triton.cdiv(n, given["BLOCK"]))](gate_up, y, n)
    return y
"""


def test_a_file_may_choose_the_interpreter_by_itself(config, tmp_path):
    """Then that has to be mended too. In a process of its own, in which nobody else has chosen it."""
    (tmp_path / "mine.py").write_text(TUNED)
    arguments = ["--config", config, "--kernel", tmp_path / "mine.py", "--batch", "2", "--rounds", "1"]
    command = [sys.executable, "-m", "bench.ops", *map(str, arguments), "--engine", "FlashInfer"]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("warm\n"), done.stdout + done.stderr


@pytest.mark.parametrize(("set_to", "words"), [("1", "the interpreter answers launches"), ("0", "TRITON_INTERPRET=1")])
def test_triton_without_a_gpu_says_what_helps(set_to, words, monkeypatch):
    import triton

    monkeypatch.setenv("TRITON_INTERPRET", set_to)
    with pytest.raises(RuntimeError) as error:
        triton.runtime.driver.active.get_current_target()
    assert words in measure.reason_of(error.value)


def test_two_files_of_one_name(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text("def swiglu(gate_up): pass\n")
    message = fails(capsys, "--kernel", tmp_path / "a" / "mine.py", tmp_path / "b" / "mine.py")
    assert "two files have one name, and so would their rows: mine.py, mine.py" in message


def test_fuzz_takes_a_user_kernel_through_the_cases(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def rms_norm(x, weight, eps):\n    raise RuntimeError('it was called')\n")
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--kernel",
        mine,
        "--dtype",
        "float16",
        "--seed",
        "5",
    ]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 1
    assert "RuntimeError: it was called" in done.stdout and "dtype=torch.float16" in done.stdout
    again = f'again: make fuzz ARGS="--op rms_norm --dtype float16 --kernel {mine} --seed 5"'
    assert done.stdout.splitlines()[-1] == again


@pytest.mark.parametrize("program", ["bench.ops", "tests.fuzz"])
def test_an_op_that_a_file_does_not_have_is_no_success(program, tmp_path):
    """Ours would be tested in its place."""
    mine = tmp_path / "mine.py"
    mine.write_text("def rms_norm(x, weight, eps):\n    return x\n")
    command = [sys.executable, "-m", program, "--kernel", mine, "--op", "linear"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.endswith(f"{mine} has no linear to test: it has rms_norm\n")


def test_user_kernel_of_an_op_that_writes(fast, config, tmp_path, capsys):
    """It must write k and v into the pages as the reference does, and nothing else."""
    mine = tmp_path / "mine.py"
    whole = """
from internlm3.kernels import reference
def rope_and_cache(**arguments):
    q = reference.rope_and_cache(**arguments)
    {then}
    return q
"""
    for then, code, message in (
        ("pass", 0, "warm"),
        ("arguments['v_cache'][0, 0, 0] += 1", 1, "v_cache (bfloat16 [4, 2, 64, 16]) is wrong at"),
        ("arguments['seq_lens'] += 1", 1, "the kernel changed its input seq_lens"),
    ):
        mine.write_text(whole.format(then=then))
        arguments = [
            "--config",
            str(config),
            "--kernel",
            str(mine),
            "--batch",
            "2",
            "--context",
            "100",
            "--rounds",
            "1",
        ]
        assert ops.main(arguments) == code
        (row,) = [x for x in capsys.readouterr().out.splitlines() if " mine.py " in x]
        assert message in row
