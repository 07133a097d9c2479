"""A quantised checkpoint is read here, by compressed-tensors and by transformers as what the rounding made."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from internlm3.runtime.checkpoint.gguf.folder import locate
from internlm3.runtime.checkpoint.quantise import checkpoint as module
from internlm3.runtime.checkpoint.quantise import shards as shards_module
from internlm3.runtime.checkpoint.quantise.activation_scaling import scale
from internlm3.runtime.checkpoint.quantise.calibration import Calibration
from internlm3.runtime.checkpoint.quantise.checkpoint import quantise_checkpoint
from internlm3.runtime.checkpoint.quantise.compressed import pack
from internlm3.runtime.checkpoint.quantise.rounding import to_integers
from internlm3.runtime.checkpoint.quantised import compressed_tensors
from internlm3.runtime.checkpoint.quantised.integers import unpack
from internlm3.runtime.checkpoint.quantised.scheme import Settings
from internlm3.tests.support.checkpoints import INDEX, change, contents, load, make, shards
from internlm3.tests.support.gguf_files import write
from internlm3.tests.support.quantised import SHAPE, rounded

# Groups of 128 take 128 inputs, and 64 the 192 of down_proj.
MODEL = {**SHAPE, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 40}
FORMS = {
    "int4": ("int4", {}),
    "int4 in groups of 32": ("int4", {"group": 32}),
    "int4 symmetric": ("int4", {"symmetric": True}),
    "int8": ("int8", {}),
    "fp8": ("fp8", {}),
}


@pytest.fixture
def source(tmp_path):
    """A checkpoint in bfloat16 with files beside it."""
    folder = tmp_path / "source"
    make(4, torch.bfloat16, **MODEL).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "of_another_tool": [1]}))
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "consolidated.pth").write_bytes(b"the weights once more")
    (folder / "model.safetensors.index.json").write_text("{}")  # left over: a single file wins
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new" / "target"


def expected(source, form, options):
    """What the weights of the checkpoint are after rounding: in float32, or as they were."""
    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        integers = rounded(name, weight, form, **options)
        weights[name] = weight if integers is None else integers.weight()
    return weights


@pytest.mark.parametrize("name", FORMS)
def test_it_is_read_as_what_the_rounding_made(source, target, name):
    form, options = FORMS[name]
    before = contents(source)
    quantise_checkpoint(source, target, form, **options, progress=False)
    assert contents(source) == before
    for dtype in (torch.float32, torch.bfloat16):
        state = load(target, dtype=dtype).state_dict()
        for each, weight in expected(source, form, options).items():
            assert torch.equal(state[each], weight.to(dtype)), each
    names = {path.name for path in target.iterdir()}
    assert names == {str(path) for path in before} - {"consolidated.pth", INDEX} and "tokenizer.model" in names
    config, old = (json.loads((folder / "config.json").read_text()) for folder in (target, source))
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors" and config == old
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("name", FORMS)
def test_compressed_tensors_unpacks_it_to_the_same(source, target, name):
    """Each layer by the scheme that the package itself finds for it."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    form, options = FORMS[name]
    quantise_checkpoint(source, target, form, **options, progress=False)
    settings = json.loads((target / "config.json").read_text())["quantization_config"]
    stored = load_file(target / "model.safetensors")
    weights = expected(source, form, options)
    # A module with a Linear of every name, as transformers has it.
    tree = torch.nn.Module()
    for each, weight in weights.items():
        if weight.dim() == 2 and "embed" not in each:
            *path, last = each.removesuffix(".weight").split(".")
            node = tree
            for part in path:
                if not hasattr(node, part):
                    node.add_module(part, torch.nn.Module())
                node = getattr(node, part)
            node.add_module(last, torch.nn.Linear(weight.shape[1], weight.shape[0], False, device="meta"))
    apply_quantization_config(tree, QuantizationConfig.model_validate(settings), run_compressed=False)
    ours = compressed_tensors.method(Settings(settings))
    for each, layer in tree.named_modules():
        if isinstance(layer, torch.nn.Linear):
            parts = {key.removeprefix(f"{each}."): part for key, part in stored.items() if key.startswith(f"{each}.")}
            scheme = layer.quantization_scheme
            found = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
            exact = weights[f"{each}.weight"]
            assert torch.equal(found.float(), exact.to(found.dtype).float()), each
            assert torch.equal(ours.scheme(each).numbers(parts, tuple(exact.shape)).weight(), exact), each


@pytest.mark.parametrize("name", ["int4 symmetric", "int8", "fp8"])
def test_transformers_loads_it(source, target, name):
    """Not with zero points: transformers 5.23 expects them unpacked."""
    transformers = pytest.importorskip("transformers", "5.23")
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    form, options = FORMS[name]
    quantise_checkpoint(source, target, form, **options, progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    ids = torch.tensor([[1, 5, 9, 33, 6, 0, 12]])
    logits = model(ids).logits  # which decompresses the weights
    state = model.state_dict()
    for each, weight in expected(source, form, options).items():
        assert torch.equal(state[each], weight.to(torch.bfloat16)), each
    ours = load(target, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(logits.float(), ours, rtol=0.1, atol=0.1 * ours.std().item())


def test_a_calibrated_checkpoint(source, target):
    """What is stored is the rounding of what scaling the blocks one after the other makes."""
    ids = torch.randint(3, 40, (70,)).tolist()
    quantise_checkpoint(source, target, "int4", group=32, calibration=ids, progress=False)
    model = load(source, dtype=torch.float32)
    weights = load_file(source / "model.safetensors")
    text = Calibration(model.config, weights["model.embed_tokens.weight"][ids], torch.device("cpu"))
    state = load(target, dtype=torch.float32).state_dict()

    def rounding(name, weight):
        return to_integers(name, weight, torch.bfloat16, "int4", 32, False).weight()

    for layer in range(2):
        prefix = f"model.layers.{layer}."
        block = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        before = dict(block)
        scale(block, text.run(block), rounding)
        for name, weight in block.items():
            exact = rounding(name, weight) if "_proj" in name else weight.float()
            assert torch.equal(state[f"{prefix}{name}"], exact), name
        assert not torch.equal(block["input_layernorm.weight"], before["input_layernorm.weight"])


def test_several_files(source, target, monkeypatch):
    form, options = FORMS["int4"]
    quantise_checkpoint(source, target, form, progress=False)
    whole = load_file(target / "model.safetensors")
    monkeypatch.setattr(shards_module, "LIMIT", 20_000)
    other = target.with_name("other")
    other.mkdir()  # an empty folder may be there
    quantise_checkpoint(source, other, form, progress=False)
    assert len(shards(other)) > 3 and json.loads((other / INDEX).read_text())["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in whole.values()
    )
    found = {name: tensor for path in shards(other) for name, tensor in load_file(path).items()}
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    state = load(other, dtype=torch.float32).state_dict()
    assert all(torch.equal(state[name], weight.float()) for name, weight in expected(source, form, options).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_and_biases(tmp_path, target, dtype):
    make(2, dtype, **MODEL, bias=True, qkv_bias=True).save_pretrained(tmp_path / "source")
    quantise_checkpoint(tmp_path / "source", target, "int4", progress=False)
    stored = load_file(target / "model.safetensors")
    assert all(tensor.dtype == dtype for name, tensor in stored.items() if name.endswith(("scale", "bias")))
    state = load(target, dtype=torch.float32).state_dict()
    for name, weight in expected(tmp_path / "source", "int4", {}).items():
        assert torch.equal(state[name], weight.float()), name


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_a_tied_head_stays(tmp_path, target, form):
    make(2, torch.bfloat16, **MODEL, tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    quantise_checkpoint(tmp_path / "source", target, form, progress=False)
    assert json.loads((target / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    assert not [name for name in load_file(target / "model.safetensors") if name.startswith("lm_head")]
    state, old = load(target).state_dict(), load(tmp_path / "source").state_dict()
    assert torch.equal(state["lm_head.weight"], old["model.embed_tokens.weight"])
    assert not torch.equal(state["model.layers.0.mlp.up_proj.weight"], old["model.layers.0.mlp.up_proj.weight"])


def test_packing_is_the_inverse_of_unpacking():
    for shape, dim in (((5, 16), 1), ((16, 3), 0), ((11, 4), 0), ((2, 13), 1)):
        fields = torch.randint(0, 16, shape, dtype=torch.uint8)
        words = pack(fields, dim)
        assert words.dtype == torch.int32 and words.shape[dim] == -(-shape[dim] // 8)
        assert torch.equal(unpack(words, 4, dim).narrow(dim, 0, shape[dim]), fields)


# --- mistakes


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error"), KeyError("x")])
def test_after_an_error_nothing_is_left(source, target, monkeypatch, error):
    def fails(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(shards_module, "save_file", fails)
    with pytest.raises(KeyError if isinstance(error, KeyError) else OSError) as caught:
        quantise_checkpoint(source, target, "int8", progress=False)
    assert isinstance(error, KeyError) or str(target) in str(caught.value)
    assert not list(target.parent.iterdir())


def test_a_folder_with_something_in_it_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("")
    for there in (source, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="is there already: name a folder"):
            quantise_checkpoint(source, there, "int8", progress=False)


def test_what_cannot_be_quantised(source, target, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Shards", None)  # nothing is written before the checks

    def refused(folder, *words):
        with pytest.raises(ValueError) as caught:
            quantise_checkpoint(folder, target, "int4", progress=False)
        assert all(word in str(caught.value) for word in words), caught.value
        assert not target.parent.exists() or not list(target.parent.iterdir())

    config = json.loads((source / "config.json").read_text())
    quantised = {"quant_method": "smooth_quant", "quant_dtype": "int8"}
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    refused(source, "is quantised already", "SmoothQuant")
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    refused(source, "mlp.down_proj.weight", "[128, 192]", "[128, 96]")
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refused(source, "model.layers.2.", "missing")
    (source / "config.json").write_text(json.dumps(config))
    change(source / "model.safetensors", lambda weights: weights.update({"model.layers.0.mlp.other": torch.ones(2)}))
    refused(source, str(source / "model.safetensors"), "'model.layers.0.mlp.other' is unexpected")
    write(tmp_path / "a.gguf", lambda name: "Q8_0", hidden_size=128, intermediate_size=128, head_dim=32)
    refused(locate(tmp_path / "a.gguf"), str(tmp_path / "a.gguf"), "cannot be quantised again")
    make(2, torch.bfloat16, **{**MODEL, "intermediate_size": 40}).save_pretrained(tmp_path / "odd")
    refused(tmp_path / "odd", "down_proj", "40 inputs")


@pytest.mark.parametrize("ids", [None, [1, 5, 9]])
def test_buffers_of_other_tools_are_copied(source, target, ids):
    """Loading leaves them unread; they belong to a block by their names only."""
    name, buffer = "model.layers.1.self_attn.rotary_emb.inv_freq", torch.rand(8)
    change(source / "model.safetensors", lambda weights: weights.update({name: buffer}))
    quantise_checkpoint(source, target, "int4", calibration=ids, progress=False)
    assert torch.equal(load_file(target / "model.safetensors")[name], buffer)
    load(target)


@pytest.mark.parametrize("names", [["embedding"], ["head"], ["embedding", "head"]], ids=" and ".join)
@pytest.mark.parametrize("ids", [None, [1, 5, 9]])
def test_a_head_that_is_the_embeddings(tmp_path, target, names, ids):
    """It stays as it is, under whichever name it is stored."""
    model, full = make(3, **MODEL, tie_word_embeddings=True), {"embedding": "model.embed_tokens.weight",
                                                               "head": "lm_head.weight"}  # fmt: skip
    model.save_pretrained(tmp_path / "tied")

    def edit(weights):
        weight = weights.pop(full["embedding"])
        weights.update({full[name]: weight.clone() for name in names})

    change(tmp_path / "tied" / "model.safetensors", edit)
    quantise_checkpoint(tmp_path / "tied", target, "int4", calibration=ids, progress=False)
    assert load_file(target / "model.safetensors").keys() >= {full[name] for name in names}
    found = load(target)
    assert torch.equal(found.lm_head.weight, model.lm_head.weight) and found.config.tie_word_embeddings


@pytest.mark.parametrize("limit", ["5GB", "20KB"])
def test_files_have_the_permissions_of_new_ones(source, tmp_path, limit):
    """As their folder's other files have: safetensors lets only the owner read those that it writes."""
    make(1).save_pretrained(tmp_path / "saved", max_shard_size=limit)
    quantise_checkpoint(source, tmp_path / "quantised", "int8", progress=False)
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    for folder in ("saved", "quantised"):
        assert {path.stat().st_mode for path in (tmp_path / folder).iterdir()} == {expected}
