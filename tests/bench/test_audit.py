"""The audit of machine code finds every fault that is planted for it, and only that one.

The audit compiles, so it runs in processes of its own: this one may have chosen Triton's interpreter.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
TARGETS = ("sm_86", "sm_90", "sm_100")
WITH_DEPENDENT_LAUNCH = ("sm_90", "sm_100")

NO_WAIT = {
    "a way through it ends without waiting for its predecessor",
    "stores before the wait",
    "loads of a predecessor's work before the wait",
}
ON_EVERY_TARGET = {
    "none": set(),
    "narrow weight": {"narrow loads in a stream"},
    "untraceable load": {"accesses without an argument behind them"},
    "spills": {"spills"},
    "no tensor core": {"has no tensor-core instruction, though it is meant to"},
    "too much shared memory": {"takes too much shared memory"},
    "may contract": {"is launched so that the compiler may contract a product and a sum, which are rounded once then"},
    "fuses in 16 bits": {"fused 16-bit operations"},
    "slow": {"slower than memory"},
    "idle": {"leaves multiprocessors idle"},
}
OF_DEPENDENT_LAUNCH = {
    "late trigger": {"accesses before the successor may start"},
    "no trigger": {"accesses before the successor may start"},
    "early activation": {"loads of a predecessor's work before the wait"},
    "early store": {"stores before the wait"},
    "no wait": NO_WAIT,
    "wait on one way": NO_WAIT,
    "way out before the wait": {"a way through it ends without waiting for its predecessor"},
    "late weight": {"loads after the wait that belong before it"},
    "serial": {"waits for memory one behind another"},
    "launched without": {"is launched without programmatic dependent launch, which this target has"},
}


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment | variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    """What the audit says of each fault on each target."""
    done = run(Path(__file__).with_name("faulty_kernels.py"), BENCH, *TARGETS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def kinds(sentences: list[str]) -> set[str]:
    """Sentences without their particulars."""
    return {re.sub(r"\d+ bytes of (.*);.*", r"too much \1", sentence).split(":")[0] for sentence in sentences}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fault", ON_EVERY_TARGET)
def test_a_fault_is_found_on_every_target(said, fault, target):
    found = kinds(said[f"{fault} on {target}"])
    if (
        fault == "spills"
    ):  # what is reloaded after a spill has lost its origin; and a thread that spills works and waits
        found -= {
            "accesses without an argument behind them",
            "slower than memory",
            "waits for memory one behind another",
        }
    assert found == ON_EVERY_TARGET[fault], said[f"{fault} on {target}"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fault", OF_DEPENDENT_LAUNCH)
def test_a_fault_of_dependent_launch_is_found_where_there_is_such_a_thing(said, fault, target):
    expected = OF_DEPENDENT_LAUNCH[fault] if target in WITH_DEPENDENT_LAUNCH else set()
    assert kinds(said[f"{fault} on {target}"]) == expected, said[f"{fault} on {target}"]


def test_every_planted_fault_is_expected_by_a_test(said):
    assert {name.rpartition(" on ")[0] for name in said} == {*ON_EVERY_TARGET, *OF_DEPENDENT_LAUNCH}


def test_the_command_is_content_with_a_sound_kernel():
    done = run(BENCH / "audit.py", "--kernel", "swiglu", "--target", "sm_80", "--target", "sm_90", "--target", "gfx942")
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows, verdict = done.stdout.splitlines()
    assert header.split()[:3] == ["target", "op", "kernel"]
    assert [row.split()[:3] for row in rows] == [
        [target, "swiglu", "_swiglu"] for target in ("sm_80", "sm_90", "gfx942") for _ in range(4)
    ]
    # 10 programs for each of 1, 16, 4 and 512 tokens, of which 16 fit each of an H100's 132 multiprocessors.
    waves = header.split().index("waves")
    assert [row.split()[waves] for row in rows if row.startswith("sm_90")] == ["0.00", "0.08", "0.02", "2.42"]
    assert verdict == "12 launches audited, 0 violations"


def test_the_command_compiles_even_where_the_interpreter_is_asked_for():
    done = run(BENCH / "audit.py", "--kernel", "swiglu", "--target", "sm_80", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_fails_where_a_tool_fails(tmp_path):
    tool = tmp_path / "cuobjdump"
    # Triton asks for the version, and falls back on its own tool where there is none.
    tool.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "release 13.0, V13.0.0"\n')
    tool.chmod(0o755)
    done = run(BENCH / "audit.py", "--kernel", "swiglu", "--target", "sm_80", TRITON_CUOBJDUMP_PATH=str(tool))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL  sm_80 swiglu (1 row)" in done.stdout
    assert "4 violations" in done.stdout


# What follows needs no compiler: machine code in the disassembler's words.
@pytest.fixture(scope="module")
def sass():
    spec = importlib.util.spec_from_file_location("sass", BENCH / "machine_code" / "sass.py")
    sass = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sass)
    return sass


@pytest.fixture
def trace(sass):
    def trace(*lines: str):
        text = "\n".join(line if line.endswith(":") else f"        /*0000*/        {line} ;" for line in lines)
        return sass.trace(text, {0x160: "x_ptr", 0x168: "w_ptr"})

    return trace


def origins(traced) -> list[set[str]]:
    return [set(access.pointers) for access in traced.accesses]


def test_a_register_forgets_what_it_held(trace):
    traced = trace(
        "LDC.64 R2, c[0x0][0x160]", "LDG.E R4, [R2.64]", "LDC.64 R2, c[0x0][0x168]", "LDG.E R5, [R2.64]", "EXIT"
    )
    assert origins(traced) == [{"x_ptr"}, {"w_ptr"}]


def test_one_wide_load_of_the_constant_bank_brings_two_pointers(trace):
    traced = trace("LDCU.128 UR4, c[0x0][0x160]", "LDG.E R0, [UR4.64]", "LDG.E R1, [R8.64+UR6]", "EXIT")
    assert origins(traced) == [{"x_ptr"}, {"w_ptr"}]


def test_a_guarded_write_counts_alone_under_its_guard_only(trace):
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


def test_ways_that_meet_bring_both_origins_and_a_wait_counts_only_on_all(trace):
    accesses, exits_unwaited, _ = trace(
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


def test_a_loop_brings_back_what_its_end_computed(trace):
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


def test_an_address_may_travel_through_shared_memory(trace):
    traced = trace(
        "LDC.64 R2, c[0x0][0x168]", "STS.64 [R9], R2", "LDS.128 R4, [R10]", "STG.E [R6.64], R0", "@P0 ACQBULK", "EXIT"
    )
    assert origins(traced) == [{"w_ptr"}]
    assert traced.exits_unwaited, "a guarded wait is not a wait on every way"


def test_what_is_loaded_is_a_number(trace):
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
def test_a_fused_operation_is_known_from_a_product_a_sum_and_a_constant(sass, text, fuses):
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
        (["FADD R0, R8, R9", "STG.E.128 [R2.64], R8"], (0, 0, 0)),
    ],
)  # fmt: skip
def test_what_is_asked_for_and_not_yet_used_is_in_flight(sass, lines, flight):
    listing = "\n".join(f"/*0000*/ {line} ;" for line in lines)
    assert sass.flight(sass.instructions(listing)) == flight


def test_a_call_goes_on_behind_itself_and_its_return_makes_no_loop(trace):
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


def test_the_first_exit_ends_the_shortest_way(sass):
    lines = ["LDG.E R4, [R2.64]", "ISETP.LT.AND P0, PT, R4, RZ, PT", "@P0 EXIT", "LDG.E R5, [R2.64]", "FADD R0, R5, R1"]
    listing = list(sass.instructions("\n".join(f"/*0000*/ {line} ;" for line in lines)))
    assert sass.flight(sass.way_out(listing)).round_trips == 1
    assert sass.flight(listing).round_trips == 2


def test_an_audit_of_nothing_fails():
    """An op that has no case, in the audit of it alone and of all."""
    for chosen in (["--kernel", "embed"], []):
        arguments = ["--target", "sm_90", *chosen]
        program = (
            f"import sys; sys.path.insert(0, {str(BENCH)!r})\n"
            "import audit, cases\n"
            "audit.cases = lambda: (case for case in cases.cases() if case.op == 'advance')\n"
            f"sys.exit(audit.main({arguments}))"
        )
        done = run("-c", program)
        assert done.returncode == 1, done.stderr
        assert "FAIL  embed: nothing of it was audited; it has no case in bench/cases.py" in done.stdout
        assert ("FAIL  linear: nothing" in done.stdout) == (not chosen)
        assert "FAIL  advance" not in done.stdout


def test_an_unknown_kernel_is_refused_with_the_nearest():
    done = run(BENCH / "audit.py", "--kernel", "swigul")
    assert done.returncode == 2 and "there is no op 'swigul': did you mean 'swiglu'?" in done.stderr


def test_instructions_and_loads_are_counted_in_the_innermost_loop_around_them(trace):
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
        ".L_x_3:",  # a slow way that the compiler moved behind the end, back into the inner loop
        "FADD R0, R4, R5",
        "BRA `(.L_x_4)",
        ".L_x_5:",
        "BRA `(.L_x_5)",
    )
    assert traced.instructions == {"": 3, ".L_x_0": 2, ".L_x_1": 5}
    assert [access.loop for access in traced.accesses] == [".L_x_0", ".L_x_1"]
