"""One clear error for a token id that the model does not have."""

from collections.abc import Iterable


def check_ids(name: str, ids: Iterable[object], vocab_size: int) -> None:
    """Raises ValueError for the first of `ids` that is no integer in [0, vocab_size)."""
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(f"{name} holds {token!r}, which is outside the vocabulary of {vocab_size}")
