"""The longest pause of a running stream while long prompts come in, next to that of another checkout.

    python -m bench.admission [--prompts 3] [--tokens 4096] [--rounds 3] [--before CHECKOUT] [--json FILE]

On this machine's CPU the demo model streams one answer. After its eighth token, prompts of random tokens come from
another thread, all at once, each for a short answer. Printed are the longest and the median time between two tokens of
the stream, in times of the median without any prompt, which is measured in the same process. Between two steps at most
one chunk of prompts runs, so the longest pause should be that of a chunk, whatever the length of the prompts is; in a
checkout without that it is the time of all prompts.
"""

import argparse
import random
import statistics
import threading
import time
from collections.abc import Sequence
from typing import TypedDict

from .options import output, positive
from .record import Part, Record, stamp
from .workers import Worker, serve

BEGIN = 8  # tokens of the stream before the prompts come


class Pauses(TypedDict):
    alone: list[float]
    among: list[float]
    seconds: float  # from the arrival of the prompts to the last answer


def worker(work: tuple[int, int]) -> Pauses:
    from internlm3 import LLM
    from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint

    count, tokens = work
    llm = LLM(demo_model_checkpoint(progress=False), max_batch_size=count + 1, progress=False)
    rng = random.Random(1)
    prompts = [[rng.randrange(300, 40000) for _ in range(tokens)] for _ in range(count)]
    done: list[float] = []

    def ask() -> None:
        llm.generate(prompts, temperature=0, max_tokens=2, ignore_eos=True)
        done.append(time.perf_counter())

    def stream(thread: threading.Thread | None) -> tuple[list[float], float]:
        times, arrived, number = [], 0.0, 0
        for number, _ in enumerate(llm.stream("Once upon a time", temperature=0, max_tokens=500, ignore_eos=True)):
            times.append(time.perf_counter())
            if number == BEGIN and thread is not None:
                arrived = times[-1]
                thread.start()
            if number > 4 * BEGIN and (thread is None or done):
                break
        return [after - before for before, after in zip(times[BEGIN:], times[BEGIN + 1 :], strict=False)], arrived

    stream(None)  # the first pass reads pages of the weights
    alone, _ = stream(None)
    among, arrived = stream(threading.Thread(target=ask))
    return {"alone": alone, "among": among, "seconds": done[0] - arrived if done else 0.0}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.admission", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=positive, default=3, help="how many come at once")
    parser.add_argument("--tokens", type=positive, default=4096, help="the length of each")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--before", help="the folder of another checkout, which does the same")
    parser.add_argument("--json", type=output, help="write the record: every round, the machine and the versions")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        serve(worker)
        return

    made, part, rows = stamp(), Part("admission"), []
    print("; ".join(f"{key} {value}" for key, value in made.items()))
    print(
        f"{args.prompts} prompts of {args.tokens} tokens come while an answer streams; in steps of that answer alone:"
    )
    sides = {"this checkout": None, **({"before": args.before} if args.before else {})}
    found: dict[str, list[Pauses]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, checkout in sides.items():
            with Worker("bench.admission", "--worker", checkout=checkout) as process:
                found[side].append(process.ask((args.prompts, args.tokens)))
    for side, rounds in found.items():
        steps = [statistics.median(each["alone"]) for each in rounds]
        for name, of in (("longest pause", max), ("median pause", statistics.median)):
            figures = [of(each["among"]) / step for each, step in zip(rounds, steps, strict=True)]
            rows.append(part.figure(f"{side}, {name}", figures, "steps", prompts=args.prompts, tokens=args.tokens))
            print(rows[-1])
        rows.append(part.figure(f"{side}, until all are answered", [each["seconds"] for each in rounds], "s"))
        print(rows[-1])
    if args.json:
        Record(made, rows).save(args.json)


if __name__ == "__main__":
    main()
