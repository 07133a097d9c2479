"""The table of fields in runtime/README.md is what the code takes, ignores and refuses."""

import re

from bench import ROOT
from internlm3.runtime.sampling.settings import SETTINGS
from internlm3.runtime.server import schemas
from internlm3.runtime.server.response_schemas import ResponseRequest


def test_the_table_of_fields_is_the_code():
    page = (ROOT / "runtime" / "README.md").read_text(encoding="utf-8")
    section = page[page.index("## Server") : page.index("## transformers' classes")]
    rows = dict(re.findall(r"^\| ((?:of|ignored|refused)[^|]*) \| (.*) \|$", section, re.MULTILINE))
    fields = [re.findall(r"`(\w+)`", text) for text in rows.values()]
    both, chat, completions, ignored, refused = fields[:5]
    responses, ignored_by_responses, refused_by_responses = fields[5:]
    settings = {setting.name for setting in SETTINGS} - {"logprobs"}
    assert settings | {*both} == {*schemas.Generation.model_fields} | {"logprobs"}
    assert {*chat} == schemas.ChatRequest.model_fields.keys() - schemas.Generation.model_fields.keys()
    assert {*completions} == schemas.CompletionRequest.model_fields.keys() - schemas.Generation.model_fields.keys()
    assert ignored == [*schemas.IGNORED] and refused == [*schemas.UNSUPPORTED]
    assert settings - {"n"} | {*responses} - {"n", "logprobs"} == {*ResponseRequest.model_fields}
    assert ignored_by_responses == [*ResponseRequest.ignored]
    assert refused_by_responses == [*ResponseRequest.unsupported]
