"""Predict the time of a decode step of InternLM3-8B on a GPU that is not present.

    python -m bench.step_model [--device H100 ...] [--batch N ...] [--context N ...] [--record FILE] [--launches]
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from .machine_code.targets import TARGETS
from .record import load
from .simulation import Gpu, ends
from .step_launches import LAYERS, StepLaunch

SIMULATED = 3

H200 = Gpu(read=4.76e6, l2=5.5e6, port=0.11e6, issued=3.0 * 1980, issued_by_warp=0.4 * 1980, trip=0.6, start=0.2, release=0.75, barrier=0.04, tail=0.2, scattered=1.10)


def microseconds(launches: Sequence[StepLaunch], gpu: Gpu) -> list[float]:
    layer = [x for x in launches if x.per_layer]
    first = next(i for i, x in enumerate(launches) if x.per_layer)
    chain = [*launches[:first], *layer * SIMULATED, *launches[first + len(layer):]]
    end = ends([x.programs for x in chain], gpu, TARGETS["sm_90"])
    times = [e - b for b, e in zip([0.0, *end], end)]
    middle = first + len(layer)
    return [*times[:first], *times[middle: middle + len(layer)], *times[first + SIMULATED * len(layer):]], end[-1] + (LAYERS - SIMULATED) * sum(times[middle: middle + len(layer)])
