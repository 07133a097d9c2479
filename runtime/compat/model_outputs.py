"""What the models' calls return. Fields are read as in transformers: by attribute, by name, or by index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from .cache import KVCache


class Output:
    """Base of a dataclass whose fields that are None count as missing: in keys, indices and tuples."""

    order: ClassVar[tuple[str, ...]]  # the fields in transformers' order

    def keys(self) -> list[str]:
        return [name for name in self.order if getattr(self, name) is not None]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{type(self).__name__} has {', '.join(self.keys())}, and no {key!r}")
        return getattr(self, key)


@dataclass
class ModelOutput(Output):
    """What InternLM3Model returns.

    Attributes:
        last_hidden_state: [B, T, C], after the last norm.
        past_key_values: the cache, extended by the T tokens; None without use_cache.
        hidden_states: [B, T, C] each: the embeddings, then every block's output, the last one after the norm; None
            without output_hidden_states.
    """

    order = ("last_hidden_state", "past_key_values", "hidden_states")
    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput(Output):
    """What InternLM3ForCausalLM returns.

    Attributes:
        logits: [B, T, V] in the model's dtype; with logits_to_keep only those positions.
        loss: float32 scalar; None without labels.
        past_key_values, hidden_states: as in ModelOutput.
    """

    order = ("loss", "logits", "past_key_values", "hidden_states")
    logits: Tensor
    loss: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class GenerateOutput(Output):
    """What `generate` returns with return_dict_in_generate. N = B * num_return_sequences.

    Attributes:
        sequences: [N, T + longest answer], prompts and answers, padded with pad_token_id.
        scores: for each step [N, V] float32, what the token is drawn from: after penalties, temperature and filters.
            Rows that have ended are -inf. None without output_scores.
        logits: the same before all of these. None without output_logits.
        logprobs: [N, longest answer] float32, each chosen token's log-probability under the model's own softmax; 0
            after a row's end.
    """

    order = ("sequences", "scores", "logits", "logprobs")
    sequences: Tensor
    logprobs: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
