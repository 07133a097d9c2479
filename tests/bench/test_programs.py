"""Every command of bench/README.md is accepted and runs; the programs that compare whole models, with fake workers."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from bench import ROOT, admission, batching, demo_model, gpu, ops, peers, quantised_accuracy, record, report, roofline
from bench.roofline import Roofline
from internlm3 import InternLM3Tokenizer
from internlm3.tests.support.checkpoints import load, make

README = (ROOT / "bench" / "README.md").read_text("utf-8")
COMMANDS = [
    shlex.split(line, comments=True)[2:]
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("python -m bench.")
]
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests of what happens on a CPU"),
    pytest.mark.usefixtures("in_this_process"),
]


@pytest.mark.parametrize("command", [each for each in COMMANDS if each[0] == "bench.ops"], ids=" ".join)
def test_commands_of_ops(command, tmp_path, monkeypatch, capsys):
    """At tiny shapes, one round, without most peers; the kernel is the README's."""
    ceilings = Roofline(1e9, 1e9, {"bfloat16": 1e12, "float16": 1e12})
    monkeypatch.setattr(roofline, "measure", lambda *_: ceilings)
    monkeypatch.setattr(peers, "PEERS", {"cuBLAS": peers.PEERS["cuBLAS"]})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PATH").write_text(
        '{"hidden_size": 32, "intermediate_size": 48, "vocab_size": 70, "num_attention_heads": 4, "head_dim": 16}'
    )
    (mine,) = re.findall(r"```python\n(# mine.py.*?)```", README, re.DOTALL)
    (tmp_path / "mine.py").write_text(mine)
    smaller = {"triton": "cpu", "32768": "300", "llama-3.1-8b": "PATH"}  # our engine on a CPU
    arguments = [smaller.get(word, word) for word in command[1:]]
    if "--config" not in arguments:
        arguments += ["--config", "PATH"]
    assert ops.main([*arguments, "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert ("mine.py" in out) == ("mine.py" in command) and "WRONG" not in out
    assert (tmp_path / "run.json").exists() == ("run.json" in command)


@pytest.mark.parametrize("command", [each for each in COMMANDS if each[0] == "bench.report"], ids=" ".join)
def test_commands_of_report(command, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the plots are an extra")
    monkeypatch.chdir(tmp_path)
    results = ROOT / "bench" / "results"
    (tmp_path / "OUT").mkdir()
    for name in ("OUT/gpu.json", "a100.json", "h100.json", "h200.json"):
        shutil.copy(results / "2026-11-27-h200.json", name)
    for name in ("before.json", "run.json"):
        shutil.copy(results / "2026-11-25-ops-cpu.json", name)
    assert report.main(command[1:]) == 0 and capsys.readouterr().out
    for name in {"run.csv", "plots", "gpu.md"} & {*command}:
        assert (tmp_path / name).exists()


@pytest.mark.parametrize("command", [each for each in COMMANDS if each[0] == "bench.gpu"], ids=" ".join)
def test_commands_of_gpu(command):
    """They are accepted; test_gpu.py runs the parts."""
    assert gpu.parser().parse_args(command[1:]).out


def test_every_program_is_in_the_table():
    folder = ROOT / "bench"  # of which bench.gpu starts the parts
    paths = [path for path in folder.rglob("*.py") if path.parent.name != "parts"]
    files = [path for path in paths if '__name__ == "__main__"' in path.read_text()]
    programs = {".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__main__") for path in files}
    assert {*re.findall(r"^\| `python -m bench\.([\w.]+)", README, re.MULTILINE)} == programs
    assert {each[0].partition(".")[2] for each in COMMANDS} <= programs


def test_launch_overhead():
    command = [sys.executable, "-m", "bench.launch_overhead", "--calls", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()[1:]} == {*ops.kernels.__all__}


class Worker:
    """Answers start-up with 2 s (transformers: 4 s), and n new tokens with n / 10 s (transformers: n / 5 s)."""

    def __init__(self, module, flag, engine, *arguments, checkout=None):
        self.seconds = 0.2 if engine == "transformers" else 0.1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, question):
        return 20 * self.seconds if question is None else question[2] * self.seconds


def test_demo_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_model, "Worker", Worker)
    monkeypatch.setattr("internlm3.runtime.checkpoint.demo_model.demo_model_checkpoint", lambda: tmp_path)
    path = tmp_path / "run.json"
    demo_model.main(["--dtype", "float32", "--batch", "4", "--rounds", "2", "--json", str(path)])
    rows = {row.name: row for row in record.load(path).rows}
    assert rows["float32, start to first token, transformers"].rounds == [4.0, 4.0]
    assert rows["float32, decode, 4 x 512, internlm3"].value == pytest.approx(40)  # 4 x 64 tokens in 6.4 s
    assert rows["float32, prefill, 4 x 512, internlm3"].value == pytest.approx(4 * 512 / 0.1)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert all("transformers" in line and "2.00 times as fast (2.00 to 2.00)" in line for line in lines)


def test_demo_model_refuses_a_folder_that_is_not_a_checkout(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo_model.main(["--before", str(tmp_path)])
    assert "is not a checkout of this project: name its folder" in capsys.readouterr().err


def test_admission(tmp_path, monkeypatch, capsys):
    """Pauses are given in steps of the answer alone."""
    pauses = {None: [0.5, 1.5], "OTHER": [0.5, 20.0, 0.5]}

    class Fake:
        def __init__(self, *_, checkout):
            self.among = pauses[checkout]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self, work):
            assert work == (2, 100)
            return {"alone": [0.5, 0.5, 9.0], "among": self.among, "seconds": 3.0}

    monkeypatch.setattr(admission, "Worker", Fake)
    path = tmp_path / "record.json"
    admission.main(["--prompts", "2", "--tokens", "100", "--rounds", "2", "--before", "OTHER", "--json", str(path)])
    out = capsys.readouterr().out
    rows = {row.name: row.rounds for row in record.load(path).rows}
    assert rows["this checkout, longest pause"] == [3.0, 3.0] and rows["before, longest pause"] == [40.0, 40.0]
    assert rows["before, median pause"] == [1.0, 1.0] and "longest pause" in out


def test_batching(tmp_path, monkeypatch, capsys):
    lengths = [1, 9, 3, 5]
    seconds = {"continuous": 1.0, "static": 2.0}
    monkeypatch.setattr(
        batching, "run", lambda kind, mode, batch, _: {"seconds": seconds[mode], "lengths": lengths, "cut": 0}
    )
    path = tmp_path / "run.json"
    batching.main(["--batch", "2", "--rounds", "1", "--json", str(path)])
    rows = {row.name: row for row in record.load(path).rows}
    # Two slots: 0, 2 and 4 steps in one, 8 in the other. Two batches: 8 and 4 steps.
    assert rows["questions, continuous"].about["steps"] == 8 and rows["questions, static"].about["steps"] == 12
    assert "2.00 times as fast as static (2.00 to 2.00); the ratio of steps is 1.50" in capsys.readouterr().out


@pytest.fixture
def small(demo_model, tmp_path, monkeypatch):
    """A small model in the demo model's place, with its tokenizer: heads share values, no size equals another."""
    folder = tmp_path / "small"
    folder.mkdir()
    for path in demo_model.glob("*token*"):
        shutil.copy(path, folder)
    shape = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 49152,
             "initializer_range": 0.05}  # fmt: skip
    make(5, torch.bfloat16, **shape).save_pretrained(folder)
    monkeypatch.setattr("internlm3.runtime.checkpoint.demo_model.demo_model_checkpoint", lambda **_: folder)
    return folder


def test_the_permuted_model_computes_the_same(small, tmp_path):
    quantised_accuracy.permuted(small, tmp_path / "permuted")
    one, other = (load(folder, dtype=torch.float32) for folder in (small, tmp_path / "permuted"))
    ids = torch.randint(0, 49152, (1, 20))
    torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)
    state = other.state_dict()
    assert not [
        name for name, weight in one.state_dict().items() if weight.dim() == 2 and torch.equal(weight, state[name])
    ]


def test_quantised_accuracy(small, tmp_path, capsys):
    (tmp_path / "text").write_text('A lazy @-@ eyed dog ( brown ) , 1 @,@ 000 years old , said " no " . \n' * 30)
    arguments = [
        str(tmp_path / "text"),
        "--windows",
        "1",
        "--form",
        "int8",
        "int4 g32",
        "--json",
        str(tmp_path / "run.json"),
    ]
    assert quantised_accuracy.main(arguments) == 0
    rows = {row.name: row for row in record.load(tmp_path / "run.json").rows}
    plain = quantised_accuracy.plain((tmp_path / "text").read_text())
    assert plain.startswith('A lazy-eyed dog (brown), 1,000 years old, said "no".')
    ids = InternLM3Tokenizer.from_pretrained(small).encode(plain)[:512]
    with torch.no_grad():
        logits = load(small, dtype=torch.float32)(torch.tensor([ids])).logits[0, :-1]
    perplexity = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).exp().item()
    assert rows["bfloat16"].value == pytest.approx(perplexity, rel=1e-4)
    # 8 bits and a scale of 16 for each output, which has 96, 160 or 64 weights; the head outweighs the rest.
    assert rows["int8"].about["bits"] == pytest.approx(8 + 16 / 96, abs=0.01)
    assert rows["int8, goal"].state == "pass" and abs(rows["int8"].about["change"]) < 0.01
    assert f"| int8 | 8.17 | {rows['int8'].value:.4f} |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        quantised_accuracy.main([str(tmp_path / "text"), "--windows", "90"])
