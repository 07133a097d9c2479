"""Saving: at every moment, and after every error, the folder contains one whole checkpoint."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from internlm3.runtime.checkpoint import save as saving
from internlm3.tests.support.checkpoints import (
    INDEX,
    LIMITS,
    contents,
    distinct,
    is_whole,
    load,
    make,
    same,
)


def test_saving_again_leaves_nothing_stale(tmp_path):
    """The last save wins, whatever was there before: fewer shards, more shards, or one file."""
    for seed, limit in enumerate(["20KB", "5GB", 1, "40KB", "20KB", "5GB"]):
        model = make(seed)
        model.save_pretrained(tmp_path, max_shard_size=limit)
        assert same(model, load(tmp_path)), (seed, limit)
        expected = {*json.loads((tmp_path / INDEX).read_text())["weight_map"].values()} if limit != "5GB" else None
        assert {path.name for path in tmp_path.glob("*.safetensors")} == (expected or {"model.safetensors"})


def test_saving_over_a_checkpoint_of_other_settings(tmp_path):
    """Settings that the model no longer has do not come back from the folder."""
    distinct(1).save_pretrained(tmp_path)
    model = make(2)
    model.save_pretrained(tmp_path)
    assert is_whole(model, tmp_path) and load(tmp_path).generation_config == {}


# -------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("before", [None, "5GB", "20KB"])
@pytest.mark.parametrize("limit", ["5GB", 20000])
def test_disk_full(tmp_path, before, limit):
    """The system limits files to 24 kB: nothing new stays, and what was there is unchanged."""
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
    """The disk fills up while the n-th file is written: the folder stays as it was."""
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


class Cut:
    """Raises an error at the n-th step of a save, before or after that step is done."""

    def __init__(self, monkeypatch, at, after, error):
        self.at, self.after, self.error, self.steps = at, after, error, 0
        monkeypatch.setattr(saving, "save_file", self.wrapped(saving.save_file))
        for name in ("write_bytes", "replace", "unlink"):
            monkeypatch.setattr(Path, name, self.wrapped(getattr(Path, name)))

    def wrapped(self, step):
        def cut(*args, **options):
            self.steps += 1
            if self.steps != self.at:
                return step(*args, **options)
            if self.after:
                step(*args, **options)
            raise self.error

        return cut


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
@pytest.mark.parametrize("new", ["one file", "shards"])
@pytest.mark.parametrize("old", [None, *LIMITS])
def test_a_save_that_is_cut_off_leaves_one_checkpoint_whole(tmp_path, old, new, error, after):
    """Cut off at every step in turn. The next save leaves nothing of it."""
    first, second, third = map(distinct, (1, 2, 3))
    third.save_pretrained(tmp_path / "third", max_shard_size=LIMITS[new])
    for at in range(1, 60):
        folder = tmp_path / str(at)
        if old:
            first.save_pretrained(folder, max_shard_size=LIMITS[old])
        files = contents(folder)
        with pytest.MonkeyPatch.context() as patch:
            cut = Cut(patch, at, after, error)
            with contextlib.suppress(KeyboardInterrupt, OSError):
                second.save_pretrained(folder, max_shard_size=LIMITS[new])
        if cut.steps < at:  # the save was not cut off
            assert at > 6 and is_whole(second, folder)
            break
        assert contents(folder) == files or is_whole(second, folder), at
        third.save_pretrained(folder, max_shard_size=LIMITS[new])
        assert is_whole(third, folder)
        assert len(contents(folder)) == len(contents(tmp_path / "third")), at
    else:
        raise AssertionError("a save has more steps than were tried")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_save_that_is_killed_leaves_one_checkpoint_whole(tmp_path):
    """A process is killed by a signal after every step of its save in turn. The next save leaves nothing of it."""
    script = textwrap.dedent("""
        import itertools, os, pathlib, signal, sys
        from internlm3.runtime.checkpoint import save as saving
        from internlm3.tests.support.checkpoints import LIMITS, distinct
        first, second = distinct(1), distinct(2)

        def save_and_die(folder, module, name, at, number):
            step, calls = getattr(module, name), itertools.count(1)
            def counted(*args, **options):
                result = step(*args, **options)
                if next(calls) == at:
                    os.kill(os.getpid(), number)
                return result
            setattr(module, name, counted)
            second.save_pretrained(folder, max_shard_size=20000)

        for old, number in ("one file", signal.SIGTERM), ("shards", signal.SIGKILL):
            for name in ("write_bytes", "replace", "unlink", "save_file"):
                for at in itertools.count(1):
                    folder = pathlib.Path(sys.argv[1], f"{old} {name} {at}")
                    first.save_pretrained(folder, max_shard_size=LIMITS[old])
                    pid = os.fork()
                    if not pid:
                        save_and_die(folder, saving if name == "save_file" else pathlib.Path, name, at, number)
                        os._exit(0)
                    if os.WIFEXITED(os.waitpid(pid, 0)[1]):  # the save has fewer steps
                        break
    """)
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    first, second, third, seen = distinct(1), distinct(2), distinct(3), set()
    folders = sorted(tmp_path.iterdir())
    assert len(folders) > 20
    for folder in folders:
        weights = load(folder)
        seen.add(same(second, weights))
        assert same(first, weights) or same(second, weights), folder.name
        third.save_pretrained(folder)
        left = {path.name for path in folder.iterdir()}
        assert left == {"config.json", "generation_config.json", "model.safetensors"}, folder.name
    assert seen == {True, False}


def test_drafts_of_others(tmp_path):
    """Drafts of ended processes are removed. Drafts of running ones, and other files, stay."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = [f".{name}.{ended.pid}" for name in ("model.safetensors", "config.json", "tokenizer.model")]
    dead += [f".model-00001-of-00003.safetensors.{ended.pid}", f".model.safetensors.{10**30}"]
    kept = [f".config.json.{os.getppid()}", ".cache.123", f"model.safetensors.{ended.pid}", ".gitattributes", "notes"]
    for name in (*dead, *kept):
        (tmp_path / name).write_text("x")
    make().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "config.json", "model.safetensors"}


@pytest.mark.parametrize("size", [0, -1, "5XB", "", "MB", "-5GB", "nan", "infGB", None, [1]])
def test_an_invalid_shard_size(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        make().save_pretrained(tmp_path, max_shard_size=size)
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------- what other savers get


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_state_dict_has_the_memory_of_the_model(mode):
    """Every part covers its storage, and writing into it changes the model's weights and their version."""
    model = make()
    with mode():
        state = model.state_dict()
        for name, weight in state.items():
            assert weight.untyped_storage().nbytes() == weight.nbytes
            versions = [parameter._version for parameter in model.parameters()]
            weight.fill_(2.0)
            changed = [old != new._version for old, new in zip(versions, model.parameters(), strict=True)]
            assert sum(changed) == 1, name
    assert all(parameter.eq(2.0).all() for parameter in model.parameters())
    empty = type(model)(model.config, device="meta").state_dict()
    assert {name: weight.shape for name, weight in empty.items()} == {n: w.shape for n, w in state.items()}
