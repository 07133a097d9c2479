"""What a type checker reports for calls of an installed copy."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RIGHT = """
    from collections.abc import Iterator

    from internlm3 import LLM, Chunk, RequestOutput, SamplingParams

    class Vector:
        # What matters here of a tensor or an array.

        def __iter__(self) -> Iterator["Vector"]:
            return iter([self])

    llm = LLM("folder")
    one: RequestOutput = llm.generate("hi", max_tokens=3)
    ids: RequestOutput = llm.generate([1, 2, 3], SamplingParams(), temp=0.5, stop=["a"])
    two: list[RequestOutput] = llm.generate(["a", "b"], [SamplingParams(), SamplingParams()])
    three: list[RequestOutput] = llm.generate([[1, 2], [3]])
    llm.generate(Vector())
    answer: RequestOutput = llm.chat([{"role": "user", "content": "hi"}], thinking=True)
    text: str = llm.chat("hi", SamplingParams()).text + one.outputs[0].text
    several: list[RequestOutput] = llm.chat([[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]])
    chunks: Iterator[Chunk] = llm.chat("hi", stream=True)
    for chunk in llm.stream("hi", seed=1):
        text += chunk.text
    seconds: float = one.timings.first_token
"""
WRONG = {
    'llm.generate("hi", max_token=3)': 'Unexpected keyword argument "max_token"',
    'llm.generate("hi").txt': '"RequestOutput" has no attribute "txt"',
    'llm.generate("hi", max_tokens="3")': "No overload variant",
    'llm.generate(["a"]).text': '"list[RequestOutput]" has no attribute "text"',
    'llm.chat("hi", temprature=1)': "temprature",
    'llm.chat("hi").txt': '"RequestOutput" has no attribute "txt"',
    'llm.chat("hi", stream=True).text': "text",
    'llm.stream("hi", max_token=3)': 'Unexpected keyword argument "max_token"',
    'next(llm.stream("hi")).txt': '"Chunk" has no attribute "txt"',
    'LLM("folder", devcie="cpu").generat("hi")': '"LLM" has no attribute "generat"',
}


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Runs mypy on a program that imports the package from a folder like site-packages."""
    place = tmp_path_factory.mktemp("typing")
    (place / "site").mkdir()
    (place / "site" / "internlm3").symlink_to(ROOT, target_is_directory=True)
    # The types of other packages are not tested here, and reading PyTorch's takes three quarters of the time.
    others = [
        "torch",
        "triton",
        "numpy",
        "transformers",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "jinja2",
        "huggingface_hub",
        "tqdm",
    ]
    sections = ",".join(f"mypy-{name}.*" for name in others)
    (place / "mypy.ini").write_text(f"[mypy]\nignore_missing_imports = True\n[{sections}]\nfollow_imports = skip\n")

    def run(program: str) -> str:
        (place / "program.py").write_text(program)
        command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "program.py"]
        environment = {**os.environ, "MYPYPATH": str(place / "site")}
        return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True).stdout

    return run


def test_right_calls_pass_and_wrong_ones_do_not(mypy):
    program = textwrap.dedent(RIGHT)
    report = mypy(program + "\n".join(WRONG) + "\n")
    first = program.count("\n") + 1
    wrong = {
        int(line.split(":")[1]) for line in report.splitlines() if line.startswith("program.py") and ": error" in line
    }
    assert wrong == set(range(first, first + len(WRONG))), report
    for number, (call, words) in enumerate(WRONG.items(), first):
        lines = [line for line in report.splitlines() if line.startswith(f"program.py:{number}:")]
        assert any(words in line for line in lines), (call, lines)
