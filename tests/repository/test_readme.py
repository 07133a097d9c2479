"""The READMEs: links lead somewhere, code runs as pasted, commands are accepted, and both languages say the same."""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import internlm3
from bench import ROOT, user_kernels
from internlm3 import AsyncLLM
from internlm3.runtime.api import async_llm
from internlm3.runtime.api import llm as llm_module
from internlm3.runtime.sampling import params
from internlm3.tests.server.conftest import served

PAGES = ["README.md", "runtime/README.md", "kernels/README.md", "bench/README.md", "tests/README.md", "CONTRIBUTING.md"]
LANGUAGES = ("README.md", "README.zh-CN.md")
MODEL = "internlm/internlm3-8b-instruct"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text, kind):
    return [code for found, code in FENCE.findall(text) if found == kind]


def prose(text):
    return FENCE.sub("", text)


def links(text):
    return re.findall(r"\]\(([^)]+)\)", prose(text))


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(read(page)), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


# --- both languages


def shape(text):
    """The kind of every line that is no plain prose: headings, table rows with their columns, list items."""
    marks = re.findall(r"^(#+ |\|.*\||- |\d\. )", prose(text), re.MULTILINE)
    return [f"row of {mark.count('|') - 1}" if mark.startswith("|") else mark for mark in marks]


def test_both_languages_say_the_same():
    english, chinese = map(read, LANGUAGES)
    assert FENCE.findall(english) == FENCE.findall(chinese)
    assert shape(english) == shape(chinese)
    targets = [[link for link in links(text) if not link.startswith(("README", "#"))] for text in (english, chinese)]
    assert targets[0] == targets[1]
    code = [set(re.findall(r"`([^`\n]+)`", prose(text))) for text in (english, chinese)]
    assert code[0] == code[1]
    # Every figure of one is in the other: measurements, versions, dates.
    figures = [sorted(set(re.findall(r"\d[\d.]*\d|\d", prose(text)))) for text in (english, chinese)]
    assert figures[0] == figures[1]


# --- links, tables


@pytest.mark.parametrize("page", [*PAGES, LANGUAGES[1]])
def test_links_lead_somewhere(page):
    for link in links(read(page)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [*PAGES, LANGUAGES[1]])
def test_files_named_in_the_text_exist(page):
    """In the root or beside the page. Names with capital letters stand for others."""
    for name in re.findall(r"`([a-z_./]+/[a-z_]+\.(?:py|md|json))`", prose(read(page))):
        assert (ROOT / name).exists() or (ROOT / page).parent.joinpath(name).exists(), name


def test_every_sampling_parameter_is_in_the_table():
    text = read("runtime/README.md")
    table = text[text.index("## Sampling settings") : text.index("## Arguments of transformers")]
    named = set(re.findall(r"`(\w+)", table))
    assert {*(field.name for field in fields(params.SamplingParams)), *params.ALIASES} <= named


def test_every_environment_variable_is_in_the_table():
    """Those that the runtime reads. The tables may name more, which libraries read."""
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "runtime").rglob("*.py"))
    read_here = set(re.findall(r'environ(?:\.get|\.setdefault)?[\[(]"(\w+)"', code))
    text = read("runtime/README.md")
    table = text[text.index("## Environment variables") : text.index("## Common questions")]
    assert read_here and read_here <= set(re.findall(r"[`$]([A-Z][A-Z0-9_]+)\b", table))


def test_the_memory_table_is_what_info_computes(tmp_path, capsys):
    """For InternLM3-8B's configuration."""
    from internlm3.runtime.cli.main import main

    published = {
        "model_type": "internlm3", "vocab_size": 128512, "hidden_size": 4096, "intermediate_size": 10240,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
        "max_position_embeddings": 32768, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    lengths = ("4,096", "32,768", "131,072")
    rows = {}
    for dtype in ("bfloat16", "float32"):
        row = []
        for length in lengths:
            assert main(["info", str(tmp_path), "--dtype", dtype, "--length", length.replace(",", "")]) == 0
            out = capsys.readouterr().out
            parameters = re.search(r"^parameters +([\d,]+)$", out, re.MULTILINE)[1]
            weights = int(parameters.replace(",", "")) * getattr(torch, dtype).itemsize / 1e9
            per_token = re.search(r"^KV cache +([\d,]+) bytes per token", out, re.MULTILINE)[1]
            row = row or [f"{weights:.2f}", f"{per_token} bytes"]
            total = weights + int(per_token.replace(",", "")) * int(length.replace(",", "")) / 1e9
            row.append(f"{total:.2f}")
        rows[dtype] = row
    text = read("README.md")
    assert f"({parameters} parameters)" in text
    for dtype, names in (("bfloat16", "bfloat16, float16"), ("float32", "float32")):
        assert f"| {names} | {' | '.join(rows[dtype])} |" in text


# --- Python


def python_blocks():
    for page in PAGES:
        for code in blocks(read(page), "python"):
            yield page, code


@pytest.fixture(scope="module")
def loaded(demo_model):
    """LLM as the examples call it: one demo model for all of them, with short answers."""
    llm = internlm3.LLM(demo_model, max_seq_len=4096, progress=False)
    llm.default_params = replace(llm.default_params, max_tokens=8)
    known = internlm3.LLM.__init__.__kwdefaults__.keys()

    def load(model, **options):
        assert Path(model) == demo_model
        assert options.keys() <= known
        return llm

    return load


@pytest.mark.parametrize(
    ("page", "code"), [pytest.param(*each, id=f"{n}-{each[0]}") for n, each in enumerate(python_blocks())]
)
def test_python_runs_as_it_is_pasted(page, code, demo_model, loaded, monkeypatch, tmp_path, capsys):
    """With the demo model in place of the 8B, and with short answers."""
    if code.startswith("# mine.py"):  # a file for bench.ops
        (tmp_path / "mine.py").write_text(code)
        assert user_kernels.load(str(tmp_path / "mine.py"))
        return
    for name in ("RECOMMENDED", "RECOMMENDED_THINKING"):
        monkeypatch.setattr(params, name, replace(getattr(params, name), max_tokens=8))
    monkeypatch.setattr(llm_module, "LLM", loaded)
    monkeypatch.setattr(async_llm, "AsyncLLM", lambda model, **options: AsyncLLM(loaded(model), **options))
    code = re.sub(r"\b(max_tokens|max_new_tokens)=\d+", r"\1=8", code.replace(MODEL, str(demo_model)))
    with served(AsyncLLM(loaded(demo_model)), MODEL.partition("/")[2]) if "OpenAI(" in code else nullcontext() as url:
        code = code.replace("http://localhost:8000", str(url))
        exec(compile(code, f"<a block of {page}>", "exec"), {"__name__": "pasted"})
    assert capsys.readouterr().out.strip()


# --- commands

# Parses the arguments of each command given as JSON, and runs none: argparse is stopped after it has parsed them.
PARSE = """
import argparse, importlib, json, sys

import bench  # so that internlm3 is this checkout

class Accepted(Exception):
    pass

def parse_args(self, args=None, namespace=None):
    parsed, unknown = self.parse_known_args(args, namespace)
    if unknown:
        self.error(f"unrecognized arguments: {unknown}")
    raise Accepted

argparse.ArgumentParser.parse_args = parse_args
sys.path.append(sys.argv[1])  # bench takes the root off the path
for module, arguments in json.load(sys.stdin):
    sys.argv = [module, *arguments]
    try:
        importlib.import_module(module).main()
    except Accepted:
        pass
    except SystemExit as refused:
        sys.exit(f"python -m {module} {arguments} is refused: {refused}")
    else:
        sys.exit(f"python -m {module} {arguments} parsed no arguments")
"""


def commands():
    """Every line of the pages' bash blocks, each side of a pipe by itself; and the commands in the text."""
    found = set()
    for page in PAGES:
        in_text = re.findall(r"`((?:make|pip|python -m|pytest) [^`]+)`", prose(read(page)))
        lines = [line for line in in_text if not re.search(r"NAME|\.\.\.", line)]
        for line in [*lines, *"".join(blocks(read(page), "bash")).splitlines()]:
            words = shlex.split(line, comments=True)
            while "|" in words:
                found.add(tuple(words[: words.index("|")]))
                words = words[words.index("|") + 1 :]
            if words:
                found.add(tuple(words))
    return sorted(found)


def made(words):
    """The command that a call of make runs last, after the environment is there."""
    # Without what `make test`, which may have started this process, passes to other calls of make.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "ARGS", "TRITON"))}
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.strip().splitlines()[-1])


def unfolded(words):
    """The command without variables in front and without the environment's path."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    name = Path(words[0]).name
    return unfolded(made(words[1:])) if name == "make" else [name, *words[1:]]


def test_commands_are_accepted():
    parsers, collections = [], []
    for command in commands():
        match unfolded(list(command)):
            case ["echo", *_]:
                pass
            case ["internlm3", *arguments] | ["python", "-m", "internlm3", *arguments]:
                parsers.append(("internlm3.runtime.cli.main", arguments))
            case ["python", "-m", module, *arguments]:
                path = ROOT / module.replace(".", "/")
                if path.is_dir():
                    path, module = path / "__main__", f"{module}.__main__"
                assert path.with_suffix(".py").is_file(), command
                if not torch.cuda.is_available():  # where our engine has another name
                    arguments = ["cpu" if word == "triton" else word for word in arguments]
                if arguments:  # the name alone stands for the program
                    parsers.append((module, arguments))
            case ["mypy" | "curl", *_]:
                pass
            case ["pytest", *arguments] if any(Path(ROOT, word.partition("::")[0]).exists() for word in arguments):
                collections.append(arguments)
            case ["pytest", "-k", _]:  # of all tests, whose collection takes long
                pass
            case ["pip", "install", "."]:
                pass
            case ["pip", "install", what]:
                extra = re.fullmatch(r"\.\[(\w+)\]", what)[1]
                assert f'"{extra}": [' in read("setup.py")
            case other:
                raise AssertionError(f"this test cannot check {' '.join(other)}")
    assert len(parsers) > 5
    python = [sys.executable, "-c", PARSE, ROOT]
    done = subprocess.run(python, cwd=ROOT, input=json.dumps(parsers), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for arguments in collections:
        # One process, whatever the command asks for; collecting is enough to see that it selects tests.
        pytest_collects = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
        done = subprocess.run(pytest_collects, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
