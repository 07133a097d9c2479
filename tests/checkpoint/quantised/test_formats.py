"""Quantised checkpoints: every format is read as the weights that it stands for, bit for bit in float32."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch

from internlm3 import InternLM3Config
from internlm3.runtime.checkpoint.load import load_model
from internlm3.runtime.checkpoint.quantised import integers
from internlm3.runtime.model.model import LanguageModel
from internlm3.runtime.model.quantised_linear import QuantisedLinear
from internlm3.tests.support.checkpoints import IDS, load
from internlm3.tests.support.quantised import (
    FP4,
    Checkpoint,
    awq,
    compressed,
    compressed_settings,
    gptq,
    linears,
)

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, "damp_percent": 0.01}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


STACKS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ALL = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def check(checkpoint, dtype="float32", packed=frozenset(ALL)):
    """Loads a checkpoint as floats, and as it is, and compares every weight.

    packed: the layers that the ops take as they are.
    """
    model = load(checkpoint.save(), dtype=dtype)
    found = model.state_dict()
    assert found.keys() == checkpoint.weights.keys()
    for name, weight in checkpoint.weights.items():
        torch.testing.assert_close(found[name], weight.to(getattr(torch, dtype)), rtol=0, atol=0, msg=name)
    assert "quantization_config" not in model.config.to_dict()
    check_packed(checkpoint, dtype, packed)
    return model


def is_float(checkpoint, name):
    return checkpoint.tensors[name].dtype in (torch.float32, torch.bfloat16, torch.float16)


def check_packed(checkpoint, dtype, packed):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        kept = load_model(LanguageModel, checkpoint.folder, dtype=dtype, device="cpu", keep_quantised=True)
    quantised = {path: layer for path, layer in kept.named_modules() if isinstance(layer, QuantisedLinear)}
    assert {path.rpartition(".")[2] for path in quantised} == packed
    # What is converted is said in a line; layers that the checkpoint left alone are not converted.
    stored = {name for name in checkpoint.weights if name not in checkpoint.tensors or not is_float(checkpoint, name)}
    parts = [part for layer in packed for part in STACKS.get(layer, [layer])]
    converted = [name for name in stored if name.split(".")[-2] not in parts]
    assert bool(converted) == (f"converted to {dtype}" in said.getvalue())
    assert not converted or len(converted) == 1 or f" and {len(converted) - 1} more weights" in said.getvalue()
    weights = dict(checkpoint.weights)
    for path, layer in quantised.items():
        parent, _, name = path.rpartition(".")
        parts = [weights.pop(f"{parent}.{part}.weight") for part in STACKS.get(name, [name])]
        torch.testing.assert_close(layer.weight.dense(), torch.cat(parts), rtol=0, atol=0, msg=path)
        numbers = sum(part.numel() for part in parts)
        bits = {"int4": 4, "int8": 8, "float8": 8}[layer.form.kind]
        # 96 columns are padded to 128.
        stored = sum(tensor.numel() * tensor.itemsize for tensor in (layer.words, layer.scales))
        assert stored * 8 / numbers <= bits * 1.34 + 32 / (layer.form.group or 64) + 1e-9
    rest = kept.state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(rest[name], weight.to(rest[name].dtype), rtol=0, atol=0, msg=name)


# -------------------------------------------------------------------- GPTQ and AWQ


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "reordered"])
def test_gptq(tmp_path, version, bits, group, kind):
    symmetric, reordered = kind == "symmetric", kind == "reordered"
    settings = {**GPTQ, "bits": bits, "group_size": group, "sym": symmetric, "desc_act": reordered}
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    # In version 1 a zero of 0 borrows from its neighbour.
    options = {"bits": bits, "group": group, "symmetric": symmetric, "reordered": reordered, "least_zero": 0}
    # Each layer has an order of its own here, and a stack needs one for all.
    packed = {"o_proj", "down_proj"} if reordered and group != -1 else ALL
    check(Checkpoint(tmp_path, settings).quantise(gptq(bits, less_one=2 - version), **options), packed=packed)


@pytest.mark.parametrize("kind", ["asymmetric", "reordered"])
def test_rows_are_packed_a_few_at_a_time(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(integers, "_PACKED_AT_ONCE", 7 * 64)
    reordered = kind == "reordered"
    checkpoint = Checkpoint(tmp_path, {**GPTQ, "desc_act": reordered}).quantise(gptq(), reordered=reordered)
    check(checkpoint, packed={"o_proj", "down_proj"} if reordered else ALL)


def test_symmetric_gptq_of_version_2_that_says_version_1(tmp_path):
    checkpoint = Checkpoint(tmp_path, {**GPTQ, "sym": True}).quantise(gptq(less_one=0), symmetric=True)
    with pytest.warns(UserWarning, match="zeros are of version 2"):
        check(checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autogptq_names(tmp_path, dtype):
    """Its file name, settings in a file of their own, and no g_idx."""
    file = "gptq_model-4bit-32g.safetensors"
    checkpoint = Checkpoint(tmp_path, None, file=file).quantise(gptq(g_idx=False), dtype=dtype)
    settings = {key: value for key, value in GPTQ.items() if key != "quant_method"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    check(checkpoint)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("group", [16, -1])
def test_awq(tmp_path, group, file):
    settings = {**AWQ, "group_size": group, "version": "GEMM", "modules_to_not_convert": None}
    check(Checkpoint(tmp_path, settings, file=file).quantise(awq, group=group, least_zero=0))


# -------------------------------------------------------------------- compressed-tensors


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "reordered"])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_packed_integers(tmp_path, bits, kind, strategy):
    symmetric, reordered = kind != "asymmetric", kind == "reordered" and strategy == "group"
    settings = compressed_settings(
        num_bits=bits, symmetric=symmetric, strategy=strategy, actorder="group" if reordered else None
    )
    options = {"bits": bits, "symmetric": symmetric, "reordered": reordered, "dtype": torch.bfloat16, "least_zero": 0}
    group = 32 if strategy == "group" else -1
    checkpoint = Checkpoint(tmp_path, settings).quantise(compressed(bits, symmetric, reordered), group=group, **options)
    check(checkpoint, packed={"o_proj", "down_proj"} if reordered else ALL)


def scaled(checkpoint, make_parts):
    """Replaces the weight of each layer by the parts that make_parts(shape) returns with its weight."""
    for name, shape in linears(checkpoint.model).items():
        weight, parts = make_parts(shape)
        del checkpoint.tensors[f"{name}.weight"]
        checkpoint.tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}
        checkpoint.weights[f"{name}.weight"] = weight
    return checkpoint


def random_bytes(rng, shape):
    return torch.from_numpy(rng.integers(-128, 128, shape).astype(np.int8))


def random_e4m3(rng, shape):
    """Without NaN."""
    return torch.from_numpy(rng.normal(0, 30, shape).astype(np.float32)).clamp(-448, 448).to(torch.float8_e4m3fn)


def random_scales(rng, shape, dtype=torch.bfloat16):
    return torch.from_numpy(rng.uniform(1e-4, 0.1, shape)).to(dtype)


@pytest.mark.parametrize("format", ["int-quantized", "float-quantized", "naive-quantized"])
@pytest.mark.parametrize("strategy", ["channel", "tensor", "block", "group"])
def test_eight_bits(tmp_path, format, strategy):
    """With activations of 8 bits, which are not read, and their scales."""
    integers = format != "float-quantized"
    settings = compressed_settings(
        format, strategy=strategy, num_bits=8, type="int" if integers else "float", block_structure=[16, 48],
        activations={"num_bits": 8, "dynamic": False, "strategy": "tensor"},
    )  # fmt: skip
    checkpoint = Checkpoint(tmp_path, settings)
    rng = checkpoint.rng

    def parts(shape):
        outputs, inputs = shape
        q = (random_bytes if integers else random_e4m3)(rng, shape)
        sizes = {"channel": (outputs, 1), "tensor": (1,), "group": (outputs, inputs // 32),
                 "block": (-(-outputs // 16), -(-inputs // 48))}  # fmt: skip
        scale = random_scales(rng, sizes[strategy])
        weight = torch.empty(shape)
        for o in range(outputs):
            for i in range(inputs):
                at = {"channel": (o, 0), "tensor": (0,), "group": (o, i // 32), "block": (o // 16, i // 48)}[strategy]
                weight[o, i] = q[o, i].float() * scale[at].float()
        return weight, {"weight": q, "weight_scale": scale, "input_scale": torch.ones(1)}

    check(scaled(checkpoint, parts), packed={"down_proj"} if strategy == "block" else ALL)  # 48 divides its 96 inputs


def test_eight_bits_asymmetric(tmp_path):
    checkpoint = Checkpoint(
        tmp_path, compressed_settings("int-quantized", strategy="channel", num_bits=8, symmetric=False)
    )

    def parts(shape):
        q, scale = random_bytes(checkpoint.rng, shape), random_scales(checkpoint.rng, (shape[0], 1))
        zero = random_bytes(checkpoint.rng, (shape[0], 1))
        return (q.float() - zero.float()) * scale.float(), {
            "weight": q,
            "weight_scale": scale,
            "weight_zero_point": zero,
        }

    check(scaled(checkpoint, parts))


@pytest.mark.parametrize("nv", [True, False], ids=["nvfp4", "mxfp4"])
def test_floats_of_four_bits(tmp_path, nv):
    size, format = (16, "nvfp4-pack-quantized") if nv else (32, "mxfp4-pack-quantized")
    checkpoint = Checkpoint(tmp_path, compressed_settings(format, type="float", group_size=size))
    rng = checkpoint.rng

    def parts(shape):
        outputs, inputs = shape
        q = rng.integers(0, 16, shape)
        if nv:
            of_tensor = torch.tensor([rng.uniform(1, 1e4)], dtype=torch.float32)
            stored = random_e4m3(rng, (outputs, inputs // size)).float().abs().to(torch.float8_e4m3fn)
            scale = stored.float() / of_tensor
            tensors = {"weight_scale": stored, "weight_global_scale": of_tensor}
        else:
            exponents = rng.integers(0, 255, (outputs, inputs // size))
            exponents[0, 0] = 0
            scale = torch.from_numpy((2.0 ** (exponents.astype(np.float64) - 127)).astype(np.float32))
            tensors = {"weight_scale": torch.from_numpy(exponents.astype(np.uint8))}
        values = [*FP4, *(-value for value in FP4)]
        weight = torch.tensor(
            [[values[q[o, i]] * scale[o, i // size].item() for i in range(inputs)] for o in range(outputs)]
        )
        packed = torch.from_numpy((q[:, 0::2] | q[:, 1::2] << 4).astype(np.uint8))
        return weight, {"weight_packed": packed, **tensors}

    check(scaled(checkpoint, parts))


def test_patterns(tmp_path):
    """Groups of layers of different formats, by regular expressions and names; layers that are ignored."""
    mlp, one, rest = "model.layers.0.mlp", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    settings = compressed_settings(targets=["re:.*mlp.*"], ignore=["re:.*(v|o)_proj", "lm_head"])
    settings["config_groups"]["group_1"] = compressed_settings(num_bits=8, targets=[one, rest])["config_groups"][
        "group_0"
    ]
    checkpoint = Checkpoint(tmp_path, settings)
    checkpoint.quantise(
        compressed(4, True), [name for name in linears(checkpoint.model) if mlp in name], symmetric=True
    )
    checkpoint.quantise(compressed(8, True), [one, rest], bits=8, symmetric=True)
    check(checkpoint, packed={"gate_up_proj", "down_proj"})  # q, k and v have different forms, and o none


# -------------------------------------------------------------------- other methods


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_smooth_quant(tmp_path, kind, file):
    checkpoint = Checkpoint(tmp_path, {"quant_method": "smooth_quant", "quant_dtype": kind}, file=file)

    def parts(shape):
        q = (random_bytes if kind == "int8" else random_e4m3)(checkpoint.rng, shape)
        scale = random_scales(checkpoint.rng, (shape[0], 1), torch.float32)
        return q.float() * scale, {"weight": q, "scale": scale}

    check(scaled(checkpoint, parts))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4_bits(tmp_path, kind, nested):
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
                "bnb_4bit_use_double_quant": nested, "llm_int8_threshold": 6.0}  # fmt: skip
    checkpoint = Checkpoint(tmp_path, settings)
    rng = checkpoint.rng

    def parts(shape):
        size, block, nested_block = shape[0] * shape[1], 64, 16
        q, values = rng.integers(0, 16, size), rng.normal(size=16).astype(np.float32)
        state = {"blocksize": block, "quant_type": kind, "dtype": "bfloat16", "shape": list(shape)}
        count = size // block
        absmax = rng.uniform(0, 2, count).astype(np.float32)
        tensors = {}
        if nested:
            index, table = rng.integers(0, 256, count), rng.normal(size=256).astype(np.float32)
            outer = rng.uniform(0, 0.01, -(-count // nested_block)).astype(np.float32)
            state |= {"nested_blocksize": nested_block, "nested_offset": 0.25, "nested_dtype": "float32"}
            absmax = table[index] * outer[np.arange(count) // nested_block] + np.float32(0.25)
            tensors = {
                "weight.nested_absmax": torch.from_numpy(outer),
                "weight.nested_quant_map": torch.from_numpy(table),
            }
        weight = torch.from_numpy((values[q] * absmax[np.arange(size) // block]).reshape(shape))
        return weight, {
            "weight": torch.from_numpy((q[0::2] << 4 | q[1::2]).astype(np.uint8))[:, None],
            "weight.quant_map": torch.from_numpy(values),
            "weight.absmax": torch.from_numpy(index.astype(np.uint8) if nested else absmax),
            f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(
                list(json.dumps(state).encode()), dtype=torch.uint8
            ),
            **tensors,
        }

    check(scaled(checkpoint, parts), packed=set())  # a table of values is no product


def test_bitsandbytes_blocks_larger_than_the_layer(tmp_path):
    """However large: no memory is taken for more than the layer. Small tensors may have any shape."""
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True}  # fmt: skip
    checkpoint = Checkpoint(tmp_path, settings)

    def parts(shape):
        q, values = checkpoint.rng.integers(0, 16, shape).astype(np.uint8), torch.linspace(-1, 1, 16)
        state = {"blocksize": 2**60, "nested_blocksize": 2**60, "nested_offset": 0.25, "shape": list(shape)}
        outer, table = torch.tensor([[0.5]]), torch.linspace(0, 1, 256)
        weight = values[torch.from_numpy(q).long()] * (table[77] * 0.5 + 0.25)
        return weight, {
            "weight": torch.from_numpy(q.flatten()[0::2] << 4 | q.flatten()[1::2])[:, None],
            "weight.quant_map": values,
            "weight.absmax": torch.tensor(77, dtype=torch.uint8),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor([list(json.dumps(state).encode())], dtype=torch.uint8),
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": table,
        }

    check(scaled(checkpoint, parts), packed=set())


def test_bitsandbytes_8_bits(tmp_path):
    checkpoint = Checkpoint(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True})

    def parts(shape):
        q, scale = random_bytes(checkpoint.rng, shape), random_scales(checkpoint.rng, (shape[0],), torch.float32)
        weight = q.float() * (scale / 127)[:, None]
        return weight, {"weight": q, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    check(scaled(checkpoint, parts))


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_torchao(tmp_path, kind):
    settings = {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 2, "_data": {}}}}
    checkpoint = Checkpoint(tmp_path, settings)

    def parts(shape):
        q = (random_e4m3 if kind.startswith("Float8") else random_bytes)(checkpoint.rng, shape)
        count = shape[1] // 32 if kind.startswith("Intx") else 1
        scale, zero = random_scales(checkpoint.rng, (shape[0], count)), random_bytes(checkpoint.rng, (shape[0], count))
        if kind.startswith("Float8"):
            return q.float() * scale.float(), {"_weight_qdata": q, "_weight_scale": scale}
        weight = (q.float().unflatten(1, (count, -1)) - zero.float()[:, :, None]) * scale.float()[:, :, None]
        return weight.flatten(1), {"_weight_qdata": q, "_weight_scale": scale, "_weight_zero_point": zero}

    check(scaled(checkpoint, parts))


# -------------------------------------------------------------------- the model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounded_once_to_the_models_dtype(tmp_path, dtype):
    check(Checkpoint(tmp_path, GPTQ).quantise(gptq()), dtype)


def test_parts_of_a_layer_in_different_files(tmp_path):
    checkpoint = Checkpoint(tmp_path, AWQ).quantise(awq)
    folder = checkpoint.save()
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    (folder / "model.safetensors").unlink()
    halves = {
        "model-00001-of-00002.safetensors": {n: t for n, t in tensors.items() if "scales" in n or "norm" in n},
        "model-00002-of-00002.safetensors": {n: t for n, t in tensors.items() if "scales" not in n and "norm" not in n},
    }
    for file, half in halves.items():
        save_file(half, folder / file)
    weight_map = {name: file for file, half in halves.items() for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = load(folder).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in checkpoint.weights.items())


def test_logits_are_those_of_the_dense_model(tmp_path):
    (tmp_path / "quantised").mkdir()
    checkpoint = Checkpoint(tmp_path / "quantised", GPTQ, qkv_bias=True, bias=True)
    checkpoint.quantise(lambda layer: {k: v for k, v in gptq()(layer).items() if k != "bias"})
    model = load(checkpoint.save())
    checkpoint.model.load_state_dict(checkpoint.weights)
    torch.testing.assert_close(model(IDS).logits, checkpoint.model(IDS).logits, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "dense")
    again = load(tmp_path / "dense")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=0)


def test_the_configuration_says_how(tmp_path):
    folder = Checkpoint(tmp_path, GPTQ).quantise(gptq()).save()
    assert InternLM3Config.from_pretrained(folder).quantization_config == GPTQ
