"""Ours beside transformers on the stand-in model and this machine's CPU: decode, prefill and start-up, in one run.

    python bench/standin.py [--dtype bfloat16 float32] [--rounds 5] [--json FILE]

Each engine runs in a process of its own, in turns (A B A B ...), through the same call, `model.generate`, greedy, with
the same prompt. Start-up is from the start of the process to the first token, imports and loading included. Reported
are medians with their spread, and the median of the ratios pair by pair: a machine that drifts slows both of a pair.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time

PROMPT_TOKENS = 512
DECODE_TOKENS = 64
ENGINES = ("internlm3", "transformers")
FIGURES = {  # name -> (unit, whether more is better)
    "decode": ("tokens/s", True),
    "prefill": ("tokens/s", True),
    "start to first token": ("s", False),
}
QUESTION = "Give three reasons to read old books, and name one that you would begin with."


def worker(engine: str, folder: str, dtype: str, begun: float) -> dict[str, float]:
    """One engine's figures, measured in this process, which began at `begun` (seconds of time.time)."""
    import torch

    if engine == "internlm3":
        from internlm3 import InternLM3ForCausalLM as Model
        from internlm3 import InternLM3Tokenizer as Tokenizer

        options = {"progress": False}
    else:
        from transformers import AutoModelForCausalLM as Model
        from transformers import AutoTokenizer as Tokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        options = {}
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Model.from_pretrained(folder, dtype=dtype, **options)
    question = tokenizer(QUESTION, return_tensors="pt")

    def generate(ids: torch.Tensor, tokens: int) -> float:
        begin = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
        )
        return time.perf_counter() - begin

    generate(question["input_ids"], 1)
    first_token = time.time() - begun
    long = question["input_ids"].repeat(1, PROMPT_TOKENS)[:, :PROMPT_TOKENS]
    generate(long, 2)
    prefill = min(generate(long, 1) for _ in range(3))
    whole = min(generate(long, 1 + DECODE_TOKENS) for _ in range(3))
    return {
        "decode": DECODE_TOKENS / (whole - prefill),
        "prefill": PROMPT_TOKENS / prefill,
        "start to first token": first_token,
    }


def run_worker(engine: str, folder: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", engine, folder, dtype, repr(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{engine} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, str]:
    with open("/proc/cpuinfo") as lines:
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    return {"cpu": f"{name}, {os.cpu_count()} cores", "commit": commit.stdout.strip(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("--worker", nargs=4, metavar=("ENGINE", "FOLDER", "DTYPE", "BEGUN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        engine, folder, dtype, begun = args.worker
        print(json.dumps(worker(engine, folder, dtype, float(begun))))
        return

    from internlm3.runtime.standin import standin_checkpoint

    folder = str(standin_checkpoint())
    here = machine()
    print(f"SmolLM2-135M in InternLM3's format; {'; '.join(f'{key} {value}' for key, value in here.items())}")
    print(f"prompt {PROMPT_TOKENS} tokens, {DECODE_TOKENS} decoded, batch 1, greedy, median of {args.rounds} rounds\n")
    print("| dtype | figure | internlm3 | transformers | ratio, pair by pair |")
    print("|---|---|---|---|---|")
    results = {}
    for dtype in args.dtype:
        runs = results[dtype] = [
            {engine: run_worker(engine, folder, dtype) for engine in ENGINES} for _ in range(args.rounds)
        ]
        for figure, (unit, more_is_better) in FIGURES.items():
            ours, theirs = ([run[engine][figure] for run in runs] for engine in ENGINES)
            ratios = [a / b if more_is_better else b / a for a, b in zip(ours, theirs, strict=True)]
            cells = [f"{statistics.median(x):.3g} ({min(x):.3g} to {max(x):.3g}) {unit}" for x in (ours, theirs)]
            times = f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"| {dtype} | {figure} | {cells[0]} | {cells[1]} | {times} |", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": here, "rounds": results}, file, indent=1)


if __name__ == "__main__":
    main()
