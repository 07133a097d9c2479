"""The whole suite of LLM once more, its steps replayed from graphs and 1 to 4 of them under way."""

from typing import Any

import pytest

from .capture import CapturedEngines, depth, engines  # noqa: F401 (fixtures)
from .test_llm import *  # noqa: F403


@pytest.fixture
def as_op(engines: CapturedEngines) -> Any:  # noqa: F811
    def as_op(function: Any) -> Any:
        engines.forget()
        return engines.recorder.op(function)

    return as_op


# These count the runs of the model's Python: a replay does none, and steps that run ahead are more than are read.
del test_closing_a_stream_stops_it_and_frees_it  # noqa: F821
del test_a_special_token_is_a_stop_string  # noqa: F821
del test_a_stop_string_is_met_across_tokens  # noqa: F821
del test_ctrl_c_in_a_step_reaches_the_caller_and_leaves_the_model_well  # noqa: F821
