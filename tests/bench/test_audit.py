"""The audit of machine code finds every planted fault, and nothing else.

The audit compiles, so it runs in other processes: this one may use Triton's interpreter.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from bench import ROOT
from bench.machine_code import sass

TARGETS = ("sm_86", "sm_90", "sm_100")
AUDIT = ("-m", "bench.audit")

NO_WAIT = {
    "a path through it ends without waiting for its predecessor",
    "stores before the wait",
    "loads of a predecessor's work before the wait",
}
EXPECTED = {
    "none": set(),
    "narrow weight": {"narrow loads in a stream"},
    "untraceable load": {"accesses of unknown origin"},
    "spills": {"spills"},
    "no tensor core": {"has no tensor-core instruction, but should"},
    "too much shared memory": {"takes too much shared memory"},
    "may contract": {"is launched with enable_fp_fusion"},
    "fuses in 16 bits": {"fused 16-bit operations"},
    "slow": {"slower than memory"},
    "idle": {"leaves multiprocessors idle"},
    "late trigger": {"accesses before the successor may start"},
    "no trigger": {"accesses before the successor may start"},
    "early trigger": {"lets its successor start before it has waited for its predecessor"},
    "early activation": {"loads of a predecessor's work before the wait"},
    "early store": {"stores before the wait"},
    "no wait": NO_WAIT,
    "wait on one path": NO_WAIT,
    "exit before the wait": {"a path through it ends without waiting for its predecessor"},
    "late weight": {"loads after the wait that belong before it"},
    "serial": {"waits for memory in sequence"},
    "attention": set(),
    "early query": {"loads of a predecessor's work before the wait"},
    "early newest key": {"loads of a predecessor's work before the wait"},
    "late older keys": {"older than the step, but not loaded before the wait"},
    "matrix": set(),
    "early x": {"loads of a predecessor's work before the wait"},
    "no early chunk": {"nothing of it is loaded before the wait"},
    "another instruction": {"has other tensor-core instructions than HMMA"},
    "converts one by one": {"converts one by one"},
    "other steps": {"adds columns to a sum in other steps than 16"},
    "trigger before the last keys": {"loads after the successor may start"},
    "trigger on one path": {"accesses before the successor may start"},
    "launched without": {"is launched without programmatic dependent launch, which this target supports"},
}


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = (sys.executable, *command)
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    """What the audit finds for each fault on each target."""
    done = run("-m", "tests.support.faulty_kernels", *TARGETS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def kinds(sentences: list[str]) -> set[str]:
    """The findings without their details."""
    return {re.sub(r"\d+ bytes of (.*);.*", r"too much \1", sentence).split(":")[0] for sentence in sentences}


def test_a_fault_is_found_on_every_target(found):
    """Also that it is the only finding, and that a sound kernel has none."""
    for name, sentences in found.items():
        fault = name.rpartition(" on ")[0]
        reported = kinds(sentences)
        if fault == "spills":  # an address that is reloaded has lost its origin, and reloading takes time
            reported -= {"accesses of unknown origin", "slower than memory", "waits for memory in sequence"}
        assert reported == EXPECTED[fault], (name, sentences)


def test_every_planted_fault_has_an_expectation(found):
    assert {name.rpartition(" on ")[0] for name in found} == EXPECTED.keys()
    assert {name.rpartition(" on ")[2] for name in found} == {*TARGETS}


def test_a_sound_kernel_passes():
    """Also if the environment asks for Triton's interpreter."""
    targets = ("sm_80", "sm_90", "gfx942")
    done = run(
        *AUDIT,
        "--kernel",
        "swiglu",
        *[word for target in targets for word in ("--target", target)],
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows, verdict = done.stdout.splitlines()
    assert header.split()[:3] == ["target", "op", "kernel"]
    assert [row.split()[:3] for row in rows] == [[target, "swiglu", "_swiglu"] for target in targets for _ in range(6)]
    # 10 programs for each of 1, 16, 4, 32, 64 and 512 tokens, of which 16 fit each of an H100's 132 multiprocessors.
    waves = header.split().index("waves")
    found = [row.split()[waves] for row in rows if row.startswith("sm_90")]
    assert found == ["0.00", "0.08", "0.02", "0.15", "0.30", "2.42"]
    assert verdict == "18 launches audited, 0 violations"


def test_the_failure_of_a_tool_is_a_violation(tmp_path):
    tool = tmp_path / "cuobjdump"
    # Triton asks for the version, and falls back on its own tool if there is none.
    tool.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "release 13.0, V13.0.0"\n')
    tool.chmod(0o755)
    done = run(*AUDIT, "--kernel", "swiglu", "--target", "sm_80", TRITON_CUOBJDUMP_PATH=str(tool))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL  sm_80 swiglu (batch 1)" in done.stdout
    assert "6 violations" in done.stdout


# The tests below read disassembled code and compile nothing.
def trace(*lines: str) -> sass.Trace:
    text = "\n".join(line if line.endswith(":") else f"        /*0000*/        {line} ;" for line in lines)
    return sass.trace(text, {0x160: "x_ptr", 0x168: "w_ptr"})


def origins(traced: sass.Trace) -> list[set[str]]:
    return [set(access.pointers) for access in traced.accesses]


def test_a_register_loses_its_origin_when_overwritten():
    traced = trace(
        "LDC.64 R2, c[0x0][0x160]", "LDG.E R4, [R2.64]", "LDC.64 R2, c[0x0][0x168]", "LDG.E R5, [R2.64]", "EXIT"
    )
    assert origins(traced) == [{"x_ptr"}, {"w_ptr"}]


def test_one_wide_load_of_the_constant_bank_brings_two_pointers():
    traced = trace("LDCU.128 UR4, c[0x0][0x160]", "LDG.E R0, [UR4.64]", "LDG.E R1, [R8.64+UR6]", "EXIT")
    assert origins(traced) == [{"x_ptr"}, {"w_ptr"}]


def test_a_guarded_write_replaces_the_origin_under_its_guard_only():
    traced = trace(
        "LDC.64 R2, c[0x0][0x160]",
        "@P1 LDC.64 R2, c[0x0][0x168]",
        "@P1 LDG.E R4, [R2.64]",
        "@!P1 LDG.E R4, [R2.64]",
        "ISETP.GE.AND P1, PT, R9, 0x8, PT",
        "@P1 LDG.E R4, [R2.64]",
        "EXIT",
    )
    assert origins(traced) == [{"w_ptr"}, {"x_ptr", "w_ptr"}, {"x_ptr", "w_ptr"}]


def test_paths_that_join_have_both_origins_and_a_wait_counts_only_on_all_of_them():
    accesses, exits_unwaited, *_ = trace(
        "LDC.64 R2, c[0x0][0x160]",
        "@P0 BRA `(.L_x_1)",
        "LDC.64 R2, c[0x0][0x168]",
        "ACQBULK",
        ".L_x_1:",
        "LDG.E.128 R4, [R2.64]",
        "EXIT",
    )
    (access,) = accesses
    assert access.pointers == {"x_ptr", "w_ptr"}
    assert (access.waited, access.may_have_waited, access.bytes) == (False, True, 16)
    assert exits_unwaited


@pytest.mark.parametrize(
    ("lines", "unwaited"),
    [
        (["ACQBULK", "PREEXIT", "EXIT"], False),
        (["PREEXIT", "ACQBULK", "EXIT"], True),
        (["@P0 ACQBULK", "PREEXIT", "EXIT"], True),
        (["@P0 BRA `(.L_x_1)", "ACQBULK", ".L_x_1:", "PREEXIT", "EXIT"], True),
        (["ACQBULK", "EXIT"], False),
    ],
)
def test_a_trigger_follows_the_wait_on_every_path(lines, unwaited):
    text = "\n".join(line if line.endswith(":") else f"        /*0000*/        {line} ;" for line in lines)
    assert sass.triggers_unwaited(text) == unwaited


def test_a_loop_passes_origins_to_its_next_iteration():
    traced = trace(
        "LDC.64 R2, c[0x0][0x160]",
        ".L_x_0:",
        "LDG.E R4, [R2.64]",
        "IMAD.WIDE R2, R7, 0x2, R2",
        "@P0 IADD3 R2, P1, R2, c[0x0][0x168], RZ",
        "@P2 BRA `(.L_x_0)",
        "EXIT",
    )
    assert origins(traced) == [{"x_ptr", "w_ptr"}]


def test_addresses_are_traced_through_shared_memory():
    traced = trace(
        "LDC.64 R2, c[0x0][0x168]", "STS.64 [R9], R2", "LDS.128 R4, [R10]", "STG.E [R6.64], R0", "@P0 ACQBULK", "EXIT"
    )
    assert origins(traced) == [{"w_ptr"}]
    assert traced.exits_unwaited, "a guarded wait is not a wait on every path"


def test_a_loaded_value_has_no_origin():
    traced = trace("LDC.64 R2, c[0x0][0x160]", "LDG.E.64 R2, [R2.64]", "LDG.E R4, [R2.64]", "EXIT")
    assert origins(traced) == [{"x_ptr"}, set()]


@pytest.mark.parametrize(
    ("text", "fuses"),
    [
        ("HFMA2.BF16_V2 R16, R7, R17.reuse, R20", True),
        ("@P0 HFMA2.MMA R16, R7.H0_H0, -R17.H1_H1, R16", True),
        ("HFMA2 R16, R7, 0.5, 0.5, R16", True),
        ("HFMA2.BF16_V2 R16, R7, c[0x0][0x160].H0_H0, R16", True),
        ("HFMA2.BF16_V2 R22, R6, R18, -RZ.H0_H0", False),  # a product
        ("HFMA2.MMA.BF16_V2 R20, R11, R19, -RZ", False),
        ("HFMA2.BF16_V2 R22, R22, 1, 1, R23", False),  # a sum
        ("HFMA2.BF16_V2 R0, R0.H0_H0, -1, -1, R0.H1_H1", False),
        ("HFMA2.MMA R88, -RZ, RZ, 0, 1.1920928955078125e-07", False),  # a constant
        ("HMUL2.BF16_V2 R15, R7, R23", False),
        ("FFMA R15, R7, R23, R15", False),
    ],
)
def test_a_fused_operation_is_told_from_a_product_a_sum_and_a_constant(text, fuses):
    (instruction,) = sass.instructions(f"/*0000*/ {text} ;")
    assert sass.fuses_16_bits(instruction) == fuses


@pytest.mark.parametrize(
    ("lines", "flight"),  # bytes in flight, loads ahead of the first wait, waits
    [
        (["LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]", "FADD R0, R4, R8"], (32, 2, 1)),
        (["LDG.E.128 R4, [R2.64]", "FADD R0, R6, R1", "LDG.E.64 R8, [R2.64]", "FADD R0, R8, R9"], (16, 1, 2)),
        (["LDG.E R4, [R2.64]", "LDG.E.64 R6, [R4.64]", "STG.E.64 [R2.64], R6"], (8, 1, 2)),  # a loaded address
        (["LDG.E R4, [R2.64]", "LDG.E R6, [R2.64]", "FADD R0, R6, R1", "FADD R0, R4, R1"], (8, 2, 1)),
        (["ATOMG.E.ADD.STRONG.GPU PT, R4, [R2.64], R9", "LDG.E R6, [R2.64]", "FADD R0, R4, R1"], (8, 1, 1)),
        (["LDGSTS.E.BYPASS.128 [R9], [R2.64]", "LDGDEPBAR", "LDGSTS.E.128 [R9+0x800], [R2.64]", "LDGDEPBAR",
          "DEPBAR.LE SB0, 0x1", "LDGSTS.E [R9+0x900], [R2.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0"], (32, 2, 2)),
        (["LDGSTS.E [R9], [R2.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0", "LDGSTS.E.64 [R9], [R2.64]"], (8, 1, 1)),
        (["LDGSTS.E [R9], [R2.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0, {1}"], (4, 1, 1)),
        (["FADD R0, R8, R9", "STG.E.128 [R2.64], R8"], (0, 0, 0)),
    ],
)  # fmt: skip
def test_bytes_in_flight_and_waits(lines, flight):
    listing = "\n".join(f"/*0000*/ {line} ;" for line in lines)
    assert sass.flight(sass.instructions(listing)) == flight


def test_execution_continues_after_a_call_and_its_return_makes_no_loop():
    traced = trace(
        "kernel:",
        "LDC.64 R2, c[0x0][0x160]",
        "@P0 CALL.REL.NOINC `(.L_x_0)",
        "LDG.E R4, [R2.64]",
        "EXIT",
        ".L_x_0:",
        "FADD R0, R4, R1",
        "RET.REL.NODEC R8 `(kernel)",
    )
    assert origins(traced) == [{"x_ptr"}]
    assert traced.instructions == {"": 6}


def test_the_shortest_path_ends_at_the_first_exit():
    lines = ["LDG.E R4, [R2.64]", "ISETP.LT.AND P0, PT, R4, RZ, PT", "@P0 EXIT", "LDG.E R5, [R2.64]", "FADD R0, R5, R1"]
    listing = list(sass.instructions("\n".join(f"/*0000*/ {line} ;" for line in lines)))
    assert sass.flight(sass.until_first_exit(listing)).round_trips == 1
    assert sass.flight(listing).round_trips == 2


def test_an_audit_of_nothing_fails():
    """An op without a case, in an audit of that op and in one of all ops."""
    program = """
from bench import audit, cases
audit.cases = lambda: (case for case in cases.cases() if case.op == "advance")
if __name__ == "__main__":
    print(audit.main(["--target", "sm_90", "--kernel", "embed"]), "---", audit.main(["--target", "sm_90"]))
"""
    done = run("-c", program)
    assert done.returncode == 0 and done.stdout.endswith("1 --- 1\n"), done.stderr
    of_embed, of_all = done.stdout.split(" launches audited")[1:]
    for text in (of_embed, of_all):
        assert "FAIL  embed: nothing of it was audited: it has no case in bench/cases.py" in text
        assert "FAIL  advance" not in text
    assert "FAIL  linear: nothing" not in of_embed and "FAIL  linear: nothing" in of_all


def test_an_unknown_kernel_is_refused_with_the_nearest():
    done = run(*AUDIT, "--kernel", "swigul")
    assert done.returncode == 2 and "there is no op 'swigul': did you mean 'swiglu'?" in done.stderr


def test_instructions_and_loads_are_counted_by_innermost_loop():
    traced = trace(
        "LDC.64 R2, c[0x0][0x160]",
        "@P3 BRA `(.L_x_2)",
        ".L_x_0:",
        "LDG.E R4, [R2.64]",
        ".L_x_1:",
        "LDG.E R5, [R2.64]",
        "@P4 BRA `(.L_x_3)",
        ".L_x_4:",
        "@P1 BRA `(.L_x_1)",
        "@P2 BRA `(.L_x_0)",
        ".L_x_2:",
        "EXIT",
        ".L_x_3:",  # a slow path that the compiler moved after the end; it returns into the inner loop
        "FADD R0, R4, R5",
        "BRA `(.L_x_4)",
        ".L_x_5:",
        "BRA `(.L_x_5)",
    )
    assert traced.instructions == {"": 3, ".L_x_0": 2, ".L_x_1": 5}
    assert [access.loop for access in traced.accesses] == [".L_x_0", ".L_x_1"]


def test_barriers_waits_and_what_is_before_the_wait_are_counted():
    traced = trace(
        "LDC.64 R2, c[0x0][0x160]",
        "LDG.E R4, [R2.64]",
        "FADD R0, R4, R5",
        "ACQBULK",
        "LDG.E R6, [R2.64]",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        ".L_x_0:",
        "I2FP.F32.S32 R6, R6",
        "HMMA.16816.F32 R8, R6, R10, R8",
        "PRMT R6, R6, 0x5410, R7",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "@P0 BRA `(.L_x_0)",
        "F2FP.BF16.F32.PACK_AB R8, R8, R9",
        "STG.E [R2.64], R8",
        "EXIT",
    )
    assert traced.instructions_unwaited == 4  # the wait itself is one
    assert traced.barriers == {"": 1, ".L_x_0": 1}
    assert traced.matrix == {"": 0, ".L_x_0": 1}
    assert traced.conversions == {"": 1, ".L_x_0": 2}
    assert [access.waits for access in traced.accesses] == [0, 1, 2]
