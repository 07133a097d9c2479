"""What an op must do at least: the bytes that it moves, and the operations of its products."""

from typing import Any

from cases import Arguments
from torch import Tensor


def nbytes(*values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def moved(op: str, arguments: Arguments, result: Any) -> int:
    """Bytes that the op must read and write: its arguments and results once, of tables and caches what it touches."""
    results = result if isinstance(result, tuple) else (result,)
    touched = dict(arguments)
    total = nbytes(*results)
    if op == "embed":
        del touched["table"]
        total *= 2
    elif op in ("rope_and_cache", "rms_norm_qkv_rope_cache"):
        cache = touched.pop("k_cache")
        del touched["v_cache"]
        tokens = touched["qkv" if op == "rope_and_cache" else "x"].shape[0]
        total += 2 * tokens * cache.shape[1] * cache.shape[3] * cache.element_size()
    elif op == "advance":
        for table in ("end_mask", "output_counts", "permitted", "allowed"):
            del touched[table]  # a word each
    return total + nbytes(*touched.values())


def operations(op: str, arguments: Arguments) -> int:
    """Multiplications and additions of the op's matrix products; those beside them never bind."""
    if op == "paged_attention":
        rows, heads, dim = arguments["q"].shape
        context, sequences = int(arguments["seq_lens"][0]), arguments["seq_lens"].numel()
        tokens = rows // sequences
        # The last token sees all that is held, each before it one less.
        seen = sequences * (tokens * context - tokens * (tokens - 1) // 2)
        return 4 * heads * dim * seen
    if "weight" in arguments and arguments["weight"].dim() == 2:
        return 2 * arguments["x"].shape[0] * arguments["weight"].numel()
    return 0
