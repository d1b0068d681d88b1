"""The gate that compiles launch rows: broken kernels fail it, and its account is right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cubins import account, families, sass, spills
from cubins.account import CHIPS, Tile

from sparseattn.testing import sources

ROOT = Path(__file__).resolve().parents[2]

KERNELS = '''
import torch
import triton
import triton.language as tl

@triton.jit
def product_kernel(x_ptr, y_ptr, M: tl.constexpr, K: tl.constexpr):
    """One program: everything."""
    rows = tl.arange(0, M)[:, None]
    columns = tl.arange(0, K)[None, :]
    x = tl.load(x_ptr + rows * K + columns)
    y = tl.dot(x, tl.trans(x))
    tl.store(y_ptr + rows * M + tl.arange(0, M)[None, :], y)

@triton.jit
def sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    """One program: everything."""
    at = tl.arange(0, N)
    total = tl.load(x_ptr + at)
    for i in range(4):
        total += tl.load(x_ptr + at + i * N) * tl.load(x_ptr + i)
    tl.store(y_ptr + at, total / tl.sum(total))

def call(kernel, *options):
    x = torch.empty((512, 512), dtype=torch.bfloat16, device="cuda")
    for each in options:
        kernel[(1,)](x, x.float(), **each)
'''
TUNING = """
from typing import NamedTuple

class Row(NamedTuple):
    tile: int
    num_warps: int
    num_stages: int

TABLE = ({row},)
"""
CASES = """
from functools import partial
from sparseattn.kernels.cases import Case
from . import kernel, tuning

def cases(capability):
    row = tuning.TABLE[0]
    launch = partial(kernel.call, kernel.product_kernel, {product})
    yield Case("product_kernel", row, "bf16", launch)
    {sum_case}
"""
SUM_CASE = (
    'yield Case("sum_kernel", None, "fp32", partial(kernel.call, kernel.sum_kernel, {options}))'
)
GOOD = {
    "row": "Row(64, 4, 3)",
    "product": "{'M': 64, 'K': 64, 'num_warps': 4, 'num_stages': 3}",
    "sum": "{'N': 256, 'num_warps': 1}",
}
BROKEN = {  # what is changed, and what the gate must say
    "shared": (
        {"product": "{'M': 512, 'K': 256, 'num_warps': 4, 'num_stages': 3}"},
        "bytes of shared memory, 232448 at most",
    ),
    "spill": ({"sum": "{'N': 16384, 'num_warps': 1}"}, "spills, 0 at most"),
    "spill of a second launch": (
        {"sum": "{'N': 256, 'num_warps': 1}, {'N': 16384, 'num_warps': 1}"},
        "sum_kernel fp32: 255 registers",
    ),
    "no HGMMA": (
        {
            "row": "Row(64, 2, 3)",
            "product": "{'M': 64, 'K': 64, 'num_warps': 2, 'num_stages': 3}",
        },
        "no HGMMA for 1 products of 64 rows in bf16",
    ),
    "another row": ({"row": "Row(64, 8, 3)"}, "launched with num_warps=4, row has 8"),
    "another tile": ({"row": "Row(128, 4, 3)"}, "no compile-time value is the row's tile=128"),
    "compiler's error": ({"product": "{'M': 48, 'K': 64}"}, "arange's range must be a power of 2"),
    "kernel without a case": ({"sum": None}, "no case reaches kernel_without_a_case.sum_kernel"),
    "row without a case": (
        {"row": "Row(64, 4, 3), Row(64, 4, 2)"},
        "no case reaches a row of row_without_a_case.TABLE: Row(tile=64, num_warps=4, num_stages=2",
    ),
}


def write_family(package: Path, name: str, changes: dict) -> None:
    parts = GOOD | changes
    family = package / name.replace("'", "").replace(" ", "_")
    family.mkdir()
    family.joinpath("__init__.py").touch()
    family.joinpath("kernel.py").write_text(KERNELS)
    family.joinpath("tuning.py").write_text(TUNING.format(row=parts["row"]))
    sum_case = SUM_CASE.format(options=parts["sum"]) if parts["sum"] else ""
    cases = CASES.format(product=parts["product"], sum_case=sum_case)
    family.joinpath("cases.py").write_text(cases)


def gate(folder: Path, families: dict[str, dict]) -> subprocess.CompletedProcess:
    """Run the gate for sm_90 on a package of families with two kernels each."""
    package = folder / "trial"
    package.mkdir()
    package.joinpath("__init__.py").touch()
    for name, changes in families.items():
        write_family(package, name, changes)
    # a process of its own: under Triton's interpreter, as in this one, nothing compiles
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (folder, ROOT / "benchmarks", ROOT)))
    command = [sys.executable, "-m", "cubins", "--package", "trial", "--capability", "90"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_sound_kernels_pass(tmp_path: Path) -> None:
    done = gate(tmp_path, {"sound": {}})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 launches fit, 0 do not; 0 missing" in done.stdout
    assert "HGMMA" in done.stdout


def test_broken_kernels_fail(tmp_path: Path) -> None:
    done = gate(tmp_path, {name: changes for name, (changes, _) in BROKEN.items()})
    assert done.returncode == 1, done.stdout + done.stderr
    for name, (_, said) in BROKEN.items():
        assert said in done.stdout, f"{name}: {done.stdout}"
    # of each family one launch is broken, and one is not; two families only lack a case
    assert "10 launches fit, 7 do not; 2 missing" in done.stdout


def test_a_spill_counts_where_it_repeats() -> None:
    once = ["STL [R1+0x4], R4"] * 8
    outer = ["LDL R4, [R1+0x4]", "FADD R3, R3, R4", "@!P0 BRA 0x90", "@P1 BRA 0x80"]
    program = lines(*once, *outer, "LDL R4, [R1+0x4]", "@P1 BRA 0xc0", "EXIT")
    assert [loop.head for loop in sass.loops(program)] == [8, 9, 12]
    assert sass.spills_in_loops(program) == 1
    assert sass.spills_in_loops(lines(*once, "LDL R4, [R1+0x4]", "EXIT")) == 0
    inner = lines("LDL R4, [R1+0x4]", "STL [R1+0x4], R4", "@!P0 BRA 0x0", "EXIT")
    assert sass.spills_in_loops(inner) == 2


def test_inputs_that_may_spill_exist() -> None:
    jobs = families.jobs("sparseattn.kernels", families.CAPABILITIES, "cases")
    cases = [(job.capability, families.cases(job)[job.index]) for job in jobs]
    named = {(case.kernel, capability, case.inputs) for capability, case in cases}
    assert not spills.ALLOWED.keys() - named
    assert all(0 < most <= 8 for most in spills.ALLOWED.values())


@pytest.mark.parametrize(
    "family", sorted({path.parent.name for path in sources.kernels().values()})
)
def test_every_family_says_how_its_kernels_are_compiled(family: str) -> None:
    assert (ROOT / "kernels" / family / "cases.py").is_file()


# Two loops; the first holds an inner one, and its way back to the middle is no loop of its own.
PROGRAM = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                       /* 0x0 */
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;                     /* 0x0 */
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, RZ ;         /* 0x0 */
        /*0030*/              @!P0 BRA 0x20 ;                                   /* 0x0 */
        /*0040*/               @P1 BRA 0xb0 ;                                   /* 0x0 */
        /*0050*/                   MUFU.EX2 R3, R3 ;                            /* 0x0 */
        /*0060*/                   BRA.U UP0, 0x10 ;                            /* 0x0 */
        /*0070*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ; /* 0x0 */
        /*0080*/                   FFMA R3, R3, R3, R3 ;                        /* 0x0 */
        /*0090*/               @P2 BRA 0x70 ;                                   /* 0x0 */
        /*00a0*/                   EXIT ;                                       /* 0x0 */
        /*00b0*/                   FADD R3, R3, R3 ;                            /* 0x0 */
        /*00c0*/                   BRA 0x50 ;                                   /* 0x0 */
        /*00d0*/                   NOP;                                         /* 0x0 */
"""


def test_loops_of_machine_code() -> None:
    program = sass.parse(PROGRAM)
    assert len(program) == 13
    found = {loop.head: sorted(loop.body) for loop in sass.loops(program)}
    assert found == {1: [1, 2, 3, 4, 5, 6, 11, 12], 2: [2, 3], 7: [7, 8, 9]}
    products = {i for i, instruction in enumerate(program) if instruction.kind == "HMMA"}
    assert [loop.head for loop in sass.innermost(program, products)] == [2]


def lines(*texts: str) -> list[sass.Instruction]:
    numbered = (f"        /*{16 * i:04x}*/  {text} ;\n" for i, text in enumerate(texts))
    return sass.parse("".join(numbered))


def test_account_of_a_turn() -> None:
    program = lines(
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
        "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, R24, gsb0",
        "MUFU.EX2 R1, R1",
        "FFMA R1, R1, R1, R1",
        "LDGSTS.E.BYPASS.128 [R4], desc[UR16][R2.64]",
        "@P0 BRA 0x0",
    )
    made = account.account(program, 90, 8, Tile())
    flops = 2 * 2 * 64 * (128 + 64) * 16  # two groups of four warps
    read = 2 * 2 * 16 * (64 + 128) + 2 * 2 * 16 * 64  # the second has its left side
    assert made.cycles == {
        "tensor": flops / 4096,
        "fp32": 8 * 32 / 128,
        "exp": 8 * 32 / 16,
        "shared": (read + 16 * 32 * 8) / 128,
        "global": 16 * 32 * 8 / 64,
        "issue": 6 * 8 / 4,
    }
    assert (made.limit, made.share) == ("tensor", 1.0)
    assert made.alone == pytest.approx(192 / (192 + 2 + 16 + 160 + 64))


def test_account_names_the_limit() -> None:
    products = ["HMMA.16816.F32.BF16 R8, R4, R6, RZ"] * 2
    program = lines(*products, *["MUFU.EX2 R1, R1"] * 8, "@P0 BRA 0x0")
    made = account.account(program, 80, 4, Tile())
    assert (made.limit, made.cycles["exp"], made.cycles["tensor"]) == ("exp", 64.0, 16.0)
    assert made.share == 0.25
    # Hopper's tensor cores are twice as fast, but not with this instruction
    hopper = account.account(lines(*products, "@P0 BRA 0x0"), 90, 4, Tile())
    assert hopper.share == pytest.approx(0.63)


def test_tf32_runs_at_half_the_rate() -> None:
    tf32 = lines("HMMA.1688.F32.TF32 R8, R4, R6, RZ", "@P0 BRA 0x0")
    half = lines("HMMA.16816.F32.BF16 R8, R4, R6, RZ", "@P0 BRA 0x0")
    first, second = (account.account(program, 80, 4, Tile()) for program in (tf32, half))
    assert first.cycles["tensor"] == second.cycles["tensor"]


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "blocks"),
    [(90, 255, 0, 8, 1), (90, 128, 0, 8, 2), (90, 168, 0, 4, 3), (80, 32, 0, 4, 16),
     (80, 32, 81 * 1024, 4, 2), (80, 32, 82 * 1024, 4, 1), (90, 32, 227 * 1024, 4, 1),
     (90, 16, 0, 1, 32)],
)  # fmt: skip
def test_blocks_that_a_multiprocessor_holds(
    capability: int, registers: int, shared: int, warps: int, blocks: int
) -> None:
    chip = CHIPS[capability]
    assert account.blocks_per_sm(chip, registers, shared, warps) == blocks
