"""A whole model on the Triton ops: prefill and decode give the same tokens as on the CPU's ops."""

import numpy as np
import pytest
import torch

from internlm3 import InternLM3Config, InternLM3ForCausalLM
from internlm3.kernels import triton
from internlm3.runtime.engine import prefill
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.layout import state_layout
from internlm3.runtime.engine.request import Request
from internlm3.runtime.engine.state import Slot, Tier
from internlm3.runtime.model import model as runtime_model
from internlm3.runtime.model.kv_cache import PAGE, BatchMetadata, PagedKVCache
from internlm3.runtime.model.rope import inverse_frequencies
from internlm3.runtime.sampling.params import SamplingParams
from internlm3.tests.kernels.support import DEVICE, backends
from internlm3.tests.support.capture import Recorder
from internlm3.tests.support.engine import shorten_chunks

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 16,
    "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
}  # fmt: skip


def on_triton(monkeypatch):
    monkeypatch.setattr(runtime_model, "for_device", lambda _: triton)


def make(dtype, **shape):
    torch.manual_seed(3)
    model = InternLM3ForCausalLM(InternLM3Config(**{**SHAPE, **shape}), dtype=torch.float32)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.copy_(torch.randn(weight.shape) * 1.5 * weight.shape[1] ** -0.5)
    return model.to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, {}), (torch.bfloat16, {"qkv_bias": True, "bias": True, "tie_word_embeddings": True})],
    ids=str,
)
def test_generation(monkeypatch, dtype, shape):
    """Three ragged prompts, one in chunks and past the window, decoded together: tokens and logits."""
    shorten_chunks(monkeypatch, 16, 16)
    model = make(dtype, **shape)
    ids = torch.randint(1, 96, (3, 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :21] = mask[2, :12] = 0
    flags = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": [], "pad_token_id": 0}
    flags |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, mask, **flags)
    on_triton(monkeypatch)
    with np.errstate(all="ignore"):
        found = model.generate(ids, mask, **flags)
    assert found.sequences.equal(expected.sequences)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for step, (ours, theirs) in enumerate(zip(found.logits, expected.logits, strict=True)):
        assert (ours - theirs).abs().max() < tolerance * theirs.abs().max(), f"step {step}"


@backends
def test_the_last_rows_of_prompts(monkeypatch, backend):
    """If the last block computes only the last rows, they and all keys and values stay the same."""
    model = make(torch.float32)
    if backend == "triton":
        on_triton(monkeypatch)
    tokens, lengths = 6, torch.tensor([6, 4, 0, 37], dtype=torch.int32)  # no context, padded, idle, with a context
    x = torch.randn(4 * tokens, 32, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    table = torch.tensor([[5], [2], [1], [0]], dtype=torch.int32)
    batch = BatchMetadata(table.to(DEVICE), lengths.to(DEVICE), torch.rand(4, 8).to(DEVICE))

    def through(**options):
        kv_cache = PagedKVCache(model.config, 7, torch.float32, DEVICE)
        for kv in kv_cache.layers:
            kv.copy_(torch.randn(kv.shape, generator=torch.Generator().manual_seed(6)))
        with np.errstate(all="ignore"):
            return model.model.run(x, batch, kv_cache, **options), torch.stack(kv_cache.layers)

    every, kept = through()
    found, also_kept = through(last_rows=True)
    expected = every.view(4, tokens, -1)[:, -1]
    live = lengths.to(DEVICE) > 0
    assert found.shape == expected.shape and also_kept.equal(kept)
    torch.testing.assert_close(found[live], expected[live], rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@backends
def test_a_prompt_in_padded_chunks(monkeypatch, backend):
    """The padding of a prompt's end, which stands on tokens that are there, changes no page that anybody holds."""
    shorten_chunks(monkeypatch, PAGE, PAGE)
    monkeypatch.setattr(prefill, "WIDTHS", (16, 48))
    model = make(
        torch.float32, num_hidden_layers=1, max_position_embeddings=4 * PAGE
    )  # one rotary base for all prompts
    if backend == "triton":
        on_triton(monkeypatch)
    generator = torch.Generator().manual_seed(8)
    pages = [5, 2, 0, 6]
    start = torch.randn(1, 2, 9, 2, PAGE, 16, generator=generator).to(DEVICE)  # what the pages hold before

    def filled(fill, tokens):
        kv_cache = PagedKVCache(model.config, 8, torch.float32, DEVICE)
        for kv, held in zip(kv_cache.layers, start, strict=True):
            kv.copy_(held)
        with np.errstate(all="ignore"):
            return fill(kv_cache, prompt[:tokens]), torch.stack(kv_cache.layers)[:, :, : kv_cache.spare]

    def padded(kv_cache, prompt):
        layout = state_layout(len(pages), model.config.vocab_size, model.config.head_dim)
        rows = torch.zeros(layout.words, dtype=torch.int32, device=DEVICE)
        staging = prefill.Staging(model.config, layout, rows, kv_cache.spare, PAGE)
        slot = Slot(Request(prompt, SamplingParams(), 1), 0, pages, Tier.GREEDY)
        prompts = prefill.CapturedPrompts(model, kv_cache, staging, lambda launch: launch)
        while slot.remaining:
            last = prompts.run_chunk(slot)
        return last.clone()

    def plain(kv_cache, prompt):
        inv_freq = inverse_frequencies(model.config, len(prompt), DEVICE)[None]
        length = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        batch = BatchMetadata(torch.tensor([pages], dtype=torch.int32, device=DEVICE), length, inv_freq)
        return prefill.run_chunks(model, kv_cache, batch, [torch.tensor(prompt, device=DEVICE)], [0])

    lengths = (
        (PAGE + 20,) if backend == "triton" else (PAGE + 1, 2 * PAGE + 20, 2 * PAGE + 50, 3 * PAGE)
    )  # the interpreter is slow
    for tokens in lengths:
        prompt = torch.randint(1, 96, (tokens,), generator=generator).tolist()
        last, kept = filled(padded, tokens)
        expected, expected_kept = filled(plain, tokens)
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(kept, expected_kept, rtol=1e-4, atol=1e-5)
        whole = (tokens - 1) // PAGE
        _, before = filled(padded, whole * PAGE)
        others = [page for page in range(8) if page not in pages[whole:]]
        assert kept[:, :, others].equal(before[:, :, others])


def test_a_captured_step(monkeypatch):
    """Captured steps with a row of each tier, replayed without their Python and without reading a value on the host."""
    settings = [{"temperature": 0}, {"seed": 1, "top_p": 0.9}, {"seed": 2, "presence_penalty": 0.5, "min_tokens": 2}]

    def answers(**options):
        model = make(torch.float32)
        engine = Engine(model, max_batch_size=4, max_seq_len=16, **options)
        requests = [
            Request([row + 5] * (row + 1), SamplingParams(**each), 4, frozenset(range(0, 96, 9)))
            for row, each in enumerate(settings)
        ]
        engine.add(requests)
        while engine.busy:
            engine.step()
        return [(request.token_ids, request.finish_reason) for request in requests]

    expected = answers()
    recorder = Recorder(monkeypatch, triton)
    with np.errstate(all="ignore"):
        assert answers(capture=recorder.capture, depth=2) == expected
    assert recorder.replays


def test_batch_invariance(monkeypatch):
    """With batch_invariant an answer is bit-identical alone and in a batch; without it, it need not be."""
    on_triton(monkeypatch)
    ids = torch.randint(1, 96, (3, 12), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    flags = {"do_sample": False, "max_new_tokens": 2, "eos_token_id": [], "output_logits": True}

    def logits(ids):
        with np.errstate(all="ignore"):
            steps = model.generate(ids, return_dict_in_generate=True, **flags).logits
        return torch.stack(steps)[1:, 0]  # the decode step of the first prompt

    for invariant in (False, True):
        model = make(torch.float32, num_hidden_layers=1)
        model.model.batch_invariant = invariant
        assert logits(ids[:1]).equal(logits(ids)) == invariant


def test_drafts_change_no_bit(monkeypatch):
    """With batch_invariant: two texts that repeat themselves, sampled with penalties, in captured steps."""
    recorder = Recorder(monkeypatch, triton)
    settings = [{"temperature": 0, "frequency_penalty": 0.1, "logit_bias": {5: 99.0}}, {"seed": 2, "top_k": 2}]

    def answers(speculation):
        model = make(torch.bfloat16, num_hidden_layers=1, max_position_embeddings=64)
        model.model.batch_invariant = True
        options = {"capture": recorder.capture, "depth": 2, "speculation": speculation}
        engine = Engine(model, max_batch_size=2, max_seq_len=64, **options)
        requests = [Request([5, 6, 7, 8] * 3, SamplingParams(**each), 14) for each in settings]
        engine.add(requests)
        while engine.busy:
            engine.step()
        return [(each.token_ids, each.logprobs) for each in requests], [each.accepted for each in requests]

    with np.errstate(all="ignore"):
        expected, _ = answers(False)
        found, accepted = answers(True)
    assert found == expected and accepted[0] > 5


def test_forward_with_padding_and_positions(monkeypatch):
    """transformers' forward: padding anywhere, explicit positions, a growing cache, hidden states."""
    model = make(torch.float32, num_hidden_layers=1)
    ids = torch.randint(96, (3, 12), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, -4:] = mask[2, 4:7] = 0
    positions = torch.randint(60, (3, 12), generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def run():
        states = model(ids, mask, positions, output_hidden_states=True).hidden_states
        results = [torch.stack(states)[:, mask.bool()]]
        results.append(model(ids[:, ::2], position_ids=positions[:, ::2], use_cache=False).logits)
        cache = model(ids[:, :10], mask[:, :10]).past_key_values
        results += [model(ids[:, n - 1 : n], mask[:, :n], past_key_values=cache).logits for n in (11, 12)]
        return results

    expected = run()
    on_triton(monkeypatch)
    with np.errstate(all="ignore"):
        found = run()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
