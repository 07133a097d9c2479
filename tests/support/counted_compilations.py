"""What serving compiles after a warm-up. Run by test_warmup.py in a process without Triton's interpreter:

    python -m tests.support.counted_compilations TARGET...

prints as JSON, for each target, what the warm-up would compile and what requests would still compile after it. Prompts
and steps are the runtime's own, with two layers of InternLM3-8B's shapes (prompts treat the last layer differently), on
tensors without memory.
"""

import json
import random
import sys
from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch

from bench.machine_code.launches import compilations
from bench.machine_code.targets import TARGETS
from internlm3 import InternLM3Config
from internlm3.kernels.quantised import Form, Layout
from internlm3.kernels.triton.warmup import batch_sizes
from internlm3.runtime.engine import decode, prefill, staging
from internlm3.runtime.engine.draft_rows import MOST_SEQUENCES, ROWS, DraftRows
from internlm3.runtime.engine.layout import state_layout
from internlm3.runtime.engine.pages import PageAllocator
from internlm3.runtime.engine.state import DecodeState, Tier
from internlm3.runtime.engine.warm_up import compile_kernels
from internlm3.runtime.model.kv_cache import PAGE
from internlm3.runtime.model.model import LanguageModel
from internlm3.runtime.model.quantised_linear import quantise_layers

CONFIG = InternLM3Config(num_hidden_layers=2, intermediate_size=10240, num_key_value_heads=2)
INT4 = [(name, Layout(Form("int4", columns, 128, None), None)) for names, columns in (
    ("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj", 4096),
    ("mlp.down_proj", 10240),
) for name in names.split()]  # fmt: skip
LAYOUTS = {f"model.layers.{layer}.{name}.weight": layout for layer in range(2) for name, layout in INT4}
LAYOUTS["lm_head.weight"] = Layout(Form("int8", 4096, 0, 0), None)


class Server:
    """A model, a KV cache of `pages` pages, and `rows` sequences of up to `slots` pages each."""

    def __init__(self, device, rows, slots, pages, quantised):
        factory = {"device": device, "dtype": torch.bfloat16}
        self.model = LanguageModel(CONFIG, device="meta")
        if quantised:
            quantise_layers(self.model, LAYOUTS)
        for module in self.model.modules():
            for name, x in module._parameters.items():
                if x is not None:
                    dtype = torch.bfloat16 if x.is_floating_point() else x.dtype
                    module._parameters[name] = torch.empty(x.shape, dtype=dtype, device=device)
        cache = torch.empty(pages, 2, CONFIG.num_key_value_heads, PAGE, CONFIG.head_dim, **factory)
        self.kv_cache = SimpleNamespace(layer=lambda _: cache.unbind(1))
        self.pages = PageAllocator(pages)
        layout = state_layout(slots, CONFIG.vocab_size, CONFIG.head_dim, ROWS)
        buffer = torch.zeros(rows * layout.words, dtype=torch.int32, device=device)
        self.state = DecodeState.of(layout, buffer)
        self.rows = DraftRows.like(self.state)
        with mock.patch.object(staging, "_HostBuffer"):  # needs memory
            self.staging = staging.Staging(CONFIG, layout, buffer, pages, prefill.CHUNK)

    def prefill(self, first, *prompts):
        batch = self.state.slots(first, first + len(prompts)).batch
        self.model.head(prefill.run_chunks(self.model, self.kv_cache, batch, prompts, [0] * len(prompts)))

    def first_token(self):
        for tier in Tier:
            last = torch.zeros(1, CONFIG.hidden_size, dtype=torch.bfloat16, device=self.staging.tokens.device)
            decode.first_token(self.model, self.staging, last, tier)

    def step(self, first, last):
        for tier in Tier:
            decode.step(self.model, self.kv_cache, self.state.slots(first, last), tier)

    def verify(self, sequences):
        slots, rows = self.state.slots(0, sequences), self.rows.of(sequences)
        for tier in Tier:
            decode.verify(self.model, self.kv_cache, slots, rows, tier)
        decode.draft(self.model.model.ops, slots, rows)


def warm(device, quantised):
    server = Server(device, 40, 16, 32, quantised)
    compile_kernels(server.model, server.kv_cache, server.staging, server.pages, max_seq_len=9000)
    for rows in batch_sizes(40):
        server.step(0, rows)
    for sequences in range(1, MOST_SEQUENCES + 1):
        server.verify(sequences)


def serve(device, quantised):
    """Prompts of any length, in any slot; batches of any size, from any slot on; any window and number of pages."""
    rng = random.Random(1)
    for _ in range(10):  # all that 20 find is found by 8
        rows = rng.randint(1, 40)
        server = Server(
            device, rows, rng.choice([1, 7, 512, rng.randint(1, 3000)]), rng.choice([1, 17, 4096]), quantised
        )
        prompt = torch.empty(9000, dtype=torch.int64, device=device)
        for tokens in (rng.randint(1, 3 * prefill.CHUNK), rng.randint(1, prefill.CHUNK), rng.randint(1, 40)):
            begin = rng.randint(0, 6000)
            server.prefill(rng.randrange(rows), prompt[begin : begin + tokens])
        together = rng.randint(1, rows)
        most = min(prefill.CHUNK, prefill.LAUNCH_TOKENS // together)
        server.prefill(rng.randint(0, rows - together), *(prompt[: rng.randint(1, most)] for _ in range(together)))
        server.first_token()
        first = rng.randrange(rows)
        server.step(first, rng.randint(first + 1, rows))
        server.verify(rng.randint(1, min(MOST_SEQUENCES, rows)))


def main(targets: Iterable[str]) -> None:
    found = {}
    for name in targets:
        for weights in ("bfloat16", "quantised"):
            calls = [partial(each, quantised=weights == "quantised") for each in (warm, serve)]
            before, served = (compilations(each, TARGETS[name]) for each in calls)
            found[f"{name}, {weights}"] = {
                "warm": sorted(x.split(":")[0] for x in before),
                "new": sorted(served - before),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
