"""Files of a checkpoint that are no files, or hold odd values: an error in one line that names file and key."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from internlm3 import LLM, InternLM3Config, InternLM3ForCausalLM, InternLM3Tokenizer
from internlm3.runtime.api.inputs import checkpoint_defaults
from internlm3.runtime.checkpoint.quantised.methods import method_of
from internlm3.runtime.checkpoint.weight_files import WeightFiles
from internlm3.tests.support.checkpoints import INDEX, change, make, same
from internlm3.tests.support.tokenizers import TRAINED, train, write_checkpoint

CONFIG, SETTINGS, DEFAULTS = "config.json", "tokenizer_config.json", "generation_config.json"
MAP, ADDED, TEMPLATE = "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
OPTIONAL = (SETTINGS, DEFAULTS, MAP, ADDED, TEMPLATE, "tokenizer.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A checkpoint of small files; its 517 tokens are ids of the model."""
    folder = write_checkpoint(tmp_path_factory.mktemp("odd") / "whole", train(TRAINED["plain"]))
    make(vocab_size=len(InternLM3Tokenizer.from_pretrained(folder))).save_pretrained(folder, max_shard_size=60_000)
    (folder / DEFAULTS).write_text('{"do_sample": true, "top_p": 0.9}')
    (folder / MAP).write_text('{"bos_token": "<s>"}')
    (folder / ADDED).write_text('{"<|im_end|>": 516}')
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def read(folder: Path) -> None:
    """Everything that LLM reads before the weights."""
    config = InternLM3Config.from_file(folder / CONFIG)
    InternLM3Tokenizer.from_pretrained(folder)
    checkpoint_defaults(folder, config.vocab_size)
    WeightFiles.open(folder)
    method_of(folder, config.extra)


def refused(folder: Path, error: type[Exception], *words: object) -> str:
    with pytest.raises(error) as caught:
        LLM(folder, device="cpu", progress=False)
    message = str(caught.value).replace(str(folder), "")
    assert all(str(word) in message for word in words), message
    assert len(message) < 300 and message.isprintable(), message
    return message


# -------------------------------------------------------------------- no files


def put(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "looping" else "nowhere")


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("dangling", "is a link to a missing file"),
        ("looping", "cannot be read (Too many levels"),
        ("folder", "is a folder"),
        ("pipe", "is a device or pipe"),
    ],
)
@pytest.mark.parametrize("name", [*OPTIONAL, CONFIG, "tokenizer.model", "model.safetensors", INDEX])
def test_what_is_no_file_is_named(folder, name, kind, says):
    put(folder / name, kind)
    refused(folder, OSError, name, says)


@pytest.mark.skipif(sys.platform == "win32", reason="links of POSIX")
def test_links_to_files_are_read(folder):
    """As in the hub's cache, where every file is a link."""
    (folder / "blobs").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(folder / "blobs" / path.name)
        path.symlink_to(folder / "blobs" / path.name)
    LLM(folder, device="cpu", progress=False)


def test_the_name_of_a_folder_is_no_text_or_too_long(folder):
    with pytest.raises(OSError, match=r"^'x+\.\.\.x+' cannot be read \(File name too long\)$"):
        LLM("x" * 5000, progress=False)
    if os.name == "posix":
        other = folder.rename(os.fsdecode(os.fsencode(folder) + b"\xff"))
        with pytest.raises(ValueError, match=r"copy\\udcff' is not UTF-8, .* rename it"):
            LLM(other, device="cpu", progress=False)


# -------------------------------------------------------------------- odd values


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


ODD = (
    *(None, True, 0, -1, 3, 1.5, float("nan"), float("inf"), 10**399, 1e39, "", "abc", "\ud800", "a\0b\n"),
    *("x" * 100_000, [], [None], [[]], [1], ["a"], ["x" * 100_000], [{}], {}, {"a": 1}, {"self": 1}, {"": None}),
    *(nested(300), {"\ud800": "\ud800"}, list(range(5000)), {"content": 5}, [[[1], 2]], [1, [2]]),
)
KEYS = {
    CONFIG: "vocab_size num_hidden_layers num_key_value_heads max_position_embeddings rms_norm_eps rope_theta "
    "rope_scaling rope_parameters eos_token_id tie_word_embeddings qkv_bias head_dim torch_dtype hidden_act model_type "
    "quantization_config self",
    SETTINGS: "bos_token pad_token additional_special_tokens extra_special_tokens added_tokens_decoder add_bos_token "
    "padding_side model_max_length chat_template chat_control_tokens sp_model_kwargs self",
    DEFAULTS: "do_sample temperature top_k eos_token_id max_new_tokens min_length stop_strings bad_words_ids "
    "sequence_bias suppress_tokens forced_eos_token_id exponential_decay_length_penalty num_beams logit_bias self",
    MAP: "bos_token additional_special_tokens self",
    ADDED: "<|im_end|> self",
    INDEX: "weight_map metadata",
}


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in KEYS.items() for key in keys.split()])
def test_odd_values(folder, file, key):
    """Each is read, or refused with one line."""
    content, refusals = json.loads((folder / file).read_text()), 0
    for value in ODD:
        (folder / file).write_text(json.dumps({**content, key: value}))
        try:
            read(folder)
        except (ValueError, OSError) as error:
            message = str(error).replace(str(folder), "")
            assert not isinstance(error, UnicodeError) and len(message) < 300 and "\n" not in message, message
            # Two files together may be at fault: then the folder is named, and the key.
            together = str(error).startswith(f"tokenizer of {folder}: ") and key.removeprefix("extra_") in message
            assert file in message or together, message
            refusals += 1
    assert refusals > 3 or key in ("self", "metadata", "torch_dtype"), refusals


@pytest.mark.parametrize("file", KEYS)
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, '{"a": ' + "9" * 5000 + "}", "5", '"a"', "\0"]
)
def test_odd_texts(folder, file, text):
    (folder / file).write_text(text)
    refused(folder, ValueError, file)


@pytest.mark.parametrize(
    ("file", "values", "error", "words"),
    [
        (INDEX, {"weight_map": {"model.norm": "x" * 300}}, ValueError, ["'model.norm'", "'xxx", "folder"]),
        (INDEX, {"weight_map": {"model.norm.weight": "a\0"}}, ValueError, [r"'a\x00'", "folder"]),
        (ADDED, {"<|im_end|>": {"id": [5]}}, ValueError, ["'<|im_end|>'", "{'id': [5]}", "whole number"]),
        (ADDED, {"<|im_end|>": [[[516]]]}, ValueError, ["'<|im_end|>'", "[[[516]]]", "whole number"]),
        (ADDED, {"<a>": 600, "<b>": 600}, ValueError, ["'<a>' and '<b>' have the same id"]),
        (ADDED, {"\ud800": 600}, ValueError, [r"'\ud800'", "lone surrogate"]),
        (ADDED, {"x" * 1_000_000: -1}, ValueError, ["'xxx", "whole number"]),
        (SETTINGS, {"bos_token": "x" * 1_000_000}, ValueError, ["bos_token 'xxx", "has no id"]),
        (SETTINGS, {"pad_token": "\udcff"}, ValueError, ["pad_token", r"'\udcff'", "lone surrogate"]),
        (SETTINGS, {"added_tokens_decoder": {"9" * 400: "a"}}, ValueError, ["added_tokens_decoder['999", "'a'"]),
        (MAP, {"eos_token": 5}, ValueError, ["eos_token", "5"]),
        (CONFIG, {"rope_theta": 10**399}, ValueError, ["rope_theta", "an integer of 1326 bits"]),
        (CONFIG, {"rope_scaling": {"type": "dynamic", "factor": 10**399}}, ValueError, ["factor", "1326 bits"]),
        (DEFAULTS, {"top_k": 10**399}, ValueError, ["top_k", "1326 bits"]),
    ],
)  # fmt: skip
def test_messages_name_file_and_key(folder, file, values, error, words):
    change(folder / file, lambda content: content.update(values))
    message = refused(folder, error, *words)
    assert file in message or "has no id" in message


def test_a_key_of_any_name_is_kept(folder, tmp_path):
    """As in transformers, which keeps keys that it does not know."""
    odd = {"self": 1, "cls": [2], "values": {"a": None}, "extra": "x", "": 0}
    change(folder / CONFIG, lambda content: content.update(odd))
    model = InternLM3ForCausalLM.from_pretrained(folder, device="cpu", progress=False)
    assert model.config.self == 1 and model.config.extra["cls"] == [2]
    model.save_pretrained(tmp_path / "again")
    assert odd.items() <= json.loads((tmp_path / "again" / CONFIG).read_text()).items()
    assert same(model, InternLM3ForCausalLM.from_pretrained(tmp_path / "again", device="cpu", progress=False))


def test_a_fault_in_special_tokens_map_is_not_ascribed_to_another_file(folder):
    change(folder / MAP, lambda content: content.update(unk_token=[]))
    assert re.match(rf"/{MAP}: unk_token: ", refused(folder, ValueError))
