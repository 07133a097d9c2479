"""A fixture for tests that change what a program of bench/ does: its workers answer in the tests' own process."""

import json
from contextlib import ExitStack

import pytest
import torch

from bench import engines, ops
from bench.common_form import __main__ as common_form


class HereWorker:
    """Answers as a worker process of bench.ops or bench.common_form does."""

    def __init__(self, module, *arguments):
        self._stack = ExitStack()
        if module == "bench.ops":
            device = torch.device("cpu")
            self._answer = ops.answering(ops.parser(ops.ours(device)[0]).parse_args(arguments), device)
        else:
            options = common_form.parser().parse_args(arguments)
            self._answer = self._stack.enter_context(common_form.answering(options))

    def __exit__(self, *_):
        self._stack.close()

    def ask(self, question):
        return json.loads(json.dumps(self._answer(json.loads(json.dumps(question)))))


@pytest.fixture
def in_this_process(monkeypatch):
    for module in (engines, common_form):
        monkeypatch.setattr(module, "Worker", HereWorker)
