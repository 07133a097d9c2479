"""Fixtures of checkpoints."""

import pytest
from internlm3.runtime.checkpoint import load as loading
from internlm3.tests.support.checkpoints import make, shards


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
