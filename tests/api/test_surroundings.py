"""Another default dtype, another default device and torch.autocast around everything: the results are the same."""

from contextlib import contextmanager

import pytest
import torch

from internlm3 import LLM, InternLM3ForCausalLM, InternLM3Tokenizer, SamplingParams
from internlm3.tests.support.llm import PROMPTS


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
# Every sampling setting that has a tensor, a mask or a processor of its own.
RICH = SamplingParams(
    temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, typical_p=0.95, repetition_penalty=1.1, presence_penalty=0.2,
    frequency_penalty=0.1, seed=3, max_tokens=6, logit_bias={5: 1.5}, suppress_tokens=[7], logprobs=3, n=2,
    begin_suppress_tokens=[9], bad_words_ids=[[11], [12, 13]], no_repeat_ngram_size=3, sequence_bias={(14, 15): 2.0},
    exponential_decay_length_penalty=(2, 1.1), forced_eos_token_id=[2], min_tokens=2,
)  # fmt: skip
IDS = torch.tensor([[1, 5, 9, 33, 63, 0, 12], [3, 3, 3, 8, 8, 8, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


def leaves(value):
    """All tensors and plain values in a result."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for each in value for leaf in leaves(each)] if isinstance(value, (list, tuple)) else [value]


def run_everything(folder, target):
    """Results of loading, encoding, generating, streaming, `generate`, `forward` and saving."""
    llm = LLM(folder, progress=False)
    model = InternLM3ForCausalLM.from_pretrained(folder, device="cpu", progress=False)
    tokenizer = InternLM3Tokenizer.from_pretrained(folder)
    outputs = [*llm.generate(PROMPTS, RICH), llm.generate(PROMPTS[1] * 3, temperature=0, max_tokens=3)]
    answers = [answer for output in outputs for answer in output.outputs]
    chunks = [*llm.stream([{"role": "user", "content": "Hi"}], seed=1, temperature=1.0, max_tokens=4)]
    hooks = {
        "logits_processor": lambda ids, scores: scores - scores.amax(-1, keepdim=True),
        "prefix_allowed_tokens_fn": lambda row, ids: range(100),
        "stopping_criteria": lambda ids, scores: ids[:, -1] == 77,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 4,
    }  # fmt: skip
    greedy, sampled = model.generate(IDS, MASK, **hooks), model.generate(IDS, do_sample=True, seed=1, max_new_tokens=3)
    whole = model(IDS, MASK, labels=IDS, output_hidden_states=True)
    more = model(IDS[:, :3], torch.cat((MASK, MASK[:, -3:]), 1), past_key_values=whole.past_key_values)
    plain = model.model(IDS, position_ids=IDS.new_tensor([[*range(7)]])).last_hidden_state
    model.save_pretrained(target)
    again = InternLM3ForCausalLM.from_pretrained(target, device="cpu", progress=False)
    torch.manual_seed(0)
    drawn = llm.generate(PROMPTS[0], temperature=1.0, max_tokens=3)
    return leaves([
        [[a.text, a.token_ids, a.logprobs, [*map(repr, a.top_logprobs or ())]] for a in (*answers, *drawn.outputs)],
        [[chunk.text, chunk.logprobs] for chunk in chunks],
        [greedy.sequences, greedy.scores, greedy.logits, greedy.logprobs, sampled],
        [whole.loss, whole.logits, whole.hidden_states, more.logits, plain],
        [again.state_dict(), tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")],
        tokenizer.pad([{"input_ids": [1]}, {"input_ids": [1, 2]}], return_tensors="pt"),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def expected(tiny_folder, tmp_path_factory):
    return run_everything(tiny_folder, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_results_do_not_depend_on_the_surroundings(tiny_folder, expected, tmp_path, surroundings):
    with SURROUNDINGS[surroundings]():
        results = run_everything(tiny_folder, tmp_path)
    for result, wanted in zip(results, expected, strict=True):
        if isinstance(wanted, torch.Tensor):
            assert (result.dtype, result.device) == (wanted.dtype, wanted.device) and result.equal(wanted)
        else:
            assert result == wanted
