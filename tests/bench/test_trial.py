"""The trial on a machine without a GPU: its candidates, its rows and their decisions. test_gpu.py has its dry run."""

import json
import os
import subprocess
import sys
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from bench import ROOT, gpu, harness
from bench.candidates import reference, ring
from bench.candidates.settings import Ring
from bench.candidates.sum_and_norm import sum_and_norm
from bench.cases import Inputs
from bench.parts import trial
from bench.record import Part, Row
from bench.trial import compare, layers, prompts, sums, variants
from internlm3 import kernels
from internlm3.kernels.triton import linear_few_rows
from internlm3.kernels.triton.linear_few_rows import parts as parts_of
from internlm3.tests.support.faulty_rings import changed
from internlm3.tests.support.gluon_on_cpu import OnCPU

CPU = torch.device("cpu")
linear = sys.modules[kernels.linear.__module__]
EPS = 1e-5


def test_the_audit_finds_a_faulty_ring(tmp_path):
    """It compiles, so it runs in a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.faulty_rings", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = {name: "; ".join(sentences) for name, sentences in json.loads(done.stdout).items()}
    expected = {
        "none": "",
        "late weights": "asks for 0 bytes of W before the wait, must ask for 81920",
        "few weights": "asks for 65536 bytes of W before the wait, must ask for 81920",
        "early activations": "loads of a predecessor's work before the wait",
        "no trigger": "accesses before the successor may start",
    }
    assert found.keys() == expected.keys()
    for name, sentence in expected.items():
        assert sentence in found[name] and bool(sentence) == bool(found[name]), (name, found[name])


RINGS = [
    Ring(), Ring(3, 3), Ring(4, 3), Ring(10, 4), Ring(6, 6), Ring(5, 1), Ring(4, 4, rows=128, columns=64, warps=8)
]  # fmt: skip


@pytest.mark.parametrize("early", [False, True], ids=["late copies", "early copies"])
@pytest.mark.parametrize("launched", RINGS, ids=str)
@pytest.mark.parametrize(("rows", "columns", "parts"), [(1, 2048, 4), (5, 1024, 1), (17, 512, 2), (64, 1536, 1)])
def test_the_source_of_the_ring(monkeypatch, early, launched, rows, columns, parts):
    """On a CPU, by integers whose sums are exact: only a GPU can show what it is compiled to."""
    monkeypatch.setattr(ring, "_ring", OnCPU(early))
    x, weight = (torch.randint(-4, 5, (count, columns)).half() for count in (rows, 256))
    found = harness.call(ring.partial_products, x, weight, parts, launched)
    assert not harness.difference("parts", found, reference.partial_products(x, weight, parts))
    if parts == 1:
        found = harness.call(ring.linear, x, weight, launched)
        assert not harness.difference("y", found, reference.linear(x, weight))
        x = (x / columns**0.5 / 4).half()
        found = harness.call(ring.linear_swiglu, x, weight, launched)
        torch.testing.assert_close(found, reference.linear_swiglu(x, weight))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("wait_group(XS - 1)", "wait_group(XS)"),
        ("w_ring.index(i % WS), x_ring", "w_ring.index((i + 1) % WS), x_ring"),
        ("w_chunk + (i + WS) * BC", "w_chunk + (i + WS - 1) * BC"),
        ("if i + WS < CHUNKS", "if i + WS <= CHUNKS"),
        ("(x_row < R)[:, None]", "(x_row <= R)[:, None]"),
        ("    _wait()\n\n    x_row", "    x_row"),
        ("columns = part * (C // PARTS)", "columns = 0 * (C // PARTS)"),
        ("(part * R + row)", "(part + row)"),
    ],
)
def test_a_fault_in_the_source_of_the_ring_is_found(monkeypatch, tmp_path, old, new):
    """With copies that happen late, or with copies that happen early."""
    faulty = changed(tmp_path, "faulty", [(old, new)])
    x, weight = (torch.randint(-4, 5, (count, 1024)).half() for count in (5, 64))
    wrong = []
    for early in (False, True):
        monkeypatch.setattr(ring, "_ring", faulty._ring)
        monkeypatch.setattr(ring, "_ring", OnCPU(early))
        try:
            found = ring.partial_products(x, weight, 2, Ring(3, 3))
            wrong.append(harness.difference("parts", found, reference.partial_products(x, weight, 2)))
        except AssertionError as error:
            wrong.append(str(error))
    assert any(wrong)


def test_a_ring_of_more_x_than_w_is_refused(monkeypatch):
    """Its chunk of W could be multiplied before it is there."""
    monkeypatch.setattr(ring, "_ring", OnCPU(False))
    with pytest.raises(AssertionError, match="static_assert"):
        ring.partial_products(torch.zeros(1, 512).half(), torch.zeros(64, 512).half(), 1, Ring(3, 4))


@pytest.mark.parametrize(("parts", "rows", "width"), [(1, 1, 64), (2, 3, 100), (4, 5, 256), (3, 2, 1000)])
def test_sum_and_norm(parts, rows, width):
    """x and y bit for bit: the sum of parts in ascending order, and the norm of the Triton kernel."""
    values = torch.randn(parts, rows, width) * 10.0 ** torch.arange(parts)[:, None, None]
    residual, norm = torch.randn(rows, width).half(), torch.randn(width).half()
    arguments = (harness.between_guards(each) for each in (values, residual, norm))
    x, y = harness.call(sum_and_norm, *arguments, EPS)
    expected, normed = reference.sum_and_norm(values, residual, norm, EPS)
    assert not harness.difference("x", x, expected)
    assert not harness.difference("y", y, kernels.rms_norm(expected, norm, EPS))
    torch.testing.assert_close(y, normed)


@pytest.mark.parametrize("columns", [512, 2048])
def test_the_parts_of_the_reference_are_those_of_the_kernel_of_several_rows(columns):
    """Bit for bit: sums within a part are exact, and the order of the parts decides how their sum is rounded."""
    count = parts_of(40, columns)
    assert count == 4
    width = columns // count
    x, weight = (torch.randint(-8, 9, (rows, columns)).float() for rows in (5, 40))
    x[:, 3 * width :], weight[:, 3 * width :] = x[:, :width], -weight[:, :width]  # what remains is mostly rounding
    for part, scale in enumerate((2.0**10, 2.0, 1.0, 2.0**10)):
        for factor in (x, weight):
            factor[:, part * width : (part + 1) * width] *= scale
    x, weight = x.half(), weight.half()
    found = kernels.linear(x, weight)
    parts = reference.partial_products(x, weight, count)
    assert not harness.difference("y", found, reference.sum_of(parts, x.dtype))
    assert harness.difference("y", found, reference.sum_of(parts.flip(0), x.dtype))


def test_interleaved_rows():
    gate_up = torch.arange(64.0)[:, None] * torch.ones(1, 3)
    assert reference.interleaved(gate_up)[:, 0].tolist() == [
        half + 8 * group + row for group in range(4) for half in (0, 32) for row in range(8)
    ]
    x, gate_up = torch.randn(5, 16), torch.randn(64, 16)
    expected = reference.reference.swiglu(x @ gate_up.mT)
    torch.testing.assert_close(reference.linear_swiglu(x, reference.interleaved(gate_up)), expected)


def test_a_candidate_runs_its_formula_on_a_cpu():
    x, weight = torch.randn(70, 64), torch.randn(32, 64)
    torch.testing.assert_close(sums.in_order(x, weight), x @ weight.mT)


def test_settings_of_attention_hold_inside_only():
    file = sys.modules[kernels.paged_attention.__module__]
    before = file.tiling, file._TRIGGER
    shape = (1, 16, 128, torch.bfloat16, True)
    built = file.tiling(*shape, True)
    with layers.attention_with(layers.Attention(keys=128, stages=5, trigger=0, early=False), alone=True):
        assert file.tiling(*shape, False) == built._replace(keys=128, stages=5)
        assert file._TRIGGER == 0
    assert (file.tiling, file._TRIGGER) == before


def test_settings_of_linear_layers_hold_inside_only(batch, monkeypatch):
    used = []
    tiles = linear_few_rows.HOPPER, linear_few_rows.HOPPER_WIDE
    monkeypatch.setattr(layers, "as_built", lambda *_: used.append((linear.FEW_ROWS, linear_few_rows.HOPPER[16])))
    layers.with_few_rows(batch, 0, batch.x, 1)
    layers.with_late_weights(batch, 0, batch.x, 8)
    layers.with_late_weights(batch, 0, batch.x)
    built = tiles[0][16]
    late = built._replace(early=0)
    assert built.early and used == [(1, built), (64, late._replace(stages=8)), (64, late)]
    assert linear.FEW_ROWS == 64 and tiles == (linear_few_rows.HOPPER, linear_few_rows.HOPPER_WIDE)


@pytest.fixture(scope="module")
def batch():
    make = Inputs(trial.TOY, torch.float16, CPU)
    return layers.Batch(make, layers.weights(make, 1), 2, 24)


def of(layer, **changes):
    return variants.Variant("E0", "planted", layer, "a gain of 1 us", "adopt it")._replace(**changes)


def doubled(batch, layer, x):
    return x * 2


def wrong(batch, layer, x):
    return x * 2.2


CALLS = count()


def unsteady(batch, layer, x):
    """Another result at every third call."""
    return x * 2 + (next(CALLS) % 3 == 2)


def test_a_variant_is_timed_only_if_it_is_right(batch, monkeypatch):
    monkeypatch.setattr(compare, "AS_BUILT", variants.AS_BUILT._replace(layer=doubled))

    def broken(batch, layer, x):
        raise RuntimeError("does not compile")

    tried = [of(wrong), of(wrong, same_values=False), of(broken), of(unsteady), of(doubled)]
    built, *found = compare.compared(Part("trial"), batch, tried, 1)
    assert built.name == "as built, batch 2, context 24" and built.rounds
    assert [row.state for row in found] == ["FAIL", "figure", "FAIL", "FAIL", "figure"]
    assert "so it is not timed" in found[0].note and found[2].note == "RuntimeError: does not compile"
    assert "a replay's result" in found[3].note
    assert found[4].about["predicted"] == "a gain of 1 us" and found[4].about["off"] == 0
    assert "(predicted: a gain of 1 us)" in found[4].note and found[4].note.endswith(found[4].about["decision"])


def test_a_gain_decides():
    variant = of(doubled, bar=0.5)
    assert variant.decision(0.5) == "adopt it"
    assert variant.decision(0.49) == "no change: it would have to gain 0.5 us"


@pytest.mark.parametrize(("per_token", "decision"), [(0.87, "raise CHUNK to 1024"), (0.89, "CHUNK stays 512")])
def test_longer_chunks_must_gain_twelve_percent(monkeypatch, per_token, decision):
    """2048 is compared with 512 by the sum of all four matrices."""

    def times_of(calls, rounds):
        rows = calls[0].args[0].shape[0]
        return [rows * (per_token if rows > 512 else 1.0)] * rounds

    monkeypatch.setattr(prompts, "times_of", times_of)
    make = Inputs(trial.TOY, torch.float16, CPU)
    *_, last = prompts.products_by_rows(Part("trial"), make, (512, 1024), 1, {})
    assert last.about["decision"].startswith(decision)


def test_kernels_of_a_chunk_are_told_apart():
    times = {"_attend": [3.0, 1.0], "_combine": [2.0], "nvjet_tst_128x256": [9.0], "_rms_norm": [1.0]}
    times["void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>"] = [2.0]
    assert prompts.kinds(times) == {"products": 9.0, "attention": 6.0, "element-wise": 3.0}


def test_every_variant_says_what_is_predicted_and_what_it_decides():
    names = set()
    for shape in trial.SHAPES + trial.MORE_SHAPES:
        tried = [*variants.variants(*shape)]
        assert {variant.experiment for variant in tried} <= {"E1", "E2", "E3"}
        for variant in tried:
            assert variant.predicted and variant.adopt
            names.add((shape, variant.experiment, variant.name))
        assert len([each for each in names if each[0] == shape]) == len(tried)


def planted(monkeypatch, values):
    """The trial with planted values of the candidates, and experiments that only yield their names."""
    part = Part("trial")
    monkeypatch.setattr(trial, "candidate_values", lambda part, small: iter([part.check("planted", values)]))
    monkeypatch.setattr(trial, "compared", lambda part, batch, tried, rounds: iter([_names(part, batch, tried)]))
    for name in ("products_by_rows", "chunk_kernels", "values_of_interleaved", "orders", "from_l2"):
        monkeypatch.setattr(trial, name, lambda *_, name=name: iter([part.check(name, "")]))
    return part


def _names(part: Part, batch, tried) -> Row:
    return part.check(batch.shape, "", of_candidates=any(variant.of_candidates for variant in tried))


@pytest.mark.parametrize("error", ["", "y is wrong"])
def test_a_ring_with_wrong_values_is_not_timed(monkeypatch, error):
    planted(monkeypatch, error)
    found = {row.name: row for row in trial.rows(True)}
    assert found["batch 2, context 24"].about["of_candidates"] == (not error)
    assert (found["E6"].state == "not run") if error else ("orders" in found)
    assert "E4" not in found and "chunk_kernels" in found


def test_what_has_no_time_left_is_left_out_and_named(monkeypatch):
    """The clock jumps past the limit after the first experiment."""
    planted(monkeypatch, "")
    monkeypatch.setattr(trial, "device_of", lambda small: CPU)
    monkeypatch.setattr(trial, "INTERNLM3_8B", trial.TOY)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    times = iter([0.0, 0.0])
    monkeypatch.setattr(trial, "time", SimpleNamespace(monotonic=lambda: next(times, 1e9)))
    first, *rest = trial.rows(False)
    assert first.name == "planted" and all(row.state == "not run" and "left out" in row.note for row in rest)
    assert {"E1 values", "layers at batch 1, context 1024", "E5", "E6", "E4"} <= {row.name for row in rest}


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import os; os._exit(9)", "exit code 9: no output"),
        ("raise RuntimeError('an illegal memory access')", "exit code 1: RuntimeError: an illegal memory access"),
        ("""print('[["one", ""], ["two", "is wrong"]]')""", "is wrong"),
    ],
)
def test_a_candidate_that_faults_is_a_failed_check(monkeypatch, program, error):
    run = subprocess.run
    monkeypatch.setattr(
        trial.subprocess, "run", lambda command, **options: run([sys.executable, "-c", program], **options)
    )
    found = [*trial.candidate_values(Part("trial"), False)]
    assert found[-1].state == "FAIL" and found[-1].note == error


def test_a_candidate_that_hangs_is_a_failed_check(monkeypatch):
    def hangs(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(trial.subprocess, "run", hangs)
    (row,) = trial.candidate_values(Part("trial"), False)
    assert row.state == "FAIL" and row.note == f"exceeded {trial.CHECK_SECONDS} s"


def test_the_trial_runs_only_if_it_is_named():
    assert "trial" in gpu.PARTS and "trial" not in gpu.default_parts()
    assert gpu.PARTS["trial"].seconds > trial.SECONDS + 15
