"""E5: products by their number of rows, which decide the length of a prompt's chunks. E4: the kernels of a chunk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm3.kernels.triton.linear_few_rows import parts as parts_of
from internlm3.runtime.engine import prefill

from .. import candidates
from ..candidates.settings import Ring
from ..cases import Inputs
from ..parts.bare_step import Steps, random_model
from ..parts.launch_profile import launches_of
from ..record import Part, Row
from ..timing import Call, replayed, rounds_of

LEAST = 0.12  # the share by which longer chunks must be faster per token
MATRICES = 6  # of each shape, so that no cache has the next one
RING_PREDICTED = {128: "105 us for all four; cuBLAS 100 to 110"}  # by rows of x
# Of a kernel's name, by what it does. All others are products.
ATTENTION = ("_attend", "_combine")
ELEMENTWISE = ("_rms_norm", "_swiglu", "_rope_and_cache", "_embed", "elementwise")


def products(make: Inputs) -> dict[str, tuple[int, int]]:
    """By name, the outputs and inputs of a layer's four matrices."""
    size = make.size
    return {
        "qkv": (size.qkv, size.hidden),
        "o": (size.hidden, size.hidden),
        "gate_up": (2 * size.intermediate, size.hidden),
        "down": (size.hidden, size.intermediate),
    }


def times_of(calls: Sequence[Call], rounds: int) -> list[float]:
    """Microseconds of a call, over rounds of all calls: replays of one CUDA graph, on a CPU the calls themselves."""
    run = replayed(calls) if torch.cuda.is_available() else lambda: [call() for call in calls]
    return list(islice(rounds_of(run, len(calls)), rounds))


def products_by_rows(
    part: Part, make: Inputs, counts: Sequence[int], rounds: int, rings: Mapping[int, Ring]
) -> Iterator[Row]:
    """cuBLAS for each matrix by rows of x, and what longer chunks gain per token in all four.

    rings: how the candidate is launched, by the numbers of rows for which it is timed too.
    """
    per_token: dict[int, float] = defaultdict(float)
    for name, (outputs, inputs) in products(make).items():
        matrices = [make.weight(outputs, inputs) for _ in range(MATRICES)]
        for rows in counts:
            x = make.random(rows, inputs)
            times = times_of([partial(F.linear, x, w) for w in matrices], rounds)
            per_token[rows] += median(times) / rows
            rate = 2 * rows * outputs * inputs / median(times) / 1e6
            about = {"experiment": "E5", "tokens": rows, "op": name, "TFLOP/s": rate}
            yield part.figure(f"E5 cuBLAS, {name}, {rows} rows", times, "us", f"{rate:.0f} TFLOP/s", **about)
            if rows in rings:
                calls = [partial(_in_parts, x, w, rings[rows]) for w in matrices]
                gain = median(times) - median(ring_times := times_of(calls, rounds))
                decision = f"up to {rows} rows through the ring" if gain > 0 else f"cuBLAS from {rows} rows on"
                about |= {"gain": gain, "decision": decision, "predicted": RING_PREDICTED.get(rows, "no prediction")}
                yield part.figure(f"E5 ring, {name}, {rows} rows", ring_times, "us", decision, **about)
    # A launch of all matrices at the chunk's length of today, and at longer ones.
    chunk = min(prefill.CHUNK, max(counts))
    for rows in [rows for rows in counts if rows > chunk]:
        gain = 1 - per_token[rows] / per_token[chunk]
        decision = f"raise CHUNK to {rows}" if gain >= LEAST else f"CHUNK stays {chunk}: below {LEAST:.0%}"
        about = {"experiment": "E5", "tokens": rows, "gain": gain, "decision": decision, "predicted": "no prediction"}
        name = f"E5 cuBLAS per token, {rows} rows against {chunk}"
        yield part.figure(name, [100 * gain], "% faster", decision, **about)


def chunk_kernels(part: Part, small: bool, layers: int) -> Iterator[Row]:
    """The kernels of one chunk of a prompt after 0, 1536 and 7680 cached tokens, in microseconds of a layer."""
    model = random_model(small, layers=layers)
    chunk, cached_lengths = (16, (0, 48)) if small else (prefill.CHUNK, (0, 1536, 7680))
    steps = Steps(model, 1, max(cached_lengths) + chunk)
    ids = torch.randint(1, model.config.vocab_size, (max(cached_lengths) + chunk,), device=model.device)
    layers = model.config.num_hidden_layers
    predicted = {0: "attention 10 us a layer", 7680: "attention 73 us a layer"}
    for cached in cached_lengths:
        batch = steps.state.slots(0, 1).batch
        prompt = ids[: cached + chunk]

        def run() -> None:
            with torch.inference_mode():
                prefill.run_chunks(model, steps.kv_cache, batch, [prompt], [cached])  # noqa: B023 - called at once

        run()
        name = f"E4 a chunk of {chunk} tokens after {cached}"
        if small:
            yield part.missing(name, "needs a GPU's profiler", experiment="E4")
            continue
        about: dict[str, Any] = {"experiment": "E4", "tokens": chunk, "context": cached + chunk}
        about["predicted"] = f"{predicted.get(cached, 'no prediction')}; element-wise kernels 35 us a layer"
        added = kernel_times(run)
        of_kind = kinds(added)
        share = ", ".join(f"{kind} {time / layers:.1f}" for kind, time in of_kind.items())
        longer = "attention of chunks (C4)" if of_kind["attention"] > of_kind["element-wise"] else "fewer launches (C2)"
        decision = f"next: {longer}"
        total = sum(of_kind.values()) / layers
        yield part.figure(name, [total], "us", f"{share}; {decision}", decision=decision, **about)
        for kernel, times in sorted(added.items(), key=lambda item: -sum(item[1]))[:12]:
            note = f"{len(times) / layers:.2g} launches a layer"
            yield part.figure(f"{name}: {kernel[:80]}", [sum(times) / layers], "us", note, **about)


def _in_parts(x: Tensor, weight: Tensor, ring: Ring) -> Tensor:
    return candidates.for_device(x.device).partial_products(x, weight, parts_of(*weight.shape), ring)


def kinds(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The time of a chunk's kernels by what they do."""
    found = {"products": 0.0, "attention": 0.0, "element-wise": 0.0}
    for name, each in times.items():
        kind = "attention" if any(word in name for word in ATTENTION) else "products"
        found["element-wise" if any(word in name for word in ELEMENTWISE) else kind] += sum(each)
    return found


def kernel_times(run: Call) -> dict[str, list[float]]:
    """Microseconds of each kernel launch of run(), by kernel."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    times = defaultdict(list)
    for launch in launches_of(profile):
        times[launch["name"]].append(launch["dur"])
    return dict(times)
