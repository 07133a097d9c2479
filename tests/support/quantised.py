"""Quantised checkpoints of random integers: written element by element from the formats' definitions, with the weights
that they stand for."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from internlm3.runtime.checkpoint.quantise.rounding import form_of, to_integers
from internlm3.tests.support.checkpoints import make

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 1}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack(rows: np.ndarray, bits: int, order=None) -> torch.Tensor:
    """[N, M] unsigned -> [N, M bits / 32] int32: field i of word c is column n c + order[i]."""
    per_word = 32 // bits
    words = np.zeros((rows.shape[0], -(-rows.shape[1] // per_word)), np.int64)
    for r, row in enumerate(rows):
        for c in range(words.shape[1]):
            for i in range(per_word):
                column = per_word * c + (order[i] if order else i)
                if column < len(row):
                    words[r, c] |= int(row[column]) << (bits * i)
    return torch.from_numpy(np.where(words >= 2**31, words - 2**32, words).astype(np.int32))


class Layer:
    """Random integers of one layer: q [O, I], scale [O, G], zero [O, G], group_of [I], and its weight [O, I]."""

    def __init__(
        self, rng, shape, *, bits=4, group=32, dtype=torch.float16, symmetric=False, least_zero=1, reordered=False
    ):
        self.outputs, self.inputs = shape
        count = 1 if group == -1 else self.inputs // group
        self.q = rng.integers(0, 2**bits, shape)
        self.q[: self.outputs // 2, ::5] = 2**bits - 1
        self.scale = torch.from_numpy(rng.uniform(1e-4, 0.1, (self.outputs, count))).to(dtype)
        self.zero = rng.integers(least_zero, 2**bits, (self.outputs, count))
        if symmetric:
            self.zero[:] = 2 ** (bits - 1)
        self.group_of = np.arange(self.inputs) // (self.inputs // count)
        if reordered:
            rng.shuffle(self.group_of)
        scale = self.scale.float().numpy()[:, self.group_of]
        self.weight = torch.from_numpy(
            ((self.q - self.zero[:, self.group_of]).astype(np.float32) * scale).astype(np.float32)
        )


def linears(model):
    """The layers of a model that checkpoints quantise, by name: (outputs, inputs)."""
    return {name.removesuffix(".weight"): tuple(weight.shape) for name, weight in model.state_dict().items()
            if name.endswith("_proj.weight")}  # fmt: skip


class Checkpoint:
    """A quantised checkpoint in a folder.

    Attributes:
        tensors: what its file contains. settings: its quantization_config. weights: what it stands for.
    """

    def __init__(self, folder: Path, settings, seed=0, file="model.safetensors", **shape):
        self.folder, self.settings, self.file = folder, settings, file
        self.rng = np.random.default_rng(seed)
        self.model = make(seed, **{**SHAPE, **shape})
        self.weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.tensors = dict(self.weights)

    def quantise(self, write, names=None, **options):
        """Replaces each layer's weight by what write(layer) returns: the layer's tensors by suffix."""
        for name, shape in linears(self.model).items():
            if names is None or name in names:
                layer = Layer(self.rng, shape, **options)
                del self.tensors[f"{name}.weight"]
                self.tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in write(layer).items()}
                self.weights[f"{name}.weight"] = layer.weight
        return self

    def save(self):
        """Writes config.json and the file; returns the folder."""
        config = {**self.model.config.to_dict(), "quantization_config": self.settings}
        (self.folder / "config.json").write_text(json.dumps(config))
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        if self.file.endswith(".bin"):
            torch.save(tensors, self.folder / self.file)
        else:
            save_file(tensors, self.folder / self.file)
        return self.folder


def rounded(name, weight, form, group=128, symmetric=False):
    """The integers of a weight in a model that is quantised to `form`; None if it stays as it is."""
    own = form_of(name, form)
    return None if own is None else to_integers(name, weight, weight.dtype, own, group, symmetric)


# ---------------------------------------------------------------------------------------------------- formats


def gptq(bits=4, less_one=1, g_idx=True):
    def write(layer):
        zeros = pack(layer.zero.T, bits)
        for _ in range(less_one):  # from whole words, as GPTQModel converts version 2 to 1
            words = (zeros.numpy().astype(np.int64) - sum(1 << shift for shift in range(0, 32, bits))) % 2**32
            zeros = torch.from_numpy(np.where(words >= 2**31, words - 2**32, words).astype(np.int32))
        return {
            "qweight": pack(layer.q, bits).T,
            "qzeros": zeros,
            "scales": layer.scale.T,
            **({"g_idx": torch.from_numpy(layer.group_of.astype(np.int32))} if g_idx else {}),
            "bias": torch.zeros(layer.outputs),
        }

    return write


def awq(layer):
    return {
        "qweight": pack(layer.q.T, 4, AWQ_ORDER),
        "qzeros": pack(layer.zero.T, 4, AWQ_ORDER),
        "scales": layer.scale.T,
    }


def compressed(bits=4, symmetric=False, reordered=False):
    def write(layer):
        return {
            "weight_packed": pack(layer.q, bits),
            "weight_scale": layer.scale,
            "weight_shape": torch.tensor([layer.outputs, layer.inputs]),
            **({} if symmetric else {"weight_zero_point": pack(layer.zero.T, bits).T}),
            **({"weight_g_idx": torch.from_numpy(layer.group_of.astype(np.int32))} if reordered else {}),
        }

    return write


def compressed_settings(format="pack-quantized", activations=None, ignore=("lm_head",), targets=("Linear",), **weights):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
               "actorder": None, "block_structure": None, **weights}  # fmt: skip
    group = {"targets": [*targets], "weights": weights, "input_activations": activations, "output_activations": None,
             "format": format}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group},
            "ignore": [*ignore], "kv_cache_scheme": None, "quantization_status": "compressed", "sparsity_config": {},
            "transform_config": {}}  # fmt: skip
