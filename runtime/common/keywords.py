"""One clear error for a misspelt keyword argument."""

import difflib
from collections.abc import Iterable, Mapping


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most similar to, or None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)), None)


def reject_unknown(
    where: str, given: Iterable[str], known: Iterable[str], counterparts: Mapping[str, str] | None = None
) -> None:
    """Raises TypeError for the first of `given` that is not in `known`.

    The message names its counterpart, what to write instead of another library's word, or the most similar known one.
    """
    known = [*known]
    for name in given:
        if name not in known:
            match = (counterparts or {}).get(name) or nearest(name, known)
            listed = f"known are {', '.join(known)}" if len(known) < 40 else "no known keyword is similar"
            raise TypeError(f"{where}: unknown keyword {name!r}; {f'did you mean {match!r}?' if match else listed}")
