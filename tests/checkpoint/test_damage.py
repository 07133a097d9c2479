"""Damaged and contradictory checkpoints: each is refused with one sentence that names the file."""

import json
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from internlm3 import InternLM3ForCausalLM
from internlm3.runtime.checkpoint.weight_files import WeightFiles, read_header
from internlm3.tests.support.checkpoints import INDEX, change, holder, load, make, refused, same, shards

# -------------------------------------------------------------------- damage


@pytest.mark.usefixtures("nothing_is_allocated")
class TestDamage:
    """Each raises one clear error before memory for the weights is allocated."""

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
        """Unpickling these would create a file. They are refused, and it is not created."""
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
        assert marker.exists()  # the trap works

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
        """Damage anywhere in a header: a ValueError that names the file, or tensors with other values."""
        weights, path = {"a": torch.ones(8, 4), "b": torch.zeros(3)}, tmp_path / kind.split()[-1]
        if path.suffix == ".bin":
            torch.save(weights, path, _use_new_zipfile_serialization="legacy" not in kind)
        else:
            save_file(weights, path)
        content, refusals = path.read_bytes(), 0
        for seed in range(100):
            dice, damaged = random.Random(seed), bytearray(content)
            for _ in range(dice.choice([1, 3, 10])):
                damaged[dice.randrange(min(len(damaged), 2500))] = dice.randrange(256)
            path.write_bytes(damaged)
            try:
                header = {path: read_header(path)}
                files = WeightFiles(path.parent, header, dict.fromkeys(header[path], path), {})
                list(files.read(path, weights, torch.device("cpu")))
            except ValueError as error:
                assert str(path) in str(error), f"seed {seed}: {error}"
                refusals += 1
        assert refusals > 15

    def test_a_quantised_checkpoint(self, sharded):
        settings = {"quant_method": "awq", "bits": 3}
        change(sharded / "config.json", lambda config: config.update(quantization_config=settings))
        refused(sharded, ValueError, sharded / "config.json", "quantization_config", "awq", "bits is 3")

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


def test_remote_code_is_never_run(sharded):
    """A repository with code of its own loads without running it."""
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
        """Before 50 000 layers are built, which would take a minute and gigabytes."""
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
