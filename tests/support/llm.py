"""What tests of LLM share."""

from collections.abc import Sequence
from typing import Any

import pytest

from internlm3 import LLM, Chunk, InternLM3ForCausalLM, RequestOutput

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a small village by the sea, and in that village",
    "def fibonacci(n):",
    "Water",
    "今天天气很好，我们",
]
TINY_WINDOW = 64
DYNAMIC = {"rope_type": "dynamic", "factor": 6.0}


def causal_lm(llm: LLM) -> InternLM3ForCausalLM:
    """A copy of the model of `llm` in the class that has transformers' `forward` and `generate`."""
    model = InternLM3ForCausalLM(llm.config, device="meta")
    model.load_state_dict(llm.model.state_dict(), assign=True)
    return model


def ids_of(llm: LLM, text: str) -> list[int]:
    return llm.tokenizer.encode(text, add_special_tokens=False)


def same(outputs: Sequence[RequestOutput], expected: Sequence[RequestOutput]) -> bool:
    """The same prompts, tokens, texts and ends. Log-probabilities agree to 1e-4 only: a float32 product of several rows
    may differ in its last bits from that of one.
    """
    answers = [[answer for output in each for answer in output.outputs] for each in (outputs, expected)]
    for one, other in zip(*answers, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    return [result(output) for output in outputs] == [result(output) for output in expected]


def result(output: RequestOutput) -> list[Any]:
    """All of an output but figures."""
    answers = [(a.index, a.text, a.token_ids, a.finish_reason, a.stop_reason) for a in output.outputs]
    return [output.prompt, output.prompt_token_ids, answers]


def text_of(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)
