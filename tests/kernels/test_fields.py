"""The instructions that turn words into numbers, for every word: against the layout's definition."""

import pytest
import torch

from internlm3.kernels.quantised import Form, QuantisedWeight, pack
from internlm3.kernels.triton import fields
from internlm3.tests.support import ptx


def every_word():
    """All words, each with another one: low and high halves of 32 bits."""
    low = torch.arange(1 << 16)
    return low | (low * 40503 + 7) % (1 << 16) << 16


def numbers(kind, words, zero):
    """[F, ...] float64: the fields of 16-bit words less their zero point, by the definition of the kinds."""
    bits = 4 if kind == "int4" else 8
    raw = torch.stack([words >> shift & ((1 << bits) - 1) for shift in range(0, 16, bits)])
    if kind == "float8":
        return raw.to(torch.uint8).view(torch.float8_e4m3fn).double()
    return (raw - 256 * (raw > 127) if kind == "int8" else raw).double() - zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "zero", "given"),
    [
        *[("int4", zero, given) for zero in (0, 8, 16) for given in (True, False)],
        *[("int8", zero, given) for zero in (-128, 0, 127) for given in (True, False)],
        ("float8", 0, False),
    ],
)
def test_every_word(kind, zero, given, dtype):
    """given: the zero point is an operand, as where each group has one."""
    words, count = every_word(), 4 if kind == "int4" else 2
    operands = {"$1": words}
    if given:
        bits = torch.tensor(-(fields.OFFSET[kind, dtype] + zero)).to(dtype).view(torch.int16).long() & 0xFFFF
        operands["$2"] = bits | bits << 16
    for field in range(count):
        found = ptx.run(fields.ptx(kind, dtype, None if given else zero, field), operands)["$0"]
        for half in (0, 16):
            expected = numbers(kind, words >> half & 0xFFFF, zero)
            bits = found >> half & 0xFFFF
            value = torch.where(bits > 0x7FFF, bits - 0x10000, bits).to(torch.int16).view(dtype).double()
            known = ~expected[field].isnan()
            assert torch.equal(value[known], expected[field][known])
    assert kind == "float8" or not expected.isnan().any()


def test_a_wrong_instruction_is_found():
    text = fields.ptx("int4", torch.bfloat16, 8, 3).replace(", 12;", ", 11;")
    found = ptx.run(text, {"$1": every_word()})["$0"] & 0xFFFF
    expected = numbers("int4", every_word() & 0xFFFF, 8)[3].bfloat16().view(torch.int16).long() & 0xFFFF
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
@pytest.mark.parametrize(("columns", "width"), [(4096, 128), (576, 16), (96, 16), (8, 16)])
def test_the_layout(kind, columns, width):
    """Field f of word b * L + j is column (b * F + f) * L + j."""
    form = Form(kind, columns, 0, 0)
    if kind != "int4":
        width = {576: 32, 96: 16, 8: 16}.get(columns, width)
    fields_of_a_word = 4 if kind == "int4" else 2
    assert form.width == width and form.words == -(-columns // (fields_of_a_word * width)) * width
    for column in {0, 1, columns // 2, columns - 1}:
        q = torch.zeros(1, columns)
        q[0, column] = 5
        weight = pack(kind, q.to(torch.float8_e4m3fn) if kind == "float8" else q.int(), torch.ones(1, 1), 0)
        block, rest = divmod(column, fields_of_a_word * width)
        field, j = divmod(rest, width)
        value = 5 if kind != "float8" else 0x4A  # 1.25 * 2^2
        assert weight.words[0].nonzero().tolist() == [[block * width + j]]
        assert int(weight.words[0, block * width + j]) & 0xFFFF == value << (16 // fields_of_a_word * field)
        assert torch.equal(weight.dense(), q)


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_points_are_within_the_scales(kind, dtype):
    """Every scale of 16 bits, also the smallest, keeps its value beside its zero point."""
    scale = torch.arange(1, 0x7800, dtype=torch.int16).view(dtype)[:, None]
    low, high = (0, 17) if kind == "int4" else (-128, 129)
    zero = torch.randint(low, high, scale.shape)
    q = torch.full((len(scale), 16), 3)
    weight = pack(kind, q, scale, zero)
    assert torch.equal(weight.dense(), (q - zero) * scale.float())


@pytest.mark.parametrize(
    ("kind", "q", "scale", "zero", "message"),
    [
        ("int4", torch.zeros(1, 24), torch.ones(1, 3), 8, "groups of 8 columns cannot be packed"),
        ("int4", torch.zeros(1, 32), torch.full((1, 1), 1.0001), torch.ones(1, 1), "more than 11 significant bits"),
        ("float8", torch.full((1, 16), torch.nan).to(torch.float8_e4m3fn), torch.ones(1, 1), 0, "is NaN"),
    ],
)
def test_what_cannot_be_packed(kind, q, scale, zero, message):
    with pytest.raises(ValueError, match=message):
        pack(kind, q, scale, zero)


def test_rows_of_a_weight():
    q, scale = torch.randint(0, 16, (7, 64)), torch.rand(7, 2).half()
    weight: QuantisedWeight = pack("int4", q, scale, torch.randint(0, 16, (7, 2)), torch.rand(7, 2), torch.randperm(64))
    assert weight.shape == (7, 64)
    assert torch.equal(weight.rows(2, 6).dense(), weight.dense()[2:6])
