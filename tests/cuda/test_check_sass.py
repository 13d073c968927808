"""The gate on the machine code of the CUDA kernels (csrc/cuda/sass) finds what it is there for; it needs no nvcc."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "sass"
sys.path.insert(0, str(SCRIPTS))

import check  # noqa: E402
import listing  # noqa: E402
import model  # noqa: E402
import names  # noqa: E402
import paths  # noqa: E402

FORWARD = (
    "_ZN6kl_ext4cuda7forwardINS_4math18StandardDivergenceELNS2_5RangeE0EfffNS0_7VectorsILi4ELb1EEEEEvNT4_4PlanIXplsrT_7kInputsLi1EEEE"
    "NS2_8SettingsIT1_EE"
)
DIVIDE = "_ZN6kl_ext4cuda41_GLOBAL__N__a1b7e21e_9_finish_cu_fb527d4611divide_eachIfEEvPT_lS3_"
TABLE = """
architectures sm_90
kernel       formula     dtype            access  range  loads  stores  registers
forward      StandardDivergence  float64|float32  rows    *      2      1       40
divide_each  -           *                -       -      0      0       32  # beside it
"""

# What cuobjdump prints for an H100, with most of the arithmetic left out. Whole vectors go by 0x00c0 and 0x01a0.
SASS = f"""
\t\tFunction : {FORWARD}
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
                                                                                 /* 0x000fe20000000800 */
        /*0010*/                   ISETP.GE.U32.AND P1, PT, R0, UR4, PT ;        /* 0x0000000400007c0c */
                                                                                 /* 0x000fe2000bf26070 */
        /*0020*/                   LDC.64 R2, c[0x0][0x260] ;
        /*0030*/                   BSSY B0, 0x110 ;
        /*0040*/              @!P1 BRA 0xc0 ;
        /*0050*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0060*/               @P2 LDG.E R5, desc[UR4][R2.64+0x4] ;
        /*0070*/                   LDG.E R8, desc[UR4][R12.64] ;
        /*0080*/              @!P4 BRA 0x100 ;
        /*0090*/                   LDG.E R11, desc[UR4][R12.64+0xc] ;
        /*00a0*/                   BRA 0x100 ;
        /*00b0*/                   NOP ;
        /*00c0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00d0*/                   LEA R8, P0, R0, UR6, 0x4 ;
        /*00e0*/                   LDG.E.128 R8, desc[UR4][R8.64] ;
        /*00f0*/                   HFMA2.MMA R17, -RZ, RZ, 0, 0 ;
        /*0100*/                   BSYNC B0 ;
        /*0110*/                   FMUL R2, R8.reuse, 1.4426950216293334961 ;
        /*0120*/                   FFMA R4, R2, R4, R21 ;
        /*0130*/              @!P0 EXIT ;
        /*0140*/              @!P1 BRA 0x1a0 ;
        /*0150*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0160*/               @P0 STG.E desc[UR4][R2.64+0x4], R5 ;
        /*0170*/                   EXIT ;
        /*01a0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*01b0*/                   EXIT ;
        /*01c0*/                   BRA 0x1c0;
        /*01d0*/                   NOP;
\t\tFunction : {DIVIDE}
        /*0000*/                   LDG.E R0, desc[UR4][R4.64] ;
        /*0010*/                   MUFU.RCP R2, R7 ;
        /*0020*/              @!P0 BRA 0x50 ;
        /*0030*/                   MOV R2, 0x50 ;
        /*0040*/                   CALL.REL.NOINC 0x70 ;
        /*0050*/                   STG.E desc[UR4][R4.64], R3 ;
        /*0060*/                   EXIT ;
        /*0070*/                   RET.REL.NODEC R2 0x0 ;
"""
RESOURCES = f"""
Resource usage:
 Common:
  GLOBAL:0
 Function {FORWARD}:
  REG:29 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:680 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {DIVIDE}:
  REG:16 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:548 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

needs_cppfilt = pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")


def kernels(sass: str = SASS, resources: str = RESOURCES) -> list[listing.Kernel]:
    found = listing.parse_sass(sass.splitlines(keepends=True))
    listing.parse_resources(resources, found)
    return list(found.values())


def faults(sass: str = SASS, resources: str = RESOURCES, table: str = TABLE, architecture: str = "sm_90") -> list[str]:
    return check.faults_of({architecture: check.facts_of(kernels(sass, resources))}, *check.read_table(table))


@needs_cppfilt
def test_kernels_that_are_as_the_table_says_pass():
    assert faults() == []


def with_instruction(text: str) -> str:
    return SASS.replace("NOP ;", f"{text} ;", 1)


@needs_cppfilt
@pytest.mark.parametrize(
    ("sass", "expected"),
    [
        (with_instruction("STL [R1+0x8], R5"), "local memory: STL"),
        (with_instruction("LDL.LU R5, [R1+0x8]"), "local memory: LDL.LU"),
        (with_instruction("ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU PT, RZ, desc[UR4][R2.64], R5"), "an atomic: ATOMG.E.ADD"),
        (with_instruction("RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5"), "an atomic: RED.E.ADD"),
        (with_instruction("ATOMS.ADD R5, [R2], R5"), "an atomic: ATOMS.ADD"),
        (SASS.replace("STG.E.128", "STG.E"), "0 128-bit stores, expected 1"),
        (SASS.replace("LDG.E.128 R8", "LDG.E R8"), "1 128-bit loads, expected 2"),
        (with_instruction("LDG.E.EF.128 R8, desc[UR4][R2.64]"), "3 128-bit loads, expected 2"),
        (with_instruction("STG.E.EF.128 desc[UR4][R2.64], R8"), "2 128-bit stores, expected 1"),
    ],
)
def test_a_fault_in_the_code_is_found(sass, expected):
    assert sass != SASS
    (fault,) = faults(sass)
    assert fault.startswith("sm_90: forward StandardDivergence float32 rows narrow: ")
    assert expected in fault


@needs_cppfilt
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("REG:29", "REG:41", "41 registers, the ceiling is 40"),
        ("STACK:0", "STACK:16", "a stack of 16 bytes"),
        ("LOCAL:0", "LOCAL:24", "local memory: 24 bytes"),
        ("  REG:29", "", "cuobjdump did not say how many registers"),
    ],
)
def test_a_fault_in_the_resources_is_found(old, new, expected):
    assert faults(resources=RESOURCES.replace(old, new, 1)) == [
        f"sm_90: forward StandardDivergence float32 rows narrow: {expected}"
    ]


@needs_cppfilt
@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (
            TABLE.replace("divide_each", "divide_none"),
            ["no kernel for the row divide_none - * - -", "divide_each float32: no row"],
        ),
        (TABLE.replace("float64|float32", "float64"), ["no kernel for the row forward", "float32 rows narrow: no row"]),
        (f"{TABLE}\nforward * * strided * 0 0 64", ["no kernel for the row forward * * strided *"]),
        (f"{TABLE}\nforward * * * narrow 2 1 64", ["no kernel for the row forward * * * narrow"]),
        (TABLE.replace("StandardDivergence", "of4"), ["no kernel for the row forward of4", "float32 rows narrow: no row"]),
        (TABLE.replace("sm_90", "sm_90 sm_120"), ["sm_120: no machine code in the library"]),
    ],
)
def test_table_and_library_must_cover_each_other(table, expected):
    found = faults(table=table)
    assert len(found) == len(expected)
    for fault, part in zip(found, expected):
        assert part in fault


@needs_cppfilt
def test_a_row_may_be_for_every_formula_of_so_many_inputs():
    assert faults(table=TABLE.replace("StandardDivergence", "of2")) == []


@needs_cppfilt
def test_a_kernel_of_an_unknown_kind_has_no_row():
    assert faults(SASS.replace("divide_each", "divide_some"), RESOURCES.replace("divide_each", "divide_some"))[-1] == (
        "sm_90: divide_some float32: no row of the table"
    )


def test_a_line_that_is_not_understood_is_not_passed_over():
    with pytest.raises(ValueError, match=r"not understood: /\*00b0\*/ *<STL>"):
        kernels(with_instruction("<STL>"))


NAMES = {
    "forward<math::NormalDivergence, (math::Range)1, float, math::Half, float, Vectors<8, false> >": (
        "forward NormalDivergence float16->float32 vectors wide"
    ),
    "sum_rows<Backward<math::Weighted<math::Divergence> >, (math::Range)0, double, void, void, StridedTerms<double, true> >": (
        "backward_rows WeightedDivergence float64 strided narrow"
    ),
    "sum_columns<Forward<math::StandardDivergence>, (math::Range)0, float, math::BFloat16, math::BFloat16, VectorTerms<8>>": (
        "forward_columns StandardDivergence bfloat16 vectors narrow"
    ),
    "sum_rows<Forward<math::StandardDivergence>, (math::Range)0, float, float, float, RowTerms<4>, (bool)0>": (
        "forward_rows StandardDivergence float32 rows narrow"
    ),
    "sum_rows<Forward<math::StandardDivergence>, (math::Range)0, float, float, float, RowTerms<4>, true>": (
        "forward_shared_rows StandardDivergence float32 rows narrow"
    ),
    "sum_columns<GivenQ<Backward<math::Divergence> >, (math::Range)0, float, float, float, VectorTerms<4> >": (
        "backward_columns DivergenceGivenQ float32 vectors narrow"
    ),
    "(anonymous namespace)::sum_partials<double, 64>": "sum_partials float64 lanes",
    "(anonymous namespace)::divide_each<float>": "divide_each float32",
    "new_kernel": "new_kernel",
    "forward<math::NewFormula, int>": "forward<NewFormula,int>",
}


@pytest.mark.parametrize(("short", "expected"), NAMES.items())
def test_names_say_what_a_kernel_is(short, expected):
    spelt = re.sub(r"\b(?=(math::|Backward|Forward|Vector|Strided|Row)[\w:<])", "kl_ext::cuda::", short)
    spelt = spelt.replace("kl_ext::cuda::math::", "kl_ext::math::").replace("math::kl_ext::cuda::", "math::")
    assert str(names.name_of(f"void kl_ext::cuda::{spelt}")) == expected


def test_the_main_path_is_that_of_whole_vectors():
    path = paths.main_path(kernels()[0].instructions, in_loop=False)
    addresses = [instruction.address for instruction in path]
    assert addresses == [*range(0, 0x50, 0x10), *range(0xC0, 0x150, 0x10), 0x1A0, 0x1B0]
    assert paths.loads_before_use(path) == 2


def test_a_load_that_has_sunk_below_the_arithmetic_is_reported():
    sunk = SASS.replace("HFMA2.MMA R17, -RZ, RZ, 0, 0", "FMUL R17, R4.reuse, 0.5").replace("LEA R8, P0, R0", "LEA R8, P0, R6")
    assert paths.loads_before_use(paths.main_path(kernels(sunk)[0].instructions, in_loop=False)) == 1


def test_a_turn_of_a_loop_is_the_one_with_the_loads():
    sass = f"""
\t\tFunction : {FORWARD}
        /*0000*/                   MOV R1, RZ ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P1 BRA 0x40 ;
        /*0030*/                   FADD R8, R8, R4 ;
        /*0040*/               @P0 BRA 0x10 ;
        /*0050*/                   FADD R8, R8, R9 ;
        /*0060*/               @P2 BRA 0x50 ;
        /*0070*/                   EXIT ;
"""
    path = paths.main_path(listing.parse_sass(sass.splitlines())[FORWARD].instructions, in_loop=True)
    assert [instruction.address for instruction in path] == [0x10, 0x20, 0x30, 0x40]


@needs_cppfilt
def test_the_model_counts_instructions_and_bytes_per_element():
    cost = check.facts_of(kernels())[-1].cost
    assert (cost.instructions, cost.float64, cost.bytes) == (16 / 4, 0, 12)
    slots = 32 * 4 * 132 * 1.755e9  # of a thread, per second
    assert cost.issue_share == pytest.approx(4 * 3.35e12 / 12 / slots)
    assert "| forward | StandardDivergence | 4 / 12 / 4% |" in model.markdown([cost])


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(listing.os, "access", lambda *_: False)
    with pytest.raises(listing.MissingToolError, match="install a CUDA build of torch, which brings triton"):
        listing.find_tools()


def test_a_library_without_kernels_for_gpus_is_refused(tmp_path):
    try:
        listing.find_tools()
    except listing.MissingToolError as error:
        pytest.skip(str(error))
    compiler = shutil.which("g++") or pytest.skip("no C++ compiler")
    library = tmp_path / "empty.so"
    subprocess.run([compiler, "-shared", "-x", "c++", "/dev/null", "-o", str(library)], check=True)
    completed = subprocess.run([sys.executable, str(SCRIPTS / "check.py"), "--library", str(library)], capture_output=True)
    assert completed.returncode == 1
    assert b"holds no kernels for GPUs: build it against a CUDA build of torch" in completed.stderr
