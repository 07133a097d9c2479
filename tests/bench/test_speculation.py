"""bench.speculation: what its workloads repeat, and its rows."""

import pytest
import torch

from bench import speculation, workloads
from bench.parts.bare_step import random_model
from bench.record import Part, load
from internlm3.kernels import cpu

VOCAB = 128512


def steps(prompt, answer, rows=16):
    """How many steps verify drafts of the op `draft` until the answer is there."""
    text = torch.tensor([[*prompt, *answer]], dtype=torch.int32)
    report, drafts, lens = (torch.zeros(1, rows, dtype=dtype) for dtype in (torch.int32, torch.int64, torch.int32))
    have, count = torch.tensor([len(prompt)], dtype=torch.int32), 0
    limits = (torch.tensor([text.shape[1]], dtype=torch.int32), have * 0, have * 0 + rows)
    while (length := int(have)) < text.shape[1]:
        cpu.draft(text, have, *limits, report=report, drafts=drafts, draft_lens=lens)
        guess = drafts[0, 1 : int(report[0, -1]) + 1]
        wrong = (guess != text[0, length : length + len(guess)]).nonzero()
        have += 1 + (int(wrong[0]) if len(wrong) else len(guess))
        count += 1
    return count


@pytest.mark.parametrize(
    ("name", "least"),
    [("code edit", 9), ("JSON rewrite", 5), ("table to JSON", 3), ("half quoted", 1.8), ("prose", 1.05)],
)
def test_tokens_a_step(name, least):
    """At least as many as were found for texts of each kind."""
    [workload] = [each for each in workloads.workloads() if each.name == name]
    prompt, answer = workloads.encode(workload, VOCAB)
    assert len(answer) > 500 and len(answer) / steps(prompt, answer) >= least


def test_prompt_lookup_counts_steps():
    """After 9 1 it proposes 2 3 4; of what it proposes then, the first token is wrong."""
    pytest.importorskip("transformers")
    assert workloads.lookup_steps([9, 1, 2, 3, 4, 9, 1], [2, 3, 4, 8], 3) == 1
    assert workloads.lookup_steps([9, 1, 2, 3, 4, 9, 1], [2, 7, 7, 7], 3) == 3
    assert workloads.lookup_steps([1, 2, 3], [4, 5], 3) == 2


def test_rows(monkeypatch, tmp_path, capsys):
    """A text that is its prompt again, by a toy model."""
    text = " ".join(f"word{index}" for index in range(20))
    monkeypatch.setattr(speculation, "workloads", lambda: [workloads.Workload("copy", text, text)])
    model = random_model(True, dtype=torch.float32)
    rows = {row.name: row for row in speculation.rows(Part("speculation"), model, 1, 48)}
    assert [*rows] == [f"copy, {each}" for each in (
        "internlm3", "transformers' prompt lookup", "without drafts", "with drafts"
    )]  # fmt: skip
    assert rows["copy, internlm3"].value > 3 and rows["copy, internlm3"].about["tokens"] == 48
    assert "times as fast" in rows["copy, with drafts"].note

    monkeypatch.setattr("internlm3.runtime.checkpoint.demo_model.demo_model_checkpoint", lambda: tmp_path)
    monkeypatch.setattr("internlm3.InternLM3ForCausalLM.from_pretrained", lambda *_, **__: model)
    speculation.main(["--rounds", "1", "--json", str(tmp_path / "run.json")])
    assert [row.name for row in load(tmp_path / "run.json").rows] == [*rows]
    assert "copy, with drafts" in capsys.readouterr().out
