"""What LLM does with wrong arguments and damaged checkpoints: an error that names the culprit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from internlm3 import (
    LLM,
    InternLM3Config,
    InternLM3ForCausalLM,
    InternLM3Model,
    InternLM3Tokenizer,
    SamplingParams,
)
from internlm3.runtime.api import llm as llm_module
from internlm3.runtime.common import other_libraries
from internlm3.runtime.engine import shared
from internlm3.runtime.engine.graphs import eager
from internlm3.tests.support.llm import TINY_WINDOW, same


def counted(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> list[int]:
    """A list that grows by one with every pass through the model that ends in logits."""
    calls: list[int] = []
    head = llm.model.head

    def counting(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return head(x)

    monkeypatch.setattr(llm.model, "head", counting)
    return calls


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate(""), ValueError, "the prompt is empty"),
        (lambda m: m.generate([[]]), ValueError, "the prompt is empty"),
        (lambda m: m.generate(["hi", ""]), ValueError, "prompt 1 is empty"),
        (lambda m: m.stream(""), ValueError, "the prompt is empty"),
        (lambda m: m.generate([504, 49152]), ValueError, "49152, which is outside the vocabulary of 49152"),
        (lambda m: m.generate(["hi", [-1]]), ValueError, "prompt 1 holds -1, which is outside the vocabulary"),
        (lambda m: m.generate([504] * 64), ValueError, "64 tokens, and max_seq_len is 64"),
        (lambda m: m.stream([504] * 99), ValueError, "99 tokens, and max_seq_len is 64"),
        (lambda m: m.generate(["hi", "hi " * 80]), ValueError, "prompt 1 has .* max_seq_len is 64"),
        (lambda m: m.chat("hi " * 80), ValueError, "max_seq_len is 64"),
        (lambda m: m.generate(None), TypeError, "prompts must be .* not None"),
        (lambda m: m.generate(5), TypeError, "prompts must be .* not 5"),
        (lambda m: m.generate({"prompt": "hi"}), TypeError, "prompts must be .* not {'prompt'"),
        (lambda m: m.generate([1.5]), TypeError, "token ids.* not 1.5"),
        (lambda m: m.generate(torch.tensor([1.5])), TypeError, "token ids.* not 1.5"),
        (lambda m: m.generate([504, "hi"]), TypeError, r"token ids.* not \[504, 'hi'\]"),
        (lambda m: m.generate(MESSAGES), TypeError, "messages go to chat"),
        (lambda m: m.generate("\ud800"), ValueError, "Unicode"),
        (lambda m: m.stream(["hi", ""]), ValueError, "prompt 1 is empty"),
        (lambda m: m.chat([]), ValueError, "messages must be a non-empty list"),
        (lambda m: m.chat(""), ValueError, "empty"),
        (lambda m: m.chat(MESSAGES[0]), ValueError, "messages must be a non-empty list"),
        (lambda m: m.chat(None), ValueError, "messages must be a non-empty list"),
        (lambda m: m.chat(None, thinking=True), ValueError, "messages must be a non-empty list"),
        (lambda m: m.chat([5], thinking=True), ValueError, r"messages\[0\] must be a dict"),
        (lambda m: m.chat([{"role": "robot", "content": "hi"}]), ValueError, "unknown role 'robot'.*assistant"),
        (lambda m: m.chat([*MESSAGES, {"role": "user"}]), ValueError, r"messages\[1\]: 'content'"),
        (lambda m: m.chat([{"role": "user", "content": 5}]), ValueError, r"messages\[0\]: 'content'.* int"),
        (lambda m: m.generate("hi", {"top_k": 3}), TypeError, "one SamplingParams, not {'top_k': 3}"),
        (lambda m: m.generate("hi", [SamplingParams()]), TypeError, "one SamplingParams"),
        (lambda m: m.generate("hi", max_token=3), TypeError, "'max_token'; did you mean 'max_tokens'"),
        (lambda m: m.generate("hi", temprature=3), TypeError, "'temprature'; did you mean 'temperature'"),
        (lambda m: m.chat("hi", repitition_penalty=3), TypeError, "did you mean 'repetition_penalty'"),
        (lambda m: m.stream("hi", stop_token_id=3), TypeError, "did you mean 'stop_token_ids'"),
        (lambda m: m.generate("hi", temperature=-1), ValueError, r"temperature .* got -1"),
        (lambda m: m.generate("hi", temperature=float("nan")), ValueError, r"temperature .* got nan"),
        (lambda m: m.generate("hi", temperature="hot"), ValueError, r"temperature .* got 'hot'"),
        (lambda m: m.generate("hi", top_p=-1), ValueError, r"top_p .*\[0, 1\]; got -1"),
        (lambda m: m.generate("hi", top_k=-2), ValueError, "top_k .* got -2"),
        (lambda m: m.generate("hi", max_tokens=0), ValueError, "max_tokens .* got 0"),
        (lambda m: m.generate("hi", logprobs=True), ValueError, "logprobs .* got True"),
        (lambda m: m.generate("hi", stop=""), ValueError, "stop .* got ''"),
        (lambda m: m.generate("hi", stop=[3]), ValueError, "stop .* got 3"),
        (lambda m: m.generate("hi", n=2, temp=0), ValueError, "n must be 1 at temperature 0"),
        (lambda m: m.generate("hi", min_tokens=3, max_tokens=2), ValueError, "min_tokens .* max_tokens = 2; got 3"),
        (lambda m: m.generate("hi", temp=1, temperature=2), ValueError, "temp=1 and temperature=2"),
        (lambda m: m.generate("hi", do_sample=True, temperature=0), ValueError, "do_sample=True contradicts"),
        (lambda m: m.generate("hi", allowed_token_ids=[10**6]), ValueError, "allowed_token_ids holds 1000000"),
        (lambda m: m.generate("hi", logit_bias={10**6: 1}), ValueError, "logit_bias holds 1000000"),
        (lambda m: m.generate("hi", stop_token_ids=[10**6]), ValueError, "stop_token_ids holds 1000000"),
    ],
)
def test_a_mistake_in_a_call_is_named_before_the_model_runs(tiny, monkeypatch, call, error, message):
    calls = counted(monkeypatch, tiny)
    with pytest.raises(error, match=message):
        call(tiny)
    assert calls == []


def test_a_templates_own_error_is_shown(tiny, monkeypatch):
    refusing = "{% for m in messages %}\n{{ raise_exception('roles must alternate') }}{% endfor %}"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", refusing)
    with pytest.raises(ValueError, match=r"line 2.*roles must alternate"):
        tiny.chat("hi")
    monkeypatch.setattr(tiny.tokenizer, "chat_template", "{% for %}")
    with pytest.raises(ValueError, match="line 1: syntax error"):
        tiny.chat("hi")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_model_len": 10}, TypeError, "LLM: unknown keyword 'max_model_len'; did you mean 'max_seq_len'"),
        ({"max_seq_len": 0}, ValueError, "max_seq_len must be an integer >= 1; got 0"),
        ({"max_seq_len": "10"}, ValueError, "max_seq_len must be an integer >= 1; got '10'"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be an integer >= 1; got 0"),
        (
            {"max_batch_size": 17, "batch_invariant": True, "device": "cpu"},
            ValueError,
            "up to 16 answers .* max_batch_size is 17",
        ),
        ({"dtype": "int8"}, ValueError, "dtype 'int8' is not supported.*bfloat16"),
        ({"device": "gpu"}, ValueError, "device 'gpu' is no device"),
        ({"device": "cuda:99"}, ValueError, "device 'cuda:99' does not exist"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_in_loading_is_named(tiny_folder, arguments, error, message):
    with pytest.raises(error, match=message):
        LLM(tiny_folder, progress=False, **arguments)


# What scripts for vLLM and llama.cpp pass, at the values that change nothing.
SCRIPTS = [
    {"tensor_parallel_size": 1, "gpu_memory_utilization": 0.9, "trust_remote_code": True, "enforce_eager": False,
     "swap_space": 4, "seed": 0, "max_num_seqs": 256, "quantization": None, "max_model_len": None},
    {"tokenizer_mode": "auto", "cpu_offload_gb": 0.0, "enable_prefix_caching": True, "load_format": "auto",
     "kv_cache_dtype": "auto", "disable_log_stats": True, "max_seq_len_to_capture": 8192, "download_dir": None},
    {"n_ctx": 0, "n_gpu_layers": -1, "n_batch": 512, "seed": -1, "verbose": True, "use_mmap": True, "n_threads": None},
    {"torch_dtype": "auto", "device_map": "auto", "low_cpu_mem_usage": True, "attn_implementation": "sdpa"},
]  # fmt: skip


@pytest.mark.parametrize("words", SCRIPTS, ids=lambda words: next(iter(words)))
def test_neutral_words_of_other_libraries(tiny, tiny_folder, words):
    llm = LLM(tiny_folder, progress=False, tokenizer=tiny_folder, **words)
    assert repr(llm) == repr(tiny)


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        ({"tensor_parallel_size": 2}, ValueError, "tensor_parallel_size=2 is not supported; it can only be 1"),
        ({"tensor_parallel_size": True}, ValueError, "tensor_parallel_size=True is not supported"),
        ({"tokenizer": "owner/other"}, ValueError, "tokenizer='owner/other' is not supported; it can only be"),
        ({"swap_space": 16}, ValueError, "swap_space=16 is not supported"),
        ({"logits_all": True}, ValueError, "logits_all=True is not supported"),
        ({"enforce_eager": True}, TypeError, "'enforce_eager'; did you mean 'cuda_graphs=False'"),
        ({"gpu_memory_utilization": 0.5}, TypeError, "'gpu_memory_utilization'; did you mean 'cache_tokens'"),
        ({"max_num_seqs": 8}, TypeError, "'max_num_seqs'; did you mean 'max_batch_size'"),
        ({"n_ctx": 2048}, TypeError, "'n_ctx'; did you mean 'max_seq_len'"),
        ({"n_gpu_layers": 0}, TypeError, "'n_gpu_layers'; did you mean 'device'"),
        ({"seed": 42}, TypeError, r"'seed'; did you mean 'SamplingParams\(seed="),
        ({"verbose": False}, TypeError, "'verbose'; did you mean 'progress=False'"),
        ({"torch_dtype": torch.float16}, TypeError, "'torch_dtype'; did you mean 'dtype'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_words_of_other_libraries_that_would_mean_something(tiny_folder, words, error, says):
    with pytest.raises(error, match=f"LLM: .*{says}"):
        LLM(tiny_folder, progress=False, **words)


def test_counterparts_of_llm_are_its_arguments():
    known = {*(LLM.__init__.__kwdefaults__ or ())}
    assert not known & {*other_libraries.LLM, *other_libraries.LLM_COUNTERPARTS}
    for name in other_libraries.LLM_COUNTERPARTS.values():
        assert name.partition("=")[0] in known or "." in name, name


def test_a_calls_words_of_vllm(tiny, monkeypatch):
    """use_tqdm is obeyed; the others are neutral or name ours."""
    plain = tiny.generate(["hi", "you"], temperature=0, max_tokens=2)
    shown = []
    monkeypatch.setattr(tiny, "_progress", True)
    monkeypatch.setattr(llm_module, "tqdm", lambda *a, disable, **k: shown.append(disable) or tqdm(disable=True))
    for bar in (True, False):
        call = {"use_tqdm": bar, "lora_request": None, "priority": 0, "temperature": 0, "max_tokens": 2}
        assert same(tiny.generate(["hi", "you"], **call), plain)
        assert tiny.chat("hi", **call, tools=None, chat_template=None, add_generation_prompt=True).text
    assert shown == [None, True, True, True]
    for call, error, says in (
        ({"use_tqdm": 1}, ValueError, "use_tqdm must be True or False; got 1"),
        ({"lora_request": "adapter"}, ValueError, "lora_request='adapter' is not supported"),
        ({"max_model_len": 20}, TypeError, "did you mean 'max_seq_len of LLM'"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, TypeError, "did you mean 'thinking=True"),
    ):
        with pytest.raises(error, match=says):
            tiny.chat("hi", **call)


def test_a_loaded_model_says_what_it_is(tiny, tiny_folder):
    assert repr(tiny) == (
        f"LLM({str(tiny_folder)!r}, dtype='float32', device='cpu', max_seq_len={TINY_WINDOW}, max_batch_size=16)"
    )
    assert repr(tiny.tokenizer).startswith("InternLM3Tokenizer('tokenizer.model', vocab_size=49080, bos_token=")


@pytest.mark.parametrize(("options", "capture"), [({}, None), ({"cuda_graphs": False}, eager)], ids=["on", "off"])
def test_cuda_graphs_can_be_turned_off(tiny_folder, monkeypatch, options, capture):
    """The engine then gets the eager capture, and nothing else changes."""
    asked: list[Any] = []
    monkeypatch.setattr(shared, "Engine", lambda model, *, capture, **_: asked.append(capture))
    LLM(tiny_folder, progress=False, **options)
    assert {*asked} == {capture}


def test_trust_remote_code_has_no_effect(tiny_folder):
    LLM(tiny_folder, progress=False, trust_remote_code=True)


def damaged(folder: Path, where: Path, **changes: Any) -> Path:
    """A copy whose files are removed (None), replaced (bytes), or given other JSON keys (a dict)."""
    copy = Path(shutil.copytree(folder, where / "copy"))
    for name, change in changes.items():
        path = copy / name.replace("__", ".")
        if change is None:
            path.unlink()
        elif isinstance(change, bytes):
            path.write_bytes(change)
        else:
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(content | change))
    return copy


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"config__json": None}, FileNotFoundError, "config.json is missing"),
        ({"config__json": b"{"}, ValueError, "config.json is not valid JSON"),
        ({"config__json": {"model_type": "llama"}}, ValueError, "config.json: model_type is 'llama'"),
        ({"config__json": {"vocab_size": 40_000}}, ValueError, "the tokenizer has 49080 tokens.* vocabulary 40000"),
        ({"config__json": {"rope_scaling": {"type": "yarn", "factor": 2}}}, ValueError, "rope_type 'yarn'"),
        ({"tokenizer__model": None}, FileNotFoundError, "tokenizer.model"),
        ({"tokenizer__model": b"nonsense"}, ValueError, "tokenizer.model"),
        ({"tokenizer_config__json": {"chat_template": 5}}, (ValueError, TypeError), "chat_template"),
        ({"generation_config__json": b"]"}, ValueError, "generation_config.json is not valid JSON"),
        (
            {"generation_config__json": {"do_sample": True, "top_p": 7}},
            ValueError,
            "generation_config.json: top_p .* got 7",
        ),
        (
            {"generation_config__json": {"eos_token_id": [2, 49152]}},
            ValueError,
            "generation_config.json: eos_token_id holds 49152",
        ),
        ({"generation_config__json": {"eos_token_id": "2"}}, ValueError, "_config.json: eos_token_id holds '2'"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_damaged_file_is_named_before_the_weights_are_read(
    tiny_folder, tmp_path, monkeypatch, changes, error, message
):
    folder = damaged(tiny_folder, tmp_path, **changes)
    monkeypatch.setattr("internlm3.runtime.api.llm.load_model", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(error, match=message) as raised:
        LLM(folder, progress=False)
    assert "copy" in str(raised.value) or "config.json" in str(raised.value)


def test_missing_weights(tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"contains no weights: it needs model\.safetensors"):
        LLM(damaged(tiny_folder, tmp_path, model__safetensors=None), progress=False)


@pytest.mark.parametrize("name", [None, b"folder", 5, ["folder"]], ids=str)
def test_what_names_no_checkpoint(name):
    message = re.escape(f"a checkpoint is named by a string or a Path, not by {name!r}")
    classes = InternLM3Config, InternLM3ForCausalLM, InternLM3Model, InternLM3Tokenizer
    for load in (LLM, *(each.from_pretrained for each in classes)):
        with pytest.raises(TypeError, match=message):
            load(name)


def test_no_such_checkpoint(tmp_path, tiny_folder):
    with pytest.raises(FileNotFoundError, match="there is no folder '/no/such/folder'"):
        LLM("/no/such/folder")
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file"):
        LLM(tiny_folder / "config.json")
    with pytest.raises(FileNotFoundError, match=r"'no-one/nothing' is no local folder.* in the cache"):
        LLM("no-one/nothing", cache_dir=tmp_path, local_files_only=True)


def test_no_network_and_nothing_cached(tmp_path):
    # Port 9 of this machine: nobody listens there.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    code = "from internlm3 import LLM\ntry: LLM('no-one/nothing')\nexcept FileNotFoundError as error: print(error)"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "'no-one/nothing' is no local folder" in ran.stdout and "network" in ran.stdout, ran.stderr
