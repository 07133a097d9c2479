"""What an answer of a given form costs: its masks, next to the decode steps of the demo model on this machine's CPU.

    python -m bench.structured [--rounds 5] [--json FILE]

Masks are made for one text, token by token, by each kind of grammar that describes it: the time from a token until the
words of its mask are ready for the device. On a GPU the host does this while the device runs the model. Then the same
text is decoded with a constraint, and as many tokens without, in turns (A B A B ...).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from internlm3 import LLM
from internlm3.runtime.sampling.params import SamplingParams
from internlm3.runtime.structured.grammars import Grammars

from .options import output, positive
from .record import Part, Record, Row, stamp

TEXT = (
    '{"name": "Ada Lovelace", "born": 1815, "city": "伦敦", "tags": ["maths", "poetry"], '
    '"works": [{"title": "Notes on the Analytical Engine", "year": 1843}]}'
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "born": {"type": "integer", "minimum": 0, "maximum": 2100},
        "city": {"type": "string"},
        "tags": {"type": "array", "items": {"enum": ["maths", "poetry", "music"]}},
        "works": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"title": {"type": "string"}, "year": {"type": "integer"}},
                "required": ["title", "year"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["name", "born", "city", "tags", "works"],
    "additionalProperties": False,
}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "JSON schema": {"json_schema": SCHEMA},
    "any JSON object": {"json_object": True},
    "regular expression": {"regex": r'\{("\w+": (\d+|"[^"]*"|\[.*\])(, )?)*\}'},
    "two choices": {"choice": [TEXT, TEXT.replace("1843", "1842")]},
}


def rows(part: Part, llm: LLM, rounds: int) -> Iterator[Row]:
    tables = [_seconds(Grammars, llm.tokenizer, llm.config.vocab_size) for _ in range(rounds)]
    yield part.figure("all tokens into a tree, once", tables, "s", f"{llm.config.vocab_size} tokens")
    prompt: dict[str, Any] = {"prompts": "A poet, as JSON: ", "temperature": 0, "use_tqdm": False}
    [answer] = llm.generate(**prompt, choice=[TEXT]).outputs
    ids, ends = answer.token_ids[:-1], frozenset(answer.token_ids[-1:])
    for name, given in CONSTRAINTS.items():
        params = SamplingParams(**given)
        compiled, masks = [], []
        for _ in range(rounds):
            grammars = Grammars(llm.tokenizer, llm.config.vocab_size)
            compiled.append(1e3 * _seconds(grammars.constraint, params, ends))
            constraint = grammars.constraint(params, ends)
            masks.append([1e6 * _seconds(constraint.allowed, ids[:count]) for count in range(1, len(ids) + 1)])
        yield part.figure(f"{name}, compiled, with the first mask", compiled, "ms")
        all_masks = [one for each in masks for one in each]
        note = f"mean {statistics.mean(all_masks):.0f} us, longest {max(all_masks):.0f} us"
        yield part.figure(f"{name}, mask of a token", [statistics.median(each) for each in masks], "us", note)
    free: dict[str, Any] = {**prompt, "ignore_eos": True, "max_tokens": len(answer.token_ids)}
    both = [[_per_token(llm, each) for each in (free, {**prompt, "choice": [TEXT]})] for _ in range(rounds)]
    without, constrained = ([each[way] for each in both] for way in (0, 1))
    yield part.figure("decode step, free", without, "ms/token")
    ratio = statistics.median(b / a for a, b in both)
    yield part.figure("decode step, constrained", constrained, "ms/token", f"{ratio:.2f} of the time of a free one")


def _seconds(action: Callable[..., Any], *arguments: Any) -> float:
    begun = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - begun


def _per_token(llm: LLM, given: dict[str, Any]) -> float:
    """Milliseconds from one token to the next."""
    output = llm.generate(**given)
    return 1e3 * output.timings.decode / (len(output.outputs[0].token_ids) - 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.structured", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", type=output, help="write the record: every round, the machine and the versions")
    args = parser.parse_args(arguments)
    from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint

    llm = LLM(demo_model_checkpoint(), progress=False)
    made, found = stamp(), []
    print("; ".join(f"{key} {value}" for key, value in made.items()))
    for row in rows(Part("structured"), llm, args.rounds):
        print(row, flush=True)
        found.append(row)
    if args.json:
        Record(made, found).save(args.json)


if __name__ == "__main__":
    main()
