"""Quantised checkpoints that are damaged, or of a form that is not read: one error, before memory is allocated."""

import json

import pytest
import torch

from internlm3.tests.support.checkpoints import change, load, refused
from internlm3.tests.support.quantised import Checkpoint, awq, compressed, compressed_settings, gptq

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
LAYER = "model.layers.0.mlp.up_proj"

pytestmark = pytest.mark.usefixtures("nothing_is_allocated")


def nested(settings, *path):
    """The settings with a value at a path of keys, the last of which is the value."""
    *keys, last, value = path
    settings = json.loads(json.dumps(settings))
    place = settings
    for key in keys:
        place = place[key]
    place[last] = value
    return settings


PACKED = compressed_settings()
WEIGHTS = ("config_groups", "group_0", "weights")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("gptq", ["must be an object"]),
        ({"bits": 4}, ["quantised by None", "it reads gptq, awq"]),
        ({"quant_method": "hqq"}, ["quantised by 'hqq'"]),
        ({"quant_method": ["gptq"]}, ["quantised by ['gptq']"]),
        *(({**GPTQ, "bits": bits}, ["bits is", "4 and 8 only"]) for bits in (2, 3, 16, "4", True, None)),
        *(({**GPTQ, "group_size": size}, ["group_size is"]) for size in (0, -2, "128", None, 32.0, True)),
        ({**GPTQ, "group_size": 48}, ["64 inputs are no multiple of the group size 48", "_proj' cannot be"]),
        ({**GPTQ, "checkpoint_format": "marlin"}, ["checkpoint_format", "marlin"]),
        ({**GPTQ, "is_marlin_format": True}, ["is_marlin_format", "Marlin"]),
        ({**GPTQ, "dynamic": {"-:.*down.*": {}}}, ["dynamic"]),
        ({**GPTQ, "sym": 1}, ["sym is 1"]),
        ({**AWQ, "version": "gemv"}, ["version", "gemv"]),
        ({**AWQ, "version": 5}, ["version is 5"]),
        ({**AWQ, "bits": 8}, ["bits is 8"]),
        ({"quant_method": "smooth_quant", "quant_dtype": "int4"}, ["quant_dtype", "int4"]),
        ({"quant_method": "bitsandbytes"}, ["load_in_4bit"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, ["af4"]),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, ["quant_type"]),
        ({"quant_method": "torchao", "quant_type": "int8"}, ["quant_type is 'int8'"]),
        (nested(PACKED, "format", "marlin-24") | {"config_groups": {}}, ["config_groups is {}"]),
        (nested(PACKED, *WEIGHTS, "num_bits", 3), ["group_0", "num_bits is 3"]),
        (nested(PACKED, *WEIGHTS, "type", "float"), ["type is 'float'"]),
        (nested(PACKED, *WEIGHTS, "strategy", "token"), ["strategy is 'token'"]),
        (nested(PACKED, *WEIGHTS, "dynamic", True), ["dynamic"]),
        (nested(PACKED, "config_groups", "group_0", "format", "marlin-24"), ["format is 'marlin-24'"]),
        (nested(PACKED, "config_groups", "group_0", "output_activations", {"num_bits": 8}), ["output_activations"]),
        (nested(PACKED, "config_groups", "group_0", "targets", "Linear"), ["targets is 'Linear'"]),
        (nested(PACKED, "config_groups", "group_0", "targets", ["re:("]), ["regular expression"]),
        (nested(PACKED, "config_groups", "group_0", 5), ["group_0"]),
        (nested(PACKED, "ignore", [5]), ["ignore is [5]"]),
        (nested(PACKED, "transform_config", {"config_groups": {"R1": {}}}), ["transform_config", "rotations"]),
        (nested(PACKED, "sparsity_config", {"format": "sparse-bitmask"}), ["format is 'sparse-bitmask'"]),
        (nested(PACKED, "kv_cache_scheme", {"num_bits": 8}), ["kv_cache_scheme"]),
        (nested(PACKED, "quantization_status", "frozen"), ["quantization_status"]),
    ],
)
def test_settings(tmp_path, settings, words):
    refused(Checkpoint(tmp_path, settings).quantise(gptq()).save(), ValueError, "config.json", *words)


def test_the_file_of_autogptq(tmp_path):
    Checkpoint(tmp_path, None).quantise(gptq()).save()
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 3, "group_size": 32}))
    refused(tmp_path, ValueError, tmp_path / "quantize_config.json", "bits is 3")


def remove(suffix):
    return lambda tensors: tensors.pop(f"{LAYER}.{suffix}")


def replace(suffix, new):
    def edit(tensors):
        tensors[f"{LAYER}.{suffix}"] = new(tensors[f"{LAYER}.{suffix}"]).contiguous()

    return edit


def put(index, value):
    def new(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return new


def add(suffix, tensor):
    return lambda tensors: tensors.update({f"{LAYER}.{suffix}": tensor})


SYMMETRIC = {**GPTQ, "sym": True}
TENSORS = {
    "gptq": (GPTQ, gptq(), {}),
    "symmetric": (SYMMETRIC, gptq(), {"symmetric": True}),
    "reordered": ({**GPTQ, "desc_act": True}, gptq(), {"reordered": True}),
    "awq": (AWQ, awq, {}),
    "packed": (PACKED, compressed(4, True), {"symmetric": True}),
}


@pytest.mark.parametrize(
    ("form", "edit", "words"),
    [
        ("gptq", remove("qzeros"), [f"{LAYER}.qzeros' is missing"]),
        ("gptq", remove("scales"), [f"{LAYER}.scales' is missing"]),
        ("awq", remove("qweight"), [f"{LAYER}.qweight' is missing"]),
        ("reordered", remove("g_idx"), [f"{LAYER}.g_idx' is missing"]),
        ("packed", remove("weight_scale"), [f"{LAYER}.weight_scale' is missing"]),
        ("gptq", replace("qweight", lambda q: q[:-1]), [f"{LAYER}.qweight' has shape [7, 96]", "[8, 96]"]),
        ("awq", replace("qzeros", lambda q: q[:1]), [f"{LAYER}.qzeros' has shape [1, 12]", "[2, 12]"]),
        ("packed", replace("weight_packed", lambda q: q[:, :-1]), ["weight_packed' has shape [96, 7]"]),
        ("gptq", replace("qweight", lambda q: q.float()), ["qweight' is torch.float32", "torch.int32"]),
        ("gptq", replace("scales", lambda s: s.int()), ["scales' is torch.int32"]),
        *(
            (form, replace(suffix, put(5, bad)), [LAYER, f"{suffix} holds {bad}"])
            for form, suffix in (("gptq", "scales"), ("awq", "scales"), ("packed", "weight_scale"))
            for bad in (0.0, float("inf"), float("nan"))
        ),
        ("gptq", replace("scales", put(5, -0.5)), [f"{LAYER}': scales holds -0.5; scales must be finite and positive"]),
        ("reordered", replace("g_idx", put(3, 2)), ["g_idx holds 2; the layer has groups 0 to 1"]),
        ("reordered", replace("g_idx", put(3, -1)), ["g_idx holds -1"]),
        ("gptq", replace("g_idx", put(3, 1)), ["g_idx reorders the inputs", "desc_act"]),
        ("symmetric", replace("qzeros", put(3, 0x77777778)), ["qzeros holds zeros from 7 to 8", "all are 7"]),
        ("gptq", add("weight", torch.zeros(96, 64)), [f"{LAYER}.weight' is there beside the quantised"]),
        ("gptq", add("bias", torch.ones(96)), [f"{LAYER}.bias' is not zero"]),
        ("awq", add("g_idx", torch.zeros(64, dtype=torch.int32)), [f"{LAYER}.g_idx' is unexpected"]),
        ("packed", add("k_scale", torch.ones(1)), [f"{LAYER}.k_scale' is unexpected"]),
        ("packed", add("weight_zero_point", torch.zeros(12, 2)), ["weight_zero_point' is unexpected"]),
    ],
)
def test_tensors(tmp_path, form, edit, words):
    settings, write, options = TENSORS[form]
    folder = Checkpoint(tmp_path, settings).quantise(write, **options).save()
    change(folder / "model.safetensors", edit)
    refused(folder, ValueError, folder / "model.safetensors", *words)


@pytest.mark.parametrize("pattern", ["re:(", "re:" + "(" * 5000 + ")" * 5000, "re:a{99999999999}"])
def test_patterns(tmp_path, pattern):
    checkpoint = Checkpoint(tmp_path, compressed_settings(ignore=[pattern])).quantise(compressed(4, True))
    refused(checkpoint.save(), ValueError, tmp_path / "config.json", "ignore holds 're:", "no regular expression")


def test_scales_without_numbers(tmp_path):
    settings = {"quant_method": "torchao", "quant_type": {"default": {"_type": "IntxWeightOnlyConfig"}}}

    def write(layer):
        return {"_weight_qdata": torch.from_numpy(layer.q).to(torch.int8), "_weight_scale": layer.scale[:, :0]}

    folder = Checkpoint(tmp_path, settings).quantise(write).save()
    refused(folder, ValueError, folder / "model.safetensors", "_weight_scale has shape", "does not divide")


def test_quantised_tensors_that_nothing_describes(tmp_path):
    refused(Checkpoint(tmp_path, None).quantise(awq).save(), ValueError, "missing from the weights")


def test_a_truncated_file(tmp_path):
    folder = Checkpoint(tmp_path, AWQ).quantise(awq).save()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, ValueError, path, "truncated")


def test_layers_that_are_ignored_but_quantised(tmp_path):
    settings = compressed_settings(ignore=["re:.*up_proj"])
    folder = Checkpoint(tmp_path, settings).quantise(compressed(4, True), symmetric=True).save()
    refused(folder, ValueError, f"{LAYER}.weight' is missing")


def test_a_weight_shape_of_another_layer(tmp_path):
    settings, write, options = TENSORS["packed"]
    folder = Checkpoint(tmp_path, settings).quantise(write, **options).save()
    change(folder / "model.safetensors", replace("weight_shape", put(0, 95)))
    refused(folder, ValueError, LAYER, "weight_shape is [95, 64]")


def test_nothing_wrong(tmp_path):
    """The checkpoints of this file load where nothing is damaged: the errors above are those of the damage."""
    with pytest.raises(AssertionError, match="memory for the weights was taken"):
        load(Checkpoint(tmp_path, AWQ).quantise(awq).save())
