"""`generate` of the demo model against transformers' own: greedy tokens, seeds, stop strings, logits."""

import json
import warnings

import pytest
import torch
import transformers
from filelock import FileLock

from internlm3 import InternLM3ForCausalLM
from internlm3.tests.support.prompts import padded, real_prompts

GREEDY = {"do_sample": False, "max_new_tokens": 40}


def answer_of(row, start, eos=2):
    """The new tokens of a row, up to the end of text."""
    answer = row[start:].tolist()
    return answer[: answer.index(eos) + 1] if eos in answer else answer


@pytest.fixture(scope="session")
def greedy_answers(real, tmp_path_factory, worker_id):
    """transformers' greedy answers to the 50 prompts, in one batch padded on the left; one worker computes them."""
    alone = worker_id == "master"
    folder = tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent
    path = folder / "greedy_answers.json"
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            ids, mask = padded(real_prompts(real.tokenizer), 2, left=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the temperature in generation_config.json
                out = real.theirs.generate(ids, attention_mask=mask, **GREEDY)
            path.write_text(json.dumps([answer_of(row, ids.shape[1]) for row in out]))
    answers = json.loads(path.read_text())
    assert sum(map(len, answers)) > 1500  # real answers, not fifty ends of text
    return answers


def check_greedy(real, expected, prompts, answers):
    """Where texts part, the two tokens must tie in transformers' own logits (closer than 1e-4 of the largest), which
    rounding may break either way; more than one such tie would be no accident. All by the prompt's index.
    """
    ties = []
    for index, answer in answers.items():
        if answer != expected[index]:
            at = next(i for i, (a, b) in enumerate(zip(answer, expected[index], strict=False)) if a != b)
            logits = real.theirs(torch.tensor([prompts[index] + answer[:at]])).logits[0, -1]
            gap = (logits[expected[index][at]] - logits[answer[at]]).abs() / logits.abs().max()
            assert gap < 1e-4, f"prompt {index} parts at token {at} with a gap of {gap:.1e}"
            ties.append(index)
    assert len(ties) <= 1, f"prompts {ties} tie"


def test_logits_are_those_of_transformers(real):
    ids = torch.randint(real.ours.config.vocab_size, (2, 96), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    ours, theirs = real.ours(ids, mask).logits, real.theirs(ids, attention_mask=mask).logits.double()
    share = (ours.double() - theirs).abs().amax(-1) / theirs.abs().amax(-1)
    assert ours.shape == theirs.shape and share[mask.bool()].max() < 1e-4


def test_greedy_tokens_are_those_of_transformers(real, greedy_answers):
    """Alone: a chat in Chinese, code, a Chinese text. The batches below have all 50 prompts."""
    prompts = real_prompts(real.tokenizer)
    answers = {}
    for index in (3, 30, 46):
        out = real.ours.generate(torch.tensor([prompts[index]]), **GREEDY)
        answers[index] = answer_of(out[0], len(prompts[index]))
    check_greedy(real, greedy_answers, prompts, answers)


@pytest.mark.parametrize(
    ("steps", "side"), [("eager", "left"), ("eager", "right"), ("captured", "left")], indirect=["steps"]
)
def test_greedy_tokens_in_a_ragged_batch_are_those_of_transformers(real, greedy_answers, steps, side):
    """All 50 prompts, half of them padded on each side; with captured steps every fifth."""
    prompts = real_prompts(real.tokenizer)
    chosen = range(side == "right", 50, 2) if steps == "eager" else range(0, 50, 5)
    ids, mask = padded([prompts[index] for index in chosen], 2, left=side == "left")
    answers = [answer_of(row, ids.shape[1]) for row in real.ours.generate(ids, mask, **GREEDY)]
    check_greedy(real, greedy_answers, prompts, dict(zip(chosen, answers, strict=True)))


@pytest.mark.parametrize(
    ("steps", "dtype"), [("eager", "float32"), ("eager", "bfloat16"), ("captured", "float32")], indirect=["steps"]
)
def test_a_seed_is_a_text(demo_model, real, steps, dtype):
    """The same seed gives the same text: twice, alone, in any batch, at any place; streams and seeds differ."""
    model = real.ours
    if dtype != "float32":
        model = InternLM3ForCausalLM.from_pretrained(demo_model, dtype=dtype, device="cpu", progress=False)
    prompts = [real_prompts(real.tokenizer)[index] for index in (11, 9, 10)]  # a story: its first tokens vary
    options = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 6, "seed": 7}
    alone = [answer_of(model.generate(torch.tensor([p]), **options)[0], len(p)) for p in prompts]
    assert alone[0] == answer_of(model.generate(torch.tensor([prompts[0]]), **options)[0], len(prompts[0]))
    for order, left in (([0, 1, 2], True), ([2, 0], False)):
        ids, mask = padded([prompts[index] for index in order], 2, left)
        together = model.generate(ids, mask, **options)
        assert [answer_of(row, ids.shape[1]) for row in together] == [alone[index] for index in order]
    many = model.generate(torch.tensor([prompts[0]]), num_return_sequences=3, **options)
    assert answer_of(many[0], len(prompts[0])) == alone[0]
    assert len({tuple(row.tolist()) for row in many}) == 3
    other = model.generate(torch.tensor([prompts[0]]), **{**options, "seed": 8})
    assert answer_of(other[0], len(prompts[0])) != alone[0]


@pytest.mark.usefixtures("steps")
def test_stop_strings(real):
    """Text-level stops, across token borders; the stop stays in the sequence, as in transformers."""
    prompt = torch.tensor([real.tokenizer.encode("Count: one, two, three,")])
    greedy = {"do_sample": False, "max_new_tokens": 16}
    text = real.tokenizer.decode(real.ours.generate(prompt, **greedy)[0, prompt.shape[1] :].tolist())
    for start in (3, 8):
        stop = text[start : start + 5]
        out = real.ours.generate(prompt, stop_strings=[stop, "not in the answer"], tokenizer=real.tokenizer, **greedy)
        answer = real.tokenizer.decode(out[0, prompt.shape[1] :].tolist())
        assert stop in answer and stop not in real.tokenizer.decode(out[0, prompt.shape[1] : -1].tolist())
        assert real.ours.generate(prompt, stop_strings=stop, tokenizer=real.tokenizer, **greedy).equal(out)
    with pytest.raises(ValueError, match=r"stop_strings needs tokenizer="):
        real.ours.generate(prompt, stop_strings="x", **greedy)


def test_transformers_text_streamer(real, capsys):
    prompt = torch.tensor([real.tokenizer.encode("The capital of France is")])
    streamer = transformers.TextStreamer(real.tokenizer, skip_prompt=True)
    out = real.ours.generate(prompt, streamer=streamer, do_sample=False, max_new_tokens=12)
    assert capsys.readouterr().out.strip() == real.tokenizer.decode(out[0, prompt.shape[1] :].tolist()).strip()
