"""The engines of bench.ops in processes of their own: what one of them does to its process costs its row only."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests of what happens on a CPU")

ENDS = """
import ctypes, os, sys
def embed(token_ids, table):
    os._exit(3)
def rms_norm(x, weight, eps):
    ctypes.string_at(0)
def swiglu(gate_up):
    sys.exit("bye")
def linear(x, weight):
    return linear(x, weight)
def linear_add(x, weight, residual):
    print("a line on the screen")
    os.write(1, b"{}")
    return residual + x @ weight.T
"""


def run(*arguments):
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "bench.ops", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_a_kernel_that_ends_its_process_is_a_row(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 70, "num_attention_heads": 4, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    (tmp_path / "mine.py").write_text(ENDS)
    done = run(
        "--config", tmp_path, "--kernel", tmp_path / "mine.py", "--quick", "--engine", "FlashInfer", "--rounds", "1"
    )
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if " mine.py " in line}
    assert "not timed: it ended its process, exit code 3" in rows["embed"], done.stdout
    assert "not timed: it ended its process, signal SIGSEGV" in rows["rms_norm"]
    assert "not timed: it ended its process, exit code 1" in rows["swiglu"] and "bye" in done.stderr
    assert "not timed: RecursionError" in rows["linear"]
    assert rows["linear_add"].endswith("warm") and "a line on the screen" in done.stderr
    assert done.returncode == 1 and "4 rows of ours or yours are wrong or fail" in done.stdout


def test_a_file_that_ends_its_process(tmp_path):
    (tmp_path / "mine.py").write_text("import os\nos._exit(3)\n")
    done = run("--kernel", tmp_path / "mine.py")
    assert done.returncode == 2 and "mine.py ends the process when it is run: exit code 3" in done.stderr
