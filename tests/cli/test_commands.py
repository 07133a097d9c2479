"""The command line: output, error messages and exit status of each command.

Commands run in this process, and share one copy of the demo model. Tests of what only a process has (its start, its
signals, its environment) start one.
"""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import internlm3
from internlm3 import LLM, InternLM3Config, InternLM3Tokenizer, SamplingParams
from internlm3.runtime.checkpoint.gguf.folder import locate
from internlm3.runtime.checkpoint.quantise.calibration import shipped_text
from internlm3.runtime.checkpoint.sizes import read_per_token, weight_bytes
from internlm3.runtime.cli.parser import command_parser
from internlm3.runtime.cli.sampling_switches import given_settings
from internlm3.tests.support.checkpoints import make
from internlm3.tests.support.command_line import FIGURES, run_command
from internlm3.tests.support.gguf_files import write
from internlm3.tests.support.quantised import SHAPE, Checkpoint, awq, linears

COMMAND = [sys.executable, "-m", "internlm3.runtime.cli.main"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def run():
    """Runs a command in this process. A model is loaded once for each set of arguments."""
    load = cache(LLM)
    yield partial(run_command, load)
    load.cache_clear()


def test_help_names_every_command_and_imports_nothing_heavy():
    program = """
import sys
from internlm3.runtime.cli.main import main
try:
    main(["--help"])
except SystemExit as stop:
    heavy = {"torch", "sentencepiece", "jinja2"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else stop.code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("chat", "generate", "info", "perplexity", "quantize", "demo"))


def test_importing_warns_of_nothing():
    """torch warns if numpy is missing, so setup.py requires it."""
    subprocess.run([sys.executable, "-W", "error", "-c", "from internlm3 import LLM"], check=True)


def test_the_demo_in_a_terminal_of_ascii(demo_model):
    """A whole process: the demo prints "Paris" and its figures."""
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [*COMMAND, "demo", "-p", "What is the capital of France? 🙂"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    assert "Paris" in done.stdout
    prompt, answer = map(int, FIGURES.search(done.stderr).groups())
    assert prompt > 10 and 1 < answer < 40


def test_generate_streams_the_answer_alone_to_standard_output(demo_model, run):
    asked = run("generate", demo_model, "-p", "-", "--temp", 0, "-n", 12, stdin="What is the capital of France?")
    assert asked.stdout == "The capital of France is Paris.\n"
    raw = run("generate", demo_model, "-p", "One, two, three,", "--raw", "--temp", 0, "-n", 4)
    assert raw.stdout.strip().startswith("four")
    assert FIGURES.search(raw.stderr).groups()[1] == "4"


def test_one_seed_one_text_and_a_stop_string_ends_it(demo_model, run):
    options = ("generate", demo_model, "-p", "Tell me a story.", "--temp", 1, "-n", 8)
    first, again, other = (run(*options, "--seed", seed).stdout for seed in (7, 7, 8))
    assert first == again != other
    stop = first.split()[2]
    assert run(*options, "--seed", 7, "--stop", stop).stdout.rstrip("\n") == first[: first.index(stop)]


def test_a_chat_remembers_resets_and_survives_a_bad_turn(demo_model, run):
    # The second question does not fit into the window after the first answer, and the third fits after /reset.
    turns = (
        "My name is Ada. Say hello.\n"
        + "word " * 120
        + "\n/reset\nWhat is the capital of France?\n/exit\nnever asked\n"
    )
    done = run("chat", demo_model, "--temp", 0, "-n", 12, "--max-seq-len", 140, stdin=turns)
    assert "max_seq_len is 140" in done.stderr and "/reset" in done.stderr
    assert done.stdout.splitlines()[-1] == "The capital of France is Paris."
    assert len(FIGURES.findall(done.stderr)) == 2
    remembered = run("chat", demo_model, "--temp", 0, "-n", 6, stdin="My name is Ada.\nWhat is my name?\n")
    (prompt, answer), (longer, _) = ((int(a), int(b)) for a, b in FIGURES.findall(remembered.stderr))
    assert longer > prompt + answer


def test_info_counts_parameters_and_memory(demo_model, run):
    printed = run("info", demo_model, "--length", 1000).stdout
    # 30 layers of (q and o 576 x 576, k and v 192 x 576, three of 1536 x 576, two norms), norm, embedding and head.
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576 + 2 * 576
    parameters = 30 * layer + 576 + 2 * 49152 * 576
    assert f"{parameters:,}" in printed
    assert f"{parameters * 2 / 1e9:.2f} GB in bfloat16" in printed
    assert "23,040 bytes per token" in printed  # 30 layers x (k and v) x 3 heads x 64 x 2 bytes
    assert "0.02 GB at 1,000 tokens" in printed
    assert run("info", demo_model, "--length", 1000, "--dtype", "bf16").stdout == printed


def test_perplexity_of_a_file_and_of_standard_input(demo_model, run, tmp_path):
    text = "The quick brown fox jumps over the lazy dog. " * 3
    (tmp_path / "text.txt").write_text(text)
    options = ("--window", 16, "--stride", 8, "--dtype", "float32")
    printed = run("perplexity", demo_model, tmp_path / "text.txt", *options).stdout
    assert "in windows of 16 that begin 8 apart" in printed and printed.startswith("perplexity ")
    assert run("perplexity", demo_model, "-", *options, stdin=text).stdout == printed
    assert "nothing.txt" in run("perplexity", demo_model, tmp_path / "nothing.txt", expect=1).stderr


def test_perplexity_refuses_what_is_no_text(small, run, tmp_path):
    """From standard input as from a file: with characters in its place the figure would be of another text."""
    data = "The quick brown fox".encode("utf-16")
    (tmp_path / "text.txt").write_bytes(data)
    assert "text.txt is not UTF-8 text" in run("perplexity", small, tmp_path / "text.txt", expect=1).stderr
    done = run("perplexity", small, "-", stdin=data, expect=1)
    assert "standard input is not utf-8 text" in done.stderr and not done.stdout


def test_perplexity_of_the_text_that_ships(small, run, tmp_path):
    (tmp_path / "text.txt").write_text(shipped_text(), encoding="utf-8")
    assert run("perplexity", small).stdout == run("perplexity", small, tmp_path / "text.txt").stdout


@pytest.fixture(scope="module")
def small(demo_model, tmp_path_factory):
    """A small model of random weights with the demo model's tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    for path in demo_model.glob("*token*"):
        shutil.copy(path, folder)
    make(5, torch.bfloat16, **SHAPE, vocab_size=49152, initializer_range=0.05).save_pretrained(folder)
    return folder


def test_quantize(small, run, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    options = {
        "4": ("--group", 32),
        "4c": ("--calibrate", tmp_path / "text.txt"),
        "4s": ("--symmetric",),
        "8": (),
        "fp8": (),
    }
    stored = {}
    for name, given in options.items():
        assert not run("quantize", small, tmp_path / name, "--bits", name.strip("cs"), *given).stdout
        stored[name] = load_file(tmp_path / name / "model.safetensors")
    # Without a text to scale by, it is what quantising on load makes.
    for name, form in (("8", "int8"), ("fp8", "fp8")):
        loads = ((tmp_path / name, {}), (small, {"quantization": form}), (small, {}))
        file, on_load, plain = (
            LLM(folder, device="cpu", max_seq_len=64, progress=False, **options).perplexity([*range(20, 60)])
            for folder, options in loads
        )
        assert file == on_load != plain
    assert LLM(tmp_path / "4c", max_seq_len=64, progress=False).generate("Hello", max_tokens=2).text
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(stored["4"][norm], stored["4c"][norm]) and torch.equal(
        stored["8"][norm], stored["fp8"][norm]
    )
    assert not any(name.endswith("zero_point") for name in stored["4s"])
    assert stored["fp8"]["lm_head.weight"].dtype == torch.int8
    again = run("quantize", small, tmp_path / "4", "--bits", "4", expect=1).stderr
    assert "is there already: name a folder" in again
    given = ("quantize", small, tmp_path / "new", "--bits", "8")
    assert "are for 4 bits, and bits is 8" in run(*given, "--group", 64, expect=1).stderr
    assert "is quantised already" in run("quantize", tmp_path / "8", tmp_path / "new", "--bits", "4", expect=1).stderr
    (tmp_path / "empty.txt").write_text("")
    assert "text" in run(*given[:-1], "4", "--calibrate", tmp_path / "empty.txt", expect=1).stderr


def test_info_says_how_a_checkpoint_is_stored(tmp_path, run):
    checkpoint = Checkpoint(tmp_path, {"quant_method": "awq", "bits": 4, "group_size": 32})
    checkpoint.quantise(awq).save()
    # Of each projection 4 bits, and 16 of a scale and 4 of a zero point for 32 inputs; all else in bfloat16.
    layers = sum(w.numel() for name, w in checkpoint.weights.items() if name.endswith("_proj.weight"))
    rest = sum(w.numel() for w in checkpoint.weights.values()) - layers
    size = layers * (4 + 20 / 32) / 8 + 2 * rest
    found = weight_bytes(tmp_path, InternLM3Config.from_file(tmp_path / "config.json"), torch.bfloat16)
    assert sum(found.values()) == size
    read = size - 2 * checkpoint.weights["model.embed_tokens.weight"].numel()
    assert read_per_token(found) == read
    printed = run("info", tmp_path, "--dtype", "bfloat16").stdout
    assert "GB as AWQ, 4 bits in groups of 32; what is not quantised in bfloat16" in printed
    assert f"{read / 1e9:.2f} GB of weights, and the KV cache so far" in printed


def test_info_of_layers_left_alone_because_of_their_shape(tmp_path):
    checkpoint = Checkpoint(tmp_path, {"quant_method": "awq", "bits": 4, "group_size": 64})
    checkpoint.quantise(awq, [name for name in linears(checkpoint.model) if "down" not in name], group=64).save()
    config = InternLM3Config.from_file(tmp_path / "config.json")
    found = weight_bytes(tmp_path, config, torch.bfloat16)
    assert found["model.layers.0.mlp.down_proj.weight"] == 2 * 64 * 96  # 96 inputs are no multiple of 64
    assert found["model.layers.0.mlp.up_proj.weight"] * 8 == 64 * 96 * (4 + 20 / 64)


def test_info_of_a_gguf_file(tmp_path, run):
    weights, _ = write(tmp_path / "a.gguf", lambda name: "Q4_K" if "mlp" in name else "Q8_0", hidden_size=256,
                       intermediate_size=256, head_dim=64, num_hidden_layers=2)  # fmt: skip
    assert "GB as GGUF (Q4_K, Q8_0); what is not quantised in bfloat16" in run("info", tmp_path / "a.gguf").stdout
    folder = locate(tmp_path / "a.gguf")
    found = weight_bytes(folder, InternLM3Config.from_file(folder / "config.json"), torch.bfloat16)
    for name, size in found.items():
        bits = 16 if "norm" in name or "embed" in name else 144 * 8 / 256 if "mlp" in name else 34 * 8 / 32
        assert size * 8 == weights[name].numel() * bits


def test_info_of_the_8b_needs_its_config_only(tmp_path, run):
    config = InternLM3Config(
        intermediate_size=10240, num_hidden_layers=48, num_key_value_heads=2, head_dim=128, dtype="bfloat16"
    )
    config.save_pretrained(tmp_path)
    printed = run("info", tmp_path, "--length", 32768).stdout
    assert "8,804,241,408" in printed and "17.61 GB in bfloat16" in printed
    assert "49,152 bytes per token, 1.61 GB at 32,768 tokens" in printed
    assert "25.77 GB for 16 sequences, but at most half of the memory that is free" in printed  # 16 x 32768 x 49152
    assert "pages for its prompt and max_tokens are free: 3.15 MB for 64 tokens, 512 of them for 32,768" in printed


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("generate", "/nowhere/model", "-p", "hi"), "/nowhere/model"),
        (("generate", "owner/name", "-p", "hi"), "owner/name"),
        (("generate", "DEMO_MODEL", "-p", ""), "prompt is empty"),
        (("generate", "DEMO_MODEL", "-p", "hi", "--top-p", "3"), "top_p"),
        (("generate", "DEMO_MODEL", "-p", "hi", "--raw", "--thinking"), "--raw"),
        (("generate", "DEMO_MODEL", "-p", "hi", "--dtype", "int3"), "int3"),
        (("generate", "DEMO_MODEL", "-p", "hi", "--device", "cuda:99"), "cuda:99"),
        (("info", "DEMO_MODEL", "--dtype", "int3"), "int3"),
    ],
)
def test_an_error_is_one_sentence_on_standard_error(demo_model, run, args, says):
    done = run(*(demo_model if arg == "DEMO_MODEL" else arg for arg in args), expect=1)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("internlm3: error: ") and says in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "required"),
        (("generate",), "--prompt"),
        (("generate", "-p", "a", "--max_tokens", "3"), "--max_tokens; did you mean --max-tokens?"),
        (("generate", "-p", "a", "--max-new-tokens=3"), "did you mean --max-tokens?"),
        (("generate", "-p", "a", "--n-predict", "3"), "did you mean --max-tokens?"),
        (("serve", "--max-num-seqs", "8"), "did you mean --max-batch-size?"),
        (("info", "--lenght", "8"), "did you mean --length?"),
        (("chat", "--zzz"), "unrecognized arguments: --zzz ("),
        (("info", "one", "--two"), "unrecognized arguments: --two ("),
        (("chat", "one", "two"), "unrecognized arguments: two ("),
        (("chat", "--seed", "x"), "--seed: invalid int value: 'x'"),
        (("chat", "--logit-bias", "1,2=3"), "expected one token id, = and a number, not '1,2=3': see --sequence-bias"),
        (("chat", "--logit-bias", "=3"), "expected token ids"),
        (("chat", "--sequence-bias", "1,2"), "expected token ids, = and a number"),
    ],
)
def test_bad_usage_is_one_sentence_and_status_2(run, args, says):
    done = run(*args, expect=2)
    name = " ".join(["internlm3", *args[:1]])
    assert done.stderr.startswith(f"{name}: error: ") and says in done.stderr
    assert done.stderr.endswith(f" ({name} --help shows the usage)\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "switch", ["--prompt", "--system", "--stop", "--regex", "--grammar", "--choice", "--json-schema"]
)
def test_bytes_that_are_no_text_are_named(run, switch):
    """A shell in another encoding passes them, and Python keeps them as surrogates."""
    given = b"caf\xe9".decode(errors="surrogateescape")
    done = run("generate", "-p", "a", switch, given, expect=2)
    assert f"{switch}: 'caf\N{REPLACEMENT CHARACTER}' is not text" in done.stderr


def test_control_c_ends_an_answer_at_once(demo_model, run):
    options = ("generate", demo_model, "-p", "Tell me a very long story.", "--temp", 0)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    # Background jobs of a shell, and their children, ignore Ctrl-C by default.
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*COMMAND, *map(str, options)], **streams, env=ENVIRONMENT, preexec_fn=listens) as process:
        begun = process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    printed = int(FIGURES.search(err.decode())[2])
    whole = run("generate", demo_model, "-p", "Tell me a very long story.", "--temp", 0, "-n", printed).stdout
    assert whole.startswith((begun + out).decode())  # only the model's words


def test_the_command_by_its_other_name_and_its_version():
    other = [sys.executable, "-m", "internlm3"]
    for command in (other, COMMAND):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"internlm3 {internlm3.__version__}\n"
    assert "version=VERSION" in Path(__file__).parents[2].joinpath("setup.py").read_text()  # of runtime/version.py
    assert (
        "{chat,generate,serve,batch,info,perplexity,quantize,demo}"
        in subprocess.run([*other, "--help"], capture_output=True, text=True).stdout
    )


def test_every_sampling_parameter_has_a_switch(demo_model, run):
    shown = run("generate", "--help").stdout
    for field in fields(SamplingParams):
        if field.name not in ("n", "logprobs", "priority"):  # of which a stream shows nothing
            assert f"--{field.name.replace('_', '-')}" in shown.replace("--no-s", "--s"), field.name
    tokens = InternLM3Tokenizer.from_pretrained(demo_model)
    paris = tokens.encode("Paris", add_special_tokens=False)
    options = ("generate", demo_model, "-p", "What is the capital of France?", "--temp", 0, "-n", 12)
    assert run(*options, "--allowed-token-ids", *paris, "--min-tokens", 3, "-n", 3).stdout == "Paris" * 3 + "\n"
    assert run(*options, "--logit-bias", f"{paris[0]}=100", "-n", 2).stdout == "ParisParis\n"
    capital = tokens.encode(" capital", add_special_tokens=False)
    assert run(*options, "--stop-token-ids", *capital).stdout == "The\n"
    assert run(*options, "--stop", " of", "--include-stop-str-in-output").stdout == "The capital of\n"
    assert run(*options, "--choice", "Lyon", "--choice", "Nice").stdout in ("Lyon\n", "Nice\n")
    assert run(*options, "--json-schema", '{"enum": [17]}').stdout == "17\n"
    assert run(*options, "--ignore-eos", "--no-skip-special-tokens").stdout.count("<|im_end|>") > 0
    assert run(*options, "--frequency-penalty", 2, "--presence-penalty", -2, "--typical-p", 0.5, "--seed", -1).stdout


def test_switches_of_sequences():
    line = """chat --suppress-tokens 3 4 --begin-suppress-tokens 5 --bad-words-ids 6,7 --bad-words-ids 8 --sequence-bias
        9,10=-1.5 --no-repeat-ngram-size 3 --exponential-decay-length-penalty 20 1.1 --forced-eos-token-id 2 11"""
    settings = given_settings(command_parser().parse_args(line.split()))
    assert SamplingParams.from_kwargs(**settings) == SamplingParams(
        suppress_tokens=(3, 4), begin_suppress_tokens=(5,), bad_words_ids=((6, 7), (8,)), sequence_bias={(9, 10): -1.5},
        no_repeat_ngram_size=3, exponential_decay_length_penalty=(20, 1.1), forced_eos_token_id=(2, 11),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--length", -5), "must be an integer >= 1; got -5"),
        (("--length", 0), "must be an integer >= 1; got 0"),
        (("--length", 10**6), "is 1000000, and the model was trained for"),
    ],
)
def test_info_of_a_length_that_no_model_takes(demo_model, run, args, says):
    done = run("info", demo_model, *args, expect=1)
    assert says in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert "no checkpoint is named" in run("info", "", expect=1).stderr


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "utf-8"])
def test_a_terminal_of_another_encoding(demo_model, run, encoding):
    """Characters that it cannot show are replaced, and its input may end in the middle of a character."""
    smile = InternLM3Tokenizer.from_pretrained(demo_model).encode("🙂", add_special_tokens=False)
    options = ("chat", demo_model, "--temp", 0, "-n", 1, "--allowed-token-ids", *smile[:1])
    turns = "你好".encode()[:4] + b"\n" + b"\xff\xfe\n" + b"Hi\n"
    done = run(*options, stdin=turns, encoding=encoding)
    shown = "\ufffd".encode(encoding, "replace").decode(encoding)  # of an incomplete character
    assert done.stdout == f"{shown}\n" * 3 + "\n" and len(FIGURES.findall(done.stderr)) == 3
    question = b"What is the capital of France? \xe4\xbd"
    assert run("generate", demo_model, "-p", "-", "--temp", 0, "-n", 2, stdin=question, encoding=encoding).stdout
