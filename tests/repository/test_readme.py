"""The README in its two languages: they say the same, their links lead somewhere, and their code runs as pasted."""

import re
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
READMES = {"English": HOME / "README.md", "Chinese": HOME / "README.zh-CN.md"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text):
    return FENCE.findall(text)


def prose(text):
    return FENCE.sub("", text)


def shape(text):
    """The kind of every line that is no plain prose: headings, table rows with their columns, list items."""
    marks = re.findall(r"^(#+ |\|.*\||- |\d\. )", prose(text), re.MULTILINE)
    return [f"row of {mark.count('|') - 1}" if mark.startswith("|") else mark for mark in marks]


def links(text):
    return [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("README", "#"))]


def test_both_languages_say_the_same():
    english, chinese = (path.read_text(encoding="utf-8") for path in READMES.values())
    assert blocks(english) == blocks(chinese)
    assert shape(english) == shape(chinese)
    assert links(english) == links(chinese)
    code = [set(re.findall(r"`([^`\n]+)`", prose(text))) for text in (english, chinese)]
    assert code[0] == code[1]
    # Every figure of one stands in the other: measurements, versions, dates.
    figures = [sorted(set(re.findall(r"\d[\d.]*\d|\d", prose(text)))) for text in (english, chinese)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("language", READMES)
def test_links_lead_somewhere(language):
    text = READMES[language].read_text(encoding="utf-8")
    for link in [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]:
        if link.startswith("#"):
            titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert link[1:] in [title.lower().replace(" ", "-") for title in titles], link
        else:
            assert (HOME / link).exists(), link


@pytest.mark.parametrize("index", range(3))
def test_python_blocks_run_as_they_are_pasted(demo_model, index, capsys):
    """With the demo model in the place of the 8B."""
    code = [code for kind, code in blocks(READMES["English"].read_text()) if kind == "python"]
    code = [block for block in code if not block.startswith("# mine.py")]  # a file for bench/kernels.py
    assert len(code) == 3
    exec(code[index].replace("internlm/internlm3-8b-instruct", str(demo_model)), {"__name__": "pasted"})
    assert capsys.readouterr().out.strip()


def test_every_sampling_parameter_is_in_the_table():
    from dataclasses import fields

    from internlm3 import SamplingParams
    from internlm3.runtime.sampling.params import ALIASES

    text = READMES["English"].read_text()
    table = text[text.index("### Sampling parameters") : text.index("### transformers' arguments")]
    named = set(re.findall(r"`(\w+)", table))
    assert {*(field.name for field in fields(SamplingParams)), *ALIASES} <= named
