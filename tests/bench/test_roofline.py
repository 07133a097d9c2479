"""The ceilings of a record: what is read and by which variant, and the shares that rows get."""

import dataclasses

import pytest
import torch

from bench import roofline
from bench.record import Part
from bench.roofline import Roofline

CEILINGS = Roofline(2e12, 1e12, {"bfloat16": 1e14})


def row(unit="us", rounds=(1.0, 2.0, 9.0), **about):
    return Part("ops").figure("x", rounds, unit, **{"dtype": "bfloat16", "bytes": 10**6, "flops": 0, **about})


@pytest.mark.parametrize(
    ("given", "share"),
    [
        (row(), ("read", 0.25)),  # a megabyte in 2 us
        (row("ms", bytes=10**9), ("read", 0.25)),
        (row(flops=10**8), ("matmul", 0.5)),
        (row(cold=True), ("read", 0.25)),
        (row(cold=False, flops=10**8), ("matmul", 0.5)),
        (row(bound="matmul", share=0.9), ("read", 0.25)),  # of other ceilings
        (row(cold=False, bound="read", share=0.9), (None, None)),  # a cache may have served it
    ],
)
def test_a_row_gets_its_share(given, share):
    found = CEILINGS.with_share(given)
    assert (found.about.get("bound"), found.about.get("share")) == (share[0], pytest.approx(share[1]))
    assert dataclasses.replace(found, about=given.about) == given


@pytest.mark.parametrize(
    "given",
    [
        Part("decode").figure("a sound share", [1.0], "ms", share=0.5, bound="read"),  # of an older record
        Part("decode").figure("memory", [1.0], "GiB"),
        Part("peers").missing("x", "not installed", dtype="bfloat16", bytes=1, flops=0),
        row(dtype="float64", bound="read", share=0.5),
    ],
)
def test_rows_without_bytes_a_time_or_a_ceiling_stay_as_they_are(given):
    assert CEILINGS.with_share(given) is given


def test_a_record_has_the_ceilings_that_were_measured():
    """At the median; `read` is the best of its variants, with all of its rounds and its name."""
    rounds = {"read, slow": [1.0, 1.0, 90.0], "read, fast": [2.0, 3.0, 4.0], "copy, read and written": [2.0, 2.5, 9.0]}
    measured = Roofline(3e9, 2.5e9, {"bfloat16": 1e12, "float16": 2e12}, rounds)
    rows = [*measured.rows()]
    assert (rows[0].name, rows[0].rounds, rows[0].note) == ("read", [2.0, 3.0, 4.0], "read, fast")
    assert {each.name: each.rounds for each in rows if each.name in rounds} == rounds
    assert [each.name for each in rows if each.about.get("ceiling") == "read"] == ["read"]
    assert Roofline.of([*rows, row()]) == measured._replace(rounds={})
    assert Roofline.of(rows[1:]) is None and Roofline.of([]) is None


def test_the_ceiling_is_the_best_way_to_read(monkeypatch):
    """One way takes half of the other's time."""
    monkeypatch.setattr(roofline, "reads", lambda x: {"one": (100, [int]), "two": (100, [int, int])})
    times = {1: 10.0, 2: 20.0}
    calls = []

    def rounds_of(run, count):
        made = run()
        calls.append(len(made))
        while True:
            yield times[len(made)]

    monkeypatch.setattr(roofline, "rounds_of", rounds_of)
    found = roofline.measure(torch.device("cpu"), [torch.float32], 3)
    assert found.read == pytest.approx(100 / 10e-6) and calls == [1, 2, 1, 1]
    assert next(found.rows()).note == "read, one" and found.matmul["float32"] == pytest.approx(2 * 512**3 / 10e-6)


def test_all_of_a_tensor_is_read():
    """Every way counts the bytes that its calls read; a head's matrix is whole."""
    x = torch.zeros(1 << 20, dtype=torch.bfloat16)
    ways = roofline.reads(x)
    assert {name: nbytes for name, (nbytes, _) in ways.items()} == dict.fromkeys(("sum", "lm_head of one row"), 2 << 20)
    assert [call().shape for call in ways["lm_head of one row"][1]] == [(1, 256)]


def test_the_kernels_that_read():
    """In Triton's interpreter or on a GPU: each variant adds up every block of the vector."""
    variants = pytest.importorskip("bench.read_bandwidth").variants
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randint(-8, 8, (2 << 14,), device=device).float()
    found = variants(x)
    assert len(found) == 16 and len({*found}) == 16
    for name, (call,) in found.items():
        y, block = call.args[1].zero_(), (int(name.split()[0]) << 10) // 4
        call()
        blocks = x.view(-1, block).sum(1)
        assert torch.equal(y[: len(blocks)], blocks) and not y[len(blocks) :].any()
