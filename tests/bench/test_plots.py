"""The plots of a record: which are drawn, and which lines and words are in them."""

import re

import plots
import pytest
from record import Figure, Record
from timing import Floor

FLOOR = Floor(1e12, 1e12, {"bfloat16": 1e14})
STAMP = {"device": "a GPU", "commit": "abc", "date": "2026-11-25T10:00:00", "shapes": {"of": "InternLM3-8B"}}


def figure(op, shape, rows, context=None, engine="triton", cold=True, operations=0, rounds=(2.0, 2.1, 2.2)):
    return Figure(op, shape, "bfloat16", rows, context, engine, 10**6, operations, cold, rounds)


ATTENTION = [
    figure("paged_attention", f"{rows} row{'s' * (rows > 1)}, {context} held", rows, context, engine)
    for rows in (1, 16)
    for context in (128, 1024)
    for engine in ("triton", "SDPA")
]
NORMS = [figure("rms_norm", "1 row", 1), figure("rms_norm", "16 rows", 16), figure("rms_norm", "512 tokens", 512)]


def test_lines_have_two_places_and_peers_beside_them():
    assert {key: [x.context for x in line] for key, line in plots.by_context(ATTENTION).items()} == {
        (engine, rows): [128, 1024] for engine in ("triton", "SDPA") for rows in ("1 row", "16 rows")
    }
    assert {key: [x.rows for x in line] for key, line in plots.by_rows(ATTENTION).items()} == {
        (engine, f"rows, {context} held"): [1, 16] for engine in ("triton", "SDPA") for context in (128, 1024)
    }
    assert list(plots.by_rows(NORMS)) == [("triton", "rows")]  # one chunk makes no line
    assert plots.by_context(NORMS) == {}


def test_what_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the plots are an extra")
    bound = figure("linear", "512 tokens, o", 512, operations=3 * 10**8, rounds=[4.0])
    missing = Figure("linear", "512 tokens, o", "bfloat16", 512, None, "GemLite", note="not installed")
    record = Record(STAMP, FLOOR, [*ATTENTION, *NORMS, bound, missing])
    drawn = plots.draw(record, tmp_path / "plots")
    names = {path.name for path in drawn}
    assert names == {
        "share-bfloat16.svg",
        "paged_attention-context-bfloat16.svg",
        "paged_attention-rows-bfloat16.svg",
        "rms_norm-rows-bfloat16.svg",
    }
    text = {path.name: re.sub(r"\s+", " ", path.read_text("utf-8")) for path in drawn}
    share = text["share-bfloat16.svg"]
    for words in ("paged_attention, 1 row, 128 held (read)", "linear, 512 tokens, o (matmul)", "triton", "SDPA"):
        assert words in share
    assert "GemLite" not in share
    for name in names:
        assert "a GPU, commit abc, 2026-11-25; shapes of InternLM3-8B" in text[name]
    again = plots.draw(record, tmp_path / "again")
    assert [path.read_bytes() for path in drawn] == [path.read_bytes() for path in again]


def test_no_share_is_drawn_of_what_a_cache_may_have_served(tmp_path):
    pytest.importorskip("matplotlib", reason="the plots are an extra")
    assert plots.draw(Record(STAMP, FLOOR, [figure("rms_norm", "1 row", 1, cold=False)]), tmp_path / "plots") == []


def test_a_folder_that_can_not_be(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--plot needs matplotlib: pip install 'internlm3"):
        plots.check(str(tmp_path))
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: name)
    plots.check(str(tmp_path / "new"))
    (tmp_path / "file").write_text("")
    for name in ("file", "none/new"):
        with pytest.raises(ValueError, match="can't be written: name a folder, in one that there is"):
            plots.check(str(tmp_path / name))
