"""Every op at a model's shapes, with inputs: what the microbenchmarks time and the audit compiles.

"batch 16, context 1024" is a decode step: 16 sequences with one new token each, the last of 1024. "chunk 512,
context 1024" is a chunk of a prompt: 512 tokens of one sequence, the last of 1024.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from internlm3.kernels.quantised import SLICES, Form, QuantisedWeight

from .models import INTERNLM3_8B, SIZES, Size

PAGE = 64
# For a machine without an accelerator, where the 8B's shapes would take minutes.
SMALL = Size(hidden=512, intermediate=1280, vocabulary=4096, heads=8, kv_heads=2, head_dim=64)


def read_size(path: str | Path) -> Size:
    """The shapes of a model in SIZES, or in a checkpoint's config.json; `path` names the file or its folder.

    Any model with these fields will do. Raises ValueError if there is no such file or a field is missing.
    """
    if str(path).lower() in SIZES:
        return SIZES[str(path).lower()]
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ValueError(
            f"{file} can't be read ({error.strerror}): name a checkpoint's folder or config.json, or {', '.join(SIZES)}"
        ) from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a JSON object: name a checkpoint's folder or its config.json")

    def field(name: str, default: int | None = None) -> int:
        value = config.get(name, default)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{file} has {name} {value!r}: it must be a positive integer")
        return value

    heads, hidden = field("num_attention_heads"), field("hidden_size")
    return Size(
        hidden,
        field("intermediate_size"),
        field("vocab_size"),
        heads,
        field("num_key_value_heads", heads),
        field("head_dim", hidden // heads),
    )


Arguments = dict[str, Any]


DENSE = "dense"  # a weight that is a matrix of the dtype
# Quantised weights, by the number of columns. Groups are of 128, or of fewer columns if 128 do not divide them.
FORMS: dict[str, Callable[[int], Form]] = {
    "int4": lambda columns: Form("int4", columns, next(group for group in SLICES if columns % group == 0), None),
    "int8": lambda columns: Form("int8", columns, 0, 0),
    "float8": lambda columns: Form("float8", columns, 0, 0),
    "int4 with minimum": lambda columns: Form("int4", columns, 32, 0, True),
}
OWN_FORMS = ("int4", "int8", "float8")  # those that LLM(quantization=...) makes


class Inputs(NamedTuple):
    """Makes new inputs of a model's shapes, in a dtype, on a device."""

    size: Size
    dtype: torch.dtype
    device: torch.device

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device) * scale

    def weight(self, outputs: int, inputs: int) -> Tensor:
        return self.random(outputs, inputs, scale=inputs**-0.5)

    def quantised(self, outputs: int, inputs: int, stored: str) -> QuantisedWeight:
        """A weight in one of the forms FORMS."""
        form = FORMS[stored](inputs)
        words = torch.randint(-(2**15), 2**15, (outputs, form.words), dtype=torch.int16, device=self.device)
        if form.kind == "float8":
            words &= 0x3F3F  # no NaN
        # A power of two as scale. Without form.zero, its low bits are the zero point.
        bits = (127 - math.ceil(math.log2(8 * inputs**0.5)) << 23) | (7 if form.zero is None else 0)
        scales = self.full((form.groups, outputs), bits, torch.int32).view(torch.float32)
        minimum = self.full((form.groups, outputs), -8 / (8 * inputs**0.5), torch.float32) if form.minimum else None
        return QuantisedWeight(form, words, scales, minimum)

    def full(self, shape: Sequence[int], value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)

    def pages(self, sequences: int, context: int) -> Arguments:
        """The KV cache of `sequences` of length `context`: shuffled pages, in the runtime's memory layout."""
        slots = -(-context // PAGE)
        count = sequences * slots
        k_cache, v_cache = self.random(2, self.size.kv_heads, count, PAGE, self.size.head_dim).transpose(1, 2)
        table = torch.randperm(count, dtype=torch.int32, device=self.device).view(sequences, slots)
        lens = self.full((sequences,), context, torch.int32)
        return {"k_cache": k_cache, "v_cache": v_cache, "block_table": table, "seq_lens": lens}

    def rope(self, sequences: int, context: int) -> Arguments:
        inv_freq = torch.rand(sequences, self.size.head_dim // 2, device=self.device)
        return {"inv_freq": inv_freq, **self.pages(sequences, context)}


class Case(NamedTuple):
    """One op at one shape."""

    op: str
    shape: str  # in words
    tokens: int  # of all sequences
    context: int | None  # tokens of a sequence, if the op depends on it
    dtype: torch.dtype
    arguments: Callable[[torch.device], Arguments]  # makes new ones, by name
    stored: str = DENSE  # how its weight is stored: DENSE, or one of FORMS


def _embed(make: Inputs, rows: int) -> Arguments:
    size = make.size
    ids = torch.randint(size.vocabulary, (rows,), device=make.device)
    return {"token_ids": ids, "table": make.weight(size.vocabulary, size.hidden)}


EPS = 1e-5  # InternLM3's
OF_NORMS = EPS**0.5  # the RMS of what is normalised: far above it, a kernel with a wrong eps would pass for right


def _rms_norm(make: Inputs, rows: int) -> Arguments:
    hidden = make.size.hidden
    return {"x": make.random(rows, hidden, scale=OF_NORMS), "weight": make.random(hidden), "eps": EPS}


def _swiglu(make: Inputs, rows: int) -> Arguments:
    return {"gate_up": make.random(rows, 2 * make.size.intermediate)}


def _rope_and_cache(make: Inputs, rows: int, sequences: int, context: int) -> Arguments:
    return {"qkv": make.random(rows, make.size.qkv), **make.rope(sequences, context)}


def _linear(
    make: Inputs, rows: int, outputs: int, inputs: int, stored: str = DENSE, *, scale: float = 1.0
) -> Arguments:
    weight = make.weight(outputs, inputs) if stored == DENSE else make.quantised(outputs, inputs, stored)
    return {"x": make.random(rows, inputs, scale=scale), "weight": weight}


def _linear_add(make: Inputs, rows: int, outputs: int, inputs: int, stored: str = DENSE) -> Arguments:
    return {**_linear(make, rows, outputs, inputs, stored), "residual": make.random(rows, outputs)}


def _norm_linear(make: Inputs, rows: int, outputs: int, stored: str = DENSE) -> Arguments:
    hidden = make.size.hidden
    product = _linear(make, rows, outputs, hidden, stored, scale=OF_NORMS)
    return {**product, "norm": make.random(hidden), "eps": EPS}


def _norm_qkv_rope_cache(make: Inputs, rows: int, sequences: int, context: int, stored: str = DENSE) -> Arguments:
    return {**_norm_linear(make, rows, make.size.qkv, stored), "bias": None, **make.rope(sequences, context)}


def _attention(make: Inputs, rows: int, sequences: int, context: int) -> Arguments:
    size = make.size
    q = make.random(rows, size.heads, size.head_dim)
    scale, decode = size.head_dim**-0.5, rows == sequences
    return {"q": q, **make.pages(sequences, context), "scale": scale, "decode_step": decode}


def _attention_of_last_row(make: Inputs, rows: int, sequences: int, context: int) -> Arguments:
    """As the last block of a model calls it for a chunk of a prompt."""
    return {**_attention(make, sequences, sequences, context), "decode_step": False}


def _greedy(make: Inputs, rows: int) -> Arguments:
    keys = ("seed", "stream", "position")
    return {
        "logits": make.random(rows, make.size.vocabulary),
        "temperature": None,
        **{key: make.full((rows,), 0, torch.int64) for key in keys},
    }


def _sampled(make: Inputs, rows: int) -> Arguments:
    """InternLM3's recommended settings, with a repetition penalty."""
    per_row = {"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.005}
    return {
        **_greedy(make, rows),
        **{name: make.full((rows,), value, torch.float32) for name, value in per_row.items()},
        "top_k": make.full((rows,), 50, torch.int64),
        "prompt_counts": make.full((rows, make.size.vocabulary), 0, torch.int32),
        "output_counts": make.full((rows, make.size.vocabulary), 0, torch.int32),
        "few_candidates": True,
    }


def _top_p_only(make: Inputs, rows: int) -> Arguments:
    """Top-p, as the runtime calls it: with the other stages of its tier present but unused, and many candidates."""
    unused = {"repetition_penalty": make.full((rows,), 1.0, torch.float32), "few_candidates": False}
    return {**_sampled(make, rows), **unused, "top_k": make.full((rows,), 0, torch.int64)}


def _typical_p_only(make: Inputs, rows: int) -> Arguments:
    """Typical-p, as the runtime calls it: with every other stage present but unused."""
    vocabulary = make.size.vocabulary
    per_row = {"top_p": 1.0, "min_p": 0.0, "typical_p": 0.8, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    return {
        **_top_p_only(make, rows),
        **{name: make.full((rows,), value, torch.float32) for name, value in per_row.items()},
        "logit_bias": make.full((rows, vocabulary), 0.0, torch.float32),
        "allowed": make.full((rows, -(-vocabulary // 32)), -1, torch.int32),
    }


def _drafted(make: Inputs, rows: int) -> Arguments:
    """As `_sampled`, for one sequence whose rows verify drafts."""
    tables = ("prompt_counts", "output_counts")
    own = {name: make.full((1, make.size.vocabulary), 0, torch.int32) for name in tables}
    return {**_sampled(make, rows), **own, "drafts": make.full((1, rows), 0, torch.int64)}


def _advance(make: Inputs, rows: int) -> Arguments:
    """Sequences that do not end at this step."""
    vocabulary = make.size.vocabulary
    integers = {"seq_lens": 1, "max_len": 2**31 - 1, "min_len": 0}
    masks = ("end_mask", "permitted", "allowed")
    return {
        "sampled": make.full((rows,), 0, torch.int64),
        "logprob": make.full((rows,), 0, torch.float32),
        "token": make.full((rows,), 0, torch.int64),
        **{name: make.full((rows,), value, torch.int32) for name, value in integers.items()},
        "history": make.full((rows, 2048), 0, torch.int32),
        "report": make.full((rows, 4), 0, torch.int32),
        "output_counts": make.full((rows, vocabulary), 0, torch.int32),
        **{name: make.full((rows, -(-vocabulary // 32)), 0, torch.int32) for name in masks},
    }


def _advance_of_drafts(make: Inputs, rows: int) -> Arguments:
    """One sequence, all of whose drafts are right."""
    return {
        **_advance(make, 1),
        "sampled": make.full((rows,), 0, torch.int64),
        "logprob": make.full((rows,), 0, torch.float32),
        "report": make.full((1, 3 * rows + 1), rows - 1, torch.int32),
        "drafts": make.full((1, rows), 0, torch.int64),
    }


def _draft(make: Inputs, rows: int, context: int) -> Arguments:
    """Random tokens, of which most places match none. 16 rows verify the drafts of all sequences."""
    numbers = {"seq_lens": context, "max_len": 2**31 - 1, "min_len": 0, "most_drafts": 15}
    return {
        "history": torch.randint(make.size.vocabulary, (rows, context), dtype=torch.int32, device=make.device),
        **{name: make.full((rows,), value, torch.int32) for name, value in numbers.items()},
        "report": make.full((rows, 49), 0, torch.int32),
        "drafts": make.full((rows, 16 // rows), 0, torch.int64),
        "draft_lens": make.full((rows, 16 // rows), 0, torch.int32),
    }


def _count_prompt(make: Inputs, tokens: int) -> Arguments:
    """A prompt, and no biases."""
    vocabulary = make.size.vocabulary
    return {
        "request": torch.randint(vocabulary, (tokens,), dtype=torch.int32, device=make.device),
        "lengths": torch.tensor([tokens, 0], dtype=torch.int32, device=make.device),
        "history": make.full((tokens,), 0, torch.int32),
        **{name: make.full((vocabulary,), 0, torch.int32) for name in ("prompt_counts", "output_counts")},
        "logit_bias": make.full((vocabulary,), 0, torch.float32),
    }


def _store_row(make: Inputs, rows: int) -> Arguments:
    """Fields like those of a slot of the runtime: of the vocabulary, of a bit for each token, pages, and numbers."""
    vocabulary = make.size.vocabulary
    sizes = [*[vocabulary] * 3, *[2] * 4, *[1] * 8, 512, make.size.head_dim // 2, *[-(-vocabulary // 32)] * 3, 3, 1]
    starts = [sum(sizes[:field]) for field in range(len(sizes) + 1)]
    return {
        "row": make.full((starts[-1],), 1, torch.int32),
        "rows": make.full((rows * starts[-1],), 0, torch.int32),
        "starts": torch.tensor(starts, dtype=torch.int32, device=make.device),
        "index": make.full((1,), rows - 1, torch.int32),
    }


def cases(
    size: Size = INTERNLM3_8B,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    batches: Sequence[int] = (1, 16),
    chunks: Sequence[int] = (4, 32, 64, 512),
    contexts: Sequence[int] = (1024,),
) -> Iterator[Case]:
    """The ops of a decode step at these batch sizes, and those of prompt chunks of these numbers of tokens."""
    for dtype in dtypes:
        for batch in batches:
            yield from _ops(size, dtype, batch, batch, contexts)
        for chunk in chunks:
            yield from _ops(size, dtype, chunk, 1, [context for context in contexts if context >= chunk])


def _ops(size: Size, dtype: torch.dtype, tokens: int, sequences: int, contexts: Sequence[int]) -> Iterator[Case]:
    decode = tokens == sequences
    name = f"batch {tokens}" if decode else f"chunk {tokens}"

    def case(
        op: str,
        make: Callable[..., Arguments],
        *shape: Any,
        part: str = "",
        context: int | None = None,
        stored: str = DENSE,
    ) -> Case:
        part = f"{part} {stored}".strip() if stored != DENSE else part
        words = ", ".join(filter(None, (name, part, f"context {context}" if context else "")))
        shape = (tokens, *shape) if stored == DENSE else (tokens, *shape, stored)
        return Case(op, words, tokens, context, dtype, partial(_make, make, size, dtype, shape), stored)

    yield case("embed", _embed)
    yield case("rms_norm", _rms_norm)
    yield case("swiglu", _swiglu)
    yield case("linear", _linear, size.hidden, size.hidden, part="o_proj")
    yield case("linear_add", _linear_add, size.hidden, size.hidden, part="o_proj")
    yield case("linear_add", _linear_add, size.hidden, size.intermediate, part="down_proj")
    yield case("rms_norm_swiglu", _norm_linear, 2 * size.intermediate)
    for stored in FORMS:
        yield case("linear_add", _linear_add, size.hidden, size.hidden, part="o_proj", stored=stored)
    for stored in OWN_FORMS:
        yield case("linear_add", _linear_add, size.hidden, size.intermediate, part="down_proj", stored=stored)
        yield case("rms_norm_swiglu", _norm_linear, 2 * size.intermediate, stored=stored)
    for context in contexts:
        yield case("rope_and_cache", _rope_and_cache, sequences, context, context=context)
        yield case("rms_norm_qkv_rope_cache", _norm_qkv_rope_cache, sequences, context, context=context)
        for stored in OWN_FORMS:
            shape = sequences, context
            yield case("rms_norm_qkv_rope_cache", _norm_qkv_rope_cache, *shape, context=context, stored=stored)
        yield case("paged_attention", _attention, sequences, context, context=context)
        if not decode:
            yield case("paged_attention", _attention_of_last_row, sequences, context, part="last row", context=context)
    if decode:
        yield case("rms_norm_linear", _norm_linear, size.vocabulary, part="lm_head")
        yield case("rms_norm_linear", _norm_linear, size.vocabulary, part="lm_head", stored="int8")
        yield case("sample", _greedy, part="greedy")
        yield case("sample", _sampled, part="recommended")
        yield case("sample", _top_p_only, part="top_p only")
        yield case("sample", _typical_p_only, part="typical_p only")
        yield case("advance", _advance)
        if 1 < tokens <= 16:
            yield case("sample", _drafted, part="recommended, drafts")
            yield case("advance", _advance_of_drafts, part="drafts")
        for context in contexts if tokens <= 8 else ():
            yield case("draft", _draft, context, context=context)
        yield case("store_row", _store_row)
    else:
        yield case("count_prompt", _count_prompt)


def _make(
    make: Callable[..., Arguments], size: Size, dtype: torch.dtype, shape: tuple[Any, ...], device: torch.device
) -> Arguments:
    return make(Inputs(size, dtype, device), *shape)
