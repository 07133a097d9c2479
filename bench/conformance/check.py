"""A runtime's logits against the expected ones: the error at every place, and the fault that explains it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from .checkpoint import PLACES, VOCAB, WINDOW
from .runs import FAULTS

DATA = Path(__file__).parent / "data"
# What a right runtime stays within, by the dtype it computes in; bench/README.md has what some reached.
ALLOWED = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}


class Report(NamedTuple):
    """errors: at every place. wrong: the places beyond `allowed`. why: what explains them, or where to look."""

    allowed: float
    errors: dict[int, float]
    wrong: list[int]
    why: str

    def lines(self) -> Iterator[str]:
        yield f"{'place':>6} {'error':>9} {'allowed':>9}"
        for place, error in self.errors.items():
            yield f"{place:6} {error:9.1e} {self.allowed:9.1e}{'  WRONG' if place in self.wrong else ''}"
        if self.wrong:
            yield f"first wrong at place {self.wrong[0]}: {self.why}"


def expected(run: str) -> dict[str, Tensor]:
    """Logits [len(PLACES), VOCAB] by name: "right" is float64; "transformers", except for "decode", and faults."""
    tensors = {tuple(name.split("/")): rows for name, rows in load_file(DATA / "expected.safetensors").items()}
    return {name: rows for (own, name), rows in tensors.items() if own == run}


def errors(found: Tensor, right: Tensor) -> Tensor:
    """|found - right| / |right| of every row, both less their mean: log-probabilities have the errors of logits."""
    found, right = (x.double() - x.double().mean(-1, keepdim=True) for x in (found, right))
    return (found - right).norm(dim=-1) / right.norm(dim=-1)


def check(found: Tensor, run: str, dtype: str) -> Report:
    """Compares logits [len(PLACES), VOCAB] of a runtime that computes in `dtype` with those of a run."""
    allowed, known = ALLOWED[dtype], expected(run)
    off = dict(zip(PLACES, errors(found, known["right"]).tolist(), strict=True))
    wrong = [place for place, error in off.items() if error > allowed]
    faults = {name: errors(found, rows).max().item() for name, rows in known.items() if name in FAULTS}
    return Report(allowed, off, wrong, _why(faults, allowed, wrong[0]) if wrong else "")


def _why(faults: dict[str, float], allowed: float, first: int) -> str:
    """A sentence about logits that are wrong from place `first` on, and `faults` off from those of each fault."""
    nearest = min(faults, key=faults.__getitem__)
    if faults[nearest] <= allowed:
        return f"{FAULTS[nearest].sentence} (within {faults[nearest]:.1e} of that at every place)"
    if first == 0:
        return "no known fault. One token alone is wrong, so look at weights, norms, MLP and head, not at positions"
    if first < WINDOW:
        return "no known fault. Look at attention: rotation, mask, scale, which heads share keys, cached pages"
    return "no known fault. All is right within the trained window, so look at dynamic NTK and at what decoding caches"


def read(path: Path, dtype: str) -> Tensor:
    """The logits in a file, checked.

    Raises:
        ValueError: it is not a .npy or .json file of len(PLACES) rows of VOCAB finite numbers; or they are float16,
            which may be off by more than a runtime that computes in float32.
    """
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            values = np.array(json.loads(path.read_text("utf-8")), dtype=np.float64)
        else:
            raise ValueError("its name must end in .npy or .json")
        if values.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"its numbers are {values.dtype}, and must be float16, float32 or float64")
        if values.dtype == np.float16 and dtype == "float32":
            raise ValueError("its numbers are float16, too coarse for float32: write them as float32, or give --dtype")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no file of logits: {error}") from error
    if values.shape != (len(PLACES), VOCAB):
        raise ValueError(
            f"{path} has shape {list(values.shape)}, and must have [{len(PLACES)}, {VOCAB}]: the logits of all "
            f"{VOCAB} tokens at places {', '.join(map(str, PLACES))}"
        )
    for row, token in np.argwhere(~np.isfinite(values))[:1]:
        raise ValueError(f"{path} has {values[row, token]} at place {PLACES[row]}, token {token}: logits are finite")
    return torch.from_numpy(values.astype(np.float64))
