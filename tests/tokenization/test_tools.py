"""The JSON schema of a Python function: transformers' get_json_schema is the oracle."""

import json

import pytest
from transformers.utils import get_json_schema

from internlm3.runtime.chat_template.tools import function_schema
from internlm3.tests.support.functions import BAD, GOOD


@pytest.mark.parametrize("function", GOOD, ids=lambda function: function.__qualname__)
def test_a_schema_is_that_of_transformers(function):
    """In the order of its keys too, as a template prints them."""
    assert json.dumps(function_schema(function)) == json.dumps(get_json_schema(function))


@pytest.mark.parametrize("function", BAD, ids=lambda function: function.__qualname__)
def test_what_has_no_schema_is_named(function):
    with pytest.raises(Exception):  # noqa: B017 - transformers raises several kinds
        get_json_schema(function)
    with pytest.raises(ValueError, match=f"tool '{function.__name__}'") as caught:
        function_schema(function)
    assert function.__name__ == "undocumented" or any(word in str(caught.value) for word in ("'a'", "'b'", "Nowhere"))
