"""Converts a small Llama-like model from a GGUF file into an InternLM3 checkpoint, with all files of one from the hub.

Supports only what the demo model needs: architecture "llama", tied embeddings, a byte-level BPE vocabulary. Needs the
packages of the extra `demo` (gguf, protobuf), so it is imported only when a conversion starts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFReader
from sentencepiece import sentencepiece_model_pb2
from tqdm import tqdm

from ..common.files import write_json
from ..common.progress import hides_bar
from ..model.config import InternLM3Config
from ..model.model import LanguageModel
from ..sampling.generation_config import GENERATION_CONFIG
from .gguf.weights import LAYER_TENSORS, unpermute
from .save import save_weights

MAX_SHARD_BYTES = 128 * 2**20
VOCAB_MULTIPLE = 128  # InternLM3 pads its embedding to a multiple of it too

ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # created at import
SPACE = "\u2581"  # SentencePiece's visible space


def convert(source: Path, folder: Path, *, sampling: dict[str, Any], progress: bool) -> None:
    """Converts the GGUF file `source` into a checkpoint in the empty `folder`.

    `sampling` goes into generation_config.json. Raises OSError when a file cannot be written (the folder is then
    incomplete: the caller discards it).
    """
    reader = GGUFReader(source)
    field = {name: value.contents() for name, value in reader.fields.items()}
    proto, rows = sentencepiece_model(
        field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"], field["tokenizer.ggml.merges"]
    )
    config = _config(field, vocab_size=-(-len(rows) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    _write_tokenizer_config(folder, proto, ids, field["tokenizer.chat_template"], config["max_position_embeddings"])
    notes = {"config.json": config, GENERATION_CONFIG: {**ids, **sampling}}
    model = _model(config, _tensors(reader, config, rows), progress)
    save_weights(model, folder, notes, max_shard_size=MAX_SHARD_BYTES)


def _config(field: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    hidden, heads = field["llama.embedding_length"], field["llama.attention.head_count"]
    return {
        "architectures": ["InternLM3ForCausalLM"],
        "model_type": "internlm3",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": float(f"{field['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as a float32
        "rope_theta": field["llama.rope.freq_base"],
        "rope_scaling": None,
        "qkv_bias": False,
        "bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "pad_token_id": field["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


# ---------------------------------------------------------------------------------------------------- tokenizer


def sentencepiece_model(tokens: list[str], types: list[int], merges: list[str]) -> tuple[Any, list[int | None]]:
    """Rewrites a byte-level BPE vocabulary as a SentencePiece BPE with byte fallback.

    The pieces are, in this order: the special tokens with the GGUF's ids, the 256 bytes, and every token of whole
    characters, by the priority of its merge. A token that contains part of a character cannot be written as a
    SentencePiece piece. It is left out, and such characters are encoded byte by byte.

    Byte-level BPE splits a text into words and runs of white space before it merges; SentencePiece merges across them.
    The split of "   word" gives the last space to the word. So pieces of white space come last here, and a word takes
    its space first. Within words and within runs the order is unchanged. One difference remains: the split separates
    the last line break from a run ("\\n\\nword" has two tokens), which SentencePiece cannot do.

    Returns:
        The ModelProto, and for each piece its row in the GGUF's embedding, or None.
    """
    piece_type = ModelProto.SentencePiece
    byte_of = _byte_alphabet()
    rank = {merge.replace(" ", ""): i for i, merge in enumerate(merges)}  # no token contains a space: byte 0x20 is "Ġ"
    special = [i for i, type in enumerate(types) if type != gguf.TokenType.NORMAL]
    spelled: dict[str, int] = {}
    byte_row: dict[int, int] = {}
    for i, token in enumerate(tokens):
        if types[i] != gguf.TokenType.NORMAL:
            continue
        raw = bytes(byte_of[char] for char in token)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = ""
        if text and text != "\0" and SPACE not in text:  # both have another meaning in SentencePiece
            spelled[text] = i
        elif len(raw) == 1:
            byte_row[raw[0]] = i
    # As in vocabularies that SentencePiece trains, each character of a piece is a piece (a handful like " Ö" are not).
    spelled = {text: i for text, i in spelled.items() if all(char in spelled for char in text)}

    def priority(text: str) -> tuple[bool, int]:
        return len(text) > 1 and text.isspace(), rank.get(tokens[spelled[text]], -1)

    proto = ModelProto()
    rows: list[int | None] = []

    def add(piece: str, type: int, row: int | None, score: float = 0.0) -> None:
        proto.pieces.add(piece=piece, type=type, score=score)
        rows.append(row)

    for i in special:
        add(tokens[i], piece_type.CONTROL if i else piece_type.UNKNOWN, i)
    for byte in range(256):
        add(f"<0x{byte:02X}>", piece_type.BYTE, byte_row.get(byte))
    for i, text in enumerate(sorted(spelled, key=priority)):
        add(text.replace(" ", SPACE), piece_type.NORMAL, spelled[text], score=-i)

    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(proto.pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = tokens[:3]
    trainer.unk_surface = tokens[0]
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return proto, rows


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable bytes as themselves, others as the characters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _write_tokenizer_config(folder: Path, proto: Any, ids: dict[str, int], chat_template: str, length: int) -> None:
    special = [p.piece for p in proto.pieces if p.type in (p.UNKNOWN, p.CONTROL)]
    names = {"unk_token": special[0]} | {name.removesuffix("_id"): special[id] for name, id in ids.items()}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "InternLM3Tokenizer",
        "added_tokens_decoder": {str(i): {"content": piece, **flags} for i, piece in enumerate(special)},
        **names,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "model_max_length": length,
        "chat_template": chat_template,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", names)


# ------------------------------------------------------------------------------------------------------ weights

Tensors = dict[str, Callable[[], torch.Tensor]]  # name -> function that returns the tensor in float32


def _tensors(reader: GGUFReader, config: dict[str, Any], rows: list[int | None]) -> Tensors:
    """All tensors of the checkpoint by InternLM3's names. Each is dequantised only when its function is called."""
    stored = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def dense(name: str) -> torch.Tensor:
        values = gguf.dequantize(stored[name].data, stored[name].tensor_type)
        return torch.tensor(values, dtype=torch.float32, device="cpu")

    def weight(name: str) -> torch.Tensor:
        value, part = dense(name), name.split(".")[-2]
        return unpermute(value, heads[part]) if part in heads else value

    def embedding() -> torch.Tensor:
        # A row without a source gets the mean row, whose logit is the mean logit: never the largest.
        value = dense("token_embd.weight")
        padded = value.mean(0).repeat(config["vocab_size"], 1)
        known = [i for i, row in enumerate(rows) if row is not None]
        padded[known] = value[[rows[i] for i in known]]
        return padded

    names = {"output_norm.weight": "model.norm.weight"}
    for layer in range(config["num_hidden_layers"]):
        names |= {f"blk.{layer}.{a}.weight": f"model.layers.{layer}.{b}.weight" for a, b in LAYER_TENSORS.items()}
    if left := set(stored) - set(names) - {"token_embd.weight"}:
        raise ValueError(f"The GGUF file contains tensors that InternLM3 has no place for: {sorted(left)}")
    tensors: Tensors = {target: lambda source=source: weight(source) for source, target in names.items()}  # type: ignore[misc]
    return {"model.embed_tokens.weight": embedding, **tensors, "lm_head.weight": embedding}


def _model(config: dict[str, Any], tensors: Tensors, progress: bool) -> LanguageModel:
    """A bfloat16 model with these tensors."""
    model = LanguageModel(InternLM3Config.from_dict(config), dtype=torch.bfloat16)
    weights = model.state_dict()
    bar = tqdm(tensors.items(), desc="Converting weights", unit="tensor", disable=hides_bar(progress))
    for name, make in bar:
        weights[name].copy_(make())
    return model
