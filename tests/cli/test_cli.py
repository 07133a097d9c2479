"""The command line as a person meets it: whole processes, their output, their exit status."""

import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import internlm3
import pytest
from internlm3 import Chunk, InternLM3Config, InternLM3Tokenizer, SamplingParams
from internlm3.runtime.cli import main as cli
from internlm3.runtime.cli.chat import Chat, show

FIGURES = re.compile(
    r"\[prompt (\d+) tokens, [\d.]+ tokens/s; answer (\d+) tokens, [\d.]+ tokens/s; peak memory [\d.]+ GB\]"
)
COMMAND = [sys.executable, "-m", "internlm3.runtime.cli.main"]
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
from internlm3.runtime.cli.main import main
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


def test_the_demo_says_paris_and_its_figures(demo_model):
    done = run("demo")
    assert "Paris" in done.stdout
    prompt, answer = map(int, FIGURES.search(done.stderr).groups())
    assert prompt > 10 and 1 < answer < 40


def test_generate_streams_the_answer_alone_to_standard_output(demo_model):
    asked = run("generate", demo_model, "-p", "-", "--temp", 0, "-n", 12, stdin="What is the capital of France?")
    assert asked.stdout == "The capital of France is Paris.\n"
    raw = run("generate", demo_model, "-p", "One, two, three,", "--raw", "--temp", 0, "-n", 4)
    assert raw.stdout.strip().startswith("four")
    assert FIGURES.search(raw.stderr).groups()[1] == "4"


def test_one_seed_one_text_and_a_stop_string_ends_it(demo_model):
    options = ("generate", demo_model, "-p", "Tell me a story.", "--temp", 1, "-n", 20)
    first, again, other = (run(*options, "--seed", seed).stdout for seed in (7, 7, 8))
    assert first == again != other
    stop = first.split()[2]
    assert run(*options, "--seed", 7, "--stop", stop).stdout.rstrip("\n") == first[: first.index(stop)]


def test_a_chat_remembers_resets_and_survives_a_bad_turn(demo_model):
    # The window is so small that the second question does not fit behind the first answer, and fits after /reset.
    turns = (
        "My name is Ada. Say hello.\n"
        + "word " * 120
        + "\n/reset\nWhat is the capital of France?\n/exit\nnever asked\n"
    )
    done = run("chat", demo_model, "--temp", 0, "-n", 12, "--max-seq-len", 140, stdin=turns)
    assert "max_seq_len is 140" in done.stderr and "/reset" in done.stderr
    assert done.stdout.splitlines()[-1] == "The capital of France is Paris."
    assert len(FIGURES.findall(done.stderr)) == 2
    remembered = run("chat", demo_model, "--temp", 0, "-n", 24, stdin="My name is Ada.\nWhat is my name?\n")
    (prompt, answer), (longer, _) = ((int(a), int(b)) for a, b in FIGURES.findall(remembered.stderr))
    assert longer > prompt + answer


def test_info_counts_parameters_and_memory(demo_model):
    printed = run("info", demo_model, "--length", 1000).stdout
    # 30 layers of (q and o 576 x 576, k and v 192 x 576, three of 1536 x 576, two norms), norm, embedding and head.
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576 + 2 * 576
    parameters = 30 * layer + 576 + 2 * 49152 * 576
    assert f"{parameters:,}" in printed
    assert f"{parameters * 2 / 1e9:.2f} GB in bfloat16" in printed
    assert "23,040 bytes a token" in printed  # 30 layers x (k and v) x 3 heads x 64 x 2 bytes
    assert "0.02 GB at 1,000 tokens" in printed
    assert run("info", demo_model, "--length", 1000, "--dtype", "bf16").stdout == printed


def test_info_of_the_8b_needs_its_config_only(tmp_path):
    config = InternLM3Config(
        intermediate_size=10240, num_hidden_layers=48, num_key_value_heads=2, head_dim=128, dtype="bfloat16"
    )
    config.save_pretrained(tmp_path)
    printed = run("info", tmp_path, "--length", 32768).stdout
    assert "8,804,241,408" in printed and "17.61 GB in bfloat16" in printed
    assert "49,152 bytes a token, 1.61 GB at 32,768 tokens" in printed
    assert "25.77 GB for 16 answers, but at most half of what the weights leave free" in printed  # 16 x 32768 x 49152
    assert "the pages of its prompt and max_tokens: 3.15 MB for 64 tokens, 512 of them for 32,768" in printed


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
def test_an_error_is_one_sentence_on_standard_error(demo_model, args, says):
    done = run(*(demo_model if arg == "DEMO_MODEL" else arg for arg in args), expect=1)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("internlm3: error: ") and says in done.stderr
    assert done.stdout == ""


def test_bad_usage_is_status_2():
    assert "--prompt" in run("generate", expect=2).stderr


def test_control_c_ends_an_answer_at_once(demo_model):
    options = ("generate", demo_model, "-p", "Tell me a very long story.", "--temp", 0)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    # A shell has its background jobs, and all that they start, ignore Ctrl-C.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*COMMAND, *map(str, options)], **streams, env=ENVIRONMENT, preexec_fn=heard) as process:
        begun = process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    said = int(FIGURES.search(err.decode())[2])
    whole = run("generate", demo_model, "-p", "Tell me a very long story.", "--temp", 0, "-n", said).stdout
    assert whole.startswith((begun + out).decode())  # the model's words, and nothing of its own


def test_the_command_by_its_other_name_and_its_version():
    other = [sys.executable, "-m", "internlm3"]
    for command in (other, COMMAND):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"internlm3 {internlm3.__version__}\n"
    assert f'version="{internlm3.__version__}"' in Path(__file__).parents[2].joinpath("setup.py").read_text()
    assert "{chat,generate,info,demo}" in subprocess.run([*other, "--help"], capture_output=True, text=True).stdout


def test_every_sampling_parameter_has_a_switch(demo_model):
    shown = run("generate", "--help").stdout
    for field in fields(SamplingParams):
        if field.name not in ("n", "logprobs"):  # of which a stream shows nothing
            assert f"--{field.name.replace('_', '-')}" in shown.replace("--no-skip", "--skip"), field.name
    tokens = InternLM3Tokenizer.from_pretrained(demo_model)
    said = tokens.encode("Paris", add_special_tokens=False)
    options = ("generate", demo_model, "-p", "What is the capital of France?", "--temp", 0, "-n", 12)
    assert run(*options, "--allowed-token-ids", *said, "--min-tokens", 3, "-n", 3).stdout == "Paris" * 3 + "\n"
    assert run(*options, "--logit-bias", f"{said[0]}=100", "-n", 2).stdout == "ParisParis\n"
    capital = tokens.encode(" capital", add_special_tokens=False)
    assert run(*options, "--stop-token-ids", *capital).stdout == "The\n"
    assert run(*options, "--stop", " of", "--include-stop-str-in-output").stdout == "The capital of\n"
    assert run(*options, "--ignore-eos", "--no-skip-special-tokens").stdout.count("<|im_end|>") > 0
    assert run(*options, "--frequency-penalty", 2, "--presence-penalty", -2, "--typical-p", 0.5, "--seed", -1).stdout


def test_switches_of_sequences():
    line = """chat --suppress-tokens 3 4 --begin-suppress-tokens 5 --bad-words-ids 6,7 --bad-words-ids 8 --sequence-bias
        9,10=-1.5 --no-repeat-ngram-size 3 --exponential-decay-length-penalty 20 1.1 --forced-eos-token-id 2 11"""
    settings = cli._settings(cli._parser().parse_args(line.split()))
    assert SamplingParams.from_kwargs(**settings) == SamplingParams(
        suppress_tokens=(3, 4), begin_suppress_tokens=(5,), bad_words_ids=((6, 7), (8,)), sequence_bias={(9, 10): -1.5},
        no_repeat_ngram_size=3, exponential_decay_length_penalty=(20, 1.1), forced_eos_token_id=(2, 11),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--length", -5), "must be an integer of at least 1; it is -5"),
        (("--length", 0), "must be an integer of at least 1; it is 0"),
        (("--length", 10**6), "is 1000000, and the model was trained for"),
    ],
)
def test_info_of_a_length_that_no_model_takes(demo_model, args, says):
    done = run("info", demo_model, *args, expect=1)
    assert says in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert "no checkpoint is named" in run("info", "", expect=1).stderr


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "utf-8"])
def test_a_terminal_of_another_encoding(demo_model, encoding):
    """What it cannot show is replaced, and what it sends may be cut in the middle of a character."""
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    smile = InternLM3Tokenizer.from_pretrained(demo_model).encode("🙂", add_special_tokens=False)
    options = ["chat", demo_model, "--temp", 0, "-n", 2 * len(smile), "--allowed-token-ids", *smile[:1]]
    turns = "你好".encode()[:4] + b"\n" + b"\xff\xfe\n" + b"Hi\n"
    done = subprocess.run(
        [*COMMAND, *map(str, options)], input=turns, capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(FIGURES.findall(done.stderr.decode(errors="replace"))) == 3
    asked = ["generate", demo_model, "-p", "-", "--temp", 0, "-n", 12]
    done = subprocess.run([*COMMAND, *map(str, asked)], input=b"What is the capital of France? \xe4\xbd",
                          capture_output=True, env=environment, check=False)  # fmt: skip
    assert done.returncode == 0 and done.stdout, done.stderr


# The conversation itself, with an answer that the test gives


def chat(monkeypatch, turns, answer=None, messages=()):
    """The chat after these inputs; `answer` gives the text for a conversation, or raises."""
    asked: list[list[dict]] = []

    def chunks(conversation):
        asked.append(conversation)
        for text in answer(conversation) if answer else [f"answer {len(asked)}"]:
            if isinstance(text, BaseException):
                raise text
            yield Chunk(text, [1], [0.0], None, None, None, 1, 1, 1.0, 1.0, 1.0, 0)

    inputs = iter(turns)

    def read():
        turn = next(inputs, EOFError())
        if isinstance(turn, BaseException):
            raise turn
        return turn

    monkeypatch.setattr("internlm3.runtime.cli.chat.reader", lambda: read)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    talk = Chat(chunks, list(messages))
    talk.run()
    return talk.messages, asked


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_a_conversation_grows(monkeypatch, capsys):
    messages, asked = chat(monkeypatch, ["one", "  ", "two\nlines"])
    assert messages == [*turn("one", "answer 1"), *turn("two\nlines", "answer 2")]
    assert asked[1] == messages[:3]
    assert capsys.readouterr().out == "answer 1\nanswer 2\n\n"


def test_a_turn_shows_what_was_reused_and_how_fast(capsys):
    for reused, words in ((0, "2.00 GB]\n"), (512, "2.00 GB] [512 of the prompt's tokens reused]\n")):
        show(iter([Chunk("hi", [1], [0.0], None, None, None, 600, 1, 900.0, 30.0, 2.0, reused)]))
        said = capsys.readouterr().err
        assert FIGURES.search(said).groups() == ("600", "1") and "30.0 tokens/s" in said and said.endswith(words)


def test_an_answer_that_an_error_ends(capsys):
    """What is wrong is an error of the command, and said in a chat (as in `test_a_question_that_fails...`)."""
    with pytest.raises(ValueError, match="not numbers"):
        show(iter([Chunk("", [], [], None, "error", "not numbers", 1, 0, 0.0, 0.0, 1.0, 0)]))
    said = capsys.readouterr()
    assert "answer 0 tokens" in said.err and said.out == ""


def test_control_c_loses_no_conversation(monkeypatch, capsys):
    """Before an answer begins its question is taken back, in its middle what was said stays, at the prompt all."""
    answers = iter([["first"], [KeyboardInterrupt()], ["half", KeyboardInterrupt()], ["last"]])
    turns = ["one", KeyboardInterrupt(), "two", "three", "four"]
    messages, _ = chat(monkeypatch, turns, lambda _: next(answers))
    assert messages == [*turn("one", "first"), *turn("three", "half"), *turn("four", "last")]
    said = capsys.readouterr()
    assert "taken back" in said.err and "[stopped]" in said.err and "stopped" not in said.out


def test_a_question_that_fails_is_taken_back(monkeypatch, capsys):
    answers = iter([["first"], [ValueError("too long")], ["last"]])
    messages, _ = chat(monkeypatch, ["one", "two", "three"], lambda _: next(answers))
    assert messages == [*turn("one", "first"), *turn("three", "last")]
    assert "too long (/undo takes a turn back, /reset begins anew)" in capsys.readouterr().err


SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize(
    ("turns", "left", "says"),
    [
        (["one", "/undo", "two"], [*SYSTEM, *turn("two", "answer 2")], "taken back: one"),
        (["/undo"], SYSTEM, "nothing to take back"),
        (["one", "/clear", "two"], [*SYSTEM, *turn("two", "answer 2")], "begins anew"),
        (["one", "/reset"], SYSTEM, "begins anew"),
        (["one", "/quit", "two"], [*SYSTEM, *turn("one", "answer 1")], ""),
        (["one", " /exit ", "two"], [*SYSTEM, *turn("one", "answer 1")], ""),
        (["one", "/system Rhyme\nalways."], [{"role": "system", "content": "Rhyme\nalways."}, *turn("one", "answer 1")],
         "system prompt: Rhyme"),
        (["/system"], SYSTEM, "system prompt: Be brief."),
        (["/help"], SYSTEM, "/undo"),
        (["/hepl"], SYSTEM, "there is no /hepl; did you mean /help?"),
        (["/quti", "/cler"], SYSTEM, "did you mean /clear?"),
        (["/zzzz"], SYSTEM, "there is no /zzzz; /help lists the commands"),
        (["/usr/bin is a folder?"], [*SYSTEM, *turn("/usr/bin is a folder?", "answer 1")], ""),
        (["/ 2"], [*SYSTEM, *turn("/ 2", "answer 1")], ""),
    ],
)  # fmt: skip
def test_commands(monkeypatch, capsys, turns, left, says):
    messages, _ = chat(monkeypatch, turns, messages=SYSTEM)
    assert messages == left
    assert says in capsys.readouterr().err


def test_system_where_there_was_none(monkeypatch, capsys):
    messages, _ = chat(monkeypatch, ["/system", "one", "/system Be kind.", "two"])
    assert messages == [{"role": "system", "content": "Be kind."}, *turn("one", "answer 1"), *turn("two", "answer 2")]
    assert "system prompt: none" in capsys.readouterr().err


# A terminal


@pytest.mark.skipif(os.name != "posix", reason="a terminal of one's own is POSIX's")
@pytest.mark.parametrize("toolkit", [True, False])
def test_a_paste_is_one_question(tmp_path, toolkit):
    """Four lines at once are one input, with prompt_toolkit and without; the next run knows it, with prompt_toolkit."""
    import pty

    if toolkit:
        pytest.importorskip("prompt_toolkit")
    code = f"""
import sys
if not {toolkit}:
    sys.modules["prompt_toolkit"] = None
from internlm3.runtime.cli.terminal import history_file, reader
read = reader()
sys.stderr.write("ready\\n")
for _ in range(2):
    sys.stderr.write(ascii(read()) + "\\n")
sys.stderr.write(f"{{history_file().exists()}}\\n")
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
                               env=environment, start_new_session=True)  # fmt: skip
    os.close(theirs)
    assert process.stderr.readline() == b"ready\n"
    drain = threading.Thread(target=_drain, args=(ours,), daemon=True)
    drain.start()
    lines = b"def f():\r    return 1\r\rprint(f())"
    os.write(ours, b"\x1b[200~" + lines + b"\x1b[201~\r" if toolkit else lines.replace(b"\r", b"\n") + b"\n")
    assert process.stderr.readline() == b"'def f():\\n    return 1\\n\\nprint(f())'\n"
    os.write(ours, b"next\r" if toolkit else b"next\n")
    assert process.stderr.readline() == b"'next'\n"
    assert process.stderr.readline().strip() == str(toolkit).encode()
    assert process.wait() == 0
    process.stderr.close()
    if toolkit:
        assert "print(f())" in (tmp_path / "internlm3" / "history").read_text()
        assert (tmp_path / "internlm3" / "history").stat().st_mode & 0o077 == 0


def _drain(terminal):
    """Reads what the program writes to its terminal, so that it never waits."""
    try:
        while os.read(terminal, 4096):
            pass
    except OSError:
        pass
    os.close(terminal)
