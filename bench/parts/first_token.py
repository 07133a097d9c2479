"""Time to first token: of a prompt, with its share of the matmul ceiling, and of a process from its start.

A start is broken down into imports, the model's weights, compiling and capturing one step, and the first answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from internlm3 import InternLM3ForCausalLM
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.request import Request
from internlm3.runtime.sampling.params import SamplingParams

from .. import ROOT
from ..record import Part, Row
from ..timing import name_of
from .bare_step import random_model


def rows(small: bool, name: str) -> Iterator[Row]:
    part = Part("first_token")
    model = random_model(small, name)
    weights = sum(weight.numel() for weight in model.model.layers.parameters())
    # 700: one whole chunk, and a short one after it.
    for tokens in (8, 24) if small else (16, 128, 512, 700, 1024, 2048, 8192):
        times = prompt_times(model, tokens, 2 if small else 10)
        config = model.config
        flops = 2 * tokens * weights  # plus attention: each token attends to half of the prompt on average
        flops += 2 * tokens**2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        about: dict[str, Any] = {"engine": "internlm3", "tokens": tokens, "dtype": name_of(model.dtype)}
        yield part.figure(f"{tokens} tokens", times, "ms", **about, bytes=0, flops=flops)
    del model
    if not small:
        torch.cuda.empty_cache()
    for run in ("first", "second"):  # the second finds every kernel compiled
        command = [sys.executable, "-m", __name__, "small" if small else "whole", name, str(time.monotonic())]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            yield part.check(f"process start, {run} run", f"exit code {done.returncode}: {last[0] if last else ''}")
            continue
        for stage, seconds in json.loads(done.stdout.splitlines()[-1]).items():
            yield part.figure(f"process start, {run} run: {stage}", [seconds], "s", start=run)


def prompt_times(model: InternLM3ForCausalLM, tokens: int, rounds: int) -> list[float]:
    """Milliseconds from a request to its first token; each request has a new prompt."""
    engine, times = Engine(model, max_batch_size=1, max_seq_len=tokens + 1), []
    for _ in range(rounds + 1):
        request = Request(torch.randint(1, model.config.vocab_size, (tokens,)).tolist(), SamplingParams(), 1)
        begin = time.perf_counter()
        engine.add([request])
        while engine.busy:
            engine.step()
        times.append((time.perf_counter() - begin) * 1e3)
    return times[1:]


def start(small: bool, name: str, begin: float) -> None:
    """Runs in a new process: prints the seconds of each stage. begin: `time.monotonic` before the process started."""
    stages: dict[str, float] = {}

    def done(stage: str) -> None:
        nonlocal begin
        if not small:
            torch.cuda.synchronize()
        now = time.monotonic()
        stages[stage], begin = now - begin, now

    done("interpreter and imports")
    model = random_model(small, name)
    done("random weights")
    engine = Engine(model, max_batch_size=1, max_seq_len=64 if small else 2048)
    done("pages and state")
    for stage in ("first request: compiles, captures, answers", "second request"):
        request = Request([5, 6, 7], SamplingParams(temperature=0), 8)
        engine.add([request])
        while engine.busy:
            engine.step()
        done(stage)
    print(json.dumps(stages))


if __name__ == "__main__":
    start(sys.argv[1] == "small", sys.argv[2], float(sys.argv[3]))
