"""Steps and time that speculation saves, by workload, next to the steps of transformers' prompt lookup.

    python -m bench.speculation [--rounds 3] [--json FILE]

The demo model on this machine's CPU runs every step with and without drafts; its samples are replaced by the text that
a workload has for an answer, so that the figures are of that text, whatever a model would say. A CPU gains less than a
GPU, on which 16 rows take about as long as one: `python -m bench.gpu --part speculation` measures that.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from internlm3 import kernels
from internlm3.runtime.engine.draft_rows import ROWS
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.request import Request
from internlm3.runtime.model.model import LanguageModel
from internlm3.runtime.sampling.params import SamplingParams

from .options import output, positive
from .parts.bare_step import on_ops
from .record import Part, Record, Row, first_line, stamp
from .workloads import encode, lookup_steps, workloads


class Forced:
    """The ops of a device, but `sample` returns the tokens of a text, after sampling.

    text: [T] int64, the text by position.
    """

    def __init__(self, device: torch.device, tokens: int):
        self._ops = kernels.for_device(device)
        self.text = torch.zeros(tokens, dtype=torch.int64, device=device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def sample(self, logits: Tensor, *, position: Tensor, **stages: Any) -> tuple[Tensor, Tensor]:
        token, logprob = self._ops.sample(logits, position=position, **stages)
        return token.copy_(self.text[position.long().clamp(max=len(self.text) - 1)]), logprob.nan_to_num()


def rows(part: Part, model: LanguageModel, rounds: int, most: int = 1200) -> Iterator[Row]:
    """The rows of each workload, whose answers have `most` tokens at most."""
    texts = {each.name: encode(each, model.config.vocab_size, most) for each in workloads()}
    longest = max(len(prompt) + len(answer) for prompt, answer in texts.values())
    forced = Forced(model.device, longest)
    with on_ops(forced):  # type: ignore[arg-type]
        engines = [Engine(model, max_batch_size=1, max_seq_len=longest, speculation=each) for each in (False, True)]
        for engine in engines:
            engine.warm_up()
        for name, (prompt, answer) in texts.items():
            text = torch.tensor([*prompt, *answer], device=model.device)
            forced.text[: len(text)] = text
            runs = [[run(engine, prompt, answer) for engine in engines] for _ in range(rounds)]
            seconds = [[request.times[-1] - request.times[0] for request in each] for each in runs]
            drafting = runs[0][1]
            about: dict[str, Any] = {"workload": name, "tokens": len(answer)}
            note = f"{drafting.accepted} of {drafting.drafted} drafts right"
            per_step = len(answer) / (len(answer) - drafting.accepted)
            yield part.figure(f"{name}, internlm3", [per_step], "tokens/step", note, engine="internlm3", **about)
            yield lookup_row(part, name, prompt, answer, about)
            without, drafts = ([1e3 * each[way] / (len(answer) - 1) for each in seconds] for way in (0, 1))
            yield part.figure(f"{name}, without drafts", without, "ms/token", drafts=False, **about)
            ratio = sorted(a / b for a, b in zip(without, drafts, strict=True))[rounds // 2]
            note = f"{ratio:.2f} times as fast as without"
            yield part.figure(f"{name}, with drafts", drafts, "ms/token", note, drafts=True, **about)


def lookup_row(part: Part, name: str, prompt: list[int], answer: list[int], about: dict[str, Any]) -> Row:
    about = {"engine": "transformers", **about}
    name = f"{name}, transformers' prompt lookup"
    try:
        return part.figure(name, [len(answer) / lookup_steps(prompt, answer, ROWS - 1)], "tokens/step", **about)
    except ImportError as error:
        return part.missing(name, first_line(error), **about)


def run(engine: Engine, prompt: list[int], answer: list[int]) -> Request:
    """A request that has been answered, with the answer of the workload."""
    request = Request(prompt, SamplingParams(temperature=0), len(answer))
    engine.add([request])
    while engine.busy:
        engine.step()
    if request.token_ids != answer:
        raise RuntimeError("the engine generated another text than the one that its samples were replaced by")
    return request


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speculation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--json", type=output, help="write the record: every round, the machine and the versions")
    args = parser.parse_args(arguments)
    from internlm3 import InternLM3ForCausalLM
    from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint

    model = InternLM3ForCausalLM.from_pretrained(demo_model_checkpoint(), progress=False)
    made, found = stamp(), []
    print("; ".join(f"{key} {value}" for key, value in made.items()))
    for row in rows(Part("speculation"), model, args.rounds):
        print(row, flush=True)
        found.append(row)
    if args.json:
        Record(made, found).save(args.json)


if __name__ == "__main__":
    main()
