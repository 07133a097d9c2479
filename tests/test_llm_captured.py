"""The whole suite of LLM once more, its steps replayed from graphs and 1 to 4 of them under way."""

from typing import Any

import pytest
from internlm3.tests.support.capture import CapturedEngines, depth, engines  # noqa: F401 (fixtures)
from internlm3.tests.test_llm import *  # noqa: F403


@pytest.fixture
def as_op(engines: CapturedEngines) -> Any:  # noqa: F811
    def as_op(function: Any) -> Any:
        engines.forget()
        return engines.recorder.op(function)

    return as_op


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What counts or says the tokens of each step holds at every depth; the other tests have one each."""
    if {"drawn", "as_op"} & {*metafunc.fixturenames}:
        metafunc.parametrize("depth", [1, 2, 3, 4], indirect=True)


def test_steps_are_replayed_here(engines, tiny):  # noqa: F811
    before = engines.recorder.replays
    tiny.generate("hello", max_tokens=6, ignore_eos=True)
    assert engines.recorder.replays - before == 5  # the prompt, and the steps behind that which was captured
