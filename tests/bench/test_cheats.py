"""Kernels that cheat their benchmark are refused, each for its own reason, and honest ones beside them are timed.

tests/bench/cheats has one file for each. bench/README.md says which mechanism refuses which, and what none can exclude.
What needs a GPU is played here: a graph of 64 launches by calls one after another, a stream by a late thread, the
driver's L2 limit by an object.
"""

import ctypes
import json
import random
from pathlib import Path

import pytest
import torch

from bench import integrity, measure, ops, roofline, strict, timing
from bench.roofline import Roofline

CHEATS = Path(__file__).parent / "cheats"
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="graph, stream and driver are played for a CPU"),
    pytest.mark.usefixtures("in_this_process"),
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a file through bench.ops at tiny shapes; returns the exit code and the file's row."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 70, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "num_key_value_heads": 2, "head_dim": 16}))
    ceilings = Roofline(1e9, 1e9, {"bfloat16": 1e12, "float32": 1e12})
    monkeypatch.setattr(roofline, "measure", lambda *_: ceilings)
    # Which element changes and which call is compared: a memo that samples its inputs would have luck now and then.
    monkeypatch.setattr(strict, "_random", random.Random(3))

    def call(name, dtype="bfloat16"):
        fixed = ["--batch", "3", "--rounds", "4", "--seed", "3", "--engine", "FlashInfer"]  # which is not installed
        code = ops.main(["--config", str(tmp_path), "--kernel", str(CHEATS / f"{name}.py"), "--dtype", dtype, *fixed])
        (row,) = [x for x in capsys.readouterr().out.splitlines() if f"{name}.py " in x]
        return code, row

    return call


def launches(monkeypatch):
    """64 calls, captured as a CUDA graph captures them."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def prepare(case, make, device, keep=False):
        given = [case.arguments(device) for _ in range(64)]
        kept = [strict.Kept(make(case.op, arguments), arguments) for arguments in given]

        def replay():
            with monkeypatch.context() as capture:
                capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                for call in kept:
                    call()

        return measure.Prepared(replay, 64, 1, 1, False, kept)

    monkeypatch.setattr(measure, "prepare", prepare)


def stopped_clock(monkeypatch):
    monkeypatch.setattr(timing, "perf_counter", lambda: 1.0)


def l2_driver(monkeypatch):
    class Driver:
        limit = 0

        def cuCtxSetLimit(self, which, size):
            self.limit = size.value

        def cuCtxGetLimit(self, size, which):
            size._obj.value = self.limit
            return 0

        def cuCtxResetPersistingL2Cache(self):
            pass

    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    return driver


REFUSED = [
    ("kept_by_pointer", "with the same inputs but for one element: the result"),
    ("kept_by_version", "with the same inputs but for one element: the result"),
    ("kept_by_content", "with the same inputs but for one element: the result"),
    ("kept_in_file", "REFUSED: it opens a file in a call that has nothing left to compile"),
    ("device_memo", "with the same inputs again, after every kept copy of the result was overwritten: the result"),
    ("hidden_memo", "REFUSED: it hides objects by gc.freeze from the search for results that were kept"),
    ("only_if_poisoned", "if its outputs begin with ordinary values, not with NaN: the result"),
    ("first_launch_only", "REFUSED: in a timed call, with new inputs in the same memory: the result"),
    ("other_stream", "WRONG, not timed: the result (bfloat16 [3, 32]) is wrong at 96 of 96 places"),
    ("lazy_output", "it returns a Lazy, a subclass that may compute later, and must return a Tensor"),
    ("replaced_timer", "REFUSED: it replaces bench.timing.perf_counter, by which kernels are checked or timed"),
    ("replaced_statistics", "REFUSED: it replaces statistics.median, by which kernels are checked or timed"),
    ("rewritten_check", "REFUSED: it rewrites bench.verify.judge, by which kernels are checked or timed"),
    ("loosened_bound", "REFUSED: it replaces bench.verify.STEPS, by which kernels are checked or timed"),
    ("found_by_gc", "REFUSED: it searches this process by gc.get_objects"),
    ("recycled_memory", "WRONG, not timed: the result (bfloat16 [3, 32]) is wrong"),
    ("nan_everywhere", "is wrong at 96 of 96 places, worst at [0, 0]: nan instead of"),
    ("changes_inputs", "the kernel changed its input x, which the op only reads"),
    ("recognised_warm_up", "REFUSED: in a timed call, with new inputs in the same memory: the result"),
    ("zero_time", "REFUSED: a round took 0 us per call, and no call takes less than 0.1 us"),
    ("persisting_l2", "REFUSED: it sets aside 1048576 bytes of L2 cache, which keep its data between calls"),
    ("lower_precision", "WRONG, not timed: the result (float32 [3, 32]) is wrong"),
    ("lower_precision_left_on", "REFUSED: it leaves torch's float32_matmul_precision at medium"),
    ("near_constant", "WRONG, not timed: the result (bfloat16 [3, 32]) is wrong"),
    ("falls_back", "REFUSED: it catches RuntimeError in line 11 (no binary for this device)"),
]
PLAYED = {"first_launch_only": launches, "zero_time": stopped_clock, "persisting_l2": l2_driver}


@pytest.mark.parametrize(("name", "reason"), REFUSED)
def test_a_cheat_is_refused_for_its_own_reason(name, reason, run, monkeypatch):
    PLAYED.get(name, lambda _: None)(monkeypatch)
    code, row = run(name, "float32" if name.startswith("lower_precision") else "bfloat16")
    assert code == 1 and reason in row


@pytest.mark.parametrize("name", ["honest", "honest_buffers", "honest_in_place"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_honest_kernel_is_timed(name, dtype, run):
    code, row = run(name, dtype)
    assert code == 0 and row.endswith("warm")


def test_honest_launches_and_an_untouched_cache_are_timed(run, monkeypatch):
    launches(monkeypatch)
    l2_driver(monkeypatch)
    assert run("honest")[0] == 0


def test_every_file_is_tested():
    honest = {path.stem for path in CHEATS.glob("honest*.py")}
    assert honest == {"honest", "honest_buffers", "honest_in_place"}
    assert {path.stem for path in CHEATS.glob("*.py")} - honest == {name for name, _ in REFUSED}


def test_what_a_file_changes_is_put_back(run, monkeypatch):
    """Later rows are measured by the functions and settings that were there before it."""
    driver = l2_driver(monkeypatch)
    clock, precision = timing.perf_counter, torch.get_float32_matmul_precision()
    for name in ("replaced_timer", "replaced_statistics", "rewritten_check", "loosened_bound", "persisting_l2"):
        assert run(name)[0] == 1
    run("lower_precision_left_on", "float32")
    assert timing.perf_counter is clock and torch.get_float32_matmul_precision() == precision and driver.limit == 0
    assert integrity.statistics.median([1, 2, 30]) == 2
    assert run("honest")[0] == 0 and "wrong" in run("recycled_memory")[1]
