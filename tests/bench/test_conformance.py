"""The conformance folder: its bytes, its logits and cases against oracles, and planted faults that its check names."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from bench.conformance import __main__ as program
from bench.conformance import checkpoint, generated, reference
from bench.conformance.check import ALLOWED, DATA, check, errors, expected
from bench.conformance.checkpoint import DIM, PLACES, VOCAB, WINDOW, token_ids
from bench.conformance.folder import SHA256, write
from bench.conformance.reference import base, logits
from bench.conformance.runs import FAULTS, RUNS, computed, faults_of
from internlm3 import InternLM3Config, InternLM3ForCausalLM, InternLM3Tokenizer
from internlm3.runtime.engine import staging
from internlm3.tests.bench.test_programs import COMMANDS
from internlm3.tests.model.test_model import by_hand
from internlm3.tests.support.tokenizers import oracle

SHORT = PLACES[:3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("conformance") / "folder"
    assert program.main(["write", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def model(folder):
    return InternLM3ForCausalLM.from_pretrained(folder, dtype=torch.float32, progress=False)


# -------------------------------------------------------------------- the folder


def test_the_bytes_are_the_same_everywhere(folder):
    for name, digest in SHA256.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    ids = json.loads((folder / "token_ids.json").read_text())
    assert ids == token_ids() and len(ids) == PLACES[-1] + 1 and ids[0] == 1
    assert {*ids[1:]} == {*range(3, checkpoint.PIECES)}


def test_every_dtype_holds_the_weights_exactly(model):
    for name, values in checkpoint.weights().items():
        exact = torch.from_numpy(values)
        assert model.state_dict()[name].equal(exact)
        assert exact.half().float().equal(exact) and exact.bfloat16().float().equal(exact)


def test_a_folder_with_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(SystemExit):
        program.main(["write", str(tmp_path)])
    assert "has files already: name a new folder" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "mine"


def test_other_bytes_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SEED", 8)
    with pytest.raises(ValueError, match=r"model\.safetensors came out with other bytes than it must have"):
        write(tmp_path)
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------- logits, with a window of 32 tokens

SMALL = 32
AROUND = (0, 1, 9, 31, 32, 33, 50)
RULES = {**RUNS, "decode": lambda place, window: base(min(place + 1, window), window)}


@pytest.fixture(scope="module")
def small_config(model):
    return InternLM3Config.from_dict({**model.config.to_dict(), "max_position_embeddings": SMALL})


@pytest.fixture
def small_window(monkeypatch):
    monkeypatch.setattr(generated, "WINDOW", SMALL)


def by_reference(run, **fault):
    """The reference's logits AROUND the window."""
    ids = token_ids()
    return torch.stack([logits(ids[: place + 1], RULES[run](place, SMALL), **fault) for place in AROUND])


@pytest.mark.parametrize("stretch", [1, 2])
@pytest.mark.parametrize("run", ["prompts", "decode"])
def test_the_reference_is_the_specification(folder, small_config, run, stretch):
    """Token by token and head by head, in float64."""
    model = InternLM3ForCausalLM.from_pretrained(folder, config=small_config, dtype=torch.float32, progress=False)
    ids = torch.tensor(token_ids())
    for place, row in zip(AROUND, by_reference(run, stretch=stretch), strict=True):
        begun = place + 1 if run == "prompts" else min(place + 1, SMALL)
        exact = by_hand(model, ids[: place + 1], stretch * torch.arange(place + 1), begun)[-1]
        torch.testing.assert_close(row, exact, rtol=1e-10, atol=1e-10)


def test_the_reference_is_transformers(folder, small_window):
    """1e-5: transformers' angles are float32 in any dtype. It does not keep the base of a sequence."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    theirs.config.max_position_embeddings = SMALL
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, config=theirs.config)
    for run in ("prompts", "decode-rederived"):
        assert errors(generated.generated(theirs, run, AROUND), by_reference(run)).max() < 1e-5
    stepwise = generated.generated(theirs, "decode", AROUND)
    assert errors(stepwise, by_reference("decode"))[-1] > 0.1


@pytest.mark.parametrize("run", ["prompts", "decode"])
def test_this_runtime_is_the_reference(folder, small_config, small_window, run):
    """The engine, through `generate`; decode steps cross the window."""
    ours = InternLM3ForCausalLM.from_pretrained(folder, config=small_config, dtype=torch.float32, progress=False)
    assert errors(generated.generated(ours, run, AROUND), by_reference(run)).max() < 1e-5


# -------------------------------------------------------------------- logits, with InternLM3's window


@pytest.mark.parametrize("run", RUNS)
def test_expected_logits_are_those_of_the_reference(run):
    """As `python -m bench.conformance record` computes them."""
    known = expected(run)
    assert known.keys() == {"right", *faults_of(run), *(() if run == "decode" else ("transformers",))}
    assert torch.allclose(computed(run), known["right"], rtol=1e-9, atol=1e-9)
    assert all(rows.shape == (len(PLACES), VOCAB) and rows.isfinite().all() for rows in known.values())
    for name, fault in faults_of(run).items():
        some = [511, WINDOW]  # the others take time
        assert errors(computed(run, fault, some), known[name][[2, 4]]).max() < 1e-6


@pytest.mark.parametrize("run", ["prompts", "decode-rederived"])
def test_transformers_agrees(monkeypatch, run):
    """transformers in float64, as `record` ran it, is off by no more than float32 angles explain.

    Its frequencies and angles are float32 in any dtype: an angle of 40000 is rounded by up to 0.002. It may round twice
    as badly as the best float32 does. Its logits are recorded in float32, too.
    """
    known = expected(run)
    rotated = reference.rotated

    def rounded(x, angles, pairs):
        place = angles[:, :1]  # the first frequency is 1
        frequencies = (angles / place).nan_to_num().float()
        return rotated(x, (place.float() * frequencies).double(), pairs)

    monkeypatch.setattr(reference, "rotated", rounded)
    explained = 2 * errors(computed(run), known["right"]) + 2 * torch.finfo(torch.float32).eps
    off = errors(known["transformers"], known["right"])
    assert (off < explained).all() and off.max() < 5e-4 and explained.max() < ALLOWED["float32"]


def test_runs_agree_where_their_rules_do():
    right = {run: expected(run)["right"] for run in RUNS}
    for run in RUNS:
        assert torch.allclose(right[run][:4], right["prompts"][:4], rtol=1e-9, atol=1e-9)
    assert torch.allclose(expected("prompts")["plain"][4:], right["decode"][4:].float(), atol=1e-3)
    assert torch.allclose(expected("decode")["rederived"][4:], right["decode-rederived"][4:].float(), atol=1e-3)


def test_this_runtime_decodes_across_the_window(model):
    """A prompt that fills the window, and two steps after it; and short prompts."""
    places = PLACES[:6]
    off = errors(generated.generated(model, "decode", places), expected("decode")["right"][:6])
    assert off.max() < ALLOWED["float32"]


def test_this_runtime_begins_beyond_the_window(model):
    """A prompt of a token more than the window."""
    (row,) = generated.generated(model, "prompts", [WINDOW])
    off = {name: errors(row[None], rows[4:5]).item() for name, rows in expected("prompts").items()}
    assert off["right"] < ALLOWED["float32"] < min(off[name] for name in FAULTS)


# -------------------------------------------------------------------- faults

# The first place at which a runtime that computes in float32 is wrong.
FIRST = {
    "prompts": {"doubled": 1, "pairs": 1, "window": 32767, "rederived": 32768, "plain": 32768, "whole": 1, "static": 1},
    "decode": {"doubled": 1, "pairs": 1, "window": 32767, "rederived": 32768, "whole": 1, "static": 1},
    "decode-rederived": {"doubled": 1, "pairs": 1, "window": 32767, "plain": 32768, "whole": 1, "static": 1},
}


@pytest.mark.parametrize(("run", "name"), [(run, name) for run in RUNS for name in FIRST[run]])
def test_every_fault_is_refused_and_named(run, name, tmp_path, capsys):
    """Also in bfloat16, whose rounding is played by noise of 2%."""
    assert FIRST[run].keys() == faults_of(run).keys()
    rows = expected(run)[name]
    report = check(rows, run, "float32")
    assert report.wrong[0] == FIRST[run][name] and report.why.startswith(FAULTS[name].sentence)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)) * rows.std() / 50
    rough = check(rows + noise, run, "bfloat16")
    assert rough.wrong and rough.why.startswith(FAULTS[name].sentence)
    np.save(tmp_path / "logits.npy", rows.numpy())
    assert program.main(["check", str(tmp_path / "logits.npy"), "--run", run]) == 1
    assert f"first wrong at place {FIRST[run][name]}: {FAULTS[name].sentence}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["doubled", "pairs"])
def test_a_fault_planted_in_this_runtime_is_that_of_the_reference(model, monkeypatch, name):
    """Doubled frequencies are doubled positions. Rows of q and k in another order are pairs."""
    state = model.state_dict()
    if name == "doubled":
        right = staging.inverse_frequencies
        monkeypatch.setattr(staging, "inverse_frequencies", lambda *arguments: 2 * right(*arguments))
    else:
        halves = torch.arange(DIM).view(-1, 2).T.flatten()
        for key in [key for key in state if "q_proj" in key or "k_proj" in key]:
            state[key] = state[key].unflatten(0, (-1, DIM))[:, halves].flatten(0, 1)
    faulty = InternLM3ForCausalLM(model.config, dtype=torch.float32)
    faulty.load_state_dict(state)
    assert errors(generated.generated(faulty, "prompts", SHORT), expected("prompts")[name][:3]).max() < 1e-4


@pytest.mark.parametrize(
    ("place", "words"), [(0, "One token alone is wrong"), (511, "Look at attention"), (32769, "look at dynamic NTK")]
)
def test_an_unknown_fault(place, words):
    rows = expected("decode")["right"].clone()
    rows[PLACES.index(place)] = rows[PLACES.index(place)].roll(1)
    report = check(rows, "decode", "float32")
    assert report.wrong == [place] and report.why.startswith("no known fault") and words in report.why


# -------------------------------------------------------------------- files of logits


@pytest.mark.parametrize("run", RUNS)
def test_right_logits_pass(run, tmp_path, capsys):
    """As .npy in any float dtype or as .json; as logits or as log-probabilities."""
    right = expected(run)["right"]
    assert not check(right.bfloat16(), run, "bfloat16").wrong and not check(right.half(), run, "float16").wrong
    for dtype in (np.float64, np.float32):
        np.save(tmp_path / "logits.npy", right.numpy().astype(dtype))
        assert program.main(["check", str(tmp_path / "logits.npy"), "--run", run]) == 0
    (tmp_path / "logits.json").write_text(json.dumps(right.log_softmax(-1).tolist()))
    assert program.main(["check", str(tmp_path / "logits.json"), "--run", run, "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "WRONG" not in out and re.findall(r"^ *(\d+) .* 1\.0e-03$", out, re.MULTILINE) == 3 * [*map(str, PLACES)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "logits.npy",
            np.zeros((6, VOCAB)),
            r"has shape \[6, 384\], and must have \[7, 384\]: .* at places 0, 1, 511,",
        ),
        (
            "logits.npy",
            np.zeros((7, VOCAB), np.int64),
            "its numbers are int64, and must be float16, float32 or float64",
        ),
        ("logits.npy", np.zeros((7, VOCAB), np.float16), "its numbers are float16, too coarse for float32"),
        ("logits.npy", np.full((7, VOCAB), np.nan), "has nan at place 0, token 0: logits are finite"),
        ("logits.npy", np.array([{}]), "is no file of logits: Object arrays cannot be loaded"),
        ("logits.npy", b"\x93NUMPY", "is no file of logits"),
        ("logits.json", b"{}", "is no file of logits"),
        ("logits.json", b"[[1, 2], [3]]", "is no file of logits"),
        ("logits.json", b"[[1.0]]", r"has shape \[1, 1\]"),
        ("logits.json", b"not", "is no file of logits"),
        ("logits.bin", b"", r"its name must end in \.npy or \.json"),
        (None, b"", "No such file"),
    ],
)
def test_bad_files(name, content, words, tmp_path, capsys):
    path = tmp_path / (name or "missing.npy")
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif name:
        path.write_bytes(content)
    with pytest.raises(SystemExit):
        program.main(["check", str(path), "--run", "prompts"])
    assert re.search(words, capsys.readouterr().err)


def test_commands_of_the_readme(folder, tmp_path, monkeypatch, capsys):
    commands = [each[1:] for each in COMMANDS if each[0] == "bench.conformance"]
    assert {each[0] for each in commands} == {"write", "check", "ours"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generated, "generated", lambda model, run: expected(run)["right"].float())
    np.save("LOGITS.npy", expected("prompts")["right"].numpy())
    for command in sorted(commands, key=lambda each: ["write", "ours", "check"].index(each[0])):
        assert program.main(command) == 0


def test_numpy_names_no_other_file_than_the_user(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["ours", str(folder), "--run", "prompts", "--out", str(tmp_path / "logits")])
    assert "logits must end in .npy" in capsys.readouterr().err


# -------------------------------------------------------------------- tokenizer and template

CASES = json.loads((DATA / "tokenizer_cases.json").read_text("utf-8"))


def by_sentencepiece(text):
    """Ids and decoded text: SentencePiece encodes and decodes what is between special tokens."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizer.model"))
    config = json.loads((DATA / "tokenizer_config.json").read_text("utf-8"))
    special = {token["content"]: int(id) for id, token in config["added_tokens_decoder"].items()}
    ids, decoded = [], ""
    for part in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        own = [special[part]] if part in special else processor.encode(part)
        ids += own
        decoded += part if part in special else processor.decode(own)
    return ids, decoded


def test_cases_of_the_tokenizer(folder):
    tokenizer, theirs = InternLM3Tokenizer.from_pretrained(folder), oracle(folder)
    assert len(tokenizer) <= VOCAB and tokenizer.vocab_size == checkpoint.PIECES
    for case in CASES["texts"]:
        assert tokenizer.encode(case["text"]) == theirs.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        assert by_sentencepiece("<s>" + case["text"]) == (case["ids"], case["decoded"])
    used = {id for case in CASES["texts"] for id in case["ids"]}
    assert {1, 2, *range(370, 378)} - used <= {373}


def test_cases_of_the_template(folder):
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    tokenizer = InternLM3Tokenizer.from_pretrained(folder)
    for case in CASES["chats"]:
        add = {"add_generation_prompt": case["add_generation_prompt"]}
        assert tokenizer.apply_chat_template(case["messages"], tokenize=False, **add) == case["prompt"]
        assert tokenizer.apply_chat_template(case["messages"], tokenize=True, **add) == case["ids"]
        (prompts,) = transformers.render_jinja_template(
            [case["messages"]], chat_template=tokenizer.chat_template, bos_token="<s>", **add
        )[:1]
        assert prompts == [case["prompt"]]
        assert by_sentencepiece(case["prompt"])[0] == case["ids"]
