"""GGUF files of random models, written by the package gguf as llama.cpp writes them."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from internlm3.tests.support.checkpoints import make

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Offsets of the 16-bit floats in a block of each type that gguf dequantises and does not quantise.
FLOATS_OF = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def name_of(name: str) -> str:
    """llama.cpp's name of a parameter."""
    part, kind = name.rsplit(".", 1)
    if part in NAMES:
        return f"{NAMES[part]}.{kind}"
    _, _, layer, rest = part.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def random_blocks(rng, kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Bytes [rows, n] of a tensor of a type: any bytes are numbers, if the floats among them are."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // size, width)).astype(np.uint8)
    for at in FLOATS_OF[kind.name]:
        blocks[:, at : at + 2] = rng.normal(0, 0.01, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a q or k projection as llama.cpp's converter orders them, one row at a time."""
    dim = len(weight) // heads
    order = [
        head * dim + first + half * dim // 2 for head in range(heads) for first in range(dim // 2) for half in (0, 1)
    ]
    return weight[order]


def sentencepiece_vocabulary(writer: gguf.GGUFWriter, model: bytes) -> None:
    """A SentencePiece vocabulary."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.piece for piece in proto.pieces])
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)


def byte_level_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, special: list[str], pre: str) -> None:
    """A byte-level vocabulary of the library `tokenizers`."""
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]])


def write(path: Path, kinds, vocabulary=None, *, seed=0, settings=(), vectors="F32", **shape):
    """Writes a random model.

    Args:
        kinds: the name of the type of each matrix, by its parameter's name.
        vocabulary: writes the tokenizer's settings; by default it has only tokens of one character.
        settings: (key, value) of further settings: uint32, float32, texts, booleans, and lists of one of these.
        vectors: the name of the type of norms and biases.
        shape: of the model.

    Returns:
        Its weights in float32, by name, and its configuration.
    """
    rng = np.random.default_rng(seed)
    model = make(seed, **shape)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(7)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in settings:
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if type(value) is int else kind)
    if vocabulary is None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
        writer.add_token_scores([0.0] * config.vocab_size)
        writer.add_token_types([1] * config.vocab_size)
    else:
        vocabulary(writer)
    weights = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = parameter.float().numpy()
        kind = gguf.GGMLQuantizationType[kinds(name) if value.ndim == 2 else vectors]
        pairs = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if kind.name in FLOATS_OF:
            stored = random_blocks(rng, kind, *value.shape)
        else:
            stored = gguf.quantize(value, kind) if kind.name != "F32" else value
        dense = gguf.dequantize(stored, kind).astype(np.float32) if kind.name != "F32" else value
        weights[name] = torch.from_numpy(dense)
        if pairs:
            stored = in_pairs(stored, pairs)
        if kind.name == "F32":
            writer.add_tensor(name_of(name), stored)
        else:
            writer.add_tensor(name_of(name), stored, raw_dtype=kind)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights, config
