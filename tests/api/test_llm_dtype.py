"""dtype="auto" of LLM on a CPU without products of the checkpoint's dtype."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from internlm3 import LLM
from internlm3.runtime.checkpoint import cpu_dtype
from internlm3.tests.support.checkpoints import load

SIXTEEN = [torch.bfloat16, torch.float16]


@pytest.fixture
def cpu(monkeypatch):
    """Makes this machine a CPU that multiplies these dtypes and float32, with so many free bytes."""

    def cpu(*multiplied, free=10**9):
        monkeypatch.setattr(cpu_dtype, "multiplies", lambda dtype: dtype in (torch.float32, *multiplied))
        monkeypatch.setattr(cpu_dtype, "free_memory", lambda device: free)

    return cpu


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """A checkpoint in each dtype."""
    found = {torch.float32: tiny_folder}
    for dtype in SIXTEEN:
        found[dtype] = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("dtype") / "copy"))
        load(tiny_folder, dtype=dtype).save_pretrained(found[dtype])
    return found


@pytest.mark.parametrize("stored", SIXTEEN, ids=str)
def test_float32_where_the_cpu_lacks_products(cpu, capsys, folders, stored):
    """In one line, with the memory that it takes and how to keep the checkpoint's dtype."""
    cpu()
    llm = LLM(folders[stored], device="cpu")
    assert llm.model.dtype == torch.float32
    said = capsys.readouterr().err
    name, size = str(stored).removeprefix("torch."), sum(p.numel() for p in llm.model.parameters()) * 4 / 1e9
    assert said.count("\n") == 1 and f"no {name} products" in said and f"float32, {size:.2f} GB" in said
    assert f"(dtype='{name}' keeps it small" in said
    for given in (name, stored, "float32"):
        wanted = torch.float32 if given == "float32" else stored
        assert LLM(folders[stored], device="cpu", dtype=given).model.dtype == wanted
    assert LLM(folders[stored], device="cpu", progress=False).model.dtype == torch.float32
    assert capsys.readouterr().err == ""


def test_the_checkpoints_dtype_where_the_cpu_has_products(cpu, capsys, folders):
    cpu(*SIXTEEN)
    assert [LLM(folder, device="cpu").model.dtype for folder in folders.values()] == [*folders]
    cpu(torch.bfloat16)
    assert [LLM(folder, device="cpu", progress=False).model.dtype for folder in folders.values()] == [
        torch.float32, torch.bfloat16, torch.float32,
    ]  # fmt: skip
    assert capsys.readouterr().err == ""


def test_the_checkpoints_dtype_where_memory_is_short(cpu, capsys, folders):
    weights = sum(p.numel() for p in LLM(folders[torch.bfloat16], progress=False).model.parameters()) * 4
    for free, dtype in ((weights * 3 // 2 + 3, torch.float32), (weights * 3 // 2 - 3, torch.bfloat16)):
        cpu(free=free)
        assert LLM(folders[torch.bfloat16], device="cpu").model.dtype == dtype
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "bfloat16 products" in said
    assert re.search(r"float32 needs \d\.\d\d GB of \d\.\d\d GB of free memory: prompts will be slow\n$", said)


def test_transformers_classes_load_what_is_stored(cpu, folders):
    """dtype="auto" is there what it is in transformers."""
    cpu()
    for dtype, folder in folders.items():
        assert load(folder).dtype == load(folder, dtype="auto").dtype == dtype


def test_what_this_cpu_multiplies(monkeypatch):
    """AMX or AVX512-BF16 for bfloat16 on x86; other CPUs have not been measured."""
    assert cpu_dtype.multiplies(torch.float32)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for amx, avx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert cpu_dtype.multiplies(torch.bfloat16) == (amx or avx)
    assert isinstance(cpu_dtype.multiplies(torch.float16), bool)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert all(map(cpu_dtype.multiplies, SIXTEEN))
