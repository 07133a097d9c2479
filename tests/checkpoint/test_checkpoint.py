"""Checkpoints: what is saved is what is loaded, in bounded memory, and damage is met with a sentence that names it."""

import contextlib
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from internlm3 import InternLM3Config, InternLM3ForCausalLM, InternLM3Model
from internlm3.runtime.checkpoint import load as loading
from internlm3.runtime.checkpoint import save as saving
from internlm3.runtime.checkpoint.weight_files import read_header, read_tensors

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 2,
}
IDS = torch.tensor([[1, 5, 9, 33, 63, 0, 12]])
INDEX = "model.safetensors.index.json"


def make(seed=0, dtype=torch.float32, **shape):
    torch.manual_seed(seed)
    return InternLM3ForCausalLM(InternLM3Config(**{**SHAPE, "initializer_range": 0.3, **shape}), dtype=dtype).eval()


def load(folder, **options):
    return InternLM3ForCausalLM.from_pretrained(folder, **{"device": "cpu", "progress": False, **options})


def same(one, two):
    ours, theirs = one.state_dict(), two.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def sharded(tmp_path):
    """A folder with a model in several shards."""
    make().save_pretrained(tmp_path, max_shard_size=20000)
    assert len(shards(tmp_path)) > 2
    return tmp_path


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def holder(folder, name):
    """The shard that holds a tensor."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change(path, edit):
    """Rewrites a JSON or a safetensors file as `edit` leaves its contents."""
    content = json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
    edit(content)
    path.write_text(json.dumps(content)) if path.suffix == ".json" else save_file(content, path)


@pytest.fixture
def nothing_is_allocated(monkeypatch):
    """Fails a test whose error comes only after memory for the weights was taken."""

    def taken(*_args, **_kwargs):
        raise AssertionError("memory for the weights was taken before the check")

    monkeypatch.setattr(loading, "_allocate", taken)


def refused(folder, error, *words, **options):
    """The message of the error that loading gives; it holds every one of `words`."""
    with pytest.raises(error) as caught:
        load(folder, **options)
    for word in words:
        assert str(word) in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


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


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_bin_files(tmp_path, parts, zipped):
    model = make()
    model.config.save_pretrained(tmp_path)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    names = list(weights)
    files = ["pytorch_model.bin"] if parts == 1 else [f"pytorch_model-{i:05d}-of-00003.bin" for i in range(1, 4)]
    for index, file in enumerate(files):
        group = {name: weights[name] for name in names[index::parts]}
        torch.save(group, tmp_path / file, _use_new_zipfile_serialization=zipped)
    if parts > 1:
        weight_map = {name: files[i % parts] for i, name in enumerate(names)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same(model, load(tmp_path))


def test_saving_again_leaves_nothing_stale(tmp_path):
    """The last save wins, whatever lay there: fewer shards, more shards, or one file."""
    for seed, limit in enumerate(["20KB", "5GB", 1, "40KB", "20KB", "5GB"]):
        model = make(seed)
        model.save_pretrained(tmp_path, max_shard_size=limit)
        assert same(model, load(tmp_path)), (seed, limit)
        expected = {*json.loads((tmp_path / INDEX).read_text())["weight_map"].values()} if limit != "5GB" else None
        assert {path.name for path in tmp_path.glob("*.safetensors")} == (expected or {"model.safetensors"})


def test_saving_over_a_checkpoint_of_other_settings(tmp_path):
    """Settings that the model does not have any more do not come back from the folder."""
    stand(1, "5GB", tmp_path)
    model = make(2)
    model.save_pretrained(tmp_path)
    assert is_whole(model, tmp_path) and load(tmp_path).generation_config == {}


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


def test_a_configuration_of_ones_own(tmp_path):
    make().save_pretrained(tmp_path)
    config = InternLM3Config.from_pretrained(tmp_path, rope_theta=500.0)
    assert load(tmp_path, config=config).config.rope_theta == 500.0


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


# -------------------------------------------------------------------- memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_peak_memory_is_the_model_and_a_shard(tmp_path, kind):
    """300 MB in six shards. Two copies of the model at once, as a naive loader makes them, would be 600 MB."""
    model = make(
        vocab_size=8192, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=16, head_dim=64,
    )  # fmt: skip
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    files = shards(tmp_path)
    if kind == "bin":
        for path in files:
            torch.save(load_file(path), path.with_suffix(".bin"))
            path.unlink()
        index = json.loads((tmp_path / INDEX).read_text())
        index["weight_map"] = {name: file.replace("safetensors", "bin") for name, file in index["weight_map"].items()}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (tmp_path / INDEX).unlink()
        files = [path.with_suffix(".bin") for path in files]
    make().save_pretrained(tmp_path / "tiny")
    script = textwrap.dedent("""
        import re, sys, torch
        from internlm3 import InternLM3ForCausalLM
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
        InternLM3ForCausalLM.from_pretrained(sys.argv[1] + "/tiny", device="cpu", progress=False)
        before = peak()
        model = InternLM3ForCausalLM.from_pretrained(sys.argv[1], device="cpu", progress=False)
        print(peak() - before, float(sum(p.double().sum() for p in model.parameters())))
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, total = map(float, done.stdout.split())
    size = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(path.stat().st_size for path in files)
    assert size > 250e6 and len(files) >= 5
    assert grown < size + largest + 8e6  # 8 MB for what any load adds: buffers, pages of code touched first
    assert total == pytest.approx(float(sum(parameter.double().sum() for parameter in model.parameters())))


# -------------------------------------------------------------------- damage


@pytest.mark.usefixtures("nothing_is_allocated")
class TestDamage:
    """Each gives one clear error before memory for the weights is taken."""

    def test_no_such_folder(self, tmp_path):
        refused(tmp_path / "nowhere", FileNotFoundError, "nowhere")
        refused(str(tmp_path / "a" / "b" / "c"), FileNotFoundError, "a/b/c")

    def test_a_file_for_a_folder(self, sharded):
        refused(sharded / "config.json", NotADirectoryError, "config.json", "folder")

    def test_no_config(self, sharded):
        (sharded / "config.json").unlink()
        refused(sharded, FileNotFoundError, sharded / "config.json")

    def test_no_weights(self, tmp_path):
        make().config.save_pretrained(tmp_path)
        refused(tmp_path, FileNotFoundError, tmp_path, "model.safetensors")

    @pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX])
    @pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"", b"null"])
    def test_broken_json(self, sharded, file, content):
        (sharded / file).write_bytes(content)
        refused(sharded, ValueError, sharded / file)

    def test_missing_shard(self, sharded):
        shards(sharded)[1].unlink()
        refused(sharded, FileNotFoundError, shards(sharded)[0].parent / "model-00002", INDEX)

    @pytest.mark.parametrize("left", [0, 4, 8, 100, 0.5, -1])
    def test_truncated_shard(self, sharded, left):
        path = shards(sharded)[1]
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * left) if isinstance(left, float) else left])
        refused(sharded, ValueError, path, "truncated")

    def test_a_shard_of_garbage(self, sharded):
        path = shards(sharded)[0]
        path.write_bytes(os.urandom(4096))
        refused(sharded, ValueError, path)

    def test_a_web_page_for_a_shard(self, sharded):
        path = shards(sharded)[0]
        path.write_text("<html>Access denied</html>")
        refused(sharded, ValueError, path)

    def test_a_git_lfs_pointer_for_a_shard(self, sharded):
        path = shards(sharded)[0]
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n")
        refused(sharded, ValueError, path)

    def test_index_names_another_shard(self, sharded):
        change(
            sharded / INDEX,
            lambda index: index["weight_map"].update({"model.norm.weight": shards(sharded)[0].name}),
        )
        refused(sharded, ValueError, INDEX, "model.norm.weight", shards(sharded)[0].name)

    def test_index_names_a_tensor_that_no_shard_has(self, sharded):
        change(sharded / INDEX, lambda index: index["weight_map"].update({"model.more": shards(sharded)[0].name}))
        refused(sharded, ValueError, INDEX, "model.more")

    def test_shard_has_a_tensor_that_the_index_lacks(self, sharded):
        change(sharded / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
        refused(sharded, ValueError, INDEX, "model.norm.weight")

    @pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}])
    def test_index_without_a_map(self, sharded, content):
        (sharded / INDEX).write_text(json.dumps(content))
        refused(sharded, ValueError, INDEX, "weight_map")

    @pytest.mark.parametrize(
        "name",
        ["../evil.safetensors", "/etc/passwd", "sub/../../evil.safetensors", "sub/evil.safetensors", "..", "", 1],
    )
    def test_index_leads_out_of_the_folder(self, sharded, name):
        target = sharded.parent / "evil.safetensors"
        target.write_bytes(shards(sharded)[0].read_bytes())
        change(sharded / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
        refused(sharded, ValueError, INDEX, repr(name), "folder")

    def test_one_tensor_in_two_shards(self, sharded):
        first, last = shards(sharded)[0], holder(sharded, "model.norm.weight")
        assert first != last
        change(first, lambda weights: weights.update({"model.norm.weight": torch.ones(32)}))
        refused(sharded, ValueError, first, last, "model.norm.weight")

    def test_missing_tensor(self, tmp_path):
        make().save_pretrained(tmp_path)
        change(tmp_path / "model.safetensors", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
        refused(tmp_path, ValueError, tmp_path, "model.layers.1.mlp.up_proj.weight", "missing")

    def test_missing_head(self, tmp_path):
        make(tie_word_embeddings=True).save_pretrained(tmp_path)
        change(tmp_path / "config.json", lambda config: config.update(tie_word_embeddings=False))
        refused(tmp_path, ValueError, "lm_head.weight", "missing")

    def test_unexpected_tensor(self, tmp_path):
        make().save_pretrained(tmp_path)
        change(tmp_path / "model.safetensors", lambda weights: weights.update({"model.extra.weight": torch.ones(2)}))
        refused(tmp_path, ValueError, tmp_path / "model.safetensors", "model.extra.weight", "unexpected")

    def test_biases_that_the_config_does_not_know(self, tmp_path):
        make(qkv_bias=True).save_pretrained(tmp_path)
        change(tmp_path / "config.json", lambda config: config.update(qkv_bias=False))
        refused(tmp_path, ValueError, "model.layers.0.self_attn.k_proj.bias", "unexpected", "more")

    @pytest.mark.parametrize("shape", [(33,), (32, 1), (), (1, 32)])
    def test_wrong_shape(self, sharded, shape):
        path = holder(sharded, "model.norm.weight")
        change(path, lambda weights: weights.update({"model.norm.weight": torch.ones(shape)}))
        refused(sharded, ValueError, path, "model.norm.weight", list(shape), [32])

    @pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "head_dim"])
    def test_config_of_another_size(self, sharded, key):
        change(sharded / "config.json", lambda config: config.update({key: config[key] * 2}))
        refused(sharded, ValueError, sharded, "has shape")

    @pytest.mark.parametrize(
        "dtype", [torch.int8, torch.int32, torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn], ids=str
    )
    def test_wrong_dtype(self, sharded, dtype):
        path = holder(sharded, "model.norm.weight")
        change(path, lambda weights: weights.update({"model.norm.weight": torch.ones(32).to(dtype)}))
        refused(sharded, ValueError, path, "model.norm.weight", "float32")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_a_pickle_that_runs_code(self, tmp_path, protocol):
        """Unpickling these would make a file: they are refused and it is not made."""
        marker = tmp_path / "marker"

        class Trap:
            def __reduce__(self):
                return (os.system, (f"touch {marker}",))

        make().config.save_pretrained(tmp_path)
        path = tmp_path / "pytorch_model.bin"
        for write in (
            lambda: path.write_bytes(pickle.dumps(Trap(), protocol)),
            lambda: torch.save({"model.norm.weight": torch.ones(32), "x": Trap()}, path),
            lambda: torch.save(Trap(), path, _use_new_zipfile_serialization=False),
        ):
            write()
            refused(tmp_path, ValueError, path, "not read")
            assert not marker.exists()
        pickle.loads(pickle.dumps(Trap(), protocol))
        assert marker.exists()  # the trap was a real one

    @pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 1}, torch.ones(2), {"a": {"b": torch.ones(1)}}])
    def test_a_bin_of_something_else(self, tmp_path, content):
        make().config.save_pretrained(tmp_path)
        torch.save(content, tmp_path / "pytorch_model.bin")
        refused(tmp_path, ValueError, tmp_path / "pytorch_model.bin", "dictionary of tensors")

    @pytest.mark.parametrize("left", [0, 10, 1000, -100])
    def test_a_truncated_bin(self, tmp_path, left):
        make().config.save_pretrained(tmp_path)
        path = tmp_path / "pytorch_model.bin"
        torch.save(make().state_dict(), path)
        path.write_bytes(path.read_bytes()[:left])
        refused(tmp_path, ValueError, path)

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*:FutureWarning")
    @pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "legacy pytorch_model.bin"])
    def test_flipped_bytes(self, tmp_path, kind):
        """Damage anywhere in a header: a ValueError that names the file, or tensors still (of other values)."""
        weights, path = {"a": torch.ones(8, 4), "b": torch.zeros(3)}, tmp_path / kind.split()[-1]
        if path.suffix == ".bin":
            torch.save(weights, path, _use_new_zipfile_serialization="legacy" not in kind)
        else:
            save_file(weights, path)
        content, refusals = path.read_bytes(), 0
        for seed in range(300):
            dice, damaged = random.Random(seed), bytearray(content)
            for _ in range(dice.choice([1, 3, 10])):
                damaged[dice.randrange(min(len(damaged), 2500))] = dice.randrange(256)
            path.write_bytes(damaged)
            try:
                read_header(path)
                list(read_tensors(path, weights, torch.device("cpu")))
            except ValueError as error:
                assert str(path) in str(error), f"seed {seed}: {error}"
                refusals += 1
        assert refusals > 50

    def test_a_quantised_checkpoint(self, sharded):
        settings = {"quant_method": "awq", "bits": 4}
        change(sharded / "config.json", lambda config: config.update(quantization_config=settings))
        refused(sharded, ValueError, sharded / "config.json", "quantization_config", "awq")

    def test_another_model(self, sharded):
        change(sharded / "config.json", lambda config: config.update(model_type="gpt2", architectures=["GPT2"]))
        refused(sharded, ValueError, sharded / "config.json", "model_type", "gpt2")

    def test_unknown_keyword(self, sharded):
        message = refused(sharded, TypeError, "devcie", devcie="cpu")
        assert "did you mean 'device'" in message

    @pytest.mark.parametrize("offline", [True, False])
    def test_no_network_and_nothing_cached(self, tmp_path, monkeypatch, offline):
        if offline:
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        options = {"cache_dir": tmp_path, "local_files_only": not offline}
        refused("nobody/nothing", FileNotFoundError, "nobody/nothing", **options)
        refused("nobody/nothing", FileNotFoundError, "some-branch", revision="some-branch", **options)

    def test_no_network_in_a_fresh_process(self, tmp_path):
        script = "from internlm3 import InternLM3ForCausalLM as M; M.from_pretrained('nobody/nothing')"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("FileNotFoundError") and "nobody/nothing" in last


def test_remote_code_is_never_run(sharded):
    """A repository that wants its own code: the code lies there, and the model loads without it."""
    code = "open({!r}, 'w')\n".format(str(sharded / "marker"))
    for name in ("modeling_internlm3", "configuration_internlm3"):
        (sharded / f"{name}.py").write_text(code)
    auto_map = {
        "AutoConfig": "configuration_internlm3.InternLM3Config",
        "AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM",
    }
    change(sharded / "config.json", lambda config: config.update(auto_map=auto_map))
    assert same(make(), load(sharded)) and same(make(), load(sharded, trust_remote_code=True))
    assert not (sharded / "marker").exists()
    load(sharded).save_pretrained(sharded / "again")
    assert "auto_map" not in json.loads((sharded / "again" / "config.json").read_text())


def test_a_cached_snapshot_needs_no_network(tmp_path):
    model = make()
    snapshot = tmp_path / "models--nobody--something" / "snapshots" / ("0" * 40)
    model.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert same(model, load("nobody/something", cache_dir=tmp_path, local_files_only=True))


# -------------------------------------------------------------------- a full disk


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("before", [None, "5GB", "20KB"])
@pytest.mark.parametrize("limit", ["5GB", 20000])
def test_disk_full(tmp_path, before, limit):
    """No file may grow beyond 24 kB, in the system's own hands: nothing new stays, and what was there still loads."""
    if before:
        make(1).save_pretrained(tmp_path, max_shard_size=before)
    old = contents(tmp_path)
    model = make(2, vocab_size=512)  # its embedding alone is 64 kB
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24000, hard))
    try:
        with pytest.raises(OSError, match="not saved") as caught:
            model.save_pretrained(tmp_path, max_shard_size=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value)
    assert contents(tmp_path) == old


@pytest.mark.parametrize("failing", range(7))
def test_disk_full_at_any_file(tmp_path, monkeypatch, failing):
    """The disk fills up while the n-th file is written: a folder that held a checkpoint holds it still."""
    make(1).save_pretrained(tmp_path, max_shard_size=20000)
    old, calls = contents(tmp_path), []

    def full(write):
        def wrapped(*args, **kwargs):
            calls.append(args)
            if len(calls) == failing + 1:
                raise OSError(28, "No space left on device")
            return write(*args, **kwargs)

        return wrapped

    model = make(2)
    model.generation_config = {"do_sample": True}
    monkeypatch.setattr(saving, "save_file", full(saving.save_file))
    monkeypatch.setattr(Path, "write_bytes", full(Path.write_bytes))
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path, max_shard_size=20000)
    monkeypatch.undo()
    assert contents(tmp_path) == old


# -------------------------------------------------------------------- a save that is cut off

LIMITS = {"none": None, "one file": "5GB", "shards": 20000, "other shards": 9000}


def stand(seed, limit, folder):
    """A checkpoint of its own values, configuration and settings in the folder."""
    model = make(seed, rope_theta=1000.0 + seed)
    model.generation_config = {"eos_token_id": [2, seed]}
    if limit is not None:
        model.save_pretrained(folder, max_shard_size=limit)
    return model


def is_whole(model, folder):
    again = load(folder)
    return same(model, again) and (again.config, again.generation_config) == (model.config, model.generation_config)


class Cut:
    """Cuts a save off at its n-th step on files: before that step is done, or just behind it."""

    def __init__(self, monkeypatch, at, behind, error):
        self.at, self.behind, self.error, self.steps = at, behind, error, 0
        monkeypatch.setattr(saving, "save_file", self.wrapped(saving.save_file))
        for name in ("write_bytes", "replace", "unlink"):
            monkeypatch.setattr(Path, name, self.wrapped(getattr(Path, name)))

    def wrapped(self, step):
        def cut(*args, **options):
            self.steps += 1
            if self.steps != self.at:
                return step(*args, **options)
            if self.behind:
                step(*args, **options)
            raise self.error

        return cut


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
@pytest.mark.parametrize("new", ["one file", "shards"])
@pytest.mark.parametrize("old", LIMITS)
def test_a_save_that_is_cut_off_leaves_one_checkpoint_whole(tmp_path, old, new, error, behind):
    for at in range(1, 60):
        folder = tmp_path / str(at)
        before = stand(1, LIMITS[old], folder)
        files = contents(folder) if folder.is_dir() else {}
        after = make(2, rope_theta=1002.0)
        after.generation_config = {"eos_token_id": [2, 2]}
        with pytest.MonkeyPatch.context() as patch:
            cut = Cut(patch, at, behind, error)
            with contextlib.suppress(KeyboardInterrupt, OSError):
                after.save_pretrained(folder, max_shard_size=LIMITS[new])
        if cut.steps < at:  # nothing was cut off
            assert at > 6 and is_whole(after, folder)
            break
        if contents(folder) != files:
            assert is_whole(after, folder), at
        elif old != "none":
            assert is_whole(before, folder), at
        last = stand(3, LIMITS[new], folder)
        assert is_whole(last, folder)
        kept = {path.name for path in folder.iterdir()}
        stand(3, LIMITS[new], tmp_path / "alone")
        assert len(kept) == len(list((tmp_path / "alone").iterdir())), (at, kept)
    else:
        raise AssertionError("a save has more steps than were tried")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("old", "signal"), [("one file", "SIGTERM"), ("shards", "SIGKILL")])
def test_a_save_that_is_killed_leaves_one_checkpoint_whole(tmp_path, old, signal):
    """A process dies by a signal at every step of its save in turn; what it leaves goes with the next save."""
    script = textwrap.dedent("""
        import os, signal, sys, pathlib
        sys.path.insert(0, sys.argv[1])
        import test_checkpoint as tests
        def hit(step):
            def struck(*args, **options):
                step(*args, **options)
                os.kill(os.getpid(), getattr(signal, sys.argv[4]))
            return struck
        for name in ("write_bytes", "replace", "unlink", "save_file"):
            at = tests.saving if name == "save_file" else pathlib.Path
            step = getattr(at, name)
            for i in range(12):
                pid = os.fork()
                if pid:
                    os.waitpid(pid, 0)
                    continue
                calls = []
                def counted(*args, **options):
                    calls.append(1)
                    return (hit(step) if len(calls) == i + 1 else step)(*args, **options)
                folder = pathlib.Path(sys.argv[2], name + str(i))
                tests.stand(1, tests.LIMITS[sys.argv[3]], folder)
                setattr(at, name, counted)
                try:
                    tests.make(2, rope_theta=1001.0).save_pretrained(folder, max_shard_size=20000)
                finally:
                    os._exit(0)
    """)
    arguments = [str(Path(__file__).parent), str(tmp_path), old, signal]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
    before, after, seen = stand(1, None, None), make(2, rope_theta=1001.0), set()
    for folder in sorted(tmp_path.iterdir()):
        weights = load(folder)
        seen.add(same(after, weights))
        assert same(before, weights) or same(after, weights), folder.name
        drafts = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        stand(4, "5GB", folder)
        left = {path.name for path in folder.iterdir()}
        assert left == {"config.json", "generation_config.json", "model.safetensors"}, (folder.name, drafts)
    assert seen == {True, False}


def test_drafts_of_others(tmp_path):
    """A draft of a process that runs is left alone, one of a process that has ended goes; other files are nobody's."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = [f".{name}.{ended.pid}" for name in ("model.safetensors", "config.json", "tokenizer.model")]
    dead += [f".model-00001-of-00003.safetensors.{ended.pid}", f".model.safetensors.{10**30}"]
    kept = [f".config.json.{os.getppid()}", ".cache.123", f"model.safetensors.{ended.pid}", ".gitattributes", "notes"]
    for name in (*dead, *kept):
        (tmp_path / name).write_text("x")
    make().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "config.json", "model.safetensors"}


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_merged_weights_beside_their_bases_index(tmp_path, weights):
    """transformers takes the one file, and so does this runtime."""
    make(1).save_pretrained(tmp_path, max_shard_size=20000)
    merged = {name: weight.clone() for name, weight in make(2).state_dict().items()}
    if weights.endswith(".bin"):
        for path in shards(tmp_path):
            torch.save(load_file(path), path.with_suffix(".bin"))
            path.unlink()
        index = json.loads((tmp_path / INDEX).read_text())
        index["weight_map"] = {name: file.replace("safetensors", "bin") for name, file in index["weight_map"].items()}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (tmp_path / INDEX).unlink()
        torch.save(merged, tmp_path / weights)
    else:
        save_file(merged, tmp_path / weights, metadata={"format": "pt"})
    assert same(make(2), load(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(theirs(IDS).logits, make(2)(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("nothing_is_allocated")
class TestSourcesThatDisagree:
    @pytest.mark.parametrize(
        "head", [torch.ones(64, 32), torch.ones(60, 32), torch.ones(32)], ids=lambda t: str(t.shape)
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_tied_configuration_with_another_head(self, tmp_path, head, dtype):
        make(tie_word_embeddings=True).save_pretrained(tmp_path)
        change(tmp_path / "model.safetensors", lambda weights: weights.update({"lm_head.weight": head.to(dtype)}))
        path = tmp_path / "model.safetensors"
        refused(tmp_path, ValueError, path, "'lm_head.weight'", "'model.embed_tokens.weight'", "tie_word_embeddings")

    def test_more_layers_than_anything(self, sharded, monkeypatch):
        """Before anybody builds 50 000 layers, which would take a minute and gigabytes."""
        monkeypatch.setattr(InternLM3ForCausalLM, "__init__", lambda *_: pytest.fail("the model was built"))
        change(sharded / "config.json", lambda config: config.update(num_hidden_layers=50_000))
        refused(sharded, ValueError, sharded, "50000 layers", "config.json", "21 tensors")

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize(
        ("name", "tensor", "words"),
        [
            (1, lambda: torch.ones(2), ["called 1, a int"]),
            (None, lambda: torch.ones(2), ["called None"]),
            (("a", 1), lambda: torch.ones(2), ["called ('a', 1)"]),
            ("model.norm.weight", lambda: torch.ones(32).to_sparse(), ["'model.norm.weight' is a sparse tensor"]),
            ("a", lambda: torch.eye(4).to_sparse_csr(), ["'a' is a sparse tensor"]),
            ("a", lambda: torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.qint8), ["'a' is a quantised tensor"]),
            ("a", lambda: torch.ones(4, device="meta"), ["'a' is an empty tensor"]),
        ],
    )
    def test_a_bin_of_other_tensors(self, tmp_path, name, tensor, words):
        make().config.save_pretrained(tmp_path)
        torch.save({name: tensor()}, tmp_path / "pytorch_model.bin")
        refused(tmp_path, ValueError, tmp_path / "pytorch_model.bin", *words)


@pytest.mark.parametrize("size", [0, -1, "5XB", "", "MB", "-5GB", "nan", "infGB", None, [1]])
def test_a_shard_size_that_is_none(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        make().save_pretrained(tmp_path, max_shard_size=size)
    assert not any(tmp_path.iterdir())
