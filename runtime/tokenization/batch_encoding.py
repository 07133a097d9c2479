"""What a tokenizer returns, and how its rows are made to fit: frame, truncation, padding, tensors."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any


class BatchEncoding(dict[str, Any]):
    """`input_ids`, `attention_mask` (and `token_type_ids` if asked for), also readable as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this encoding holds {', '.join(self)}; it has no {name!r}") from None

    def to(self, device: Any) -> "BatchEncoding":
        """Moves every tensor to `device`, in place; returns itself."""
        for name, value in self.items():
            if not hasattr(value, "to"):
                raise TypeError(f"{name} is a list: only an encoding made with return_tensors='pt' can be moved")
            self[name] = value.to(device)
        return self


def check_side(name: str, side: Any) -> str:
    if side not in ("left", "right"):
        raise ValueError(f"{name} must be 'left' or 'right', not {side!r}")
    return side


def padding_strategy(padding: Any) -> str | None:
    return _choose("padding", padding, "do_not_pad", "longest", "max_length")


def truncation_strategy(truncation: Any) -> str | None:
    return _choose("truncation", truncation, "do_not_truncate", "longest_first", "only_first", "only_second")


def _choose(name: str, value: Any, off: str, default: str, *others: str) -> str | None:
    if value is True:
        return default
    if value in (False, None, off):
        return None
    if value != default and value not in others:
        raise ValueError(f"{name} must be True, False, or one of {', '.join((default, *others))}, not {value!r}")
    return value


def frame(
    first: list[int],
    second: list[int] | None,
    bos: list[int],
    eos: list[int],
    room: int,
    strategy: str | None,
    side: str,
) -> tuple[list[int], list[int]]:
    """One row, (input_ids, token_type_ids): bos + first + eos, then the same for `second` if there is one.

    With a truncation strategy the two are first shortened at `side`, to `room` tokens with the frame.
    """
    if strategy:
        framing = (len(bos) + len(eos)) * (1 if second is None else 2)
        first, second = _truncate(first, second, len(first) + len(second or ()) + framing - room, strategy, side)
    head, tail = bos + first + eos, [] if second is None else bos + second + eos
    return head + tail, [0] * len(head) + [1] * len(tail)


def _truncate(
    first: list[int], second: list[int] | None, excess: int, strategy: str, side: str
) -> tuple[list[int], list[int] | None]:
    """Removes `excess` ids. longest_first shortens the longer of the two until they are equal, then both by turns."""
    if excess <= 0:
        return first, second
    lengths = len(first), len(second or ())
    if strategy == "only_second":
        cuts = (0, excess)
    elif strategy == "only_first" or second is None:
        cuts = (excess, 0)
    else:
        uneven = min(abs(lengths[0] - lengths[1]), excess)
        even = excess - uneven
        cuts = (even // 2, even - even // 2)
        cuts = (cuts[0] + uneven, cuts[1]) if lengths[0] > lengths[1] else (cuts[0], cuts[1] + uneven)
    if cuts[0] > lengths[0] or cuts[1] > lengths[1]:
        raise ValueError(f"truncation={strategy!r} would have to remove {cuts} tokens from texts of {lengths}: "
                         "raise max_length")  # fmt: skip

    def cut(ids: list[int], count: int) -> list[int]:
        return ids[count:] if side == "left" else ids[: len(ids) - count]

    return cut(first, cuts[0]), None if second is None else cut(second, cuts[1])


def mask_of(spans: Sequence[tuple[int, int, int]], marked: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each of the spans (id, start, end) that has characters of a marked (start, end), else 0."""
    ends = [end for _, _, end in spans]
    mask = [0] * len(spans)
    for start, end in marked:
        first, last = bisect_right(ends, start), bisect_left(ends, end)
        for index in range(first, min(last + 1, len(mask)) if start < end else first):
            mask[index] = 1
    return mask


def pad(rows: Sequence[list[int]], length: int | None, value: int, side: str) -> list[list[int]]:
    """Fills every row with `value` up to `length` (None: up to the longest row); longer rows stay as they are."""
    if length is None:
        length = max(map(len, rows), default=0)
    fills = [[value] * (length - len(row)) for row in rows]
    return [fill + row if side == "left" else row + fill for row, fill in zip(rows, fills, strict=True)]


def to_tensor(rows: Sequence[list[int]]) -> Any:
    """int64 [rows, length]; rows of different lengths are an error."""
    import torch

    if len({len(row) for row in rows}) > 1:
        raise ValueError("return_tensors='pt' needs rows of one length: pass padding=True")
    return torch.tensor(rows, dtype=torch.long)
