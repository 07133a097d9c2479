"""The real InternLM3-8B-Instruct against what is published of it: logits, texts, ids. Needs its 18 GB.

Set INTERNLM3_CHECKPOINT to the folder (or hub id) of the real checkpoint to run this; it takes a GPU of 24 GB, or
patience. The numbers are those of the InternLM team's own tests for transformers (pull request 35694, never merged),
whose hardware is not known, and of public runs of the checkpoint.
"""

import os

import pytest
import torch

from internlm3 import InternLM3Config, InternLM3ForCausalLM, InternLM3Tokenizer

CHECKPOINT = os.environ.get("INTERNLM3_CHECKPOINT", "")
pytestmark = pytest.mark.skipif(
    not CHECKPOINT,
    reason="set INTERNLM3_CHECKPOINT to the real InternLM3-8B-Instruct (18 GB) to check its golden values",
)

IDS = [1, 306, 4658, 278, 6593, 310, 2834, 338]
MEANS = {
    "bfloat16": [-0.2686, 1.1701, 3.5237, 3.8104, 4.2634, 3.7399, 3.7684, 4.6514],
    "float16": [-0.2332, 1.1851, 3.5305, 3.8233, 4.2801, 3.7457, 3.7795, 4.6220],
}
FIRST_LOGITS = {
    "bfloat16": [-1.7578, -0.5508, 3.5625, -0.6641, 1.9141, 1.5781, 1.2422, 0.7227, 0.3438, 0.5078, 0.5039, -1.9766,
                 7.6875, -1.9766, -1.5703],
    "float16": [-1.5908, -0.4353, 3.2070, -0.4221, 1.8008, 1.4951, 1.1963, 0.7026, 0.3464, 0.4961, 0.5063, -1.8018,
                7.1289, -1.8018, -1.2461],
}  # fmt: skip
# The two published precisions lie up to 0.04 (means) and 0.56 (single logits) apart, which is bfloat16's rounding in 48
# layers. Another order of summation may be as far from the bfloat16 numbers; float16 rounds eight times finer.
TOLERANCE = {"bfloat16": (0.04, 0.56), "float16": (0.01, 0.07)}

REVOLUTION = (
    "The French Revolution was a pivotal period in history that lasted from 1789 to 1799, fundamentally transforming "
    "France and having far-reaching global impacts. It was a complex and multifaceted event, driven by a combination "
    "of social, economic, and political factors.\n\n### Causes of the French Revolution\n\n"
)
INDUSTRIAL = [
    1, 1019, 30517, 19969, 1752, 20657, 293, 19649, 25461, 899, 4542, 272, 5808, 16846, 18992, 371, 17012, 353, 23134,
    10389, 6420, 21011, 29530, 14212, 353, 15683, 17999, 27980, 581, 20051, 282, 1689, 3598, 5629, 27980, 2040, 71491,
    81698, 394, 27980, 10590, 365, 27980, 353, 272, 10664, 14757, 331, 17415, 2878, 3401, 27974, 5563, 5568, 20748,
    1235,
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return InternLM3Tokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def model(request):
    return InternLM3ForCausalLM.from_pretrained(CHECKPOINT, dtype=request.param)


def test_config():
    config = InternLM3Config.from_pretrained(CHECKPOINT)
    expected = {
        "vocab_size": 128512, "hidden_size": 4096, "intermediate_size": 10240, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 5e7, "max_position_embeddings": 32768, "qkv_bias": False, "bias": False,
        "tie_word_embeddings": False,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.rope_parameters == {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 5e7}
    skeleton = InternLM3ForCausalLM(config, device="meta")
    assert sum(parameter.numel() for parameter in skeleton.parameters()) == 8_804_241_408


def test_special_tokens(tokenizer):
    names = ["<unk>", "<s>", "</s>", "<restate>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 128111, 128131]
    assert set(tokenizer.eos_ids) == {2, 128131}


def test_token_ids(tokenizer):
    """The ids of a public run: they spell a text that encodes to them again."""
    text = tokenizer.decode(INDUSTRIAL, skip_special_tokens=True)
    assert text.startswith("The Industrial Revolution began in Great Britain during the late")
    assert tokenizer.encode(text) == INDUSTRIAL


def test_logits(model):
    dtype = str(model.dtype).removeprefix("torch.")
    logits = model(torch.tensor([IDS])).logits[0].float().cpu()
    of_means, of_logits = TOLERANCE[dtype]
    torch.testing.assert_close(logits.mean(-1), torch.tensor(MEANS[dtype]), rtol=0, atol=of_means)
    torch.testing.assert_close(logits[0, :15], torch.tensor(FIRST_LOGITS[dtype]), rtol=0, atol=of_logits)


@pytest.mark.parametrize("model", ["bfloat16"], indirect=True)
def test_greedy_ids(model):
    prompt = torch.tensor([[1, *[306, 338] * 2048]])
    out = model.generate(prompt, do_sample=False, max_new_tokens=4)
    assert out[0, prompt.shape[1] :].tolist() == [306, 8631, 306, 8631]


@pytest.mark.parametrize("model", ["bfloat16"], indirect=True)  # as published
def test_greedy_texts(model, tokenizer):
    for prompt, tokens, expected in (
        ("Tell me about the french revolution.", 128, REVOLUTION),
        ("My favourite condiment is ", 20, "100% pure tomato sauce. I love it on pizza, in pasta sauce"),
    ):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=False, max_new_tokens=tokens)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert text.strip().startswith(expected.strip()), text
