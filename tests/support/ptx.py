"""Runs the few PTX instructions of kernels/triton/fields.py in PyTorch: Triton interprets no inline assembly."""

import re

import torch


def run(text, operands):
    """Executes `text`. operands: "$0" ... -> int64 tensors of 32-bit values; what it writes is added to them."""
    registers = dict(operands)

    def value(name):
        return torch.tensor(int(name, 0)) if name[0].isdigit() else registers[name]

    for line in filter(None, (x.strip() for x in text.strip("{} \n").split(";"))):
        name, _, rest = line.partition(" ")
        if name == ".reg":
            continue
        target, *sources = (x.strip() for x in rest.split(","))
        given = [value(x) for x in sources]
        registers[target] = OPERATIONS[re.sub(r"^(fma)\.rn\.", r"\1.", name)](*given)
    return registers


def lop3(a, b, c, table):
    """Bit i of the table is the result for the inputs' bits a, b, c with i = 4 a + 2 b + c."""
    result = torch.zeros_like(a)
    for i in range(8):
        if int(table) >> i & 1:
            bits = [x if i & place else ~x for x, place in ((a, 4), (b, 2), (c, 1))]
            result = result | bits[0] & bits[1] & bits[2]
    return result & 0xFFFFFFFF


def fma(dtype):
    def halves(x):
        """[2, ...] float64."""
        parts = torch.stack([x & 0xFFFF, x >> 16 & 0xFFFF])
        return torch.where(parts > 0x7FFF, parts - 0x10000, parts).to(torch.int16).view(dtype).double()

    def run(a, b, c):
        a, b, c = torch.broadcast_tensors(a, b, c)
        exact = halves(a) * halves(b) + halves(c)
        assert torch.equal(exact.to(dtype).double(), exact), "a result is rounded"
        low, high = exact.to(dtype).view(torch.int16).long() & 0xFFFF
        return low | high << 16

    return run


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: (a << b) & 0xFFFFFFFF,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lop3,
    "fma.bf16x2": fma(torch.bfloat16),
    "fma.f16x2": fma(torch.float16),
}
