"""The logits of a run through `generate` of transformers' interface, by this runtime or by transformers itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checkpoint import PLACES, WINDOW, token_ids


def generated(model: Any, run: str, places: Sequence[int] = PLACES) -> Tensor:
    """Logits [len(places), VOCAB], float32 on the CPU.

    "prompts": a prompt for each place, which ends there. Otherwise a prompt of WINDOW tokens, after which each token of
    the sequence is forced; places before its last are prompts of their own, which have the same base.
    """
    ids = torch.tensor([token_ids()], device=model.device)
    rows = {}
    for place in places:
        if run == "prompts" or place < WINDOW - 1:
            rows[place] = _steps(model, ids[:, : place + 1], place + 1)[0]
    if len(rows) < len(places):
        steps = _steps(model, ids[:, : max(places) + 1], WINDOW)
        rows |= {place: steps[place + 1 - WINDOW] for place in places if place not in rows}
    return torch.stack([rows[place] for place in places])


def _steps(model: Any, ids: Tensor, prompt: int) -> list[Tensor]:
    """The logits after the first `prompt` ids, and after each further one."""

    def force(seen: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, ids[0, min(seen.shape[1], ids.shape[1] - 1)]] = 0
        return forced

    kept = model.generate(
        ids[:, :prompt], attention_mask=torch.ones_like(ids[:, :prompt]), do_sample=False,
        max_new_tokens=ids.shape[1] - prompt + 1, logits_processor=[force], return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    return [logits[0].float().cpu() for logits in kept.logits]
