"""The whole suite of LLM once more, its steps replayed from graphs and 1 to 4 of them under way."""

from typing import Any

import pytest

from .capture import CapturedEngines
from .test_llm import *  # noqa: F403


@pytest.fixture(scope="module", autouse=True)
def engines() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield CapturedEngines(patch)


@pytest.fixture(autouse=True)
def depth(engines: CapturedEngines, request: pytest.FixtureRequest) -> Any:
    """Another depth for every test; what it patches is captured anew, and forgotten behind it."""
    engines.begin(depth=1 + len(request.node.name) % 4)
    yield
    engines.begin(depth=1)


@pytest.fixture
def as_op(engines: CapturedEngines) -> Any:
    def as_op(function: Any) -> Any:
        engines.forget()
        return engines.recorder.op(function)

    return as_op


# These count the runs of the model's Python: a replay does none, and steps that run ahead are more than are read.
del test_closing_a_stream_stops_it_and_frees_it  # noqa: F821
del test_a_special_token_is_a_stop_string  # noqa: F821
del test_a_stop_string_is_met_across_tokens  # noqa: F821
del test_ctrl_c_in_a_step_reaches_the_caller_and_leaves_the_model_well  # noqa: F821
