"""Decode, prefill and start-up of the demo model on this machine's CPU, compared with transformers in the same run.

    python -m bench.demo_model [--dtype bfloat16 float32] [--prompt 128 512 2048 6000] [--batch 1 4 16]
                               [--before CHECKOUT] [--rounds 5] [--json FILE]

In each round every engine gets a new process. The engines take turns call by call (A B A B ...), through the same
call, `model.generate`, greedy, with the same prompts. Start-up is the time from the start of the process to the first
token, imports and loading included. Printed are medians with their spread, and the median and spread of the ratios of
each pair of rounds: a machine that drifts slows both of a pair.

`--before` compares with the folder of another checkout of this project as well.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

from . import tables
from .options import one_of, output, positive
from .record import Part, Record, Row, stamp
from .workers import Worker, serve

DECODE_TOKENS = 64
DTYPES = ("bfloat16", "float16", "float32")
START = "start to first token"
Figures = dict[str, float]
QUESTION = "Give three reasons to read old books, and name one that you would begin with."


def worker(engine: str, folder: str, dtype: str, begun: float) -> None:
    """Answers None with the seconds from `begun` (time.time), the start of the process, to the first token; and
    [prompt, batch, new tokens] with the seconds that this takes."""
    import torch

    tokenizer: Any
    model: Any
    if engine != "transformers":
        from internlm3 import InternLM3ForCausalLM, InternLM3Tokenizer

        tokenizer = InternLM3Tokenizer.from_pretrained(folder)
        model = InternLM3ForCausalLM.from_pretrained(folder, dtype=dtype, progress=False)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    question = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    firsts = itertools.count(100)

    def generate(ids: torch.Tensor, tokens: int) -> float:
        ids[:, 0] = next(firsts)  # a new first token each time: ours would take the rest from its prefix cache
        begin = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
        )
        return time.perf_counter() - begin

    generate(question.clone(), 1)
    start = time.time() - begun

    def answer(asked: tuple[int, int, int] | None) -> float:
        if asked is None:
            return start
        prompt, batch, tokens = asked
        # The prompts of a batch start at different places of the text, so no two are equal.
        text = question.repeat(1, prompt + batch)[0]
        return generate(torch.stack([text[row : row + prompt] for row in range(batch)]), tokens)

    serve(answer)


def one_round(engines: dict[str, str | None], folder: str, dtype: str, shapes: list[list[int]]) -> dict[str, Figures]:
    """The figures of each engine, by name. engines: name -> another checkout, or None."""
    found: dict[str, Figures] = {engine: {} for engine in engines}
    with contextlib.ExitStack() as stack:
        workers = {}
        for engine, checkout in engines.items():
            arguments = ("--worker", engine, folder, dtype, repr(time.time()))
            workers[engine] = stack.enter_context(Worker("bench.demo_model", *arguments, checkout=checkout))
            found[engine][START] = workers[engine].ask(None)

        def least(prompt: int, batch: int, tokens: int) -> dict[str, float]:
            """Seconds by engine: the faster of two calls, which the engines make in turns."""
            calls = [{name: each.ask((prompt, batch, tokens)) for name, each in workers.items()} for _ in range(2)]
            return {engine: min(seconds[engine] for seconds in calls) for engine in workers}

        for prompt, batch in shapes:
            for each in workers.values():
                each.ask((prompt, batch, 2))
            prefill, whole = (least(prompt, batch, tokens) for tokens in (1, 1 + DECODE_TOKENS))
            for engine, figures in found.items():
                figures[f"prefill, {batch} x {prompt}"] = batch * prompt / prefill[engine]
                figures[f"decode, {batch} x {prompt}"] = batch * DECODE_TOKENS / (whole[engine] - prefill[engine])
    return found


def compared(ours: Row, peer: Row) -> str:
    """A line of the table. Rounds are compared in pairs."""
    # A higher rate is faster, a higher time is slower.
    power = 1 if ours.unit == "tokens/s" else -1
    ratios = [(a / b) ** power for a, b in zip(ours.rounds, peer.rounds, strict=True)]
    cells = [f"{x.value:.3g} ({min(x.rounds):.3g} to {max(x.rounds):.3g}) {x.unit}" for x in (ours, peer)]
    times = f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
    dtype, figure = ours.about["dtype"], ours.about["figure"]
    return f"| {dtype} | {figure} | {cells[0]} | {peer.about['engine']} | {cells[1]} | {times} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", type=one_of("dtype", DTYPES), default=["bfloat16", "float32"])
    parser.add_argument("--prompt", nargs="+", type=positive, default=[512], help="tokens of a prompt")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1], help="batch sizes")
    parser.add_argument("--before", help="the folder of another checkout, compared with this one as transformers is")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", type=output, help="write the record: every round, the machine and the versions")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        engine, folder, dtype, begun = args.worker
        worker(engine, folder, dtype, float(begun))
        return

    if args.before and not os.path.exists(os.path.join(args.before, "runtime")):
        parser.error(f"--before {args.before} is not a checkout of this project: name its folder")
    from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint

    folder = str(demo_model_checkpoint())
    made, part, rows = stamp(), Part("demo_model"), []
    print(f"SmolLM2-135M in InternLM3's format; {'; '.join(f'{key} {value}' for key, value in made.items())}")
    print(f"{DECODE_TOKENS} tokens decoded, greedy, medians of {args.rounds} rounds; shapes are batch x prompt\n")
    print(tables.table(["dtype", "figure", "internlm3", "peer", "its figure", "ratio (in pairs)"], []), end="")
    shapes = [[prompt, batch] for prompt in args.prompt for batch in args.batch]
    engines = {"internlm3": None, "transformers": None, **({"before": args.before} if args.before else {})}
    for dtype in args.dtype:
        runs = [one_round(engines, folder, dtype, shapes) for _ in range(args.rounds)]
        for figure in runs[0]["internlm3"]:
            unit = "s" if figure == START else "tokens/s"
            ours, *others = (
                part.figure(
                    f"{dtype}, {figure}, {engine}", [run[engine][figure] for run in runs], unit,
                    engine=engine, dtype=dtype, figure=figure,
                )
                for engine in engines
            )  # fmt: skip
            rows += [ours, *others]
            for peer in others:
                print(compared(ours, peer), flush=True)
    if args.json:
        Record(made, rows).save(args.json)


if __name__ == "__main__":
    main()
