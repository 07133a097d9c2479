"""A runtime for InternLM3-8B at the lowest latency on one GPU, with hand-written Triton kernels.

Names are imported on first use, so that `import internlm3` and `internlm3 --help` are fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .runtime.version import VERSION as __version__

if TYPE_CHECKING:
    from .runtime.api.async_llm import AsyncLLM as AsyncLLM
    from .runtime.api.llm import LLM as LLM
    from .runtime.api.outputs import Chunk as Chunk
    from .runtime.api.outputs import CompletionOutput as CompletionOutput
    from .runtime.api.outputs import RequestOutput as RequestOutput
    from .runtime.api.perplexity import Perplexity as Perplexity
    from .runtime.api.prompt_logprobs import PromptLogprobs as PromptLogprobs
    from .runtime.api.prompts import SYSTEM_PROMPT as SYSTEM_PROMPT
    from .runtime.api.prompts import THINKING_SYSTEM_PROMPT as THINKING_SYSTEM_PROMPT
    from .runtime.api.run_tools import run_tools as run_tools
    from .runtime.compat.causal_lm import InternLM3ForCausalLM as InternLM3ForCausalLM
    from .runtime.compat.decoder import InternLM3Model as InternLM3Model
    from .runtime.engine.thread import QueueFull as QueueFull
    from .runtime.model.config import InternLM3Config as InternLM3Config
    from .runtime.sampling.params import RECOMMENDED as RECOMMENDED
    from .runtime.sampling.params import RECOMMENDED_THINKING as RECOMMENDED_THINKING
    from .runtime.sampling.params import SamplingParams as SamplingParams
    from .runtime.tokenization.tokenizer import InternLM3Tokenizer as InternLM3Tokenizer
    from .runtime.tools.calls import ToolCall as ToolCall
    from .runtime.tools.calls import ToolCallDelta as ToolCallDelta

_HOME = {
    "AsyncLLM": "api.async_llm",
    "Chunk": "api.outputs",
    "CompletionOutput": "api.outputs",
    "InternLM3Config": "model.config",
    "InternLM3ForCausalLM": "compat.causal_lm",
    "InternLM3Model": "compat.decoder",
    "InternLM3Tokenizer": "tokenization.tokenizer",
    "LLM": "api.llm",
    "Perplexity": "api.perplexity",
    "PromptLogprobs": "api.prompt_logprobs",
    "QueueFull": "engine.thread",
    "RECOMMENDED": "sampling.params",
    "RECOMMENDED_THINKING": "sampling.params",
    "RequestOutput": "api.outputs",
    "SYSTEM_PROMPT": "api.prompts",
    "SamplingParams": "sampling.params",
    "THINKING_SYSTEM_PROMPT": "api.prompts",
    "ToolCall": "tools.calls",
    "ToolCallDelta": "tools.calls",
    "run_tools": "api.run_tools",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'internlm3' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(f".runtime.{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
