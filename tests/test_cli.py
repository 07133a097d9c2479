"""The command line as a person meets it: whole processes, their output, their exit status."""

import os
import re
import signal
import subprocess
import sys

import pytest
from internlm3 import InternLM3Config

FIGURES = re.compile(
    r"\[prompt (\d+) tokens, [\d.]+ tokens/s; answer (\d+) tokens, [\d.]+ tokens/s; peak memory [\d.]+ GB\]"
)
COMMAND = [sys.executable, "-m", "internlm3.runtime.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*args, stdin="", expect=0):
    done = subprocess.run(
        [*COMMAND, *map(str, args)], input=stdin, capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == expect, done.stderr
    return done


def test_help_names_every_command_and_imports_nothing_heavy():
    program = """
import sys
from internlm3.runtime.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    heavy = {"torch", "sentencepiece", "jinja2"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else stop.code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("chat", "generate", "info", "demo"))


def test_importing_warns_of_nothing():
    """torch warns where numpy is missing, so setup.py asks for it."""
    subprocess.run([sys.executable, "-W", "error", "-c", "from internlm3 import LLM"], check=True)


def test_the_demo_says_paris_and_its_figures(standin):
    done = run("demo")
    assert "Paris" in done.stdout
    prompt, answer = map(int, FIGURES.search(done.stderr).groups())
    assert prompt > 10 and 1 < answer < 40


def test_generate_streams_the_answer_alone_to_standard_output(standin):
    asked = run("generate", standin, "-p", "-", "--temp", 0, "-n", 12, stdin="What is the capital of France?")
    assert asked.stdout == "The capital of France is Paris.\n"
    raw = run("generate", standin, "-p", "One, two, three,", "--raw", "--temp", 0, "-n", 4)
    assert raw.stdout.strip().startswith("four")
    assert FIGURES.search(raw.stderr).groups()[1] == "4"


def test_one_seed_one_text_and_a_stop_string_ends_it(standin):
    options = ("generate", standin, "-p", "Tell me a story.", "--temp", 1, "-n", 20)
    first, again, other = (run(*options, "--seed", seed).stdout for seed in (7, 7, 8))
    assert first == again != other
    stop = first.split()[2]
    assert run(*options, "--seed", 7, "--stop", stop).stdout.rstrip("\n") == first[: first.index(stop)]


def test_a_chat_remembers_resets_and_survives_a_bad_turn(standin):
    # The window is so small that the second question does not fit behind the first answer, and fits after /reset.
    turns = (
        "My name is Ada. Say hello.\n"
        + "word " * 120
        + "\n/reset\nWhat is the capital of France?\n/exit\nnever asked\n"
    )
    done = run("chat", standin, "--temp", 0, "-n", 12, "--max-seq-len", 140, stdin=turns)
    assert "max_seq_len is 140" in done.stderr and "/reset" in done.stderr
    assert done.stdout.splitlines()[-1] == "The capital of France is Paris."
    assert len(FIGURES.findall(done.stderr)) == 2
    remembered = run("chat", standin, "--temp", 0, "-n", 24, stdin="My name is Ada.\nWhat is my name?\n")
    (prompt, answer), (longer, _) = ((int(a), int(b)) for a, b in FIGURES.findall(remembered.stderr))
    assert longer > prompt + answer


def test_info_counts_parameters_and_memory(standin):
    printed = run("info", standin, "--length", 1000).stdout
    # 30 layers of (q and o 576 x 576, k and v 192 x 576, three of 1536 x 576, two norms), norm, embedding and head.
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576 + 2 * 576
    parameters = 30 * layer + 576 + 2 * 49152 * 576
    assert f"{parameters:,}" in printed
    assert f"{parameters * 2 / 1e9:.2f} GB in bfloat16" in printed
    assert "23,040 bytes a token" in printed  # 30 layers x (k and v) x 3 heads x 64 x 2 bytes
    assert "0.02 GB at 1,000 tokens" in printed
    assert run("info", standin, "--length", 1000, "--dtype", "bf16").stdout == printed


def test_info_of_the_8b_needs_its_config_only(tmp_path):
    config = InternLM3Config(
        intermediate_size=10240, num_hidden_layers=48, num_key_value_heads=2, head_dim=128, dtype="bfloat16"
    )
    config.save_pretrained(tmp_path)
    printed = run("info", tmp_path, "--length", 32768).stdout
    assert "8,804,241,408" in printed and "17.61 GB in bfloat16" in printed
    assert "49,152 bytes a token, 1.61 GB at 32,768 tokens" in printed


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("generate", "/nowhere/model", "-p", "hi"), "/nowhere/model"),
        (("generate", "owner/name", "-p", "hi"), "owner/name"),
        (("generate", "STANDIN", "-p", ""), "prompt is empty"),
        (("generate", "STANDIN", "-p", "hi", "--top-p", "3"), "top_p"),
        (("generate", "STANDIN", "-p", "hi", "--raw", "--thinking"), "--raw"),
        (("generate", "STANDIN", "-p", "hi", "--dtype", "int3"), "int3"),
        (("generate", "STANDIN", "-p", "hi", "--device", "cuda:99"), "cuda:99"),
        (("info", "STANDIN", "--dtype", "int3"), "int3"),
    ],
)
def test_an_error_is_one_sentence_on_standard_error(standin, args, says):
    done = run(*(standin if arg == "STANDIN" else arg for arg in args), expect=1)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("internlm3: error: ") and says in done.stderr
    assert done.stdout == ""


def test_bad_usage_is_status_2():
    assert "--prompt" in run("generate", expect=2).stderr


def test_control_c_ends_an_answer_at_once(standin):
    options = ("generate", standin, "-p", "Tell me a very long story.", "--temp", 0)
    with subprocess.Popen(
        [*COMMAND, *map(str, options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 0
    assert "[stopped]" in out and FIGURES.search(err)
