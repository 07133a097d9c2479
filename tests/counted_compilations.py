"""What serving compiles behind a warm-up. Run by test_warmup.py, in a process that compiles:

    python counted_compilations.py BENCH TARGET...

prints, as JSON for each target, how much the warm-up compiled, and the names of what requests still compile behind it.
"""

import json
import random
import sys
from functools import partial

import torch
from internlm3 import kernels
from internlm3.kernels.warmup import token_counts

C, I, V, H, K, D, PAGE, CHUNK = 4096, 10240, 128512, 32, 2, 128, 64, 512  # noqa: E741
STAGES = {  # sets of stages, those of a step and of a watched one
    "greedy": (),
    "usual": ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    "full": (
        *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty"),
        *("frequency_penalty", "logit_bias", "allowed"),
    ),
}
INTEGERS = {"top_k": torch.int64}


class Model:
    """The ops of a layer and of sampling, at InternLM3-8B's shapes."""

    def __init__(self, device, rows, slots, pages):
        make = partial(torch.empty, device=device)
        self.make, self.weights = partial(make, dtype=torch.bfloat16), {}
        self.cache = [self.make(pages, K, PAGE, D) for _ in "kv"]
        self.ints = {name: make(rows, dtype=torch.int32) for name in ("seq_lens", "limit", "free_from", "top_k")}
        self.longs = {name: make(rows, dtype=torch.int64) for name in ("token", "drawn", "seed", "stream", "top_k")}
        self.floats = {name: make(rows) for name in STAGES["full"] if name not in ("top_k", "logit_bias", "allowed")}
        self.inv_freq, self.bias, self.said = make(rows, D // 2), make(rows, V), make(rows, 3, dtype=torch.int32)
        self.table = make(rows, slots, dtype=torch.int32)
        self.counts = [make(rows, V, dtype=torch.int32) for _ in range(2)]
        self.words = {name: make(rows, V // 32, dtype=torch.int32) for name in ("ends", "permitted", "allowed")}

    def weight(self, *shape):
        return self.make(*shape)

    def layer(self, ids, rows):
        """ids [B * T]: T tokens of each of the sequences in these rows of the state. The last one's logits."""
        norm = self.make(C)
        places = (self.table[rows], self.ints["seq_lens"][rows])
        x = kernels.embed(ids, self.weight(V, C))
        q = kernels.rms_norm_qkv_rope_cache(
            x, norm, 1e-5, self.weight((H + 2 * K) * D, C), None, self.inv_freq[rows], *self.cache, *places
        )
        x = kernels.linear_add(kernels.paged_attention(q, *self.cache, *places, D**-0.5), self.weight(C, H * D), x)
        h = kernels.rms_norm_swiglu(x, norm, 1e-5, self.weight(2 * I, C))
        x = kernels.linear_add(h, self.weight(C, I), x)
        return kernels.rms_norm_linear(x[-places[0].shape[0] :], norm, 1e-5, self.weight(V, C))

    def choose(self, logits, rows, stages):
        per_row = {name: self.floats[name][rows] for name in stages if name in self.floats}
        per_row |= {name: self.longs[name][rows] for name in stages if name == "top_k"}
        if "repetition_penalty" in stages:
            per_row |= {"prompt_counts": self.counts[0][rows], "output_counts": self.counts[1][rows]}
        if "logit_bias" in stages:
            per_row |= {"logit_bias": self.bias[rows], "allowed": self.words["allowed"][rows]}
        per_row.setdefault("temperature", None)
        _, logprob = kernels.sample(
            logits, **per_row, seed=self.longs["seed"][rows], stream=self.longs["stream"][rows],
            position=self.ints["seq_lens"][rows],
        )  # fmt: skip
        kernels.advance(
            self.longs["drawn"][rows], logprob, token=self.longs["token"][rows], said=self.said[rows],
            output_counts=self.counts[1][rows], **{name: x[rows] for name, x in self.words.items()},
            **{name: self.ints[name][rows] for name in ("seq_lens", "limit", "free_from")},
        )  # fmt: skip


def step(model, rows, stages):
    model.choose(model.layer(model.longs["token"][rows], rows), rows, stages)


def warm(device):
    model = Model(device, rows=2, slots=16, pages=32)
    for tokens in token_counts(CHUNK, H // K, D, torch.bfloat16, device):
        model.layer(torch.empty(tokens, dtype=torch.int64, device=device), slice(0, 1))
    for rows in (1, 2):
        for stages in STAGES.values():
            step(model, slice(0, rows), stages)


def serve(device):
    """Prompts of any length, in any row; batches of any size, anywhere in the state; any window and number of pages."""
    rng = random.Random(1)
    for _ in range(20):
        rows = rng.randint(1, 40)
        model = Model(device, rows, rng.choice([1, 7, 512, rng.randint(1, 3000)]), rng.choice([1, 17, 4096]))
        prompt = torch.empty(9000, dtype=torch.int64, device=device)
        for tokens in (CHUNK, rng.randint(1, CHUNK), rng.randint(1, 40)):
            begin, row = rng.randint(0, 8000), rng.randrange(rows)
            model.layer(prompt[begin : begin + tokens], slice(row, row + 1))
        first = rng.randrange(rows)
        for stages in STAGES.values():
            step(model, slice(first, rng.randint(first + 1, rows)), stages)


def main(bench, *targets):
    sys.path.insert(0, bench)
    from launches import compilations
    from targets import TARGETS

    said = {}
    for name in targets:
        before, served = (compilations(calls, TARGETS[name]) for calls in (warm, serve))
        said[name] = {"warm": sorted(x.split(":")[0] for x in before), "new": sorted(served - before)}
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
