"""Generations from many threads, with everything that callers do to one another: make soak ARGS="--generations 2000"

Eight threads generate, stream, sample, cancel, let callbacks raise and are interrupted by asynchronous exceptions. At
the end no slot and no page is held, and every answer that was not disturbed is that of its request alone.
"""

import argparse
import ctypes
import random
import sys
import threading
import time

import torch

from bench.options import positive
from internlm3.runtime.engine.answer import Answer
from internlm3.runtime.engine.engine import Engine
from internlm3.tests.support.engine import alone, ask, ids, random_model, result

THREADS = 8
PROMPTS = 40  # few, so that they share prefixes and have few answers to compare with


class Interrupt(BaseException):
    """Raised in a thread from outside."""


class Soak:
    """The threads' work, and what they have seen."""

    def __init__(self, generations: int, seed: int):
        self.model = random_model()
        self.model.model.batch_invariant = True  # every answer is compared bit by bit
        self.engine = Engine(self.model, max_batch_size=8, max_seq_len=1024, cache_tokens=4096, depth=2)
        self.alone = {case: alone(self.model, self.request(case)) for case in range(PROMPTS)}
        self.generations, self.seed, self.done = generations, seed, 0
        self.counts = {"whole": 0, "stopped early": 0, "interrupted": 0, "raised": 0, "broken off by others": 0}
        self.wrong: list[int] = []
        self.lock = threading.Lock()
        self.interruptible: set[int] = set()

    def request(self, case: int):
        """The same request for the same number; prompts of up to 700 tokens that begin alike."""
        dice = random.Random(case)
        settings = {"temperature": dice.choice([0, 1.0]), "seed": case, "logprobs": dice.choice([None, None, 2])}
        return ask(
            ids(600)[: dice.randrange(600)] + ids(dice.randrange(1, 100), case), dice.randrange(1, 20), **settings
        )

    def work(self, number: int) -> None:
        dice = random.Random(f"{self.seed} {number}")
        while self.done < self.generations:
            try:
                self.interruptible.add(threading.get_ident())
                self.generate(dice)
            except Interrupt:
                self.count("interrupted")
            finally:
                self.interruptible.discard(threading.get_ident())

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1
            self.done += 1

    def generate(self, dice: random.Random) -> None:
        """One generation: read to its end, closed in the middle, or with a callback that raises."""
        case, kind = dice.randrange(PROMPTS), dice.random()
        request = self.request(case)
        most = dice.randrange(1, 20) if kind < 0.2 else 1000
        if 0.2 <= kind < 0.25:
            return self.raise_in_a_processor()
        run = self.engine.run([Answer(request)])
        try:
            for _, _ in zip(range(most), run):  # noqa: B905 - it may stop early
                pass
            run.close()
        except RuntimeError as error:
            if "broken off" not in str(error):
                raise
            return self.count("broken off by others")
        if request.finish_reason == "abort":
            return self.count("stopped early")
        if result(request) != self.alone[case]:
            self.wrong.append(case)
        self.count("whole")

    def raise_in_a_processor(self) -> None:
        def fail(token_ids, scores):
            if token_ids.shape[1] == 8:
                raise ZeroDivisionError
            return scores

        try:
            self.model.generate(torch.tensor([ids(5)]), logits_processor=[fail], max_new_tokens=6)
        except ZeroDivisionError:
            self.count("raised")
        except RuntimeError as error:
            if "broken off" not in str(error):
                raise
            self.count("broken off by others")

    def run(self) -> bool:
        threads = [threading.Thread(target=self.work, args=(number,)) for number in range(THREADS)]
        dice, shown = random.Random(self.seed), 0.0
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
            victim = dice.choice(threads).ident
            if victim in self.interruptible and dice.random() < 0.2:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(victim), ctypes.py_object(Interrupt))
            if time.monotonic() > shown + 20:
                shown = time.monotonic()
                print(f"{self.done} of {self.generations}: {self.counts}", flush=True)
        for engine in (self.engine, self.model.engine(1, 64)):
            engine.step()
            held = len(engine.pages) - engine.pages.free
            if engine.busy or held:
                print(f"{held} pages are held; busy: {engine.busy}")
                return False
        print(f"{self.done} generations: {self.counts}; different from alone: {len(self.wrong)} {self.wrong[:10]}")
        return not self.wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generations", type=positive, default=20_000, help="default: 20000")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="default: a new one")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    return 0 if Soak(options.generations, options.seed).run() else 1


if __name__ == "__main__":
    sys.exit(main())
