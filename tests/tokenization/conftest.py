"""Fixtures of tokenizers."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from internlm3 import InternLM3Tokenizer
from internlm3.tests.support.tokenizers import REAL, TRAINED, save_by_transformers, train, write_checkpoint

MISTRAL_COMMON = "mistral-common==1.13.1"
MISTRAL_COMMON_SHA256 = "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"


@pytest.fixture(scope="session")
def mistral_wheel() -> Path:
    """mistral-common's wheel with real SentencePiece files, downloaded once into the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "internlm3"
    wheel = cache / "mistral_common-1.13.1-py3-none-any.whl"
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            requirement = Path(folder, "requirements.txt")
            requirement.write_text(f"{MISTRAL_COMMON} --hash=sha256:{MISTRAL_COMMON_SHA256}\n")
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
            subprocess.run([*pip, "--dest", folder, "-r", str(requirement)], check=True)
            Path(folder, wheel.name).replace(wheel)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == MISTRAL_COMMON_SHA256, f"{wheel} is damaged: delete it"
    return wheel


@pytest.fixture(scope="session", params=[*TRAINED, *REAL])
def checkpoint(request, tmp_path_factory) -> Path:
    if request.param in REAL:
        wheel = zipfile.ZipFile(request.getfixturevalue("mistral_wheel"))
        model = wheel.read("mistral_common/data/" + REAL[request.param])
    else:
        model = train(TRAINED[request.param])
    return write_checkpoint(tmp_path_factory.mktemp("tokenizers") / request.param, model)


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", train(TRAINED["plain"]))


@pytest.fixture(scope="session")
def saved_by_transformers(checkpoint, tmp_path_factory) -> Path:
    return save_by_transformers(checkpoint, tmp_path_factory.mktemp("by_transformers"))


@pytest.fixture(scope="session")
def plain_by_transformers(plain, tmp_path_factory) -> Path:
    return save_by_transformers(plain, tmp_path_factory.mktemp("plain_by_transformers"))


@pytest.fixture(scope="session")
def demo_pair(demo_model):
    """Ours, and transformers' own choice for the folder: the pieces rebuilt as a BPE for the Rust library."""
    from transformers import AutoTokenizer

    return InternLM3Tokenizer.from_pretrained(demo_model), AutoTokenizer.from_pretrained(demo_model)
