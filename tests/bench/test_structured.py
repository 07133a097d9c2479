"""bench.structured, by a toy model."""

from bench import structured
from bench.record import load
from internlm3.tests.support.tiny_gguf import tiny_gguf


def test_rows(monkeypatch, tmp_path, capsys):
    tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr("internlm3.runtime.checkpoint.demo_model.demo_model_checkpoint", lambda: tmp_path / "tiny.gguf")
    structured.main(["--rounds", "2", "--json", str(tmp_path / "run.json")])
    rows = {row.name: row for row in load(tmp_path / "run.json").rows}
    kinds = [f"{name}, {what}" for name in structured.CONSTRAINTS for what in (
        "compiled, with the first mask", "mask of a token"
    )]  # fmt: skip
    assert [*rows] == ["all tokens into a tree, once", *kinds, "decode step, free", "decode step, constrained"]
    assert all(row.value > 0 and len(row.rounds) == 2 for row in rows.values())
    assert "of the time of a free one" in capsys.readouterr().out
