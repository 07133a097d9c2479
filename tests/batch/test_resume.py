"""A batch that was interrupted goes on where it was: nothing twice, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from internlm3.runtime.batch.answer import Answer
from internlm3.runtime.batch.output import Output
from internlm3.runtime.batch.run import run_batch
from internlm3.tests.batch.conftest import NAME, chat, read, text_of, write
from internlm3.tests.batch.test_run import never

# The command, whose steps take half a second once three answers are in the file: it never ends before it is ended.
SCRIPT = """
import sys, time
from pathlib import Path
from internlm3.runtime.cli.main import main
from internlm3.runtime.engine.runner import Runner

step, out = Runner.step, Path(sys.argv[4])

def slow(self):
    if out.exists() and out.read_bytes().count(b"\\n") >= 3:
        time.sleep(0.5)
    return step(self)

Runner.step = slow
sys.exit(main(sys.argv[1:]))
"""
COMMAND = [sys.executable, "-c", SCRIPT, "batch"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    requests = [chat(f"{n}", f"Number {n}", max_tokens=20, ignore_eos=True) for n in range(30)]
    return write(tmp_path_factory.mktemp("batch") / "in", requests)


@pytest.fixture(scope="module")
def whole(run, source):
    """The answers of a run without interruption."""
    out = source.with_name("whole")
    assert run(source, out)
    return {name: text_of(line) for name, line in read(out).items()}


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_ends_in_the_middle(run, source, folder, whole, tmp_path, capsys, sent):
    out = tmp_path / "out"
    options = ["--served-model-name", "tiny", "--max-batch-size", "4"]
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job ignores Ctrl-C
    with subprocess.Popen(
        [*COMMAND, folder, source, out, *options], stderr=subprocess.PIPE, env=ENVIRONMENT, preexec_fn=listens
    ) as process:
        while not out.exists() or out.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(sent)
        _, said = process.communicate()
    assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    assert (b"the same command goes on" in said) == (sent == signal.SIGINT)
    done = out.read_bytes().count(b"\n")
    assert 3 <= done < 30
    assert run(source, out)
    assert {name: text_of(line) for name, line in read(out).items()} == whole
    assert f"{30 - done} answers, " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_answer_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    with Output(tmp_path / "out", {"a"}, NAME) as output:
        output.write(Answer("a", 200, {}))
        assert read(tmp_path / "out").keys() == {"a"}


def test_an_unfinished_last_line_is_cut_off(run, source, whole, tmp_path):
    out, requests = tmp_path / "out", source.read_text().splitlines(keepends=True)[:3]
    short = tmp_path / "in"
    short.write_text("".join(requests))
    assert run(short, out)
    lines = out.read_bytes().splitlines(keepends=True)
    for cut in (1, 10, 30, len(lines[2]) - 1):
        out.write_bytes(b"".join([*lines[:2], lines[2][:cut]]))
        assert run(short, out)
        assert {name: text_of(line) for name, line in read(out).items()} == {n: whole[n] for n in ("0", "1", "2")}
        assert out.read_bytes().startswith(b"".join(lines[:2]))
    assert run_batch(short, out, NAME, never)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"notes of mine", "line 1 is no answer of a batch"),
        (b'{"custom_id": "0"}\n', "line 1 is no answer of a batch"),
        (b"{ANSWER}\n}", "line 2 is no answer of a batch"),
        (b"{ANSWER}\n\n", "line 2 is no answer of a batch"),
        (b"{ANSWER}\n{ANSWER}\n", "line 2 answers '0', as an earlier line does"),
        (b"{ANSWER}\n{OF ANOTHER MODEL}\n", "line 2 is an answer of 'other', and this model is 'tiny'"),
        (b"{OTHER}\n{UNFINISHED}", "line 1 answers 'other', which the input does not have"),
    ],
)
def test_another_files_output_is_refused_and_kept(source, tmp_path, content, says):
    def line(name, model=NAME):
        response = {"status_code": 200, "request_id": "req_1", "body": {"model": model}}
        return json.dumps({"id": "batch_req_1", "custom_id": name, "response": response, "error": None}).encode()

    words = {b"{ANSWER}": line("0"), b"{OTHER}": line("other"), b"{UNFINISHED}": line("1")[:40]}
    words[b"{OF ANOTHER MODEL}"] = line("1", "other")
    for word, given in words.items():
        content = content.replace(word, given)
    out = tmp_path / "out"
    out.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        run_batch(source, out, NAME, never)
    assert says in str(raised.value) and str(out) in str(raised.value)
    assert out.read_bytes() == content
