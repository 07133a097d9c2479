"""`internlm3 batch --replicas` on a Ray cluster that is there: answers, and what is killed meanwhile."""

import os
import signal
import time
from functools import partial

import pytest

from internlm3 import LLM
from internlm3.tests.api.conftest import make  # noqa: F401 - a fixture
from internlm3.tests.batch.conftest import chat, read, text_of, write
from internlm3.tests.support.ray_processes import command_with_replicas, ray_cluster, replicas_of

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


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster() as (process, environment):
        yield process, environment


@pytest.fixture
def started(cluster):
    """Starts a batch on the cluster."""
    return partial(batch, **cluster[1])


def batch(model, source, out, replicas=2, **environment):
    """The process of a batch."""
    switches = ["--served-model-name", "tiny", "--device", "cpu", "--max-batch-size", 2, "--replicas", replicas]
    return command_with_replicas("batch", model, source, out, *switches, **environment)


def until_answered(process, out, count):
    while not out.exists() or out.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)


def check(out, expected):
    lines = read(out)
    assert lines.pop("wrong")["response"]["status_code"] == 400
    assert {name: text_of(line) for name, line in lines.items()} == expected


def test_a_replica_that_is_killed_is_replaced(cluster, started, folder, source, expected, tmp_path):
    out = tmp_path / "out"
    with started(folder, source, out) as process:
        until_answered(process, out, 3)
        first, *others = replicas_of(cluster[0], "ray::MapWorker")
        assert len(others) == 1
        os.kill(first, signal.SIGKILL)
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert f"{COUNT + 1} of {COUNT + 1} requests are answered" in said
    check(out, expected)


def test_a_batch_that_is_killed_goes_on(started, folder, source, expected, tmp_path):
    out = tmp_path / "out"
    with started(folder, source, out) as process:
        until_answered(process, out, 3)
        process.kill()
        process.communicate()
    done = out.read_bytes().count(b"\n")
    assert 3 <= done <= COUNT
    with started(folder, source, out) as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert f"internlm3: {COUNT + 1 - done} answers, " in said
    check(out, expected)


def test_a_model_that_is_not_there_is_one_sentence(started, source, tmp_path):
    refused(started("/no/such/model", source, tmp_path / "out", 1), "/no/such/model")


def test_more_replicas_than_this_machine_has_room_for_are_refused(folder, source, tmp_path):
    refused(batch(folder, source, tmp_path / "out", 999), "999 replicas need a core each, and this machine has")


def refused(process, says):
    with process:
        said, _ = process.communicate()
    errors = [line for line in said.splitlines() if line.startswith("internlm3: error: ")]
    assert process.returncode == 1 and len(errors) == 1 and says in errors[0], said
    assert "Traceback" not in said
