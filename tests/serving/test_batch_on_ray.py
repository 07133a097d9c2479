"""`internlm3 batch --replicas` on a Ray of this machine: answers, and what is killed meanwhile."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internlm3 import LLM
from internlm3.tests.api.conftest import make  # noqa: F401 - a fixture
from internlm3.tests.batch.conftest import chat, read, text_of, write

pytest.importorskip("ray", reason="Ray is not installed here: make test-serving installs it")

COUNT = 40
TOKENS = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(make):
    return make(max_position_embeddings=1024, num_hidden_layers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    requests = [chat(f"{n}", f"Number {n}", **TOKENS) for n in range(COUNT)]
    return write(tmp_path_factory.mktemp("batch") / "in", [*requests, chat("wrong", "Water", temperature=-1)])


@pytest.fixture(scope="module")
def expected(folder):
    llm = LLM(folder, progress=False, device="cpu")
    return {f"{n}": llm.chat(f"Number {n}", **TOKENS).text for n in range(COUNT)}


def started(model, source, out, replicas=2):
    """The process of a batch."""
    command = [sys.executable, "-m", "internlm3.runtime.cli.main", "batch", model, source, out]
    command += ["--served-model-name", "tiny", "--device", "cpu", "--max-batch-size", "2", "--replicas", replicas]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, env={**environment, "HF_HUB_OFFLINE": "1"})


def until_answered(process, out, count):
    while not out.exists() or out.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.1)


def replicas_of(process):
    """The process ids of its replicas."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")

    def below(pid):
        return pid == process.pid or (pid in parents and below(parents[pid]))

    return [pid for pid, name in names.items() if name.startswith("ray::MapWorker") and below(pid)]


def check(out, expected):
    lines = read(out)
    assert lines.pop("wrong")["response"]["status_code"] == 400
    assert {name: text_of(line) for name, line in lines.items()} == expected


def test_a_replica_that_is_killed_is_replaced(folder, source, expected, tmp_path):
    out = tmp_path / "out"
    with started(folder, source, out) as process:
        until_answered(process, out, 3)
        first, *others = replicas_of(process)
        assert len(others) == 1
        os.kill(first, signal.SIGKILL)
        _, said = process.communicate()
    assert process.returncode == 0, said.decode()
    assert f"{COUNT + 1} of {COUNT + 1} requests are answered" in said.decode()
    check(out, expected)


def test_a_batch_that_is_killed_goes_on(folder, source, expected, tmp_path):
    out = tmp_path / "out"
    with started(folder, source, out) as process:
        until_answered(process, out, 3)
        process.kill()
        process.communicate()
    done = out.read_bytes().count(b"\n")
    assert 3 <= done <= COUNT
    with started(folder, source, out) as process:
        _, said = process.communicate()
    assert process.returncode == 0, said.decode()
    assert f"internlm3: {COUNT + 1 - done} answers, " in said.decode()
    check(out, expected)


@pytest.mark.parametrize(
    ("model", "replicas", "says"), [("/no/such/model", 1, "/no/such/model"), ("FOLDER", 999, "and this machine has")]
)
def test_what_cannot_start_is_one_sentence(folder, source, tmp_path, model, replicas, says):
    out = tmp_path / "out"
    with started(folder if model == "FOLDER" else model, source, out, replicas) as process:
        _, said = process.communicate()
    errors = [line for line in said.decode().splitlines() if line.startswith("internlm3: error: ")]
    assert process.returncode == 1 and len(errors) == 1 and says in errors[0], said.decode()
    assert "Traceback" not in said.decode()
