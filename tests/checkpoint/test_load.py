"""Loading: what was saved is what is loaded, in bounded memory, by transformers too."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, load_model, save_file, save_model

from internlm3 import InternLM3Config, InternLM3ForCausalLM, InternLM3Model
from internlm3.runtime.checkpoint import load as loading
from internlm3.runtime.model.model import Decoder, LanguageModel
from internlm3.tests.support.checkpoints import IDS, INDEX, change, load, make, refused, same, shards_to_bin

# -------------------------------------------------------------------- round trips


@pytest.mark.parametrize("limit", ["5GB", "20KB", 20000, 1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}, {"qkv_bias": True, "bias": True}], ids=str)
def test_saved_is_loaded(tmp_path, limit, dtype, shape):
    model = make(dtype=dtype, **shape)
    model.generation_config = {"eos_token_id": [2, 7], "do_sample": True}
    model.save_pretrained(tmp_path / "new" / "folder", max_shard_size=limit)
    again = load(tmp_path / "new" / "folder")
    assert same(model, again) and again.dtype == dtype
    assert again.config == model.config and again.generation_config == model.generation_config
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == bool(shape.get("tie_word_embeddings"))
    assert (limit == "5GB") != (tmp_path / "new" / "folder" / INDEX).is_file()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("limit", ["5GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_is_saved_and_the_reverse(tmp_path, limit, tied):
    model = make(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "ours", max_shard_size=limit)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    assert same(model, load(tmp_path / "theirs"))


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}, {"qkv_bias": True, "bias": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_safetensors_saves_a_model(tmp_path, shape, dtype):
    """Its save_model writes what transformers and this runtime load, and its load_model reads it back."""
    model, path = make(dtype=dtype, **shape), tmp_path / "model.safetensors"
    model.config.save_pretrained(tmp_path)
    save_model(model, str(path), metadata={"format": "pt"})
    assert same(model, load(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert all(theirs.state_dict()[name].equal(weight) for name, weight in model.state_dict().items())
    other = make(1, dtype=dtype, **shape)
    assert not same(model, other)
    load_model(other, path)
    assert same(model, other)
    with torch.inference_mode():
        save_model(model.model, str(tmp_path / "decoder.safetensors"))
    assert {f"model.{name}" for name in load_file(tmp_path / "decoder.safetensors")} == model.state_dict().keys() - {
        "lm_head.weight"
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", [torch.clone, torch.nn.Parameter], ids=["tensors", "parameters"])
def test_bin_files(tmp_path, kind, parts, zipped):
    model = make()
    model.config.save_pretrained(tmp_path)
    weights = {name: kind(weight) for name, weight in model.state_dict().items()}
    names = list(weights)
    files = ["pytorch_model.bin"] if parts == 1 else [f"pytorch_model-{i:05d}-of-00003.bin" for i in range(1, 4)]
    for index, file in enumerate(files):
        group = {name: weights[name] for name in names[index::parts]}
        torch.save(group, tmp_path / file, _use_new_zipfile_serialization=zipped)
    if parts > 1:
        weight_map = {name: files[i % parts] for i, name in enumerate(names)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same(model, load(tmp_path))


def test_dtype_forms(tmp_path):
    make(dtype=torch.float16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == load(tmp_path, dtype="auto").dtype == torch.float16
    for options in (
        {"dtype": "bfloat16"},
        {"dtype": torch.bfloat16},
        {"torch_dtype": "bfloat16"},
        {"torch_dtype": torch.bfloat16},
        {"dtype": "bf16"},
        {"dtype": "torch.bfloat16"},
    ):
        assert load(tmp_path, **options).dtype == torch.bfloat16
    wide = load(tmp_path, dtype="float32")
    assert torch.equal(wide.lm_head.weight, load(tmp_path).lm_head.weight.float())
    for bad in ("int8", torch.int8, "float8", torch.float64):
        refused(tmp_path, ValueError, "dtype", bad, dtype=bad)
    refused(tmp_path, ValueError, "dtype", "torch_dtype", dtype="float32", torch_dtype="bfloat16")


def test_dtype_where_the_config_says_none(tmp_path):
    """It is that of the weights, whatever a derived buffer beside them is."""
    make(dtype=torch.bfloat16).save_pretrained(tmp_path)
    change(tmp_path / "config.json", lambda config: config.update(torch_dtype=None))
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change(tmp_path / "model.safetensors", lambda weights: weights.update(buffer))
    assert load(tmp_path).dtype == torch.bfloat16


def test_device_forms(tmp_path):
    make().save_pretrained(tmp_path)
    for options in (
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"model": "cpu", "lm_head": torch.device("cpu")}},
        {"device": torch.device("cpu")},
        {"device": "cpu"},
        {"device": None, "device_map": "cpu"},
    ):
        assert load(tmp_path, **{"device": None, **options}).device.type == "cpu"
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert load(tmp_path, device=None).device.type == load(tmp_path, device="auto").device.type == expected
    refused(tmp_path, ValueError, "cpu", "cuda:0", device=None, device_map={"a": "cpu", "b": "cuda:0"})
    for bad in ("banana", "cuda:99", "mps", "balanced", ["cpu"], -1):
        refused(tmp_path, ValueError, bad if isinstance(bad, str) else "device", device=bad)
    refused(tmp_path, ValueError, "device", "device_map", device="cpu", device_map="cuda")


def test_the_decoder_alone(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    decoder = InternLM3Model.from_pretrained(str(tmp_path), device="cpu", progress=False)
    assert torch.equal(decoder(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_plain_language_model(tmp_path):
    """load_model makes any LanguageModel, without transformers' interface."""
    model = make()
    model.save_pretrained(tmp_path)
    plain = loading.load_model(LanguageModel, tmp_path, device="cpu", batch_invariant=True, progress=False)
    assert type(plain) is LanguageModel and type(plain.model) is Decoder
    assert same(model, plain) and plain.model.batch_invariant and not plain.training


def test_a_configuration_of_ones_own(tmp_path):
    """An object, transformers' own, or a path of a folder or a file."""
    make().save_pretrained(tmp_path / "model")
    config = InternLM3Config.from_pretrained(tmp_path / "model", rope_theta=500.0)
    config.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").rename(tmp_path / "other" / "mine.json")
    config.save_pretrained(tmp_path / "other")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "other")
    for given in (config, str(tmp_path / "other"), tmp_path / "other" / "mine.json", theirs):
        model = load(tmp_path / "model", config=given)
        assert model.config.rope_theta == 500.0 and same(model, make())
    decoder = InternLM3Model.from_pretrained(tmp_path / "model", config=tmp_path / "other", progress=False)
    assert decoder.config == config
    assert InternLM3Config.from_pretrained(tmp_path / "other" / "mine.json") == config
    refused(tmp_path / "model", FileNotFoundError, "nowhere", config=str(tmp_path / "nowhere"))
    refused(tmp_path / "model", TypeError, "config must be an InternLM3Config", config={"rope_theta": 500.0})


@pytest.mark.parametrize(("tied", "head"), [(True, False), (False, True), (True, True), (False, False)])
def test_a_base_model_without_the_prefix(tmp_path, tied, head):
    """transformers' InternLM3Model saves names without "model.", and no head; others add the head's weight."""
    model = make(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "whole")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "base", max_shard_size="20KB" if head else "5GB")
    (tmp_path / "base" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    if head:
        path = next((tmp_path / "base").glob("model-00001*"))
        change(path, lambda weights: weights.update({"lm_head.weight": model.lm_head.weight.clone()}))
        add = {"lm_head.weight": path.name}
        change(tmp_path / "base" / INDEX, lambda index: index["weight_map"].update(add))
    decoder = InternLM3Model.from_pretrained(tmp_path / "base", device="cpu", progress=False)
    assert same(decoder, model.model)
    torch.testing.assert_close(decoder(IDS)[0], theirs(IDS)[0], rtol=1e-4, atol=1e-5)
    if tied or head:
        assert same(model, load(tmp_path / "base"))
    else:
        refused(tmp_path / "base", ValueError, "'lm_head.weight' is missing")


def test_a_base_model_that_lacks_a_tensor(tmp_path):
    model, file = make(tie_word_embeddings=True), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    bare = {name.removeprefix("model."): weight for name, weight in load_file(file).items()}
    save_file(bare, file)
    assert same(model, load(tmp_path))
    change(file, lambda weights: weights.pop("layers.1.mlp.up_proj.weight"))
    refused(tmp_path, ValueError, "'layers.1.mlp.up_proj.weight' is missing")
    change(file, lambda weights: weights.update({"layers.1.mlp.up_proj.weight": torch.ones(2)}))
    refused(tmp_path, ValueError, "'layers.1.mlp.up_proj.weight' has shape [2]")


def test_derived_buffers_are_ignored(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    extra = {f"model.layers.0.self_attn.rotary_emb.{name}": torch.ones(4) for name in ("inv_freq", "cos_cached")}
    change(tmp_path / "model.safetensors", lambda weights: weights.update(extra))
    assert same(model, load(tmp_path))


def test_a_tied_head_that_was_saved_too(tmp_path):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    head = {"lm_head.weight": model.lm_head.weight.clone()}
    change(tmp_path / "model.safetensors", lambda weights: weights.update(head))
    assert same(model, load(tmp_path))


NEUTRAL = {
    "attn_implementation": "sdpa", "low_cpu_mem_usage": True, "use_safetensors": True, "trust_remote_code": True,
    "quantization_config": None, "load_in_8bit": False, "force_download": False, "subfolder": "", "variant": None,
    "max_memory": None, "output_loading_info": False, "ignore_mismatched_sizes": False, "proxies": None,
}  # fmt: skip


def test_keywords_of_copied_scripts(tmp_path):
    """What means nothing here is accepted at the value at which it means nothing, and names are transformers'."""
    model = make()
    model.save_pretrained(save_directory=tmp_path, safe_serialization=True, push_to_hub=False)
    again = InternLM3ForCausalLM.from_pretrained(
        pretrained_model_name_or_path=tmp_path, device="cpu", progress=False, **NEUTRAL
    )
    assert same(model, again)
    model.config.save_pretrained(save_directory=tmp_path, push_to_hub=False)
    config = InternLM3Config.from_pretrained(pretrained_model_name_or_path=tmp_path, force_download=False)
    assert config == model.config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2' .* 'sdpa' or 'eager'"),
        ({"load_in_4bit": True}, "load_in_4bit=True is not supported; it can only be False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported"),
        ({"variant": "fp16"}, "variant='fp16'"),
        ({"subfolder": "sub"}, "subfolder='sub'"),
        ({"use_safetensors": False}, "use_safetensors=False"),
        ({"force_download": True}, "force_download=True"),
    ],
    ids=str,
)
def test_keywords_that_would_mean_something(tmp_path, options, words):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(tmp_path, **options)
    with pytest.raises(ValueError, match="safe_serialization=False is not supported"):
        make().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(TypeError, match="'max_shard_sise'; did you mean 'max_shard_size'"):
        make().save_pretrained(tmp_path, max_shard_sise="5GB")


def test_pickled_weights_where_safe_ones_are_asked_for(tmp_path):
    make().config.save_pretrained(tmp_path)
    torch.save(make().state_dict(), tmp_path / "pytorch_model.bin")
    assert same(make(), load(tmp_path))
    refused(tmp_path, FileNotFoundError, tmp_path, "use_safetensors=True", use_safetensors=True)


def test_a_model_made_in_inference_mode(tmp_path):
    """It can be changed outside of it, as any other."""
    make(1).save_pretrained(tmp_path)
    with torch.inference_mode():
        models = make(), load(tmp_path)
    for model in models:
        model.load_state_dict(make(2).state_dict())
        model.lm_head.weight.mul_(1)
        assert same(model, make(2))


# -------------------------------------------------------------------- memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_the_model_and_a_shard(tmp_path):
    """100 MB in six shards. Two copies of the model at once, as a naive loader makes them, would be 200 MB."""
    model = make(
        vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    folders = {kind: tmp_path / kind for kind in ("safetensors", "bin", "tiny")}
    model.save_pretrained(folders["safetensors"], max_shard_size="20MB")
    model.save_pretrained(folders["bin"], max_shard_size="20MB")
    shards_to_bin(folders["bin"])
    make().save_pretrained(folders["tiny"])
    script = textwrap.dedent("""
        import re, sys, torch
        from internlm3 import InternLM3ForCausalLM
        def memory(kind):
            return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
        def load(folder):
            open("/proc/self/clear_refs", "w").write("5")  # resets the peak
            before = memory("VmRSS")
            model = InternLM3ForCausalLM.from_pretrained(folder, device="cpu", progress=False)
            return memory("VmHWM") - before, float(sum(p.double().sum() for p in model.parameters()))
        load(sys.argv[3])
        for folder in sys.argv[1:3]:
            print(*load(folder))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders.values())], capture_output=True, text=True, check=True
    )
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 90e6
    for folder, line in zip(folders.values(), done.stdout.splitlines(), strict=False):
        grown, total = map(float, line.split())
        files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
        largest = max(path.stat().st_size for path in files)
        assert len(files) >= 5
        assert grown < size + largest + 8e6  # 8 MB for buffers, and code that is loaded on first use
        assert total == pytest.approx(float(sum(parameter.double().sum() for parameter in model.parameters())))


def test_a_cached_snapshot_needs_no_network(tmp_path):
    model = make()
    snapshot = tmp_path / "models--nobody--something" / "snapshots" / ("0" * 40)
    model.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert same(model, load("nobody/something", cache_dir=tmp_path, local_files_only=True))


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_merged_weights_beside_their_bases_index(tmp_path, weights):
    """transformers takes the one file, and so does this runtime."""
    make(1).save_pretrained(tmp_path, max_shard_size=20000)
    merged = {name: weight.clone() for name, weight in make(2).state_dict().items()}
    if weights.endswith(".bin"):
        shards_to_bin(tmp_path)
        torch.save(merged, tmp_path / weights)
    else:
        save_file(merged, tmp_path / weights, metadata={"format": "pt"})
    assert same(make(2), load(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(theirs(IDS).logits, make(2)(IDS).logits, rtol=1e-4, atol=1e-5)
