"""Ours beside transformers on the stand-in model and this machine's CPU: decode, prefill and start-up, in one run.

    python bench/standin.py [--dtype bfloat16 float32] [--prompt 128 512 2048 6000] [--batch 1 4 16]
                            [--before CHECKOUT] [--rounds 5] [--json FILE]

Each engine has a process of its own, anew in each round. They take turns call by call (A B A B ...), through the same
call, `model.generate`, greedy, with the same prompts. Start-up is from the start of the process to the first token,
imports and loading included. Reported are medians with their spread, and the median and spread of the ratios pair by
pair: a machine that drifts slows both of a pair.
`--before` sets another checkout of this project, a folder named internlm3, beside them.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import time

from .options import one_of, output, positive
from .workers import Worker, serve

DECODE_TOKENS = 64
DTYPES = ("bfloat16", "float16", "float32")
START = "start to first token"
Figures = dict[str, float]
QUESTION = "Give three reasons to read old books, and name one that you would begin with."


def worker(engine: str, folder: str, dtype: str, begun: float) -> None:
    """Answers None with the seconds since `begun` (time.time), when the process did, to the first token; and [prompt,
    batch, new tokens] with the seconds that they take."""
    import torch

    if engine != "transformers":
        from internlm3 import InternLM3ForCausalLM as Model
        from internlm3 import InternLM3Tokenizer as Tokenizer

        options = {"progress": False}
    else:
        from transformers import AutoModelForCausalLM as Model
        from transformers import AutoTokenizer as Tokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        options = {"attn_implementation": "sdpa"}
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Model.from_pretrained(folder, dtype=dtype, **options)
    question = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    firsts = itertools.count(100)

    def generate(ids: torch.Tensor, tokens: int) -> float:
        ids[:, 0] = next(firsts)  # another beginning each time: ours would fill none twice
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
        # Rows begin at different places of the text: no two are alike.
        text = question.repeat(1, prompt + batch)[0]
        return generate(torch.stack([text[row : row + prompt] for row in range(batch)]), tokens)

    serve(answer)


def one_round(engines: dict[str, str | None], folder: str, dtype: str, shapes: list[list[int]]) -> dict[str, Figures]:
    """For each engine, with the checkout that it comes from, its figures by name."""
    found: dict[str, Figures] = {engine: {} for engine in engines}
    with contextlib.ExitStack() as stack:
        workers = {}
        for engine, checkout in engines.items():
            process = Worker(__file__, "--worker", engine, folder, dtype, repr(time.time()), checkout=checkout)
            workers[engine] = stack.enter_context(process)
            found[engine][START] = process.ask(None)

        def least(prompt: int, batch: int, tokens: int) -> dict[str, float]:
            """The seconds of each engine, the better of two calls, which they make by turns."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", type=one_of("dtype", DTYPES), default=["bfloat16", "float32"])
    parser.add_argument("--prompt", nargs="+", type=positive, default=[512], help="tokens of a prompt")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1], help="prompts decoded together")
    parser.add_argument("--before", help="another checkout, to be compared with this one as transformers is")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", type=output, help="write all figures here")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        engine, folder, dtype, begun = args.worker
        worker(engine, folder, dtype, float(begun))
        return

    if args.before and not os.path.exists(os.path.join(args.before, "runtime")):
        parser.error(f"--before {args.before} is no checkout of this project: name a folder internlm3 of one")
    from internlm3.runtime.checkpoint.demo_model import standin_checkpoint
    from .record import stamp, write_json

    folder = str(standin_checkpoint())
    here = stamp()
    print(f"SmolLM2-135M in InternLM3's format; {'; '.join(f'{key} {value}' for key, value in here.items())}")
    print(f"{DECODE_TOKENS} tokens decoded, greedy, medians of {args.rounds} rounds; batch x prompt\n")
    print("| dtype | figure | internlm3 | beside | its figure | ratio (pair by pair) |")
    print("|---|---|---|---|---|---|")
    shapes = [[prompt, batch] for prompt in args.prompt for batch in args.batch]
    engines = {"internlm3": None, "transformers": None, **({"before": args.before} if args.before else {})}
    results = {}
    for dtype in args.dtype:
        runs = results[dtype] = [one_round(engines, folder, dtype, shapes) for _ in range(args.rounds)]
        for figure in runs[0]["internlm3"]:
            for peer in list(engines)[1:]:
                ours, theirs = ([run[engine][figure] for run in runs] for engine in ("internlm3", peer))
                # The higher number is the faster of two rates, and the slower of two times.
                power = -1 if figure == START else 1
                ratios = [(a / b) ** power for a, b in zip(ours, theirs, strict=True)]
                unit = "s" if figure == START else "tokens/s"
                cells = [f"{statistics.median(x):.3g} ({min(x):.3g} to {max(x):.3g}) {unit}" for x in (ours, theirs)]
                times = f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
                print(f"| {dtype} | {figure} | {cells[0]} | {peer} | {cells[1]} | {times} |", flush=True)
    if args.json:
        write_json(args.json, {"stamp": here, "rounds": results})


if __name__ == "__main__":
    main()
