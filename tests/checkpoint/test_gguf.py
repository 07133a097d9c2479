"""GGUF files: their weights are those that the package gguf reads, their tokens those of the vocabulary written."""

import random
import shutil
import struct
from dataclasses import replace
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from internlm3 import LLM, InternLM3ForCausalLM
from internlm3.runtime.checkpoint.gguf.blocks import BLOCKS, numbers
from internlm3.runtime.checkpoint.gguf.folder import file_of, locate
from internlm3.runtime.checkpoint.gguf.reader import GGUFHeader
from internlm3.runtime.checkpoint.gguf.settings import config_of
from internlm3.runtime.checkpoint.load import load_model
from internlm3.runtime.checkpoint.quantise.rounding import to_integers
from internlm3.runtime.checkpoint.quantised.integers import Integers
from internlm3.runtime.common import hub
from internlm3.runtime.model.model import LanguageModel
from internlm3.runtime.model.quantised_linear import QuantisedLinear
from internlm3.runtime.tokenization.tokenizer import InternLM3Tokenizer
from internlm3.tests.support.checkpoints import load, make, same
from internlm3.tests.support.gguf_files import (
    FLOATS_OF,
    byte_level_vocabulary,
    random_blocks,
    sentencepiece_vocabulary,
    write,
)
from internlm3.tests.support.tokenizers import CORPUS, processor_of, train

SHAPE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [*CORPUS[:5], "", " ", "  two  spaces\n\n\nand lines\t", "can't I'LL 12345 3.14", "书生·浦语 é ﬁ 👍🏽"]


def loaded(path, dtype="float32", **options):
    return load_model(LanguageModel, locate(path), dtype=dtype, device="cpu", progress=False, **options)


# -------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", [block.name for block in BLOCKS.values()])
def test_blocks(name):
    """Every type, against gguf's own reading, bit for bit."""
    kind, rng = gguf.GGMLQuantizationType[name], np.random.default_rng(5)
    values = rng.normal(size=(6, 512)).astype(np.float32)
    data = random_blocks(rng, kind, 6, 512) if name in FLOATS_OF else gguf.quantize(values, kind)
    expected = gguf.dequantize(data, kind).astype(np.float32)
    found = numbers(kind.value, torch.from_numpy(data.copy()).view(torch.uint8).flatten(), (6, 512))
    assert isinstance(found, Integers) == (name not in FLOATS)
    if isinstance(found, Integers):
        torch.testing.assert_close(found.as_weight(packed=True).dense(), torch.from_numpy(expected), rtol=0, atol=0)
        found = found.weight()
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=0)


FLOATS = ["F32", "F16", "BF16"]
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize(
    "shape", [{}, {"tie_word_embeddings": True}, {"qkv_bias": True, "bias": True, "rope_theta": 123456.0}], ids=str
)
def test_a_whole_model_of_mixed_types(tmp_path, shape):
    types = iter(KINDS * 10)
    path = tmp_path / "mixed.gguf"
    weights, config = write(path, lambda name: next(types), **SHAPE, **shape)
    model = loaded(path)
    found = model.state_dict()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0, msg=name)
    ours, theirs = model.config.to_dict(), config.to_dict()
    different = {key for key in theirs if ours[key] != theirs[key]}
    assert different <= {"torch_dtype", "initializer_range", "pad_token_id", "attention_dropout", "rms_norm_eps"}
    assert ours["rms_norm_eps"] == pytest.approx(config.rms_norm_eps, rel=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FLOATS])
def test_weights_stay_quantised(tmp_path, kind):
    """All layers and the head; the memory is that of the integers and their scales."""
    weights, config = write(tmp_path / "a.gguf", lambda name: kind, **SHAPE)
    model = loaded(tmp_path / "a.gguf", keep_quantised=True)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantisedLinear)}
    assert len(layers) == 4 * config.num_hidden_layers + 1
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        parts = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}.get(name, [name])
        expected = torch.cat([weights[f"{parent}.{part}.weight".removeprefix(".")] for part in parts])
        torch.testing.assert_close(layer.weight.dense(), expected, rtol=0, atol=0, msg=path)
        size = sum(tensor.numel() * tensor.itemsize for tensor in layer.parameters())
        group, minimum = 16 if kind == "Q6_K" else 32, kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
        assert size * 8 == expected.numel() * ((4 if "Q4" in kind else 8) + 32 * (1 + minimum) / group)


def test_a_file_of_floats_can_be_quantised(tmp_path):
    weights, config = write(tmp_path / "a.gguf", lambda name: "F16", **SHAPE)
    model = loaded(tmp_path / "a.gguf", keep_quantised=True, quantization="int8")
    layers = [layer for layer in model.modules() if isinstance(layer, QuantisedLinear)]
    assert len(layers) == 4 * config.num_hidden_layers + 1
    head = to_integers("lm_head", weights["lm_head.weight"], torch.bfloat16, "int8", 128, False)
    assert torch.equal(model.lm_head.weight.dense(), head.weight())


def test_vectors_may_be_quantised(tmp_path):
    """Norms and biases, which llama.cpp writes as floats."""
    weights, _ = write(tmp_path / "a.gguf", lambda name: "Q8_0", vectors="Q8_0", bias=True, **SHAPE)
    found = loaded(tmp_path / "a.gguf").state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0, msg=name)


def test_the_dtype_is_the_files(tmp_path):
    write(tmp_path / "a.gguf", lambda name: "Q8_0", **SHAPE)
    assert loaded(tmp_path / "a.gguf", dtype=None).dtype == torch.bfloat16


# -------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path, prefix):
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    model = train({"add_dummy_prefix": prefix, **plain})
    library, path = processor_of(model), tmp_path / "a.gguf"
    size = library.get_piece_size()
    write(path, lambda name: "Q8_0", lambda writer: sentencepiece_vocabulary(writer, model), **SHAPE, vocab_size=size)
    tokenizer = InternLM3Tokenizer.from_pretrained(locate(path))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == library.encode(text), text
        assert tokenizer.decode(ids) == library.decode(ids)
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2
    assert tokenizer.encode("x</s>y", add_special_tokens=False)[-2:-1] != [] and tokenizer.encode("</s>")[1] == 2


@pytest.mark.parametrize("pre", ["default", "smollm", "qwen2", "llama-bpe"])
def test_byte_level(tmp_path, pre):
    library = Tokenizer(models.BPE())
    # GPT-2's own split; the others are compared by their ids only where they agree with it: see TEXTS.
    steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    library.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(CORPUS * 3, trainer)
    path, size = tmp_path / "a.gguf", library.get_vocab_size()
    vocabulary = partial(byte_level_vocabulary, tokenizer=library, special=SPECIAL, pre=pre)
    write(path, lambda name: "Q8_0", vocabulary, **SHAPE, vocab_size=size)
    tokenizer = InternLM3Tokenizer.from_pretrained(locate(path))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        if pre in ("default", "smollm"):
            assert ids == library.encode(text).ids, text
    first = [1] if pre == "llama-bpe" else []
    assert tokenizer.encode("<|im_start|>x<|im_end|>") == [*first, 1, *library.encode("x").ids, 2]


def test_tokens_with_spaces(tmp_path):
    """llama.cpp's converter writes added tokens that are not special with the spaces that they have in a text."""

    def vocabulary(writer):
        writer.add_tokenizer_model("llama")
        tokens = ["<unk>", "<s>", "</s>", "a", "b", "\u2581", "\u2581\u2581", "  ", "a b", "bb"]
        writer.add_token_list(tokens)
        writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 4, 4, 4])
        writer.add_token_scores([0.0] * len(tokens))

    write(tmp_path / "a.gguf", lambda name: "Q8_0", vocabulary, **SHAPE)
    tokenizer = InternLM3Tokenizer.from_pretrained(locate(tmp_path / "a.gguf"))
    ids = tokenizer.encode("aa bb  bba", add_special_tokens=False)
    assert [tokenizer.convert_ids_to_tokens(id) for id in ids] == [
        *("\u2581", "a", "a b", "\u2581", "b", "  ", "\u2581", "bb", "a")
    ]
    assert tokenizer.decode(ids) == "aa bb  bba" == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tokens_around_a_text(tmp_path, kind, bos, eos):
    def vocabulary(writer):
        writer.add_tokenizer_model(kind)
        tokens = ["a", "<s>", "</s>", "<unk>", "aa"]
        writer.add_token_list(tokens)
        writer.add_token_types([1, 3, 3, 2, 1])
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_token_merges(["a a"])

    settings = [("tokenizer.ggml.add_bos_token", bos), ("tokenizer.ggml.add_eos_token", eos)]
    settings += [("tokenizer.ggml.add_space_prefix", False)]
    write(tmp_path / "a.gguf", lambda name: "Q8_0", vocabulary, settings=settings, **SHAPE)
    tokenizer = InternLM3Tokenizer.from_pretrained(locate(tmp_path / "a.gguf"))
    assert tokenizer.encode("a") == [1] * bos + [0] + [2] * eos
    assert tokenizer.encode("a", add_special_tokens=False) == [0]


# -------------------------------------------------------------------- LLM


def test_llm(tmp_path):
    """A GGUF file answers like a model with its weights."""
    vocabulary = train({})
    size = processor_of(vocabulary).get_piece_size()
    write_tokens = partial(sentencepiece_vocabulary, model=vocabulary)
    weights, config = write(tmp_path / "a.gguf", lambda name: "Q4_K", write_tokens, **SHAPE, vocab_size=size)
    llm = LLM(tmp_path / "a.gguf", dtype="float32", device="cpu", progress=False)
    model = InternLM3ForCausalLM(config)
    model.load_state_dict(weights)
    ids = llm.tokenizer.encode("The quick brown fox")
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    answer = llm.generate("The quick brown fox", temperature=0, max_tokens=12, ignore_eos=True)
    assert answer.outputs[0].token_ids == ids[-12:]


def test_one_file_of_a_repository(tmp_path, monkeypatch):
    write(tmp_path / "a.gguf", lambda name: "Q8_0", **SHAPE)
    asked = []

    def download(repository, file, **options):
        asked.append((repository, file, options["revision"]))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    folder = locate("owner/name:a.gguf", revision="main", weights=False)
    assert (folder / "config.json").is_file() and asked == [("owner/name", "a.gguf", "main")]
    with pytest.raises(FileNotFoundError, match="owner/name:file"):
        locate("nowhere/at/all.gguf")
    assert hub.locate(tmp_path) == tmp_path


# -------------------------------------------------------------------- bad input


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "a.gguf", lambda name: "Q8_0", **SHAPE)
    return tmp_path / "a.gguf"


def refused(path, *words):
    with pytest.raises(ValueError) as caught:
        LLM(path, device="cpu", progress=False)
    message = str(caught.value)
    assert all(str(word) in message for word in words), message
    assert "\n" not in message and len(message) < 500


@pytest.mark.usefixtures("nothing_is_allocated")
class TestBadInput:
    def test_no_gguf_file(self, tmp_path):
        (tmp_path / "a.gguf").write_bytes(b"<html>" * 100)
        refused(tmp_path / "a.gguf", tmp_path / "a.gguf", "begin like a GGUF file")
        (tmp_path / "a.gguf").write_bytes(b"")
        refused(tmp_path / "a.gguf", "is empty")

    def test_another_version(self, file):
        content = bytearray(file.read_bytes())
        content[4:8] = struct.pack(">I", 3)
        file.write_bytes(content)
        refused(file, file, "version", "big-endian")

    def test_truncated(self, file):
        content = file.read_bytes()
        for left in (10, 30, 200, 2000, len(content) - 1):
            file.write_bytes(content[:left])
            refused(file, file, "truncated or damaged")

    @pytest.mark.parametrize("shift", [-32, 1, 32, 2**40])
    def test_offset(self, file, shift):
        """Of a tensor within the data of another, or outside the file."""
        content, name = bytearray(file.read_bytes()), b"blk.1.ffn_down.weight"
        at = content.index(name) + len(name) + 4 + 2 * 8 + 4
        (offset,) = struct.unpack_from("<Q", content, at)
        struct.pack_into("<Q", content, at, offset + shift)
        file.write_bytes(content)
        refused(file, file, name.decode(), f"offset {offset + shift}", f"ends at {offset}", "damaged")

    def test_a_tensor_less(self, file):
        content = bytearray(file.read_bytes())
        (count,) = struct.unpack_from("<Q", content, 8)
        struct.pack_into("<Q", content, 8, count - 1)
        file.write_bytes(content)
        refused(file, file, "bytes follow the last tensor", "damaged")

    def test_a_layer_that_is_not_there(self, tmp_path):
        write(tmp_path / "a.gguf", lambda name: "Q8_0", **SHAPE)
        content = (tmp_path / "a.gguf").read_bytes()
        key = b"llama.block_count" + struct.pack("<I", 4)
        at = content.index(key) + len(key)
        (tmp_path / "a.gguf").write_bytes(content[:at] + struct.pack("<I", 3) + content[at + 4 :])
        refused(tmp_path / "a.gguf", tmp_path / "a.gguf", "'model.layers.2.input_layernorm.weight'", "missing")

    def test_arrays_in_arrays(self, tmp_path):
        array = struct.pack("<IQ", 9, 1)
        content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"x" + struct.pack("<I", 9)
        (tmp_path / "a.gguf").write_bytes(content + array * 5000)
        refused(tmp_path / "a.gguf", tmp_path / "a.gguf", "damaged")

    @pytest.mark.parametrize("kind", [struct.pack("<I", 8), struct.pack("<II", 9, 0)], ids=["text", "array"])
    def test_a_length_that_would_take_gigabytes(self, tmp_path, kind):
        """In a file that is large enough for it."""
        content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"x" + kind
        with (tmp_path / "a.gguf").open("wb") as file:
            file.write(content + struct.pack("<Q", 2**36))
            file.truncate(2**37)
        refused(tmp_path / "a.gguf", tmp_path / "a.gguf", "damaged")

    def test_damaged(self, file):
        """Random bytes in the header: read, or refused with one line."""
        content, refusals = file.read_bytes(), 0
        for seed in range(60):
            dice = random.Random(seed)
            damaged = bytearray(content)
            for _ in range(3):
                damaged[dice.randrange(2500)] = dice.randrange(256)
            file.write_bytes(damaged)
            try:
                GGUFHeader.read(file)
            except ValueError as error:
                assert str(error).startswith(str(file)) and "\n" not in str(error), error
                refusals += 1
        assert refusals > 10

    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("llama.expert_count", 8, ["llama.expert_count is 8"]),
            ("split.count", 3, ["split.count is 3"]),
            ("llama.rope.scaling.factor", 4.0, ["llama.rope.scaling.factor is 4.0"]),
            ("llama.rope.scale_linear", 4.0, ["llama.rope.scale_linear is 4.0"]),
            ("llama.rope.scaling.type", "yarn", ["llama.rope.scaling.type is 'yarn'"]),
            ("llama.rope.scaling.type", [1], ["llama.rope.scaling.type is [1]", "type str"]),
            ("llama.attention.causal", False, ["llama.attention.causal is False"]),
            ("tokenizer.ggml.padding_token_id", 64, ["tokenizer.ggml.padding_token_id is 64", "64 tokens"]),
            ("tokenizer.ggml.eot_token_id", 64, ["tokenizer.ggml.eot_token_id is 64", "64 tokens"]),
            ("tokenizer.ggml.eot_token_id", [1], ["tokenizer.ggml.eot_token_id is [1]", "type int"]),
            ("tokenizer.ggml.eom_token_id", True, ["tokenizer.ggml.eom_token_id is True", "type int"]),
            ("tokenizer.ggml.add_bos_token", "no", ["tokenizer.ggml.add_bos_token is 'no'", "type bool"]),
            ("tokenizer.ggml.add_eos_token", 1, ["tokenizer.ggml.add_eos_token is 1", "type bool"]),
            ("tokenizer.ggml.add_space_prefix", 0, ["tokenizer.ggml.add_space_prefix is 0", "type bool"]),
            ("tokenizer.chat_template", [1], ["tokenizer.chat_template is [1]", "type str"]),
        ],
    )
    def test_settings(self, tmp_path, key, value, words):
        write(tmp_path / "a.gguf", lambda name: "Q8_0", settings=[(key, value)], **SHAPE)
        refused(tmp_path / "a.gguf", tmp_path / "a.gguf", *words)

    @pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "block_count", "feed_forward_length"])
    def test_a_missing_setting(self, file, key):
        content = file.read_bytes().replace(key.encode(), b"x" * len(key))
        file.write_bytes(content)
        refused(file, file, f"llama.{key} is missing")

    def test_a_setting_that_no_model_has(self, tmp_path):
        write(tmp_path / "a.gguf", lambda name: "Q8_0", **SHAPE)
        content = (tmp_path / "a.gguf").read_bytes()
        key = b"llama.context_length" + struct.pack("<I", 4)
        at = content.index(key) + len(key)
        (tmp_path / "a.gguf").write_bytes(content[:at] + struct.pack("<I", 2**31) + content[at + 4 :])
        refused(tmp_path / "a.gguf", tmp_path / "a.gguf", "max_position_embeddings", 2**31)

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    @pytest.mark.parametrize(
        ("tokens", "types", "words"),
        [
            (["a", "b", "c", "b"], [1, 1, 1, 1], ["tokens 1 and 3 are both 'b'"]),
            (["a", "", "c"], [1, 1, 1], ["token 1 is empty"]),
            (["a", "b", "c"], [1, 1], ["3 tokens and 2 types"]),
        ],
        ids=["twice", "empty", "few types"],
    )
    def test_vocabulary(self, tmp_path, kind, tokens, types, words):
        def vocabulary(writer):
            writer.add_tokenizer_model(kind)
            writer.add_token_list(tokens)
            writer.add_token_types(types)
            writer.add_token_scores([0.0] * len(tokens))

        write(tmp_path / "a.gguf", lambda name: "Q8_0", vocabulary, **SHAPE)
        refused(tmp_path / "a.gguf", tmp_path / "a.gguf", *words)

    @pytest.mark.parametrize(
        ("unknown", "count", "words"), [("?", 1, "256 byte pieces"), ("\0", 256, "no unknown token")]
    )
    def test_what_only_the_library_notices(self, tmp_path, unknown, count, words):
        """It names the GGUF file all the same."""

        def vocabulary(writer):
            writer.add_tokenizer_model("llama")
            writer.add_token_list([unknown, "b", "c", *(f"<0x{byte:02X}>" for byte in range(count))])
            writer.add_token_types([2, 1, 1, *[6] * count])
            writer.add_token_scores([0.0] * (3 + count))

        write(tmp_path / "a.gguf", lambda name: "Q8_0", vocabulary, **SHAPE)
        refused(tmp_path / "a.gguf", "a.gguf", words)

    @pytest.mark.parametrize(
        ("merge", "wrong"), [("a c", "'ac' is no"), ("b x", "'x' is no"), ("ab", "'' is no"), ("a b c", "'b c' is no")]
    )
    def test_merges(self, tmp_path, merge, wrong):
        """The library panics at the first, on standard error."""

        def vocabulary(writer):
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(["a", "b", "c", "ab"])
            writer.add_token_types([1] * 4)
            writer.add_token_merges(["a b", merge])

        write(tmp_path / "a.gguf", lambda name: "Q8_0", vocabulary, **SHAPE)
        refused(tmp_path / "a.gguf", tmp_path / "a.gguf", f"merge 1 is {merge!r}", wrong)

    def test_a_setting_of_a_list_where_a_text_belongs(self, tmp_path):
        def vocabulary(writer):
            writer.add_tokenizer_model("gpt2")
            writer.add_array("tokenizer.ggml.pre", ["qwen2"])
            writer.add_token_list(["a", "b", "c"])
            writer.add_token_types([1, 1, 1])

        write(tmp_path / "a.gguf", lambda name: "Q8_0", vocabulary, **SHAPE)
        refused(tmp_path / "a.gguf", tmp_path / "a.gguf", "tokenizer.ggml.pre is ['qwen2']", "type str")

    def test_a_later_file_of_a_split(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
        writer.add_key_value("split.count", 2, gguf.GGUFValueType.UINT16)
        writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = (tmp_path / "a.gguf").read_bytes().replace(b"general.architecture", b"general.xxxxxxxxxxxx")
        (tmp_path / "a.gguf").write_bytes(content)
        refused(tmp_path / "a.gguf", tmp_path / "a.gguf", "split.count is 2")

    def test_an_embedding_of_three_dimensions(self, file):
        header = GGUFHeader.read(file)
        embedding = header.tensors["token_embd.weight"]._replace(shape=(1, 64, 256))
        with pytest.raises(ValueError, match=r"'token_embd.weight' has shape \[1, 64, 256\]; it must be a matrix"):
            config_of(replace(header, tensors={**header.tensors, "token_embd.weight": embedding}))

    def test_a_folder_with_the_name_of_a_file(self, tmp_path):
        (tmp_path / "a.gguf").mkdir()
        with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
            LLM(tmp_path / "a.gguf", device="cpu", progress=False)

    def test_another_architecture(self, file):
        content = file.read_bytes().replace(b"llama", b"gemma")
        file.write_bytes(content)
        refused(file, file, "general.architecture is 'gemma'", "'llama'")

    def test_another_tokenizer(self, tmp_path):
        def vocabulary(writer):
            writer.add_tokenizer_model("bert")
            writer.add_token_list(["a"] * 64)
            writer.add_token_types([1] * 64)

        write(tmp_path / "a.gguf", lambda name: "Q8_0", vocabulary, **SHAPE)
        refused(tmp_path / "a.gguf", "tokenizer.ggml.model is 'bert'")

    def test_tensors_of_another_model(self, tmp_path, file):
        content = file.read_bytes().replace(b"ffn_down", b"ffn_gone")
        file.write_bytes(content)
        refused(file, file, "ffn_gone", "no place for")

    def test_a_type_that_is_not_read(self, file):
        header = GGUFHeader.read(file)
        assert header.tensors
        content = file.read_bytes()
        name = b"blk.1.ffn_down.weight"
        at = content.index(name) + len(name) + 4 + 2 * 8
        file.write_bytes(content[:at] + struct.pack("<I", 10) + content[at + 4 :])
        refused(file, file, "blk.1.ffn_down.weight", "type 10", "it reads F32")

    def test_no_such_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            LLM(tmp_path / "nothing.gguf", device="cpu", progress=False)


def test_a_gguf_file_beside_the_weights_of_a_checkpoint(tmp_path, file):
    """They are those of the checkpoint."""
    model = make(3)
    model.save_pretrained(tmp_path / "checkpoint")
    shutil.copyfile(file, tmp_path / "checkpoint" / "model.gguf")
    assert same(load(tmp_path / "checkpoint"), model)


def test_a_link_names_the_file(tmp_path, file):
    """As in the cache of the hub, whose files have the names of their checksums."""
    (tmp_path / "link.gguf").symlink_to(file)
    folder = locate(tmp_path / "link.gguf")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"link\.gguf: the tensor .* is truncated"):
        load_model(LanguageModel, folder, device="cpu", progress=False)


def test_the_small_files_go_when_the_process_ends(file):
    folder = locate(file)
    assert file_of(folder) == file and file_of(file.parent) is None
    shutil.rmtree(folder)
