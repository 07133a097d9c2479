"""The conversion of a GGUF file: weights, configuration and tokenizer.

On a tiny random GGUF with a known result, and on the demo model by an answer and by how it splits text.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint
from internlm3.runtime.checkpoint.gguf.weights import unpermute
from internlm3.runtime.checkpoint.gguf_convert import sentencepiece_model
from internlm3.tests.support.tiny_gguf import tiny_bpe

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
    # The model must not generate what it never learnt: ASCII bytes beside their characters, and padding.
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


def test_it_knows_the_capital_of_france(demo_model, model):
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

# Split at "¦" as the original byte-level BPE splits them: by the merges of the GGUF, with the `tokenizers` package
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
    # On many texts, with a small vocabulary whose merges are known. Quotes differ: GPT-2's pattern knows "'s".
    tokens, types, merges = tiny_bpe()
    oracle = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    proto, rows = sentencepiece_model(tokens, types, merges)
    ours = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts = [" ".join(part.split()) for text in real_texts() for part in text.split("\n\n") if part.isascii()]
    texts = texts[:: len(texts) // 1000]
    assert len(texts) >= 1000
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
