"""Trace addresses and the dependency wait through NVIDIA's machine code, as nvdisasm prints it.

Registers are traced through the control-flow graph from the constant bank, which has the arguments, to each global
access. This gives for each access the pointer argument that its address derives from, and whether the successor has
been triggered (PREEXIT) and the predecessor been waited for (ACQBULK) before it.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Names = frozenset[str]  # of pointer arguments


class Access(NamedTuple):
    """One instruction that reads or writes global memory. The flags hold on all paths to it, or on some."""

    instruction: str
    is_load: bool
    bytes: int  # per thread
    pointers: Names = frozenset()
    triggered: bool = False  # on all paths
    waited: bool = False  # on all paths
    may_have_waited: bool = False  # on some path
    loop: str = ""  # the label of the innermost loop around it
    waits: int = 0  # for memory, before it in the listing


LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_LABEL = re.compile(r"^([.$\w]+):")
_TARGET = re.compile(r"`\(([^)]+)\)")
_REGISTER = re.compile(r"\b(U?R)(\d+)\b(\.64)?")
_CONSTANT = re.compile(r"c\[0x0\]\[(?:U?R\w+\+)?(0x[0-9a-f]+)\]")
_PREDICATE = re.compile(r"!?(U?P(?:T|\d+))")
_SHAPE = re.compile(r"\d+(x\d+)+|16816|1688")
TENSOR_CORE = re.compile(r"(HMMA|IMMA|QMMA|OMMA|[HIQ]GMMA|UTC\w*MMA)$")

# Instructions that convert a number or move its bytes: they are slow, and a stream of numbers needs few.
_CONVERSIONS = {"I2F", "I2FP", "I2I", "F2I", "F2F", "F2FP", "PRMT"}
_GLOBAL_LOADS = {"LDG", "LD", "LDGSTS", "UBLKCP", "UTMALDG"}
_GLOBAL_STORES = {"STG", "ST", "ATOM", "ATOMG", "RED", "REDG", "UTMASTG", "UTMAREDG"}
_SHARED_LOADS = {"LDS", "LDSM"}
_SHARED_STORES = {"STS", "STSM"}
_CONSTANT_LOADS = {"LDC", "ULDC", "LDCU"}
# Instructions that compute addresses. Any other one leaves a number in its register that is not an address.
_ADDRESS_ARITHMETIC = {
    *("IADD", "IADD3", "IMAD", "LEA", "MOV", "SEL", "FSEL", "SHFL", "VIADD", "R2UR"),
    *("UIADD3", "UIMAD", "ULEA", "UMOV", "USEL", "UVIADD"),
}
# Instructions whose first operand (other than a predicate) is read, not written.
_WRITE_NO_REGISTER = {
    *("ISETP", "UISETP", "FSETP", "DSETP", "HSETP2", "FCHK", "PLOP3", "UPLOP3", "R2P", "STL", "STTM", "RED", "REDG"),
    *(
        "STG",
        "ST",
        "STS",
        "STSM",
        "LDGSTS",
        "BAR",
        "BSSY",
        "BSYNC",
        "MEMBAR",
        "CCTL",
        "WARPSYNC",
        "LDGDEPBAR",
        "DEPBAR",
    ),
}
_ONES = (["1", "1"], ["-1", "-1"])
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class _Instruction(NamedTuple):
    guard: str  # the predicate under which it executes, or ""
    name: str
    operands: list[str]

    def __str__(self) -> str:
        return f"@{self.guard} " * bool(self.guard) + f"{self.name} {', '.join(self.operands)}"

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    @property
    def shaped(self) -> str:
        """The name with the shape, if it has one, and without types."""
        shape = [part for part in self.name.split(".")[1:] if _SHAPE.fullmatch(part)]
        return ".".join([self.base, *shape])

    @property
    def bytes(self) -> int:
        """Bytes loaded or stored per thread; a copy engine moves whole lines."""
        if self.base.startswith(("UBLK", "UTMA")):
            return 16
        return next((_BYTES[part] for part in self.name.split(".") if part in _BYTES), 4)

    @property
    def address(self) -> str:
        """The operand in the last brackets, except those of a descriptor: the address in global memory."""
        return re.findall(r"\[([^\]]*)\]", re.sub(r"desc\[[^\]]*\]", "", ", ".join(self.operands)))[-1]

    def written(self) -> tuple[list[str], list[str]]:
        """The registers that it writes, and the operands after them.

        For matrix instructions and matrix loads only the first register: the others are never used as addresses.
        """
        rest = list(itertools.dropwhile(_PREDICATE.fullmatch, self.operands))
        found = _REGISTER.match(rest[0]) if rest and self.base not in _WRITE_NO_REGISTER else None
        if found is None:
            return [], self.operands
        words = 1
        if self.base in _GLOBAL_LOADS | _SHARED_LOADS | _CONSTANT_LOADS | {"LDL", "ATOM", "ATOMG"}:
            words = max(self.bytes // 4, 1)
        elif {"WIDE", "64"} & set(self.name.split(".")) or self.base == "CS2R":
            words = 2
        return [f"{found[1]}{int(found[2]) + i}" for i in range(words)], rest[1:]


def fuses_16_bits(instruction: _Instruction) -> bool:
    """Whether it rounds a 16-bit product and sum once. A product alone, a sum alone or a constant does not."""
    if instruction.base not in ("HFMA2", "HFMA"):
        return False
    # The operands: destination; two factors, the second of which may be a pair of numbers; addend.
    first, *second, addend = instruction.operands[1:]
    return not first.lstrip("-").startswith("RZ") and not addend.lstrip("-").startswith("RZ") and second not in _ONES


class Flight(NamedTuple):
    """The outstanding loads of a thread. The listing is read once in order, so a loop counts as one iteration."""

    bytes: int  # outstanding at most
    ahead: int  # loads issued before the first wait
    round_trips: int  # waits in sequence: each for something requested after the previous wait


def flight(listing: Iterable[_Instruction]) -> Flight:
    return _flight(listing)[0]


def _flight(listing: Iterable[_Instruction]) -> tuple[Flight, list[int]]:
    """The outstanding loads, and how many waits there are before each instruction."""
    most = copied = asked = ahead = waits = 0
    waits_before = []
    loads: list[tuple[set[str], int, int]] = []  # registers written, bytes, number of waits before it was issued
    groups: list[tuple[int, int]] = []  # copies to shared memory with a common wait: bytes, waits before
    for instruction in listing:
        waits_before.append(waits)
        named = {kind + number for kind, number, _ in _REGISTER.findall(", ".join(instruction.operands))}
        arrived = [since for registers, _, since in loads if registers & named]
        loads = [load for load in loads if not load[0] & named]
        if instruction.base == "DEPBAR":
            done = max(len(groups) - int(instruction.operands[1], 0), 0)  # a list of scoreboards may follow
            arrived += [since for size, since in groups[:done] if size]
            groups = groups[done:]
        if waits in arrived:
            ahead = ahead or asked
            waits += 1
        if instruction.base == "LDGDEPBAR":
            groups, copied = [*groups, (copied, waits)], 0
        elif instruction.base == "LDGSTS":
            copied += instruction.bytes
        elif instruction.base in _GLOBAL_LOADS | {"ATOM", "ATOMG"}:
            loads.append((set(instruction.written()[0]), instruction.bytes, waits))
        asked += instruction.base in _GLOBAL_LOADS
        most = max(most, copied + sum(size for size, _ in groups) + sum(size for _, size, _ in loads))
    return Flight(most, ahead, waits), waits_before


def until_first_exit(listing: Sequence[_Instruction]) -> Sequence[_Instruction]:
    """The instructions of a thread that leaves at the first exit."""
    first = next((at for at, instruction in enumerate(listing) if instruction.base == "EXIT"), len(listing))
    return listing[:first]


class _State:
    """What is known at a point between two instructions."""

    def __init__(self, arguments: dict[int, str]) -> None:
        self.arguments = arguments
        # (guard, register) -> the arguments that its value derives from, with a guard: if the guard is true.
        # All of shared memory counts as one register.
        self.pointers: dict[tuple[str, str], Names] = {}
        self.triggered = self.waited = self.may_have_waited = False

    def copy(self) -> "_State":
        """For another block, in which a predicate may have another value."""
        other = _State(self.arguments)
        other.pointers = {place: names for place, names in self.pointers.items() if not place[0]}
        other.triggered, other.waited, other.may_have_waited = self.flags
        return other

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        return self.triggered, self.waited, self.may_have_waited

    def join(self, other: "_State") -> bool:
        """Merges the state of another path. Returns whether this one changed."""
        before = dict(self.pointers), self.flags
        for place, names in other.pointers.items():
            self.pointers[place] = self.pointers.get(place, frozenset()) | names
        self.triggered &= other.triggered
        self.waited &= other.waited
        self.may_have_waited |= other.may_have_waited
        return before != (self.pointers, self.flags)

    def _register(self, guard: str, name: str) -> Names:
        return self.pointers.get((guard, name), self.pointers.get(("", name), frozenset()))

    def _argument(self, offset: int) -> Names:
        name = self.arguments.get(offset & ~7)
        return frozenset([name]) if name else frozenset()

    def read(self, guard: str, operands: Iterable[str]) -> Names:
        """The arguments that the values of these operands derive from."""
        names: Names = frozenset()
        for operand in operands:
            for kind, number, wide in _REGISTER.findall(operand):
                for i in range(1 + bool(wide)):
                    names |= self._register(guard, f"{kind}{int(number) + i}")
            for offset in _CONSTANT.findall(operand):
                names |= self._argument(int(offset, 16))
        return names

    def _write(self, guard: str, register: str, names: Names) -> None:
        old = self._register("", register)
        for place in [place for place in self.pointers if place[1] == register]:
            del self.pointers[place]
        if guard:
            self.pointers[guard, register] = names
            names |= old
        if names:
            self.pointers["", register] = names

    def step(self, instruction: _Instruction) -> None:
        guard, base = instruction.guard, instruction.base
        if base == "PREEXIT":
            self.triggered |= not guard
        elif base == "ACQBULK":
            self.waited |= not guard
            self.may_have_waited = True
        registers, operands = instruction.written()
        values: list[Names] = [frozenset()] * len(registers)
        if base in _SHARED_STORES:
            self._write("", "shared", self._register("", "shared") | self.read(guard, operands))
        elif base in _CONSTANT_LOADS:
            offset = _CONSTANT.search(operands[0])
            values = [
                self._argument(int(offset[1], 16) + 4 * i) if offset else frozenset() for i in range(len(registers))
            ]
        elif base in _ADDRESS_ARITHMETIC:
            values = [self.read(guard, operands)] * len(registers)
        elif base in _SHARED_LOADS:
            values = [self._register("", "shared")] * len(registers)
        for register, names in zip(registers, values, strict=True):
            self._write(guard, register, names)
        # A predicate among the operands may have changed.
        changed = {found[1] for operand in instruction.operands if (found := _PREDICATE.fullmatch(operand))}
        for place in [place for place in self.pointers if place[0].lstrip("!") in changed]:
            del self.pointers[place]


class _Block:
    def __init__(self) -> None:
        self.instructions: list[_Instruction] = []
        self.successors: list[str] = []


def instructions(text: str) -> Iterator[_Instruction]:
    for found in LINE.finditer(text):
        yield _Instruction(found[1] or "", found[2], [operand.strip() for operand in found[3].split(",")])


def _blocks(text: str) -> dict[str, _Block]:
    """The control-flow graph of a function: blocks by label, the entry first."""
    block = _Block()
    blocks = {"entry": block}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            block.successors.append(label[1])
            blocks[label[1]] = block = _Block()
        for instruction in instructions(line):
            block.instructions.append(instruction)
            base = instruction.base
            if base in ("BRX", "BRXU", "JMX"):
                raise NotImplementedError(f"cannot follow the indirect branch {instruction}")
            if base in ("BRA", "JMP", "CALL", "EXIT", "RET"):
                if base != "RET":  # its label is not a target: the call's block continues after the call
                    block.successors += _TARGET.findall(" ".join(instruction.operands))
                conditional = instruction.guard or base == "CALL"
                # A branch may have its predicate as an operand.
                conditional = conditional or (base in ("BRA", "JMP") and not instruction.operands[0].startswith("`"))
                following = f"after {len(blocks)}"
                if conditional:
                    block.successors.append(following)
                blocks[following] = block = _Block()
    return blocks


def _loops(blocks: dict[str, _Block]) -> dict[str, str]:
    """Block -> the innermost loop around it, by the label of its head; "" outside of loops."""
    before: dict[str, set[str]] = {"entry": set()}
    waiting = ["entry"]
    while waiting:
        label = waiting.pop()
        waiting += set(blocks[label].successors) - before.keys()
        for successor in blocks[label].successors:
            before.setdefault(successor, set()).add(label)
    # The dominators of a block: the blocks on every path to it.
    dominators = {label: set(before) for label in before} | {"entry": {"entry"}}
    changed = True
    while changed:
        changed = False
        for label in before.keys() - {"entry"}:
            now = {label}.union(set.intersection(*(dominators[each] for each in before[label])))
            changed |= now != dominators[label]
            dominators[label] = now
    bodies: dict[str, set[str]] = {}
    for label in before:
        for head in set(blocks[label].successors) & dominators[label]:  # a back edge
            body = bodies.setdefault(head, {head})
            waiting = [label]
            while waiting:
                inside = waiting.pop()
                if inside not in body:
                    body.add(inside)
                    waiting += before[inside]
    smallest = sorted(bodies, key=lambda head: len(bodies[head]))
    return {label: next((head for head in smallest if label in bodies[head]), "") for label in before}


class Trace(NamedTuple):
    accesses: list[Access]
    exits_unwaited: bool  # on some path
    instructions: Counter[str]  # how many, by innermost loop; "": outside of loops
    barriers: Counter[str]  # the same
    matrix: Counter[str]  # the same: tensor-core instructions that a warp waits for
    chains: Counter[str]  # of these, in each loop, the longest sequence in which each adds to the sum of the one before
    conversions: Counter[str]  # the same: conversions of numbers, and moves of their bytes
    instructions_unwaited: int  # before the wait for the predecessor, outside of loops


def trace(text: str, arguments: dict[int, str]) -> Trace:
    """The accesses of a function to global memory, from its disassembly.

    arguments: offset in constant bank 0 -> name, for the pointer arguments.
    """
    blocks = _blocks(text)
    loops = _loops(blocks)
    reached = _reached(blocks, arguments)
    waits = iter(_flight(instructions(text))[1])
    accesses, exits_unwaited, unwaited = [], False, 0
    counts, barriers, matrix, conversions = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    sums: dict[str, list[_Instruction]] = {}
    for label, block in blocks.items():  # in the order of the listing
        for instruction, waits_before in zip(block.instructions, waits, strict=False):
            if label not in reached:
                continue
            state = reached[label]
            counts[loops[label]] += instruction.base != "NOP"
            barriers[loops[label]] += instruction.base == "BAR"
            matrix[loops[label]] += instruction.base == "HMMA"
            if instruction.base == "HMMA":
                sums.setdefault(loops[label], []).append(instruction)
            conversions[loops[label]] += instruction.base in _CONVERSIONS
            unwaited += not state.may_have_waited and not loops[label]
            if instruction.base in _GLOBAL_LOADS | _GLOBAL_STORES:
                pointers = state.read(instruction.guard, [instruction.address])
                is_load = instruction.base in _GLOBAL_LOADS
                where = (*state.flags, loops[label], waits_before)
                accesses.append(Access(str(instruction), is_load, instruction.bytes, pointers, *where))
            exits_unwaited |= instruction.base == "EXIT" and not state.waited
            state.step(instruction)
    chains = Counter({loop: _longest_chain(found) for loop, found in sums.items()})
    return Trace(accesses, exits_unwaited, counts, barriers, matrix, chains, conversions, unwaited)


def _longest_chain(found: Iterable[_Instruction]) -> int:
    """The most tensor-core instructions each of which adds to the result of the one before."""
    length: dict[str, int] = {}  # by the first register of a sum
    for instruction in found:
        result, *_, addend = (operand.split(".")[0] for operand in instruction.operands)
        length[result] = length.get(addend, 0) + 1
    return max(length.values(), default=0)


def triggers_unwaited(text: str) -> bool:
    """Whether a function, by its disassembly, lets its successor start before it has waited, on some path."""
    blocks = _blocks(text)
    for label, state in _reached(blocks, {}).items():
        for instruction in blocks[label].instructions:
            if instruction.base == "PREEXIT" and not state.waited:
                return True
            state.step(instruction)
    return False


def _reached(blocks: dict[str, _Block], arguments: dict[int, str]) -> dict[str, _State]:
    """What is known at the beginning of each block that can be reached."""
    before = {"entry": _State(arguments)}
    waiting = ["entry"]
    while waiting:
        label = waiting.pop()
        state = before[label].copy()
        for instruction in blocks[label].instructions:
            state.step(instruction)
        for successor in blocks[label].successors:
            if successor not in before:
                before[successor] = state.copy()
                waiting.append(successor)
            elif before[successor].join(state.copy()):
                waiting.append(successor)
    return before
