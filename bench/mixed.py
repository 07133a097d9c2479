"""Answers of mixed lengths, more than are decoded together: as rows are free, beside waves that wait for their slowest.

    python bench/mixed.py [--answers 16] [--rows 4] [--rounds 5] [--json FILE]

Both ways take the same prompts through one LLM of the stand-in model, in turns (A B A B ...), on this machine's CPU.
"""

import argparse
import random
import statistics
import time

from internlm3 import LLM, SamplingParams
from internlm3.runtime.standin import standin_checkpoint
from options import output, positive
from record import stamp, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=positive, default=16)
    parser.add_argument("--rows", type=positive, default=4, help="decoded together")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", type=output, help="write all figures here")
    args = parser.parse_args()

    llm = LLM(standin_checkpoint(), max_batch_size=args.rows, progress=False)
    dice = random.Random(0)
    # Many short answers and a few long ones, as people get them; the seed says which.
    lengths = [min(int(dice.expovariate(1 / 40)) + 1, 160) for _ in range(args.answers)]
    prompts = [
        [100 + index, *(dice.randrange(300, 40_000) for _ in range(dice.randrange(8, 64)))]
        for index in range(args.answers)
    ]
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]

    def joined() -> float:
        begin = time.perf_counter()
        llm.generate(prompts, params)
        return time.perf_counter() - begin

    def in_waves() -> float:
        begin = time.perf_counter()
        for first in range(0, args.answers, args.rows):
            llm.generate(prompts[first : first + args.rows], params[first : first + args.rows])
        return time.perf_counter() - begin

    joined()
    pairs = [(joined(), in_waves()) for _ in range(args.rounds)]
    ratios = [waves / together for together, waves in pairs]
    here = stamp()
    print("; ".join(f"{key} {value}" for key, value in here.items()))
    print(
        f"{args.answers} answers of {min(lengths)} to {max(lengths)} tokens ({sum(lengths)} in all), {args.rows} rows"
    )
    for name, seconds in zip(("as rows are free", "in waves"), zip(*pairs, strict=True), strict=True):
        print(f"{name:18}{statistics.median(seconds):8.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"{'ratio':18}{statistics.median(ratios):8.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")
    if args.json:
        write_json(args.json, {"stamp": here, "lengths": lengths, "rows": args.rows, "pairs": pairs})


if __name__ == "__main__":
    main()
