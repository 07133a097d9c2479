"""A checkpoint of InternLM3's architecture and a sequence of token ids, made of the bytes of SHAKE-256.

Every value is an integer of at most 8 bits times a power of two. bfloat16, float16 and float32 represent it exactly, so
the model is the same in each of them, and any language on any machine makes the same bytes.
"""

import hashlib
import json
import struct

import numpy as np

SEED = 5  # of eight, one with wide margins: every fault changes logits by more than bfloat16 does
WINDOW, PLACES = 32768, (0, 1, 511, 32767, 32768, 32769, 40000)
LENGTH = PLACES[-1] + 1
VOCAB, PIECES, HIDDEN, INNER, HEADS, KV_HEADS, DIM = 384, 370, 128, 192, 4, 2, 32
CONFIG = {
    "architectures": ["InternLM3ForCausalLM"],
    "model_type": "internlm3",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000000,
    "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
    "max_position_embeddings": WINDOW,
    "qkv_bias": False,
    "bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}
# Shape of every tensor, and e of its scale 2 ** -e. Scores of attention have a standard deviation of 3.8: a query
# attends to few keys, at any distance.
_NORM = ((HIDDEN,), 7)
_LAYER = {
    "input_layernorm": _NORM,
    "self_attn.q_proj": ((HEADS * DIM, HIDDEN), 11),
    "self_attn.k_proj": ((KV_HEADS * DIM, HIDDEN), 11),
    "self_attn.v_proj": ((KV_HEADS * DIM, HIDDEN), 9),
    "self_attn.o_proj": ((HIDDEN, HEADS * DIM), 10),
    "post_attention_layernorm": _NORM,
    "mlp.gate_proj": ((INNER, HIDDEN), 10),
    "mlp.up_proj": ((INNER, HIDDEN), 11),
    "mlp.down_proj": ((HIDDEN, INNER), 11),
}
TENSORS = {
    "model.embed_tokens.weight": ((VOCAB, HIDDEN), 7),
    **{f"model.layers.0.{name}.weight": made for name, made in _LAYER.items()},
    "model.norm.weight": _NORM,
    "lm_head.weight": ((VOCAB, HIDDEN), 10),
}


def stream(name: str, count: int) -> np.ndarray:
    """The first `count` bytes of SHAKE-256 of a name, as integers: [count] int64."""
    return np.frombuffer(hashlib.shake_256(f"{SEED} {name}".encode()).digest(count), np.uint8).astype(np.int64)


def weights() -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint by its name, float32.

    With b the bytes of SHAKE-256 of the name, a matrix is (2b - 255) * 2**-e, and a norm (96 + b // 4) * 2**-e. In each
    head of q and k, rows 1, 2, 17 and 18 are 4 times that: their rotations, of 19 and 58 tokens a turn, show a change
    of the base best.
    """
    made = {}
    for name, (shape, exponent) in TENSORS.items():
        b = stream(name, int(np.prod(shape)))
        integers = 2 * b - 255 if len(shape) == 2 else 96 + b // 4
        if "q_proj" in name or "k_proj" in name:
            integers.reshape(-1, DIM // 2, HIDDEN)[:, 1:3] *= 4
        made[name] = np.ldexp(integers.astype(np.float32), -exponent).reshape(shape)
    return made


def token_ids() -> list[int]:
    """The sequence: <s>, then pieces at random: two bytes for each, the high one first, modulo their number."""
    high, low = stream("token_ids", 2 * LENGTH).reshape(-1, 2).T
    ids = 3 + (256 * high + low) % (PIECES - 3)
    return [1, *ids[1:].tolist()]


def safetensors() -> bytes:
    """model.safetensors in bfloat16, byte for byte the same everywhere."""
    header, data = {}, b""
    for name, values in weights().items():
        halves = values.view(np.uint32) >> 16  # the lower half of these float32 is zero
        begin, data = len(data), data + halves.astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data
