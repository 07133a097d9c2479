"""`internlm3 serve --replicas` on a Ray of its own and on a cluster that is there, asked by OpenAI's client."""

import contextlib
import os
import re
import signal
import socket
import threading

import httpx
import openai
import pytest

from internlm3 import LLM
from internlm3.tests.api.conftest import make  # noqa: F401 - a fixture
from internlm3.tests.support.ray_processes import command_with_replicas, ray_cluster, replicas_of

pytest.importorskip("ray", reason="Ray is not installed here: make test-serving installs it")

KEY = "secret"
ROWS = 2  # that a replica decodes together
# An answer of several seconds.
LONG = {"max_tokens": 1500, "temperature": 0.0, "extra_body": {"ignore_eos": True}}


class Cluster:
    """The process of `internlm3 serve`, and clients for it."""

    def __init__(self, model, *switches, **environment):
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
            port = str(listener.getsockname()[1])
        self.url, self.lines = f"http://127.0.0.1:{port}", []
        given = ["--port", port, "--device", "cpu", "--max-batch-size", ROWS, "--served-model-name", "tiny", *switches]
        self.process = command_with_replicas("serve", model, *given, **environment, INTERNLM3_API_KEY=KEY)
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._ready.wait()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if "internlm3: ready" in line:
                self._ready.set()
        self._ready.set()

    def end(self, number=signal.SIGTERM):
        """The exit status after a signal."""
        self.process.send_signal(number)
        status = self.process.wait()
        self._reader.join()
        return status

    def client(self, **options):
        return openai.OpenAI(base_url=self.url + "/v1", api_key=KEY, **options)

    def stream(self, question, **options):
        messages = [{"role": "user", "content": question}]
        return self.client().chat.completions.create(
            model="tiny", messages=messages, stream=True, **{**LONG, **options}
        )

    def metric(self, name, **labels):
        """The value of a metric for each replica, by its id."""
        text = httpx.get(self.url + "/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=60).text
        found = {}
        for labelled, value in re.findall(rf"^internlm3:{name}{{(.+)}} (\S+)$", text, re.MULTILINE):
            given = dict(re.findall(r'(\w+)="([^"]*)"', labelled))
            if labels.items() <= given.items():
                found[given["replica"]] = float(value)
        return found

    def idle(self):
        """Whether no replica has reported a running request. A report may be a second old."""
        return not any(self.metric("num_requests_running").values())

    def replicas(self):
        """The process ids of the replicas."""
        return replicas_of(self.process, "ray::ServeReplica:internlm3:Replica")


@pytest.fixture(scope="module")
def model(make):
    return make(max_position_embeddings=2048, num_hidden_layers=2)


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, progress=False, device="cpu", max_batch_size=ROWS)


def start(model, *switches):
    """A Cluster of its own. Ray gives up where it can't start within 30 seconds, which may happen on a busy machine."""
    while "Ray could not start" in "".join((cluster := Cluster(model, *switches)).lines):
        cluster.process.wait()
    return cluster


@pytest.fixture(scope="module")
def cluster(model):
    cluster = start(model, "--replicas", "2", "--max-waiting", "2")
    assert any("internlm3: ready at" in line for line in cluster.lines), "".join(cluster.lines)
    yield cluster
    if cluster.process.poll() is None:
        cluster.end()


def until(happens):
    """Waits for something that happens sooner or later."""
    pause = threading.Event()
    while not happens():
        assert not pause.wait(0.2)


def test_answers_are_the_models(cluster, llm):
    question = "What is the capital of France?"
    expected = llm.chat(question, max_tokens=24, temperature=0.0).text
    messages = [{"role": "user", "content": question}]
    client = cluster.client()
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, temperature=0.0)
    assert whole.choices[0].message.content == expected
    chunks = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=24, temperature=0.0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 3
    text = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=8, temperature=0.0)
    assert text.choices[0].text == llm.generate("Once upon a time", max_tokens=8, temperature=0.0).text


def test_errors_are_the_apps(cluster):
    client = cluster.client(max_retries=0)
    with pytest.raises(openai.BadRequestError, match="greater than or equal to 1"):
        client.completions.create(model="tiny", prompt="x", n=0)
    with pytest.raises(openai.NotFoundError, match="another"):
        client.completions.create(model="another", prompt="x")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"host": "elsewhere.example"}):
        for path in ("/v1/models", "/metrics"):
            answer = httpx.get(cluster.url + path, headers=headers)
            assert answer.status_code in (401, 403) and answer.json()["error"]["code"]
    huge = b'{"prompt": "' + b"x" * (9 << 20) + b'"}'
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    assert httpx.post(cluster.url + "/v1/completions", headers=headers, content=huge).status_code == 413


def test_a_conversation_stays_with_its_replica(cluster):
    """Its first turn is in the cache of the replica that answers its second; both replicas have some of the work."""
    client = cluster.client()
    before = cluster.metric("prompt_tokens_total")
    assert len(before) == 2
    for number in range(64):
        messages = [{"role": "user", "content": f"Conversation {number}. " + "Tell me more about it. " * 40}]
        first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0.0)
        assert not first.usage.prompt_tokens_details.cached_tokens
        said = {"role": "assistant", "content": first.choices[0].message.content}
        messages += [said, {"role": "user", "content": "Why?"}]
        second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0.0)
        assert second.usage.prompt_tokens_details.cached_tokens > 128
        # A conversation has more tokens than the other tests, which may not have been reported before.
        now, more = cluster.metric("prompt_tokens_total"), second.usage.prompt_tokens
        both = all(now[replica] > before[replica] + more for replica in before)
        if both and number > 6:
            break
    assert both


def test_a_client_that_goes_cancels_its_answer(cluster):
    until(cluster.idle)
    stream = cluster.stream("Tell a long story.")
    next(iter(stream))
    until(lambda: not cluster.idle())
    stream.close()
    until(cluster.idle)  # counted as broken off before it is cancelled
    assert sum(cluster.metric("request_success_total", finished_reason="abort").values()) == 1


def test_more_than_may_wait_are_refused(cluster):
    """Both replicas have as many as they may, and two more wait."""
    statuses = []

    def ask(number):
        body = {"prompt": f"{number}", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
        headers = {"authorization": f"Bearer {KEY}"}
        answer = httpx.post(cluster.url + "/v1/completions", json=body, headers=headers, timeout=None)
        statuses.append((answer.status_code, answer.json()))

    until(cluster.idle)
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2 * 2 * ROWS + 2 + 10)]
    for thread in threads:
        thread.start()
    until(lambda: sum(cluster.metric("num_requests_running").values()) == 2 * ROWS)
    assert httpx.get(cluster.url + "/health").json() == {"status": "ok"}
    for thread in threads:
        thread.join()
    refused = [body["error"]["code"] for status, body in statuses if status != 200]
    assert refused and set(refused) == {"queue_full"}
    assert sum(status == 200 for status, _ in statuses) >= 2 * ROWS


def test_a_replica_that_is_killed_ends_its_own_answers_and_another_comes(cluster):
    ended = []

    def talk(number):
        try:
            *_, last = cluster.stream(f"Tell story {number}.")
            ended.append(last.choices[0].finish_reason)
        except openai.APIError as error:
            ended.append(error.message)

    until(cluster.idle)
    talkers = [threading.Thread(target=talk, args=(number,)) for number in range(3 * ROWS)]
    for talker in talkers:
        talker.start()
    until(lambda: len(running := cluster.metric("num_requests_running")) == 2 and all(running.values()))
    before = cluster.metric("num_requests_running").keys()
    os.kill(cluster.replicas()[0], signal.SIGKILL)
    for talker in talkers:
        talker.join()
    gone = "the replica that had this request is gone: send it again"
    assert set(ended) == {"length", gone} and len(ended) == len(talkers)
    answer = cluster.client(max_retries=20).completions.create(model="tiny", prompt="x", max_tokens=2)
    assert answer.choices[0].text
    until(lambda: len(cluster.replicas()) == 2)
    until(lambda: len(after := cluster.metric("num_requests_running")) == 2 and len(before & after.keys()) == 1)


def test_after_a_signal_what_is_under_way_finishes(cluster):
    stream = iter(cluster.stream("Tell a third story."))
    next(stream)
    before = len(cluster.lines)
    cluster.process.send_signal(signal.SIGTERM)
    headers = {"authorization": f"Bearer {KEY}"}
    until(lambda: httpx.get(cluster.url + "/v1/models", headers=headers, timeout=60).status_code == 503)
    *_, last = stream
    assert last.choices[0].finish_reason == "length"
    assert cluster.process.wait() == 128 + signal.SIGTERM
    cluster._reader.join()
    assert "failed" not in "".join(cluster.lines[before:])  # an ordinary end is none of Ray's errors


def test_a_second_signal_ends_what_is_under_way(model):
    cluster = start(model, "--replicas", "1")
    stream = iter(cluster.stream("Tell a long story."))
    next(stream)
    pid, *_ = cluster.replicas()
    os.kill(pid, signal.SIGSTOP)  # its answer never finishes
    cluster.process.send_signal(signal.SIGTERM)
    # The ingress answers this itself, and a replica would not.
    until(lambda: httpx.get(cluster.url + "/health", timeout=60).status_code == 503)
    assert cluster.end() == 128 + signal.SIGTERM
    with pytest.raises((httpx.HTTPError, openai.APIError)):
        for _ in stream:
            pass


def test_replicas_come_as_they_are_needed_on_a_cluster_that_is_there(model):
    with ray_cluster() as (owner, environment):
        cluster = Cluster(model, "--replicas", "1-2", **environment)
        until(lambda: len(cluster.metric("num_requests_running")) == 1)
        enough = threading.Event()

        def talk(number):
            while not enough.is_set():
                for _ in cluster.stream(f"Tell story {number}.", max_tokens=100):
                    pass

        talkers = [threading.Thread(target=talk, args=(number,)) for number in range(3 * ROWS)]
        for talker in talkers:
            talker.start()
        until(lambda: len(cluster.metric("num_requests_running")) == 2)
        enough.set()
        for talker in talkers:
            talker.join()
        assert cluster.end(signal.SIGINT) == 130
        assert owner.poll() is None and not replicas_of(owner, "ray::ServeReplica:internlm3")


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        (["--replicas", "1000"], "1000 replicas need a core each, and this machine has"),
        (["--replicas", "1", "--max-seq-len", "99999999"], "a replica could not start: ValueError: max_seq_len"),
    ],
)
def test_what_cannot_start_says_why(model, switches, message):
    cluster = start(model, *switches)
    assert cluster.process.wait() == 1
    cluster._reader.join()
    assert message in "".join(cluster.lines) and "Traceback" not in "".join(cluster.lines)
