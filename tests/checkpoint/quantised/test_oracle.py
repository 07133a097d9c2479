"""Random weights packed by the package compressed-tensors are what it unpacks them to."""

import pytest
import torch

from internlm3.runtime.checkpoint.quantised import compressed_tensors
from internlm3.runtime.checkpoint.quantised.scheme import Settings
from internlm3.tests.support.quantised import compressed_settings

SHAPE = (48, 256)
GROUP = {"strategy": "group", "group_size": 32}
BLOCK = {"strategy": "block", "block_structure": [16, 128], "group_size": None}
NARROWER = {"strategy": "block", "block_structure": [32, 96], "group_size": None}  # at both ends of the weight
TENSOR = {"strategy": "tensor", "group_size": None}
CHANNEL = {"strategy": "channel", "group_size": None}
FORMS = {
    "int4": ("pack-quantized", {**GROUP, "num_bits": 4}),
    "int4 asymmetric": ("pack-quantized", {**GROUP, "num_bits": 4, "symmetric": False}),
    "int8 in groups": ("pack-quantized", {**GROUP, "num_bits": 8}),
    "int8 packed": ("pack-quantized", {**CHANNEL, "num_bits": 8, "symmetric": False}),
    "int8": ("int-quantized", {**CHANNEL, "num_bits": 8}),
    "int8 asymmetric": ("int-quantized", {**CHANNEL, "num_bits": 8, "symmetric": False}),
    "int8 asymmetric in blocks": ("int-quantized", {**BLOCK, "num_bits": 8, "symmetric": False}),
    "int8 asymmetric in narrower blocks": ("int-quantized", {**NARROWER, "num_bits": 8, "symmetric": False}),
    "int8 asymmetric of a tensor": ("int-quantized", {**TENSOR, "num_bits": 8, "symmetric": False}),
    "int4 asymmetric in blocks": ("pack-quantized", {**BLOCK, "num_bits": 4, "symmetric": False}),
    "int8 packed in narrower blocks": ("pack-quantized", {**NARROWER, "num_bits": 8, "symmetric": False}),
    "int4 asymmetric of a tensor": ("pack-quantized", {**TENSOR, "num_bits": 4, "symmetric": False}),
    "fp8": ("float-quantized", {**CHANNEL, "num_bits": 8, "type": "float"}),
    "fp8 in blocks": ("float-quantized", {**BLOCK, "num_bits": 8, "type": "float"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_compressed_tensors(form):
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="needs compressed-tensors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(list(FORMS).index(form))
    format, options = FORMS[form]
    settings = compressed_settings(format, **options)
    weights = QuantizationArgs(**settings["config_groups"]["group_0"]["weights"])
    theirs = QuantizationScheme(targets=["Linear"], weights=weights, format=format)
    ours = compressed_tensors.method(Settings(settings)).scheme("model.layers.0.mlp.up_proj")

    weight = torch.randn(SHAPE, dtype=torch.bfloat16)
    outputs, inputs = SHAPE
    rows, columns = options.get("block_structure", (1, 32))
    size = {
        "group": (outputs, inputs // 32),
        "channel": (outputs, 1),
        "tensor": (1,),
        "block": (-(-outputs // rows), -(-inputs // columns)),
    }[options["strategy"]]
    scale = torch.rand(size).add(0.5).mul(0.02 if options.get("type") == "float" else 0.4).to(torch.bfloat16)
    state = {"weight": weight, "weight_scale": scale}
    if not options.get("symmetric", True):
        half = 2 ** (options["num_bits"] - 1)
        state["weight_zero_point"] = torch.randint(-half, half, scale.shape, dtype=torch.int8)
    compressor = compressors.BaseCompressor.get_value_from_registry(format)
    packed = compressor.compress(state, theirs)
    parts = ours.parts(SHAPE)
    for suffix, tensor in packed.items():
        assert tuple(tensor.shape) == parts[suffix].shape and tensor.dtype in parts[suffix].dtypes, suffix
    ours.check(packed, SHAPE)
    found = ours.numbers(packed, SHAPE).weight()
    expected = compressor.decompress(packed, theirs)["weight"]
    # The package computes in the scale's dtype, and so rounds the product to it.
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=0, atol=0)
    assert found.dtype == torch.float32 and not torch.equal(found, weight.float())
