"""Answers of different lengths, more than fit in a batch: continuous batching against static batches.

    python -m bench.batching [--batch 4] [--rounds 5] [--before CHECKOUT] [--json FILE]

Two workloads go through `LLM.chat` of the demo model on this machine's CPU: questions whose answers the model ends by
itself, and answers whose lengths are drawn from an exponential distribution, so that any may end at any step. Each
workload runs as one call, in which a slot that becomes free takes the next request ("continuous"), and as one call per
batch, in which short answers wait for the longest ("static"), in turns (A B A B ...).

Printed is how many times as fast the one call is, next to the ratio of their numbers of decode steps. The rest of the
difference is prompts, which a static batch prefills together and the other one by one, and batch sizes: static batches
end in steps of batch size 1, which cost a CPU less than full ones.

`--before` compares with the folder of another checkout of this project as well; it gets the questions in one call.
"""

import argparse
import heapq
import random
import statistics
import time
from collections.abc import Sequence
from typing import TypedDict

from .options import output, positive
from .record import Part, Record, stamp
from .workers import Worker, serve

CONTINUOUS, STATIC, BEFORE = "continuous", "static", "before"
MOST = 512  # tokens of an answer
MEAN = 128  # tokens of an answer whose length is drawn
QUESTIONS = (  # to each of these the demo model's greedy answer ends by itself; to others it repeats itself forever
    "What is the capital of France?",
    "Name three rivers.",
    "Is 17 a prime number?",
    "Say hello in Spanish.",
    "Describe a sunset in one sentence.",
    "What does a compiler do?",
    "Translate 'good night' into French.",
    "What colour is grass?",
    "How many legs does a spider have?",
    "Thank you!",
    "Good morning!",
    "What is photosynthesis?",
    "Name a fruit that is yellow.",
    "What is the boiling point of water?",
    "How do I say thank you in Japanese?",
    "What is the opposite of hot?",
)


class Done(TypedDict):
    seconds: float
    lengths: list[int]
    cut: int  # answers that reached their limit


def drawn_lengths() -> list[int]:
    rng = random.Random(0)
    return [min(max(round(rng.expovariate(1 / MEAN)), 1), MOST) for _ in QUESTIONS]


def steps(lengths: Sequence[int], batch: int, mode: str) -> int:
    """The number of decode steps for answers of these lengths; first tokens come from the prefill."""
    left = [length - 1 for length in lengths]
    if mode == STATIC:
        return sum(max(left[first : first + batch]) for first in range(0, len(left), batch))
    ends = [0] * batch
    for each in left:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def worker(work: tuple[str, str, int]) -> Done:
    from internlm3 import LLM, SamplingParams
    from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint

    kind, mode, batch = work
    llm = LLM(demo_model_checkpoint(progress=False), max_batch_size=batch, progress=False)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    params = [SamplingParams(temperature=0, max_tokens=MOST)] * len(conversations)
    if kind == "drawn lengths":
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in drawn_lengths()]
    llm.chat("Warm up.", params[0])
    begin = time.perf_counter()
    count = batch if mode == STATIC else len(params)
    answers = [
        output.outputs[0]
        for first in range(0, len(params), count)
        for output in llm.chat(
            conversations[first : first + count], params[0] if mode == BEFORE else params[first : first + count]
        )
    ]
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "lengths": [len(answer.token_ids) for answer in answers],
        "cut": sum(answer.finish_reason == "length" for answer in answers),
    }


def run(kind: str, mode: str, batch: int, checkout: str | None) -> Done:
    """Runs in a new process, so that no mode finds the prompts of another one in a cache."""
    with Worker("bench.batching", "--worker", checkout=checkout if mode == BEFORE else None) as process:
        done: Done = process.ask((kind, mode, batch))
        return done


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.batching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=positive, default=4, help="batch size")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--before", help="the folder of another checkout, which gets the questions as well")
    parser.add_argument("--json", type=output, help="write the record: every round, the machine and the versions")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        serve(worker)
        return

    made, part, rows = stamp(), Part("batching"), []
    print("; ".join(f"{key} {value}" for key, value in made.items()))
    for kind in ("questions", "drawn lengths"):
        # Older checkouts take one set of sampling parameters per call.
        modes = [CONTINUOUS, STATIC, *([BEFORE] if args.before and kind == "questions" else [])]
        rounds = [{mode: run(kind, mode, args.batch, args.before) for mode in modes} for _ in range(args.rounds)]
        lengths, cut = rounds[0][CONTINUOUS]["lengths"], rounds[0][CONTINUOUS]["cut"]
        same = all(done["lengths"] == lengths for each in rounds for done in each.values())
        print(
            f"{kind}: {len(lengths)} answers of {min(lengths)} to {max(lengths)} tokens ({sum(lengths)} in all, {cut} "
            f"of them cut off), batch size {args.batch}{'' if same else '; NOT the same lengths every time'}"
        )
        for mode in modes:
            seconds = [each[mode]["seconds"] for each in rounds]
            count = steps(lengths, args.batch, STATIC if mode == STATIC else CONTINUOUS)
            note = f"{count} steps" * (mode != BEFORE)
            about = {"kind": kind, "mode": mode, "batch": args.batch, "lengths": lengths, "steps": count}
            rows.append(part.figure(f"{kind}, {mode}", seconds, "s", note, **about))
            print(rows[-1])
        for mode in modes[1:]:
            times = [each[mode]["seconds"] / each[CONTINUOUS]["seconds"] for each in rounds]
            allowed = steps(lengths, args.batch, STATIC) / steps(lengths, args.batch, CONTINUOUS)
            print(
                f"  continuous is {statistics.median(times):.2f} times as fast as {mode} "
                f"({min(times):.2f} to {max(times):.2f})" + f"; the ratio of steps is {allowed:.2f}" * (mode == STATIC)
            )
    if args.json:
        Record(made, rows).save(args.json)


if __name__ == "__main__":
    main()
