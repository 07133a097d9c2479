"""What calling a tokenizer returns: rows with special tokens, truncated, padded, and as tensors if asked for."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.checks import as_ints, check_int
from ..common.shown import shown

NO_LIMIT = int(1e30)  # the model_max_length that a checkpoint writes for "no maximum length"


class BatchEncoding(dict[str, Any]):
    """`input_ids`, `attention_mask` (and `token_type_ids` if asked for), also available as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this encoding holds {', '.join(self)}; it has no {name!r}") from None

    def to(self, device: Any) -> "BatchEncoding":
        """Moves every tensor to `device`, in place, and returns itself."""
        for name, value in self.items():
            if not hasattr(value, "to"):
                raise TypeError(f"{name} is a list: only an encoding made with return_tensors='pt' can be moved")
            self[name] = value.to(device)
        return self


@dataclass(frozen=True)
class Batcher:
    """Makes a BatchEncoding of ids, with the settings of a tokenizer.

    Attributes:
        bos, eos: the ids to put before and after each text.
        pad_token_id: called when rows are padded; returns None if the tokenizer has no pad token.
        padding_side, truncation_side: "left" or "right".
        max_length: model_max_length, the default of the option `max_length`.
    """

    bos: list[int]
    eos: list[int]
    pad_token_id: Callable[[], int | None]
    padding_side: str
    truncation_side: str
    max_length: int

    def batch(
        self,
        encoded: Sequence[tuple[list[int], list[int] | None]],
        columns: Mapping[str, Sequence[list[int]]],
        single: bool,
        *,
        padding: bool | str,
        truncation: bool | str,
        max_length: int | None,
        return_tensors: str | None,
        padding_side: str | None = None,
        return_attention_mask: bool = True,
        return_token_type_ids: bool = False,
    ) -> BatchEncoding:
        """The encoding of texts, or pairs of texts, that are already ids. Options as in InternLM3Tokenizer.__call__.

        Args:
            encoded: (ids of the first text, ids of the second text or None) for each row.
            columns: further lists with one number for each id of a first text. They are truncated and padded (with 0)
                like the ids; with them, rows have no second text and no bos or eos.
            single: return one row instead of a list of rows.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors must be 'pt' or None, not {return_tensors!r}")
        pads = _choose("padding", padding, "do_not_pad", "longest", "max_length")
        cuts = _choose("truncation", truncation, "do_not_truncate", "longest_first", "only_first", "only_second")
        limit = self._limit(pads, cuts, max_length)
        side = check_side("padding_side", self.padding_side if padding_side is None else padding_side)
        fill = self._fill() if pads else {}
        rows = [_row(*texts, self.bos, self.eos, limit, cuts, self.truncation_side) for texts in encoded]
        output = {"input_ids": [ids for ids, _ in rows]}
        if return_token_type_ids:
            output["token_type_ids"] = [types for _, types in rows]
        if return_attention_mask:
            output["attention_mask"] = [[1] * len(ids) for ids, _ in rows]
        for name, column in columns.items():
            output[name] = [_row(row, None, [], [], limit, cuts, self.truncation_side)[0] for row in column]
        if pads:
            length = limit if pads == "max_length" else None
            output = {name: _pad(column, length, fill.get(name, 0), side) for name, column in output.items()}
        if return_tensors is not None:
            return BatchEncoding({name: _to_tensor(column, return_tensors) for name, column in output.items()})
        return BatchEncoding({name: column[0] for name, column in output.items()} if single else output)

    def pad(
        self,
        encoded: Any,
        *,
        padding: bool | str,
        max_length: int | None,
        multiple: int | None,
        padding_side: str | None,
        return_attention_mask: bool | None,
        return_tensors: str | None,
    ) -> BatchEncoding:
        """Pads rows that are encoded already. Options as in InternLM3Tokenizer.pad."""
        if isinstance(encoded, (list, tuple)) and encoded and isinstance(encoded[0], Mapping):
            encoded = {name: [row[name] for row in encoded] for name in encoded[0]}
        if not isinstance(encoded, Mapping) or "input_ids" not in encoded:
            raise ValueError("pad takes an encoding, or a list of them, with input_ids")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors must be 'pt', 'np' or None, not {return_tensors!r}")
        pads = _choose("padding", padding, "do_not_pad", "longest", "max_length")
        side = check_side("padding_side", self.padding_side if padding_side is None else padding_side)
        multiple = 1 if multiple is None else check_int("pad_to_multiple_of", multiple, 1)
        limit = self._limit(pads, None, max_length) if pads == "max_length" else 0
        return_tensors = return_tensors or _library(encoded["input_ids"])
        columns = {name: _as_lists(column) for name, column in encoded.items()}
        if not columns["input_ids"]:
            return BatchEncoding({**columns, **({"attention_mask": []} if return_attention_mask else {})})
        single = not isinstance(columns["input_ids"][0], list)
        if single:
            columns = {name: [column] for name, column in columns.items()}
        ids = columns["input_ids"]
        with_mask = return_attention_mask in (None, True)
        if with_mask:
            columns.setdefault("attention_mask", [[1] * len(row) for row in ids])
        if pads:
            length = -(-(limit or max(map(len, ids))) // multiple) * multiple
            fill = self._fill()
            if not with_mask:
                del fill["attention_mask"]
            for name in columns.keys() & fill.keys():
                columns[name] = _pad(columns[name], length, fill[name], side)
        if single:
            columns = {name: column[0] for name, column in columns.items()}
        if return_tensors is not None:
            columns = {name: _to_tensor(column, return_tensors) for name, column in columns.items()}
        return BatchEncoding(columns)

    def _fill(self) -> dict[str, int]:
        """What pads each column. Raises ValueError if the tokenizer has no pad token."""
        pad_token_id = self.pad_token_id()
        if pad_token_id is None:
            raise ValueError("padding needs a pad token and this tokenizer has none: set tokenizer.pad_token first")
        return {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}

    def _limit(self, padding: str | None, truncation: str | None, max_length: int | None) -> int:
        if max_length is None:
            if self.max_length >= NO_LIMIT and padding == "max_length":
                raise ValueError("padding='max_length' needs max_length: this tokenizer has no limit")
            return self.max_length
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length must be a whole number of at least 1, not {max_length!r}")
        if not truncation and padding != "max_length":
            raise ValueError("max_length does nothing without truncation=True or padding='max_length'")
        return max_length


def text_pairs(text: Any, text_pair: Any) -> list[tuple[str, str | None]]:
    """(text, its pair or None) for each row. Raises TypeError or ValueError for arguments of other kinds."""
    if isinstance(text, str):
        return [(text, text_pair)]
    if not isinstance(text, (list, tuple)):
        raise TypeError(f"text must be a string or a list of strings, not {type(text).__name__}")
    if text_pair is None:
        return [(first, None) for first in text]
    if not isinstance(text_pair, (list, tuple)) or len(text_pair) != len(text):
        raise ValueError("text_pair must be like text: a string with a string, a list with a list of its length")
    return list(zip(text, text_pair, strict=True))


def id_list(ids: Any) -> list[int]:
    """A list of Python integers from a list, a tensor, an array or one id. Raises TypeError or ValueError."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    numbers = as_ints(ids if isinstance(ids, Iterable) else [ids])
    if numbers is None:
        raise TypeError(
            f"ids must be whole numbers in one flat sequence (for several, use batch_decode), not {shown(ids)}"
        )
    if numbers and min(numbers) < 0:
        raise ValueError(f"an id cannot be negative: {min(numbers)}")
    return numbers


def span_mask(spans: Sequence[tuple[int, int, int]], marked: Sequence[tuple[int, int]]) -> list[int]:
    """For each token (id, start, end): 1 if it has characters in one of the `marked` (start, end), else 0."""
    ends = [end for _, _, end in spans]
    mask = [0] * len(spans)
    for start, end in marked:
        first, last = bisect_right(ends, start), bisect_left(ends, end)
        for index in range(first, min(last + 1, len(mask)) if start < end else first):
            mask[index] = 1
    return mask


def check_side(name: str, side: Any) -> str:
    """`side`. Raises ValueError unless it is "left" or "right"."""
    if side not in ("left", "right"):
        raise ValueError(f"{name} must be 'left' or 'right', not {side!r}")
    return side


def _choose(name: str, value: Any, off: str, default: str, *others: str) -> str | None:
    """The strategy that an option names: `default` for True, None for False, None and `off`."""
    if value is True:
        return default
    if value in (False, None, off):
        return None
    if value != default and value not in others:
        raise ValueError(f"{name} must be True, False, or one of {', '.join((default, *others))}, not {value!r}")
    return value


def _row(
    first: list[int],
    second: list[int] | None,
    bos: list[int],
    eos: list[int],
    limit: int,
    strategy: str | None,
    side: str,
) -> tuple[list[int], list[int]]:
    """One row as (input_ids, token_type_ids): bos + first + eos, then the same for `second` if there is one.

    With a truncation strategy the texts are shortened at `side` first, so that the row has at most `limit` tokens.
    """
    if strategy:
        special = (len(bos) + len(eos)) * (1 if second is None else 2)
        first, second = _truncate(first, second, len(first) + len(second or ()) + special - limit, strategy, side)
    head, tail = bos + first + eos, [] if second is None else bos + second + eos
    return head + tail, [0] * len(head) + [1] * len(tail)


def _truncate(
    first: list[int], second: list[int] | None, excess: int, strategy: str, side: str
) -> tuple[list[int], list[int] | None]:
    """Removes `excess` ids. longest_first shortens the longer text until both are equal, then both alternately."""
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


def _pad(rows: Sequence[list[int]], length: int | None, value: int, side: str) -> list[list[int]]:
    """Pads every row with `value` to `length` (None: the longest row); longer rows stay as they are."""
    if length is None:
        length = max(map(len, rows), default=0)
    padding = [[value] * (length - len(row)) for row in rows]
    return [fill + row if side == "left" else row + fill for row, fill in zip(rows, padding, strict=True)]


def _library(column: Any) -> str | None:
    """ "pt" for a tensor or a list of them, "np" for arrays, None for lists."""
    some = column if hasattr(column, "tolist") or len(column) == 0 else column[0]
    return None if not hasattr(some, "tolist") else "pt" if hasattr(some, "detach") else "np"


def _as_lists(column: Any) -> Any:
    """A tensor, an array or a list of them as (nested) lists; anything else as it is."""
    if hasattr(column, "tolist"):
        return column.tolist()
    return [_as_lists(row) for row in column] if isinstance(column, (list, tuple)) else column


def _to_tensor(column: Sequence[Any], library: str) -> Any:
    """A tensor ("pt") or an array ("np"): int64 of integers, float32 of floats.

    Raises ValueError for rows of different lengths.
    """
    import numpy as np  # here, as a tokenizer alone needs neither of the two

    lengths = {len(row) for row in column if isinstance(row, (list, tuple))}
    if len(lengths) > 1:
        raise ValueError(f"return_tensors={library!r} needs rows of one length: pass padding=True")
    array = np.array(column)
    array = array.astype(np.int64) if not array.size else array
    array = array.astype(np.float32) if array.dtype.kind == "f" else array
    if library == "np":
        return array
    import torch

    return torch.from_numpy(array)
