"""Answers of mixed lengths, more than are decoded together: as rows are free, beside waves that wait for their slowest.

    python bench/mixed.py [--rows 4] [--rounds 5] [--before CHECKOUT] [--json FILE]

Two kinds of work go through `LLM.generate` of the stand-in model, on this machine's CPU: questions whose answers the
model ends by itself, and answers whose lengths are drawn from an exponential distribution: any may end at any step.
Each goes through one call, and in waves of as many questions as there are rows, in turns (A B A B ...). Beside how many
times as fast the one call is stands what the lengths allow: the steps of waves by those of rows that are taken as they
come free. The rest goes to prompts, which share a launch in a wave and come one by one otherwise, and to this: a step
of one row, as waves end in, costs a CPU less than one of all rows.
`--before` sets beside them another checkout of this project, a folder named internlm3, which gets the questions in one
call of its own: up to commit 5a2bf93 that went through them in waves.
"""

import argparse
import heapq
import random
import statistics
import time
from collections.abc import Sequence
from typing import TypedDict

from .options import output, positive
from .record import stamp, write_json
from .workers import Worker, serve

FREE, WAVES, BEFORE = "as rows are free", "in waves", "before"
MOST = 512  # tokens of an answer
MEAN = 128  # tokens of an answer whose length is drawn
QUESTIONS = (  # all to which the stand-in's greedy answer comes to an end: others go round in circles
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
    cut: int  # answers that came to no end


def drawn_lengths() -> list[int]:
    dice = random.Random(0)
    return [min(max(round(dice.expovariate(1 / MEAN)), 1), MOST) for _ in QUESTIONS]


def steps(lengths: Sequence[int], rows: int, way: str) -> int:
    """How many steps decode answers of these lengths, whose first tokens come with their prompts."""
    behind = [length - 1 for length in lengths]
    if way == WAVES:
        return sum(max(behind[first : first + rows]) for first in range(0, len(behind), rows))
    ends = [0] * rows
    for each in behind:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def worker(work: tuple[str, str, int]) -> Done:
    from internlm3 import LLM, SamplingParams
    from internlm3.runtime.checkpoint.demo_model import standin_checkpoint

    kind, way, rows = work
    llm = LLM(standin_checkpoint(progress=False), max_batch_size=rows, progress=False)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    params = [SamplingParams(temperature=0, max_tokens=MOST)] * len(conversations)
    if kind == "drawn lengths":
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in drawn_lengths()]
    llm.chat("Warm up.", params[0])
    begin = time.perf_counter()
    some = rows if way == WAVES else len(params)
    answers = [
        output.outputs[0]
        for first in range(0, len(params), some)
        for output in llm.chat(
            conversations[first : first + some], params[0] if way == BEFORE else params[first : first + some]
        )
    ]
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "lengths": [len(answer.token_ids) for answer in answers],
        "cut": sum(answer.finish_reason == "length" for answer in answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=4, help="decoded together")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--before", help="another checkout, to be asked the questions too")
    parser.add_argument("--json", type=output, help="write all figures here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(worker)
        return

    made = stamp()
    print("; ".join(f"{key} {value}" for key, value in made.items()))
    record = {}
    for kind in ("questions", "drawn lengths"):
        # One call before had one setting for all.
        ways = [FREE, WAVES, *([BEFORE] if args.before and kind == "questions" else [])]

        def run(kind: str, way: str) -> Done:
            """In a process of its own: the prompts of one way are in no cache of the other."""
            checkout = args.before if way == BEFORE else None
            with Worker(__file__, "--worker", checkout=checkout) as process:
                return process.ask((kind, way, args.rows))

        rounds = [{way: run(kind, way) for way in ways} for _ in range(args.rounds)]
        lengths, cut = rounds[0][FREE]["lengths"], rounds[0][FREE]["cut"]
        same = all(done["lengths"] == lengths for each in rounds for done in each.values())
        print(
            f"{kind}: {len(lengths)} answers of {min(lengths)} to {max(lengths)} tokens ({sum(lengths)} in all, {cut} "
            f"cut off at their bound), {args.rows} rows{'' if same else '; NOT the same lengths every time'}"
        )
        count = {way: steps(lengths, args.rows, way) for way in (FREE, WAVES)}
        for way in ways:
            seconds = [each[way]["seconds"] for each in rounds]
            taken = f", {count[way]} steps" if way in count else ""
            print(f"  {way:18}{statistics.median(seconds):7.2f} s ({min(seconds):.2f} to {max(seconds):.2f}){taken}")
        for way in ways[2:]:
            times = [each[way]["seconds"] / each[FREE]["seconds"] for each in rounds]
            print(f"  {statistics.median(times):.2f} times as fast as {way} ({min(times):.2f} to {max(times):.2f})")
        times = [each[WAVES]["seconds"] / each[FREE]["seconds"] for each in rounds]
        found, allowed = statistics.median(times), count[WAVES] / count[FREE]
        print(
            f"  {found:.2f} times as fast as in waves ({min(times):.2f} to {max(times):.2f}); these lengths allow "
            f"{allowed:.2f}: {found / allowed:.0%} of it"
        )
        record[kind] = {
            "lengths": lengths,
            "cut": cut,
            "steps": count,
            "seconds": [{way: done["seconds"] for way, done in each.items()} for each in rounds],
        }
    if args.json:
        write_json(args.json, {"stamp": made, "rows": args.rows, "work": record})


if __name__ == "__main__":
    main()
