"""The real checkpoint's own answers. Runs where INTERNLM3_CHECKPOINT names internlm3-8b-instruct (a folder, or its hub
name), and says that it was skipped everywhere else.

The values were published with InternLM3's implementation for transformers (its model tests), the ids of the English
prompt with a bring-up of the same checkpoint elsewhere.
"""

import os

import pytest
import torch
from internlm3 import LLM, InternLM3ForCausalLM, InternLM3Tokenizer

CHECKPOINT = os.environ.get("INTERNLM3_CHECKPOINT")
pytestmark = pytest.mark.skipif(
    not CHECKPOINT, reason="the real checkpoint: set INTERNLM3_CHECKPOINT to the folder of internlm3-8b-instruct"
)

IDS = [1, 306, 4658, 278, 6593, 310, 2834, 338]
# fmt: off
GOLDEN = {
    torch.bfloat16: (
        [-0.2686, 1.1701, 3.5237, 3.8104, 4.2634, 3.7399, 3.7684, 4.6514],
        [-1.7578, -0.5508, 3.5625, -0.6641, 1.9141, 1.5781, 1.2422, 0.7227,
         0.3438, 0.5078, 0.5039, -1.9766, 7.6875, -1.9766, -1.5703],
    ),
    torch.float16: (
        [-0.2332, 1.1851, 3.5305, 3.8233, 4.2801, 3.7457, 3.7795, 4.6220],
        [-1.5908, -0.4353, 3.2070, -0.4221, 1.8008, 1.4951, 1.1963, 0.7026,
         0.3464, 0.4961, 0.5063, -1.8018, 7.1289, -1.8018, -1.2461],
    ),
}
# fmt: on
# Their hardware and attention are unknown: these allow for roundings of a 48-layer bfloat16 (float16) model.
TOLERANCE = {torch.bfloat16: 0.15, torch.float16: 0.05}
FRENCH_REVOLUTION = (
    "The French Revolution was a pivotal period in history that lasted from 1789 to 1799, fundamentally transforming "
    "France and having far-reaching global impacts."
)
INDUSTRIAL_REVOLUTION = [1, 1019, 30517, 19969, 1752, 20657, 293, 19649, 25461, 899, 4542, 272, 5808]


@pytest.fixture(scope="module")
def model():
    return InternLM3ForCausalLM.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer():
    return InternLM3Tokenizer.from_pretrained(CHECKPOINT)


@pytest.mark.parametrize("dtype", list(GOLDEN), ids=str)
def test_logits(dtype):
    model = InternLM3ForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype)
    logits = model(torch.tensor([IDS])).logits[0].float().cpu()
    means, first = (torch.tensor(values) for values in GOLDEN[dtype])
    torch.testing.assert_close(logits.mean(-1), means, atol=TOLERANCE[dtype], rtol=1e-2)
    torch.testing.assert_close(logits[0, :15], first, atol=TOLERANCE[dtype], rtol=1e-2)


def test_a_long_repetition_goes_on(model):
    ids = torch.tensor([[1] + [306, 338] * 2048])
    assert model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :].tolist() == [306, 8631, 306, 8631]


@pytest.mark.parametrize(
    ("prompt", "new", "answer"),
    [
        ("Tell me about the french revolution.", 64, FRENCH_REVOLUTION),
        ("My favourite condiment is ", 20, "100% pure tomato sauce. I love it on pizza, in pasta sauce"),
    ],
)
def test_greedy_text(model, tokenizer, prompt, new, answer):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    text = tokenizer.decode(model.generate(ids, max_new_tokens=new, do_sample=False)[0], skip_special_tokens=True)
    assert answer in text


def test_ids(tokenizer):
    ids = tokenizer.encode("The Industrial Revolution began in Great Britain during the late")
    assert ids[0] == 1 and ids == INDUSTRIAL_REVOLUTION[: len(ids)]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 128131
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == 128132


def test_it_knows_where_to_stop():
    llm = LLM(CHECKPOINT)
    assert {2, 128131} <= set(llm.eos_token_ids)
    answer = llm.chat("What is the capital of France? Answer in one word.", temperature=0, max_tokens=32)
    assert "Paris" in answer.text and answer.outputs[0].finish_reason == "stop"
