"""Models for the tests of LLM: the demo model, and small random ones with its tokenizer."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm3 import LLM, InternLM3Config, InternLM3ForCausalLM
from internlm3.tests.support.llm import TINY_WINDOW


@pytest.fixture(scope="module")
def capture() -> Any:
    """How steps run; test_llm_decoding.py has one that captures them."""


@pytest.fixture(scope="module")
def llm(demo_model: Path, capture: Any) -> LLM:
    return LLM(demo_model, progress=False)


@pytest.fixture(scope="session")
def make(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a small random model with the demo model's tokenizer; weights depend on the shape alone."""

    def make(generation_config: dict[str, Any] | None = None, **overrides: Any) -> Path:
        values = {
            "vocab_size": 49152,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": TINY_WINDOW,
            # Large enough for texts that differ from prompt to prompt.
            "initializer_range": 0.3,
            "dtype": "float32",
            **overrides,
        }
        folder = tmp_path_factory.mktemp("tiny")
        torch.manual_seed(0)
        model = InternLM3ForCausalLM(InternLM3Config(**values))
        model.generation_config = generation_config or {}
        model.save_pretrained(folder)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(demo_model / name, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_folder(make: Callable[..., Path]) -> Path:
    return make()


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path, capture: Any) -> LLM:
    return LLM(tiny_folder, progress=False)


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, capture: Any) -> LLM:
    """The same model as `tiny` with an engine of its own, which no test disturbs."""
    return LLM(tiny_folder, progress=False)


@pytest.fixture
def as_op() -> Callable[..., Any]:
    """Turns a function into an op that a captured step can hold; without capture any function is one."""
    return lambda function: function


@pytest.fixture
def script(tiny: LLM, monkeypatch: pytest.MonkeyPatch, as_op: Any) -> Callable[[Sequence[int]], list[int]]:
    """Makes `tiny` generate exactly these tokens; returns the list that grows by each token."""

    def script(tokens: Sequence[int]) -> list[int]:
        generated: list[int] = []

        def head(x: torch.Tensor) -> torch.Tensor:
            # Steps may run ahead of what is read, and after the last token.
            generated.append(tokens[min(len(generated), len(tokens) - 1)])
            logits = torch.zeros(len(x), tiny.config.vocab_size)
            logits[:, generated[-1]] = 99
            return logits

        monkeypatch.setattr(tiny.model, "head", as_op(head))
        if (speculation := tiny.engine._runner.speculation) is not None:  # a step has one row
            monkeypatch.setattr(speculation, "prepare", lambda slots: False)
        return generated

    return script
