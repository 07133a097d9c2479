"""What the models' calls return. Fields are read as in transformers: by attribute, by name, or by index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from .cache import KVCache


class Output(Mapping[str, Any]):
    """Base of a dataclass that is a mapping from the names of its fields; a field that is None is missing.

    Also read by an index or a slice, as the tuple of what is there.
    """

    order: ClassVar[tuple[str, ...]]  # the fields in transformers' order

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.order if getattr(self, name) is not None)

    def __len__(self) -> int:
        return len(self.to_tuple())

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"{type(self).__name__} has {', '.join(self)}, and no {key!r}")
        return getattr(self, key)

    def get(self, name: Any, default: Any = None) -> Any:
        return dict(self).get(name, default)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self)


@dataclass(eq=False)
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


@dataclass(eq=False)
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


@dataclass(eq=False)
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
