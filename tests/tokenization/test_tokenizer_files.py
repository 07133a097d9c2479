"""The files of a tokenizer: read, saved, damaged, and in conflict with each other."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from internlm3 import InternLM3Tokenizer
from internlm3.runtime.tokenization.batch_encoding import NO_LIMIT
from internlm3.runtime.tokenization.tokenizer_files import NAMED_TOKENS
from internlm3.tests.support.tokenizers import (
    CORPUS,
    SPECIAL,
    TEXTS,
    TRAINED,
    edited,
    library_file,
    oracle,
    save_by_transformers,
    sentencepiece_ids,
    train,
    write_checkpoint,
)

# Files


def test_saving_round_trips(checkpoint, tmp_path):
    tokenizer = InternLM3Tokenizer.from_pretrained(checkpoint, padding_side="left", chat_template="{{ messages }}")
    tokenizer.add_tokens("<tool>")
    paths = tokenizer.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(Path(path).name for path in paths) == sorted(os.listdir(tmp_path / "new" / "folder"))
    again = InternLM3Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert again.added_tokens_decoder == tokenizer.added_tokens_decoder
    assert again.padding_side == "left"
    assert again.chat_template == "{{ messages }}"
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.all_special_ids == tokenizer.all_special_ids
    for text in [*TEXTS, "a<tool>b"]:
        assert again.encode(text) == tokenizer.encode(text)
    again.save_pretrained(tmp_path / "twice")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "new" / "folder" / name).read_bytes()


def test_saving_over_another_tokenizer(checkpoint, saved_by_transformers, tmp_path):
    """The last save wins, whatever files an older tokenizer left."""
    folder = edited(saved_by_transformers, tmp_path / "a")
    (folder / "chat_template.jinja").write_text("old")
    (folder / "added_tokens.json").write_text(json.dumps({"<old>": 5000}))
    tokenizer = InternLM3Tokenizer.from_pretrained(checkpoint, chat_template="new")
    tokenizer.save_pretrained(folder)
    again = InternLM3Tokenizer.from_pretrained(folder)
    assert (again.chat_template, again.added_tokens_decoder) == ("new", tokenizer.added_tokens_decoder)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


def test_save_vocabulary_is_the_file(checkpoint, tmp_path):
    (path,) = InternLM3Tokenizer.from_pretrained(checkpoint).save_vocabulary(tmp_path, filename_prefix="my")
    assert path == str(tmp_path / "my-tokenizer.model")
    assert Path(path).read_bytes() == (checkpoint / "tokenizer.model").read_bytes()


def test_nothing_half_written_stays(plain, tmp_path, monkeypatch):
    tokenizer = InternLM3Tokenizer.from_pretrained(plain)

    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save_pretrained(tmp_path / "full")
    assert os.listdir(tmp_path / "full") == []


def test_chat_template_file_wins(plain, tmp_path):
    directory = write_checkpoint(tmp_path / "a", (plain / "tokenizer.model").read_bytes(), chat_template="config")
    assert InternLM3Tokenizer.from_pretrained(directory).chat_template == "config"
    (directory / "chat_template.jinja").write_text("书生 file", encoding="utf-8")
    assert InternLM3Tokenizer.from_pretrained(directory).chat_template == "书生 file"
    assert InternLM3Tokenizer.from_pretrained(directory, chat_template="mine").chat_template == "mine"


def test_remote_code_is_never_run(plain, tmp_path):
    directory = write_checkpoint(
        tmp_path / "a", (plain / "tokenizer.model").read_bytes(), auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}
    )
    (directory / "evil.py").write_text("raise SystemExit('executed')")
    tokenizer = InternLM3Tokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(tmp_path / "b")
    assert "auto_map" not in json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())


# tokenizer.json


def test_tokenizer_json_alone_equals_transformers(saved_by_transformers, tmp_path):
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(saved_by_transformers)
    tokenizer = InternLM3Tokenizer.from_pretrained(saved_by_transformers)
    tokenizer.save_pretrained(tmp_path / "again")
    again = InternLM3Tokenizer.from_pretrained(tmp_path / "again")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == again.encode(text) == expected.encode(text), text
        assert tokenizer.tokenize(text) == expected.tokenize(text), text
        assert tokenizer.decode(ids) == again.decode(ids) == expected.decode(ids), text
        skipped = expected.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == again.decode(ids, skip_special_tokens=True) == skipped
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert len(tokenizer) == len(again) == len(expected)
    assert tokenizer.all_special_ids == sorted(expected.all_special_ids)
    assert tokenizer.eos_ids == [2, expected.convert_tokens_to_ids("<|im_end|>")]
    assert tokenizer.convert_tokens_to_ids(["<s>", "never seen"]) == expected.convert_tokens_to_ids(
        ["<s>", "never seen"]
    )
    assert tokenizer.add_tokens(["<tool>"]) == expected.add_tokens(["<tool>"]) == 1
    assert tokenizer.encode("a<tool>b") == expected.encode("a<tool>b")


@pytest.mark.parametrize("frame", [("<s>", None), ("<s>", "</s>"), (None, None)])
def test_frame_of_a_tokenizer_json_is_transformers(plain, plain_by_transformers, tmp_path, frame):
    """The bos and eos of the file win over the configuration; a keyword wins over both, and is saved into the file."""
    from transformers import AutoTokenizer

    folder = edited(plain_by_transformers, tmp_path / "a", add_bos_token=False, add_eos_token=True)
    library = json.loads((folder / "tokenizer.json").read_text())
    ends = [[{"SpecialToken": {"id": token, "type_id": 0}}] if token else [] for token in frame]
    library["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*ends[0], {"Sequence": {"id": "A", "type_id": 0}}, *ends[1]],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for i, t in enumerate(frame, 1) if t},
    }
    (folder / "tokenizer.json").write_text(json.dumps(library))
    for number, options in enumerate([{}, {"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": False}]):
        tokenizer = InternLM3Tokenizer.from_pretrained(folder, **options)
        tokenizer.save_pretrained(tmp_path / str(number))
        ids = AutoTokenizer.from_pretrained(folder, **options).encode("the dog")
        assert tokenizer.encode("the dog") == ids
        assert InternLM3Tokenizer.from_pretrained(tmp_path / str(number)).encode("the dog") == ids
        assert AutoTokenizer.from_pretrained(tmp_path / str(number)).encode("the dog") == ids
    # It counts as well where the base's tokenizer.model lies beside it.
    expected = AutoTokenizer.from_pretrained(folder).encode("the dog")
    shutil.copy(plain / "tokenizer.model", folder)
    assert InternLM3Tokenizer.from_pretrained(folder).encode("the dog") == expected
    InternLM3Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "b")
    assert InternLM3Tokenizer.from_pretrained(tmp_path / "b").encode("the dog") == expected


def test_a_frame_of_other_tokens_is_refused(plain_by_transformers, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json puts \['</s>'\] before a text, which is not bos_token '<s>'"):
        folder = edited(plain_by_transformers, tmp_path / "a")
        library = json.loads((folder / "tokenizer.json").read_text())
        library["post_processor"] = {"type": "BertProcessing", "sep": ["<s>", 1], "cls": ["</s>", 2]}
        (folder / "tokenizer.json").write_text(json.dumps(library))
        InternLM3Tokenizer.from_pretrained(folder)


def test_ids_of_special_tokens_come_from_tokenizer_json(checkpoint, saved_by_transformers, tmp_path):
    """The base model's tokenizer.model beside transformers' two files is ignored, as in transformers."""
    from transformers import AutoTokenizer

    folder = edited(saved_by_transformers, tmp_path / "a")
    shutil.copy(checkpoint / "tokenizer.model", folder)
    expected = AutoTokenizer.from_pretrained(folder)
    tokenizer = InternLM3Tokenizer.from_pretrained(folder)
    for token in SPECIAL:
        assert tokenizer.encode(token, add_special_tokens=False) == [expected.convert_tokens_to_ids(token)], token
    assert tokenizer.eos_ids == [2, expected.convert_tokens_to_ids("<|im_end|>")]
    assert tokenizer.all_special_ids == sorted(expected.all_special_ids)
    for text in CORPUS:
        assert tokenizer.encode(text) == expected.encode(text), text


@pytest.mark.parametrize("key", [*NAMED_TOKENS, "additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_no_id_is_invented_at_load(plain, tmp_path, file, key):
    given = "<nowhere>" if key in NAMED_TOKENS else ["<|im_start|>", "<nowhere>"]
    folder = edited(plain, tmp_path / "a", **{key: given})
    if file == "tokenizer.json":
        shutil.copy(library_file(plain, tmp_path), folder)
        (folder / "tokenizer.model").unlink()
    name = "additional_special_tokens" if key == "extra_special_tokens" else key
    with pytest.raises(ValueError, match=rf"{name} '<nowhere>' has no id: neither {re.escape(file)} nor added_tokens"):
        InternLM3Tokenizer.from_pretrained(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<nowhere>": 517}))
    tokenizer = InternLM3Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("<nowhere>", add_special_tokens=False) == [517]
    assert 517 in tokenizer.all_special_ids


@pytest.mark.parametrize("kind", ["nfkc", "plain"])
def test_flipped_bytes_of_a_tokenizer_json(tmp_path, kind):
    """Damage anywhere: one error that names the file, or a tokenizer. The table of nfkc makes the library panic."""
    base = write_checkpoint(tmp_path / "a", train(TRAINED[kind]))
    folder = save_by_transformers(base, tmp_path)
    content, refusals = (folder / "tokenizer.json").read_bytes(), 0
    for seed in range(60):
        dice, damaged = random.Random(seed), bytearray(content)
        for _ in range(dice.choice([1, 3, 10])):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        (folder / "tokenizer.json").write_bytes(damaged)
        try:
            InternLM3Tokenizer.from_pretrained(folder)
        except ValueError as error:
            assert str(folder) in str(error) and len(str(error)) < 800, f"seed {seed}: {error}"
            refusals += 1
    assert refusals > 20


@pytest.mark.parametrize("extra", [["<tool>"], {"tool_token": "<tool>"}, {"tool_token": {"content": "<tool>"}}])
def test_extra_special_tokens(plain, tmp_path, extra):
    config = json.loads((plain / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"] | {"700": {"content": "<tool>", "special": False}}
    folder = edited(plain, tmp_path / "a", extra_special_tokens=extra, added_tokens_decoder=added)
    tokenizer = InternLM3Tokenizer.from_pretrained(folder)
    assert 700 in tokenizer.all_special_ids
    assert (
        tokenizer.extra_special_tokens
        == tokenizer.additional_special_tokens
        == ["<|im_start|>", "<|im_end|>", "<tool>"]
    )
    assert tokenizer.decode([700, *tokenizer.encode("the")], skip_special_tokens=True) == "the"
    tokenizer.save_pretrained(tmp_path / "b")
    assert 700 in InternLM3Tokenizer.from_pretrained(tmp_path / "b").all_special_ids


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<|im_end|>": 900}),
        ("added_tokens.json", {"<other>": 516}),
        ("tokenizer.json", {"added_tokens": [{"id": 900, "content": "<|im_end|>"}]}),
        ("tokenizer.json", {"added_tokens": [{"id": 516, "content": "<other>"}]}),
    ],
)
def test_two_files_that_disagree_about_an_id(plain, tmp_path, file, content):
    folder = edited(plain, tmp_path / "a")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"tokenizer_config.json gives '<.im_end.>' the id 516, and {file} gives"):
        InternLM3Tokenizer.from_pretrained(folder)


def test_a_tokenizer_json_that_gives_other_ids(plain, tmp_path):
    """An added token without an entry in tokenizer.json gets the next id, whatever the configuration says."""
    folder = edited(plain, tmp_path / "a", added_tokens_decoder={"900": {"content": "<tool>"}})
    shutil.copy(library_file(plain, tmp_path), folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="gives '<tool>' the id 517, and added_tokens_decoder the id 900"):
        InternLM3Tokenizer.from_pretrained(folder)
    for content in ("{}", '{"added_tokens": 5}', '{"added_tokens": [{"content": "a"}]}', "nonsense"):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            InternLM3Tokenizer.from_pretrained(folder)


NULLS = ["add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "model_max_length",
         "padding_side", "truncation_side", "additional_special_tokens", "extra_special_tokens", "chat_template",
         "chat_control_tokens", "pad_token"]  # fmt: skip


@pytest.mark.parametrize("name", NULLS)
def test_null_settings(plain, tmp_path, name):
    """A switch that is null is off, as in InternLM3's published class; any other setting has its default."""
    tokenizer = InternLM3Tokenizer.from_pretrained(edited(plain, tmp_path / "a", **{name: None}))
    ids = tokenizer("the  dog n't", padding=name != "pad_token").input_ids
    text = tokenizer.decode(ids)
    if name == "add_bos_token":
        assert ids == sentencepiece_ids(plain, "the  dog n't")
        assert text == "the  dog n't"
    else:
        assert ids == oracle(plain).encode("the  dog n't")
        assert text == "<s>the  dog n't"
    assert tokenizer.model_max_length == NO_LIMIT
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "right")


# Bad files


@pytest.mark.parametrize("kind", ["missing", "empty", "random", "cut", "between pieces"])
def test_bad_sentencepiece_file(plain, tmp_path, kind):
    directory = write_checkpoint(tmp_path / "a", (plain / "tokenizer.model").read_bytes())
    path = directory / "tokenizer.model"
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "between pieces":  # 300 whole pieces, each as key, one byte of length, content
        position = 0
        for _ in range(300):
            position += 2 + data[position + 1]
        path.write_bytes(data[:position])
    else:
        path.write_bytes({"empty": b"", "random": random.Random(1).randbytes(5000), "cut": data[:-50]}[kind])
    with pytest.raises(FileNotFoundError if kind == "missing" else ValueError, match=r"tokenizer\.model"):
        InternLM3Tokenizer.from_pretrained(directory)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"a": ', "tokenizer_config.json is not valid JSON"),
        ("[1, 2]", "tokenizer_config.json must contain a JSON object"),
        ('{"added_tokens_decoder": {"x": {"content": "a"}}}', "'x'"),
        ('{"added_tokens_decoder": {"-1": {"content": "a"}}}', "'-1'"),
        ('{"added_tokens_decoder": {"900": {"lstrip": true}}}', "'900'"),
        ('{"added_tokens_decoder": {"900": {"content": "a", "lstrip": "no"}}}', "lstrip"),
        ('{"added_tokens_decoder": ["a"]}', "added_tokens_decoder"),
        ('{"added_tokens_decoder": {"1' + "0" * 30 + '": {"content": "<big>"}}}', "'<big>': an id must be"),
        ('{"added_tokens_decoder": {"2147483648": {"content": "<big>"}}}', "'<big>': an id must be"),
        ('{"eos_token": 2}', "eos_token"),
        ('{"bos_token": null}', "add_bos_token is true and bos_token is null"),
        ('{"add_bos_token": "yes"}', "add_bos_token"),
        ('{"padding_side": "up"}', "padding_side"),
        ('{"model_max_length": "long"}', "model_max_length"),
        ('{"model_max_length": NaN}', "model_max_length"),
        ('{"chat_template": [{"name": "default"}]}', "chat_template"),
        ('{"additional_special_tokens": "<a>"}', "additional_special_tokens"),
        ('{"spaces_between_special_tokens": true}', "spaces_between_special_tokens"),
    ],
)
def test_bad_config(plain, tmp_path, config, message):
    shutil.copy(plain / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message) as error:
        InternLM3Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
