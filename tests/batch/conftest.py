"""A small random model that answers batches, in this process or in one of its own."""

import json

import pytest

from internlm3 import LLM, AsyncLLM
from internlm3.runtime.batch.on_this_machine import answer_on_this_machine
from internlm3.runtime.batch.run import run_batch
from internlm3.tests.api.conftest import make  # noqa: F401 - a fixture

NAME = "tiny"


@pytest.fixture(scope="session")
def folder(make):
    return make(max_position_embeddings=1024, num_hidden_layers=1)


@pytest.fixture(scope="session")
def llm(folder):
    return LLM(folder, progress=False, max_batch_size=4)


@pytest.fixture(scope="session")
def run(llm):
    """Runs a batch; returns whether all requests have an answer."""

    def run(source, out):
        def answer_all(requests, write):
            answer_on_this_machine(lambda: AsyncLLM(llm), NAME, requests, write)

        return run_batch(source, out, NAME, answer_all)

    return run


def chat(custom_id, text, **fields):
    """A request for an answer."""
    body = {"model": NAME, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path, requests):
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def read(path):
    """The lines of an output by their custom_id, each of which is there once."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    by_id = {line["custom_id"]: line for line in lines}
    assert len(by_id) == len(lines)
    return by_id


def text_of(line):
    """The text of an answer."""
    assert line["response"]["status_code"] == 200, line
    return line["response"]["body"]["choices"][0]["message"]["content"]
