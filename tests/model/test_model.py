"""The forward pass against transformers and against a float64 twin that is written from the model's specification."""

from typing import Any

import pytest
import torch
import transformers

from internlm3 import InternLM3Config, InternLM3ForCausalLM, InternLM3Model
from internlm3.runtime.model.rope import inverse_frequencies, rope_base

SMALL: Any = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}}
SHAPES: dict[str, dict] = {
    "group 1": {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 128},
    "group 3": {},
    "group 3 of 2, dim 128": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 128},
    "group 16, dim 128": {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 128},
    "hidden = heads * dim": {"hidden_size": 192, "head_dim": None},
    "qkv_bias": {"qkv_bias": True},
    "bias": {"bias": True},
    "both biases": {"qkv_bias": True, "bias": True},
    "tied": {"tie_word_embeddings": True},
    "dynamic": DYNAMIC,
    "all at once": {"num_attention_heads": 16, "tie_word_embeddings": True, "qkv_bias": True, **DYNAMIC},
}
PUBLISHED = InternLM3Config(
    head_dim=128, rope_theta=5e7, num_key_value_heads=2, rope_scaling={"rope_type": "dynamic", "factor": 6.0}
)


def random_model(seed=0, **shape):
    """A model whose every weight matters: logits of size 1 or so, biases and norms that are not 0 and 1."""
    model = InternLM3ForCausalLM(InternLM3Config(**{**SMALL, **shape}), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            values *= parameter.shape[1] ** -0.5
        elif parameter.shape == (model.config.hidden_size,):
            values = 1 + values / 4
        parameter.copy_(values)
    return model


def random_ids(rows, tokens, seed=0, vocab=SMALL["vocab_size"]):
    return torch.randint(vocab, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def by_transformers(model, dtype=torch.float32):
    """The same model in transformers; its InternLM3 has no bias on q, k and v alone, which its Qwen2 has."""
    config = model.config
    assert config.qkv_bias or not config.bias, "transformers has no such model"
    kind = transformers.InternLM3Config if config.qkv_bias == config.bias else transformers.Qwen2Config
    values = {**config.to_dict(), "rope_parameters": config.rope_parameters}
    for key in ("architectures", "model_type", "torch_dtype", "rope_theta", "rope_scaling"):
        del values[key]
    twin = transformers.AutoModelForCausalLM.from_config(kind(**values)).to(dtype).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def by_hand(model, ids, positions=None, begun=None, embeds=None):
    """Logits [T, V] of one sequence, float64, written from the specification: token by token, head by head.

    `begun` is the length that fixed the rotary base; by default the one that the positions have.
    """
    config = model.config
    w = {name: weight.double() for name, weight in model.state_dict().items()}
    x = w["model.embed_tokens.weight"][ids] if embeds is None else embeds.double()
    tokens, dim, group = len(x), config.head_dim, config.num_attention_heads // config.num_key_value_heads
    positions = torch.arange(tokens) if positions is None else positions
    length = int(positions.max()) + 1 if begun is None else begun
    base, window = config.rope_theta, config.max_position_embeddings
    if config.rope_scaling is not None and length > window:
        factor = config.rope_scaling["factor"]
        base *= (factor * length / window - (factor - 1)) ** (dim / (dim - 2))

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * w[name]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def rotate(vector, position):
        angle = float(position) * base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        a, b = vector[: dim // 2], vector[dim // 2 :]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))

    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        h = norm(x, name + "input_layernorm.weight")
        q, k, v = (linear(h, f"{name}self_attn.{part}_proj").view(tokens, -1, dim) for part in "qkv")
        k = torch.stack([torch.stack([rotate(head, positions[t]) for head in k[t]]) for t in range(tokens)])
        q = torch.stack([torch.stack([rotate(head, positions[t]) for head in q[t]]) for t in range(tokens)])
        mixed = torch.zeros_like(q)
        for t in range(tokens):
            for head in range(config.num_attention_heads):
                scores = k[: t + 1, head // group] @ q[t, head] * dim**-0.5
                mixed[t, head] = scores.softmax(0) @ v[: t + 1, head // group]
        x = x + linear(mixed.view(tokens, -1), name + "self_attn.o_proj")
        h = norm(x, name + "post_attention_layernorm.weight")
        gate = linear(h, name + "mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, name + "mlp.up_proj"), name + "mlp.down_proj")
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def assert_near(ours, theirs, live=None, within=1e-4):
    """Each position's largest error, as a share of its largest logit."""
    assert ours.shape == theirs.shape
    share = (ours.double() - theirs.double()).abs().amax(-1) / theirs.double().abs().amax(-1)
    worst = (share if live is None else share[live.bool()]).max().item()
    assert worst < within, f"off by {worst:.2e} of the largest logit"


# -------------------------------------------------------------------- logits


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_specification(shape):
    for seed in (1, 2):
        model = random_model(seed, **SHAPES[shape])
        ids = random_ids(2, 11, seed)
        ours = model(ids).logits
        assert_near(ours, torch.stack([by_hand(model, row) for row in ids]))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "bias"])  # which transformers does not have
@pytest.mark.parametrize("tokens", [40, 64, 65, 200])  # of a window of 64
def test_logits_are_those_of_transformers(shape, tokens):
    model = random_model(tokens, **SHAPES[shape])
    ids = random_ids(3, tokens, tokens)
    assert_near(model(ids).logits, by_transformers(model)(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["group 3", "group 16, dim 128", "both biases"])
def test_half_precision_is_as_exact_as_transformers(dtype, shape):
    """Summed over seeds, the distance from float64 is not above transformers' own (but for 5 %, which is chance)."""
    ours = theirs = 0.0
    for seed in range(6):
        half = random_model(seed, **SHAPES[shape]).to(dtype)
        ids = random_ids(1, 24, seed)
        exact = by_hand(half, ids[0])
        ours += (half(ids).logits[0].double() - exact).pow(2).mean().item()
        theirs += (by_transformers(half, dtype)(ids).logits[0].double() - exact).pow(2).mean().item()
    assert ours < 1.05 * theirs


# -------------------------------------------------------------------- masks, positions, embeddings, cache


def masks(tokens):
    mask = torch.ones(4, tokens, dtype=torch.int64)
    mask[0, :5] = 0  # left
    mask[1, -7:] = 0  # right
    mask[2, 4:9] = 0  # a hole
    mask[3, 0] = mask[3, 6] = mask[3, -1] = 0
    return mask


@pytest.mark.parametrize("tokens", [20, 80])
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32], ids=str)
def test_padding_anywhere(tokens, kind):
    model = random_model(3, **DYNAMIC)
    ids, mask = random_ids(4, tokens, 3), masks(tokens)
    theirs = by_transformers(model)(ids, attention_mask=mask).logits
    assert_near(model(ids, mask.to(kind)).logits, theirs, mask)


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_changes_nothing_of_a_row(use_cache):
    """With positions that skip the padding, a row is bit for bit what it is alone."""
    model = random_model(4)
    ids, mask = random_ids(4, 20, 4), masks(20)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(ids, mask, positions, use_cache=use_cache).logits
    for row in range(4):
        live = mask[row].bool()
        assert_near(together[row][live], model(ids[row][live][None]).logits[0], within=1e-6)


def test_position_ids():
    model = random_model(5, **DYNAMIC)
    twin, ids = by_transformers(model), random_ids(2, 9, 5)
    positions = torch.tensor([[0, 1, 2, 3, 50, 51, 52, 53, 60], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    assert_near(model(ids, position_ids=positions).logits, twin(ids, position_ids=positions).logits)
    for given in (positions[0], positions[:1]):
        ours = model(ids, position_ids=given).logits
        assert_near(ours, twin(ids, position_ids=positions[:1].expand(2, -1)).logits)


def test_inputs_embeds():
    model = random_model(6)
    embeds = torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(6))
    ours = model(inputs_embeds=embeds).logits
    assert_near(ours, by_transformers(model)(inputs_embeds=embeds).logits)
    assert_near(ours[1], by_hand(model, None, embeds=embeds[1]))


def test_embeddings_and_sizes_are_those_of_transformers():
    for shape in ({"qkv_bias": True}, {"tie_word_embeddings": True}):
        model, ids = random_model(6, **shape), random_ids(2, 9, 6)
        twin = by_transformers(model)
        embeds = model.get_input_embeddings()(ids)
        assert embeds.equal(twin.get_input_embeddings()(ids))
        assert model(inputs_embeds=embeds).logits.equal(model(ids).logits)
        assert model.get_output_embeddings().weight.equal(twin.get_output_embeddings().weight)
        assert model.get_memory_footprint(return_buffers=False) == twin.get_memory_footprint(return_buffers=False)
        for exclude in (False, True):
            assert model.num_parameters(exclude_embeddings=exclude) == twin.num_parameters(exclude_embeddings=exclude)
        assert model.num_parameters(only_trainable=True) == 0


def test_a_module_that_fused_ops_replace_takes_no_hook():
    """A hook of it would never run. Those of a block do."""
    model, seen = random_model(6), []
    block = model.model.layers[0]
    for part in (block.mlp, block.self_attn, block.mlp.down_proj, model.model.norm, model.lm_head):
        for call in (part, part.register_forward_hook, part.register_forward_pre_hook):
            with pytest.raises(NotImplementedError, match=f"{type(part).__name__} is not called: .*hooks of a block"):
                call(lambda *_: None)
    block.register_forward_hook(lambda *_: seen.append(1))
    model(random_ids(1, 3))
    assert seen == [1]


@pytest.mark.parametrize("cuts", [[30, 1, 1, 1], [1] * 33, [10, 23], [32, 1]], ids=str)
@pytest.mark.parametrize("shape", ["group 3", "group 1", "dynamic"])
def test_continued_from_the_cache(cuts, shape):
    model = random_model(7, **SHAPES[shape])
    ids = random_ids(2, 33, 7)
    cache, parts = None, []
    for part in ids.split(cuts, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert_near(torch.cat(parts, 1), model(ids, use_cache=False).logits, within=1e-5)
    assert cache is not None and cache.get_seq_length() == 33


def test_continued_from_the_cache_with_padding():
    model = random_model(8)
    twin, ids = by_transformers(model), random_ids(4, 24, 8)
    mask = torch.cat([masks(20), torch.ones(4, 4, dtype=torch.int64)], 1)
    theirs = twin(ids, attention_mask=mask).logits
    cache = model(ids[:, :20], mask[:, :20]).past_key_values
    cut = model(ids[:, 20:], mask, past_key_values=cache).logits
    assert_near(cut, theirs[:, 20:])


def test_a_mask_over_the_cache_says_what_it_was():
    """As in transformers where it does; a mask that changes the past is refused, as padding is not cached."""
    model = random_model(8)
    ids, mask = random_ids(2, 9, 8), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :2] = mask[1, 6] = 0

    def go_on(begin, rest):
        cache = model(ids[:, :5], begin).past_key_values
        cache = model(ids[:, 5:8], mask[:, :8], past_key_values=cache).past_key_values
        return model(ids[:, 8:], rest, past_key_values=cache).logits

    expected = by_transformers(model)(ids, attention_mask=mask).logits[:, 8:]
    for kind in (torch.int64, torch.bool, torch.float32):
        assert_near(go_on(mask[:, :5], mask.to(kind)), expected)
    hidden, shown, last = mask.clone(), mask.clone(), mask.clone()
    hidden[1, 3], shown[0, 1], last[1, 7] = 0, 1, 0
    for changed, message in (
        (hidden, "makes column 3 of row 1 padding, and it entered the cache as a token"),
        (last, "makes column 7 of row 1 padding, and it entered the cache as a token"),
        (shown, "makes column 1 of row 0 a token, and it entered the cache as padding"),
        (None, "makes column 0 of row 0 a token, and it entered the cache as padding"),
        (mask[:, 8:], r"attention_mask has shape \[2, 1\], must be \[2, 9\], the past included"),
    ):
        with pytest.raises(ValueError, match=message):
            go_on(mask[:, :5], changed)


def test_use_cache_is_the_configurations_unless_it_is_said():
    model = random_model(9, use_cache=False)
    ids = random_ids(1, 4)
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    assert random_model(9)(ids, use_cache=False).past_key_values is None


# -------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([2, 0, 5]), torch.tensor([0]), torch.tensor([4])], ids=str)
def test_logits_to_keep(keep):
    model = random_model(10)
    ids = random_ids(2, 6, 10)
    theirs = by_transformers(model)(ids, logits_to_keep=keep).logits
    assert_near(model(ids, logits_to_keep=keep).logits, theirs)


def test_hidden_states():
    model = random_model(11)
    ids = random_ids(2, 8, 11)
    theirs = by_transformers(model)(ids, output_hidden_states=True).hidden_states
    ours = model(ids, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 3
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
    decoder = model.model(ids, output_hidden_states=True)
    torch.testing.assert_close(decoder.last_hidden_state, ours[-1], rtol=0, atol=0)
    assert model(ids).hidden_states is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss(dtype):
    model = random_model(12).to(dtype)
    ids = random_ids(3, 10, 12)
    labels = ids.clone()
    labels[0, :4] = labels[2, 7:] = -100
    ours = model(ids, labels=labels)
    theirs = by_transformers(model, dtype)(ids, labels=labels)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # bfloat16 logits of size 3 carry errors of 1/128
    torch.testing.assert_close(ours.loss, theirs.loss.float(), rtol=tolerance, atol=0)
    assert ours.loss.dtype == torch.float32
    log_probs = ours.logits[:, :-1].float().log_softmax(-1)
    picked = [log_probs[b, t, labels[b, t + 1]] for b in range(3) for t in range(9) if labels[b, t + 1] != -100]
    torch.testing.assert_close(ours.loss, -torch.stack(picked).mean())


def test_the_decoder_alone():
    config = InternLM3Config(**SMALL)
    decoder = InternLM3Model(config, dtype=torch.float32)
    out = decoder(random_ids(2, 5))
    assert out.last_hidden_state.shape == (2, 5, 96)
    assert decoder.dtype == torch.float32 and decoder.device.type == "cpu"


def test_weights_are_named_as_in_transformers():
    for shape in ({}, {"qkv_bias": True, "bias": True}, {"tie_word_embeddings": True}):
        model = random_model(13, **shape)
        twin = by_transformers(model)  # loads our state_dict: every name and shape agrees
        assert list(model.state_dict()) and set(model.state_dict()) == set(twin.state_dict())
        other = random_model(14, **shape)
        other.load_state_dict(twin.state_dict())
        ids = random_ids(1, 6)
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=0)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == bool(shape.get("tie_word_embeddings"))


@pytest.mark.parametrize("names", [["q_proj", "v_proj"], ["gate_proj"], ["k_proj", "up_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_some_projections_changes_these_only(names, assign):
    """As a merged LoRA is loaded: the others keep their weights, and both libraries report them as missing."""
    model, other = random_model(13, qkv_bias=True, bias=True), random_model(14, qkv_bias=True, bias=True)
    twin = by_transformers(model)
    some = {name: weight for name, weight in other.state_dict().items() if name.split(".")[-2] in names}
    assert some
    ours, theirs = (each.load_state_dict(some, strict=False, assign=assign) for each in (model, twin))
    assert sorted(ours.missing_keys) == sorted(theirs.missing_keys) and not ours.unexpected_keys
    assert all(weight.equal(model.state_dict()[name]) for name, weight in twin.state_dict().items())
    torch.testing.assert_close(model(random_ids(1, 6)).logits, twin(random_ids(1, 6)).logits)
    with pytest.raises(RuntimeError, match=r'Missing key.*"model\.layers\.0\.self_attn\.o_proj\.weight"'):
        model.load_state_dict(some)


def test_a_projection_of_another_shape_is_named():
    model = random_model(13)
    name = "model.layers.1.self_attn.k_proj.weight"
    state = {**model.state_dict(), name: torch.zeros(7, SMALL["hidden_size"])}
    with pytest.raises(RuntimeError, match=rf"{name} has shape \[7, {SMALL['hidden_size']}\], and the model's has"):
        model.load_state_dict(state)


# -------------------------------------------------------------------- dynamic NTK


@pytest.mark.parametrize(
    ("length", "base"),
    [
        (1, 5e7),
        (32768, 5e7),
        (40000, 117777118.66),
        (65536, 360979300.43),
        (131072, 995454195.85),
        (196608, 1636831996.68),
    ],
)
def test_dynamic_base(length, base):
    assert rope_base(PUBLISHED, length) == pytest.approx(base, rel=1e-10)
    exact = base ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    torch.testing.assert_close(inverse_frequencies(PUBLISHED, length).double(), exact, rtol=1e-6, atol=0)


def test_the_base_grows_from_the_window_on():
    plain = InternLM3Config(head_dim=128, rope_theta=5e7)
    for length in (1, 100, 32768):
        assert torch.equal(inverse_frequencies(PUBLISHED, length), inverse_frequencies(plain, length))
    assert rope_base(PUBLISHED, 32769) > 5e7
    assert rope_base(plain, 200000) == 5e7


def test_a_base_of_more_than_64_bits():
    """JSON has integers of any size."""
    whole = InternLM3Config(head_dim=128, rope_theta=10**30)
    assert torch.equal(inverse_frequencies(whole, 1), inverse_frequencies(InternLM3Config(rope_theta=1e30), 1))


def test_the_base_is_fixed_when_a_sequence_begins():
    """A sequence that outgrows the window, or what it was when it began, keeps its first base: its keys agree."""
    model = random_model(15, num_hidden_layers=1, **DYNAMIC)
    ids = random_ids(1, 100, 15)
    for begun in (40, 64, 70):
        cache = model(ids[:, :begun]).past_key_values
        rest = [model(part, past_key_values=cache).logits for part in ids[:, begun:].split([1, 3, 96 - begun], dim=1)]
        assert_near(torch.cat(rest, 1)[0], by_hand(model, ids[0], begun=begun)[begun:])


def test_each_row_has_its_own_base():
    model = random_model(16, num_hidden_layers=1, **DYNAMIC)
    ids, tokens = random_ids(2, 80, 16), torch.tensor([80, 50])
    positions = torch.stack([torch.arange(80), torch.arange(80).clamp(max=49)])
    mask = torch.arange(80) < tokens[:, None]
    logits = model(ids, mask, positions).logits
    assert_near(logits[0], by_hand(model, ids[0]))
    assert_near(logits[1, :50], by_hand(model, ids[1, :50]))


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": random_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 96)}, "not both"),
        ({"inputs_embeds": torch.zeros(1, 3, 95)}, r"inputs_embeds has shape \[1, 3, 95\]"),
        ({"inputs_embeds": torch.zeros(1, 0, 96)}, "inputs_embeds"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "input_ids must be integers"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "input_ids must be integers"),
        ({"input_ids": torch.zeros(1, 3)}, "input_ids must be integers"),
        ({"input_ids": torch.tensor([[1, 97]])}, "97, which is outside the vocabulary of 97"),
        ({"input_ids": torch.tensor([[1, -1]])}, "-1, which is outside the vocabulary of 97"),
        ({"input_ids": random_ids(2, 3), "attention_mask": torch.ones(2, 4)}, "attention_mask has shape"),
        ({"input_ids": random_ids(2, 3), "attention_mask": torch.ones(3)}, "attention_mask has shape"),
        ({"input_ids": random_ids(2, 3), "position_ids": torch.zeros(2, 4).long()}, "position_ids has shape"),
        ({"input_ids": random_ids(2, 3), "labels": random_ids(2, 4)}, "labels has shape"),
        ({"input_ids": random_ids(2, 3), "labels": random_ids(2, 3), "logits_to_keep": 1}, "logits_to_keep is 1"),
        ({"input_ids": random_ids(2, 3), "labels": random_ids(2, 3) + 97}, "labels"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_model()(**arguments)


def test_a_cache_of_other_rows():
    model = random_model()
    cache = model(random_ids(2, 3)).past_key_values
    with pytest.raises(ValueError, match="past_key_values has 2 sequences, and the input 3"):
        model(random_ids(3, 1), past_key_values=cache)


# -------------------------------------------------------------------- a model that moves


def test_a_model_that_was_moved_begins_without_its_cache():
    """The cache has the old dtype (or device) and is refused; without it the model works."""
    model, ids = random_model(17), random_ids(1, 5)
    cache = model(ids).past_key_values
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"past_key_values is on cpu as torch\.float32, and the model is on cpu as"):
        model(ids, past_key_values=cache)
    assert cache.lengths == [5]
    assert model(ids).past_key_values.kv_cache.dtype == torch.bfloat16


def test_a_device_without_ops():
    model = random_model(18).to("meta")
    with pytest.raises(ValueError, match="there are no ops for device 'meta': move the model to 'cpu' or 'cuda'"):
        model(random_ids(1, 5))
