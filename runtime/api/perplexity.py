"""Perplexity: how well a model predicts a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ..common.progress import hides_bar
from ..model.kv_cache import PagedKVCache, pages_of
from ..model.model import LanguageModel
from .prompt_logits import prompt_logits


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts the tokens of a text.

    Attributes:
        value: exp(loss).
        loss: mean of -ln p(token | tokens before it), in nats.
        standard_error: of `value`, taking the tokens' losses as independent.
        predicted: the number of tokens that were predicted.
        window, stride: in tokens.
    """

    value: float
    loss: float
    standard_error: float
    predicted: int
    window: int
    stride: int


@torch.inference_mode()
def perplexity(model: LanguageModel, ids: list[int], window: int, stride: int, *, progress: bool) -> Perplexity:
    """The perplexity of a sequence by a sliding window, as transformers' documentation defines it.

    Windows of `window` tokens begin at 0, stride, 2 stride, ... Each predicts the tokens that no window before it
    contains, given those before them in the window. A token with none before it is not predicted: the first one, and
    with stride = window the first of every window. There are at least two tokens, and 1 <= stride <= window.
    """
    # Each window writes its keys and values before it reads them.
    kv_cache = PagedKVCache(model.config, pages_of(min(window, len(ids))), model.dtype, model.device)
    losses: list[Tensor] = []
    done = 1  # tokens before this one are predicted, or cannot be
    with tqdm(total=len(ids), unit="token", disable=hides_bar(progress)) as bar:
        for begin in range(0, len(ids), stride):
            end = min(begin + window, len(ids))
            with torch.autocast(model.device.type, enabled=False):
                for logits, tokens in prompt_logits(model, kv_cache, ids[begin:end], max(done - begin, 1)):
                    losses.append(cross_entropy(logits.float(), tokens, reduction="none").cpu())
            bar.update(end - bar.n)
            done = end
            if end == len(ids):
                break
    of_all = torch.cat(losses).double()
    loss = of_all.mean().item()
    error = (of_all.std() / math.sqrt(len(of_all))).item() if len(of_all) > 1 else math.nan
    return Perplexity(math.exp(loss), loss, math.exp(loss) * error, len(of_all), window, stride)
