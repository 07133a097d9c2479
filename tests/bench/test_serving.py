"""bench.serving, by a small random model that is served in this process, next to a server that does not start."""

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
    monkeypatch.setattr(serving, "commands", lambda *places: commands(*places) | {"transformers": broken})

    def here(command):
        if command is broken:
            return started(command)
        assert command[1:4] == ["-m", "internlm3", "serve"]
        return served(AsyncLLM(LLM(command[4], progress=False)), command[command.index("--served-model-name") + 1])

    monkeypatch.setattr(serving, "started", here)
    serving.main(["--rounds", "2", "--clients", "1", "3", "--tokens", "4", "--json", str(tmp_path / "run.json")])
    missing, *rows = load(tmp_path / "run.json").rows
    assert missing.name == "transformers" and "no such package" in missing.note
    assert [row.name for row in rows] == [
        f"internlm3, {count} at a time, {what}"
        for count in (1, 3)
        for what in ("first text", "between texts", "all together")
    ]
    assert all(row.value > 0 and len(row.rounds) == 2 for row in rows)
