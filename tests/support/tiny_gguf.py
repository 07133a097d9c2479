"""A tiny random model as a GGUF file, in place of the demo model's."""

import json
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

LICENCE = Path(__file__).parents[2] / "LICENSE"


def tiny_bpe() -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges of a byte-level BPE trained on this repository's licence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(LICENCE)], trainer)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    return tokens, [int(control if token in special else normal) for token in tokens], merges


def tiny_gguf(path: Path) -> None:
    """Writes a random model with that vocabulary."""
    tokens, types, merges = tiny_bpe()
    layers, hidden, heads, kv_heads, inner = 2, 64, 4, 2, 96
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        value = random.standard_normal(shape, dtype=np.float32)
        quantised = gguf.GGMLQuantizationType.Q8_0
        if len(shape) == 2:
            writer.add_tensor(name, gguf.quantize(value / 8, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, 1 + value / 8)

    add("token_embd.weight", len(tokens), hidden)
    add("output_norm.weight", hidden)
    for layer in range(layers):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", hidden)
        add(f"{block}.ffn_norm.weight", hidden)
        add(f"{block}.attn_q.weight", hidden, hidden)
        add(f"{block}.attn_k.weight", hidden // heads * kv_heads, hidden)
        add(f"{block}.attn_v.weight", hidden // heads * kv_heads, hidden)
        add(f"{block}.attn_output.weight", hidden, hidden)
        add(f"{block}.ffn_gate.weight", inner, hidden)
        add(f"{block}.ffn_up.weight", inner, hidden)
        add(f"{block}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
