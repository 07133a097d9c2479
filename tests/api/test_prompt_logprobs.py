"""How likely the tokens of a prompt are: by the model's definition, whatever runs beside, and as answers have it."""

import asyncio
import time

import pytest
import torch

from internlm3 import LLM, AsyncLLM, InternLM3ForCausalLM
from internlm3.runtime.engine.runner import Runner
from internlm3.runtime.engine.thread import EngineThread

LONG = list(range(300, 300 + 600))  # two chunks


@pytest.fixture(scope="module")
def folder(make):
    return make(max_position_embeddings=1024, num_hidden_layers=1)


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, dtype="float32", progress=False, max_batch_size=4)


@pytest.mark.parametrize("length", [1, 2, 513, 600])
def test_every_token_given_those_before_it(llm, folder, length):
    ids = LONG[:length]
    logits = InternLM3ForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0].double()
    expected = logits.log_softmax(-1)[:-1]
    found = llm.prompt_logprobs(ids, 2)
    assert found.token_ids == ids and found.logprobs[0] is found.top_logprobs[0] is None
    own = expected.gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None])[:, 0]
    assert found.logprobs[1:] == pytest.approx(own.tolist(), abs=1e-4)
    top = [[*each.values()] for each in found.top_logprobs[1:]]
    assert torch.tensor(top).view(-1, 2).double() == pytest.approx(expected.topk(2).values, abs=1e-4)
    for each, row in zip(found.top_logprobs[1:], expected, strict=True):
        assert [row[id].item() for id in each] == pytest.approx([*each.values()], abs=1e-4)


def test_an_answer_as_a_prompt(llm):
    answer = llm.generate("The sea", max_tokens=20, temperature=0.9, seed=1, logprobs=3)
    found = llm.prompt_logprobs(answer.prompt_token_ids + answer.outputs[0].token_ids, 3)
    assert found.logprobs[-20:] == pytest.approx(answer.outputs[0].logprobs, abs=1e-4)
    assert [{*each} for each in found.top_logprobs[-20:]] == [{*each} for each in answer.outputs[0].top_logprobs]
    assert found.logprobs == llm.prompt_logprobs(found.token_ids).logprobs


def test_answers_go_on_beside_it(llm, monkeypatch):
    """Between two chunks there are steps, and neither changes the other."""
    settings = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.9, "seed": 2}
    expected, alone = llm.generate("The sea", **settings).text, llm.prompt_logprobs(LONG).logprobs
    events, step, head = [], Runner.step, llm.model.head
    monkeypatch.setattr(Runner, "step", lambda self: (events.append("step"), step(self))[1])

    def noted(x):
        events.append("chunk" if len(x) > 8 else "head")
        return head(x)

    monkeypatch.setattr(llm.model, "head", noted)

    def held(self, inbox):
        while events.count("step") >= 20 and "end" not in events:  # the answer has 40 tokens, and outlasts the prompt
            time.sleep(0.001)
        of_thread(self, inbox)

    of_thread = EngineThread._step
    monkeypatch.setattr(EngineThread, "_step", held)

    async def main():
        asynchronous = AsyncLLM(llm)
        answer = asyncio.create_task(asynchronous.generate("The sea", **settings))
        while "step" not in events:
            await asyncio.sleep(0)
        found = await asynchronous.prompt_logprobs(LONG)
        events.append("end")
        return (await answer).text, found.logprobs

    text, logprobs = asyncio.run(main())
    assert text == expected and logprobs == alone
    places = [place for place, event in enumerate(events) if event == "chunk"]
    assert len(places) == 2 and "step" in events[events.index("end") :]


def test_an_error_ends_no_answer(llm, monkeypatch):
    settings = {"max_tokens": 30, "ignore_eos": True}
    expected = llm.generate("The sea", temperature=0, **settings).text
    stream = llm.stream("The sea", temperature=0, **settings)
    text = next(stream).text
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(llm.model, "head", lambda x: (_ for _ in ()).throw(MemoryError))
        llm.prompt_logprobs(LONG)
    assert text + "".join(chunk.text for chunk in stream) == expected


def test_bad_input(llm):
    for prompt, count, words in [
        ("", 0, "empty"),
        ([5] * 1025, 0, "1025 tokens, and max_seq_len is 1024"),
        ([10**6], 0, "1000000"),
        ("a", -1, "count must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            llm.prompt_logprobs(prompt, count)
