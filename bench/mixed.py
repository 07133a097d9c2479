"""Answers of mixed lengths, more than are decoded together: as rows are free, beside waves that wait for their slowest.

    python bench/mixed.py [--rows 4] [--rounds 5] [--before CHECKOUT] [--json FILE]

Sixteen questions go through one `LLM.generate` of the stand-in model, on this machine's CPU; each answer ends where the
model ends it. Beside it the same in waves of as many questions as there are rows, in turns (A B A B ...). `--before`
sets another checkout of this project, a folder named internlm3, beside both, in a process of its own each round.
"""

import argparse
import json
import os
import statistics
import time

from options import output, positive
from record import stamp, write_json
from workers import ask

MOST = 200  # tokens of an answer
QUESTIONS = (
    "What is the capital of France?",
    "Name three rivers.",
    "Write a short poem about the sea.",
    "Is 17 a prime number?",
    "Explain why the sky is blue.",
    "Say hello in Spanish.",
    "List the planets of the solar system.",
    "What is two plus two?",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "Describe a sunset in one sentence.",
    "What does a compiler do?",
    "Translate 'good night' into French.",
    "How do bees make honey?",
    "What colour is grass?",
    "Tell me a story about a lost dog.",
)


def worker(rows: int, way: str) -> list[float]:
    """The seconds that a way takes in this process, and the lengths of its answers behind them."""
    from internlm3 import LLM
    from internlm3.runtime.standin import standin_checkpoint

    llm = LLM(standin_checkpoint(progress=False), max_batch_size=rows, progress=False)
    prompts = [
        llm.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]

    def answer(*questions: str) -> list[int]:
        outputs = llm.generate([*questions], temperature=0, max_tokens=MOST)
        return [len(output.outputs[0].token_ids) for output in outputs]

    def in_waves() -> list[int]:
        return [n for first in range(0, len(prompts), rows) for n in answer(*prompts[first : first + rows])]

    answer("Warm up.")
    begin = time.perf_counter()
    lengths = in_waves() if way == "in waves" else answer(*prompts)
    return [time.perf_counter() - begin, *lengths]


def run(rows: int, way: str, checkout: str | None = None) -> list[float]:
    return ask(__file__, "--rows", str(rows), "--worker", way, checkout=checkout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=4, help="decoded together")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--before", help="another checkout, a folder named internlm3")
    parser.add_argument("--json", type=output, help="write all figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.rows, args.worker)))
        return
    if args.before and os.path.basename(os.path.abspath(args.before)) != "internlm3":
        parser.error(f"--before {args.before}: name a checkout whose folder is called internlm3")

    made = stamp()
    print("; ".join(f"{key} {value}" for key, value in made.items()))
    rounds = []
    for number in range(args.rounds):
        # The prompts of the second way are in the cache of neither: each way has a process of its own.
        found = {way: run(args.rows, way) for way in ("as rows are free", "in waves")}
        if args.before:
            found["before"] = run(args.rows, "before", args.before)
        rounds.append({way: seconds for way, (seconds, *_) in found.items()})
        if number == 0:
            lengths = found["as rows are free"][1:]
            same = all(of[1:] == lengths for of in found.values())
            print(
                f"{len(lengths)} answers of {min(lengths)} to {max(lengths)} tokens ({sum(lengths)} in all), "
                f"{args.rows} rows; {'' if same else 'not '}the same lengths every way"
            )
    for way in rounds[0]:
        seconds = [times[way] for times in rounds]
        ratios = [times[way] / times["as rows are free"] for times in rounds]
        print(
            f"{way:18}{statistics.median(seconds):8.2f} s ({min(seconds):.2f} to {max(seconds):.2f}); takes "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of it"
        )
    if args.json:
        write_json(args.json, {"stamp": made, "lengths": lengths, "rows": args.rows, "rounds": rounds})


if __name__ == "__main__":
    main()
