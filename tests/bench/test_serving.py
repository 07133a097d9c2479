"""bench.serving, by a small random model that is served in this process, next to servers that do not start."""

import sys

from bench import serving
from bench.record import load
from internlm3 import LLM, AsyncLLM
from internlm3.tests.api.conftest import make  # noqa: F401 - a fixture
from internlm3.tests.server.conftest import served


def test_rows(make, monkeypatch, tmp_path):
    folder = make(max_position_embeddings=256, num_hidden_layers=1)
    monkeypatch.setattr("internlm3.runtime.checkpoint.demo_model.demo_model_checkpoint", lambda: folder)
    commands, started = serving.commands, serving.started
    broken = [sys.executable, "-c", "raise SystemExit('no such package')", "--port", "1"]

    def one_works(*places):
        return {name: command if name == "internlm3" else broken for name, command in commands(*places).items()}

    def here(command):
        if command is broken:
            return started(command)
        assert command[1:4] == ["-m", "internlm3", "serve"]
        return served(AsyncLLM(LLM(command[4], progress=False)), command[command.index("--served-model-name") + 1])

    monkeypatch.setattr(serving, "commands", one_works)
    monkeypatch.setattr(serving, "started", here)
    serving.main(["--rounds", "2", "--clients", "1", "3", "--tokens", "4", "--json", str(tmp_path / "run.json")])
    found = load(tmp_path / "run.json").rows
    missing, rows = found[:3], found[3:]
    assert [row.name for row in missing] == [
        "internlm3, 1 replica",
        "transformers",
        "transformers, continuous batching",
    ]
    assert all("no such package" in row.note for row in missing)
    assert [row.name for row in rows] == [
        f"internlm3, {count} at a time, {what}"
        for count in (1, 3)
        for what in ("first text", "between texts", "all together")
    ]
    assert all(row.value > 0 and len(row.rounds) == 2 for row in rows)
