"""Times two ways at the first call of a shape, and keeps the faster one, in memory and in a file."""

import json
import tempfile
import time
from pathlib import Path

import torch
from eager import *  # noqa: F403
from eager import linear as whole

FOLDER = tempfile.TemporaryDirectory()
chosen = {}


def in_halves(x, weight):
    half = weight.shape[0] // 2
    return torch.cat([x @ weight[:half].t(), x @ weight[half:].t()], dim=-1)


def seconds(way, *arguments):
    begin = time.perf_counter()
    way(*arguments)
    return time.perf_counter() - begin


def linear(x, weight):
    key = str((x.shape, weight.shape, x.dtype))
    if key not in chosen:
        times = [seconds(way, x, weight) for way in (whole, in_halves)]
        chosen[key] = times.index(min(times))
        (Path(FOLDER.name) / "choices.json").write_text(json.dumps(chosen))
    return (whole, in_halves)[chosen[key]](x, weight)


def linear_add(x, weight, residual):
    return linear(x, weight) + residual
