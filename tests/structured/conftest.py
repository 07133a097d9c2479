"""Small tokenizers of every kind, and a small random model whose answers wander through a grammar."""

from pathlib import Path

import pytest
import torch

from internlm3 import LLM, InternLM3Config, InternLM3ForCausalLM, InternLM3Tokenizer
from internlm3.runtime.checkpoint.gguf.folder import folder_of
from internlm3.tests.support.tiny_gguf import tiny_gguf
from internlm3.tests.support.tokenizers import CORPUS, TRAINED, save_by_transformers, train, write_checkpoint

JSON = [
    '{"name": "Ada", "age": 36, "tags": ["maths", "poetry"], "born": null, "alive": false}',
    '{"id": 7, "items": [{"price": 1.5, "count": 2}, {"price": 20, "count": 1}], "total": 23}',
    '{\n  "城市": "上海",\n  "名字": "李雷",\n  "年龄": 20\n}',
    '[1, 2, 3, true, "a", "b", {"x": -1e5}]',
]


@pytest.fixture(
    scope="session", params=["plain", "dummy", "nfkc", "squeeze", "saved by transformers", "GGUF, byte-level"]
)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> InternLM3Tokenizer:
    """With pieces for JSON, and single bytes for all other text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "GGUF, byte-level":
        tiny_gguf(folder / "tiny.gguf")
        return InternLM3Tokenizer.from_pretrained(folder_of(folder / "tiny.gguf"))
    kind = TRAINED.get(request.param, TRAINED["dummy"])
    checkpoint = write_checkpoint(folder / "checkpoint", train(kind, CORPUS + JSON))
    if request.param == "saved by transformers":
        checkpoint = save_by_transformers(checkpoint, folder)
    return InternLM3Tokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights. Its tokenizer puts a space before a text."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", train(TRAINED["dummy"], CORPUS + JSON))
    vocab_size = len(InternLM3Tokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    config = InternLM3Config(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, initializer_range=0.3, dtype="bfloat16",
    )  # fmt: skip
    InternLM3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llm(folder: Path) -> LLM:
    return LLM(folder, dtype="bfloat16", progress=False, max_batch_size=16)
