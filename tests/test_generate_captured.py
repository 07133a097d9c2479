"""The whole suite of `generate` once more, its steps replayed from graphs and 1 to 4 of them under way."""

from typing import Any

import pytest

from .capture import CapturedEngines
from .test_generate import *  # noqa: F403


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


# Fifty real prompts take minutes; test_a_seed_is_a_text has the same model.
del test_greedy_tokens_are_those_of_transformers  # noqa: F821
