"""A static account: cycles that one turn of a kernel's main loop needs of each unit of the chip.

It is a model and no measurement. Counts come from the machine code. Nothing here imports Triton.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cubins import sass
from cubins.sass import Instruction


class Chip(NamedTuple):
    """What one multiprocessor does in a cycle, and how much it holds."""

    tensor: int  # FLOP of 16-bit products, dense, at the chip's best instruction; TF32: half
    legacy: float  # share of that rate that HMMA reaches
    lanes: int  # float32 operations
    shared_size: int  # bytes of shared memory, all blocks together
    shared_block: int  # bytes that one block may use
    exponentials: int = 16
    shared: int = 128  # bytes
    global_: int = 64  # bytes, the port to the L2 cache
    instructions: int = 4  # of 32 lanes each


# 80: A100; a block of its rows must also fit 8.6, 8.9 and 12.0, whose shared memory is smaller.
# 90: H100; HMMA at 0.63 of the peak: Luo et al., Benchmarking and Dissecting the NVIDIA Hopper
#     GPU Architecture via Microbenchmarking, arXiv:2402.13499.
# 100: B200; HMMA is taken to be as fast as on an A100, for want of a source.
CHIPS = {
    80: Chip(2048, 1.0, 64, 164 * 1024, 99 * 1024),
    90: Chip(4096, 0.63, 128, 228 * 1024, 227 * 1024),
    100: Chip(8192, 0.25, 128, 228 * 1024, 227 * 1024),
}
TENSOR = ("HGMMA", "HMMA", "UTCHMMA")
GLOBAL_LOADS = ("LDG", "LDGSTS", "UTMALDG")
UNITS = ("tensor", "fp32", "exp", "shared", "global", "issue")


class Tile(NamedTuple):
    """What one instruction does whose name does not say it, from the compiler's own types."""

    flops: float = 0.0  # of a UTCHMMA; twice as many where it multiplies TF32, at half the rate
    operands: float = 0.0  # bytes of shared memory that a UTCHMMA reads
    copied: float = 0.0  # bytes that a UTMALDG brings


class Account(NamedTuple):
    """Cycles of one turn of the main loop for one block of threads, and what follows."""

    cycles: dict[str, float]
    limit: str  # the unit that is busy longest
    share: float  # of the peak of its arithmetic (tensor, else fp32), if all units overlap
    alone: float  # the same if no two units ever overlap


def blocks_per_sm(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Return how many blocks of threads a multiprocessor holds at once."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (16384 // per_warp) // warps  # a quarter of the registers to each scheduler
    by_shared = chip.shared_size // (shared + 1024)  # 1 KiB of every block is the system's
    return min(by_registers, by_shared, 64 // warps, 32)


def account(program: list[Instruction], capability: int, warps: int, tile: Tile) -> Account:
    """Account for the main loop: of the innermost ones the one with the most arithmetic.

    Among equals the shortest: the way without masks. Without a loop, the whole program.
    """
    chip = CHIPS[capability]
    main = main_loop(program, warps, tile)
    cycles = {unit: 0.0 for unit in UNITS}
    at_peak = 0.0
    for instruction in main:
        flops = tensor_flops(instruction, warps, tile)
        peak = chip.tensor / (2 if is_tf32(instruction) else 1)
        at_peak += flops / peak
        cycles["tensor"] += flops / peak / (chip.legacy if instruction.kind == "HMMA" else 1)
        cycles["fp32"] += fp32_operations(instruction) * warps * 32 / chip.lanes
        cycles["exp"] += (instruction.kind == "MUFU") * warps * 32 / chip.exponentials
        cycles["shared"] += shared_bytes(instruction, warps, tile) / chip.shared
        cycles["global"] += global_bytes(instruction, warps, tile) / chip.global_
        cycles["issue"] += warps / chip.instructions
    limit = max(UNITS, key=lambda unit: cycles[unit])
    wanted = at_peak or cycles["fp32"]
    # what is issued runs on one of the other units, so it is no further time
    alone = max(sum(cycles.values()) - cycles["issue"], cycles["issue"])
    return Account(cycles, limit, wanted / cycles[limit], wanted / alone)


def main_loop(program: list[Instruction], warps: int, tile: Tile) -> list[Instruction]:
    """Return the instructions of the main loop."""
    for kinds in (TENSOR, ("FFMA", "FFMA2"), GLOBAL_LOADS):
        matter = {i for i, instruction in enumerate(program) if instruction.kind in kinds}
        found = [[program[i] for i in sorted(x.body)] for x in sass.innermost(program, matter)]
        if found:
            return max(found, key=lambda body: (_weight(body, kinds, warps, tile), -len(body)))
    return program


def _weight(body: list[Instruction], kinds: tuple[str, ...], warps: int, tile: Tile) -> float:
    if kinds == TENSOR:
        return sum(tensor_flops(instruction, warps, tile) for instruction in body)
    return sum(instruction.kind in kinds for instruction in body)


def tensor_flops(instruction: Instruction, warps: int, tile: Tile) -> float:
    """Return the FLOP that all warps together do by this matrix instruction."""
    if instruction.kind == "UTCHMMA":  # one thread issues it for the block
        return tile.flops
    if instruction.kind == "HGMMA":  # of four warps
        m, n, k = _hgmma_shape(instruction)
        return 2 * m * n * k * warps / 4
    if instruction.kind == "HMMA":
        digits = instruction.name.split(".")[1]  # 16816 is 16 x 8 x 16
        return 2 * 16 * 8 * int(digits[3:]) * warps
    return 0.0


def is_tf32(instruction: Instruction) -> bool:
    """Say whether a matrix instruction multiplies TF32 numbers."""
    return "TF32" in instruction.name


def fp32_operations(instruction: Instruction) -> int:
    """Return how many float32 operations of a lane this is; a multiply-add is one."""
    wide = {"FFMA2": 2, "FMUL2": 2, "FADD2": 2}
    return wide.get(instruction.kind, int(instruction.kind in ("FFMA", "FMUL", "FADD")))


def shared_bytes(instruction: Instruction, warps: int, tile: Tile) -> float:
    """Return the bytes that pass between shared memory and the rest, for all warps."""
    kind = instruction.kind
    if kind == "UTCHMMA":
        return tile.operands
    if kind == "UTMALDG":
        return tile.copied
    if kind == "HGMMA":
        m, n, k = _hgmma_shape(instruction)
        left = instruction.operands.split(",")[1]  # in registers, or described with the right one
        rows = n + m * ("gdesc" in left)
        return rows * k * (4 if is_tf32(instruction) else 2) * warps / 4
    if kind in ("LDSM", "STSM"):  # matrices of 8 rows of 16 bytes
        count = instruction.name.split(".")[-1]
        return 128 * (int(count) if count in ("2", "4") else 1) * warps
    if kind in ("LDS", "STS", "LDGSTS"):
        return 32 * _width(instruction) * warps
    return 0.0


def global_bytes(instruction: Instruction, warps: int, tile: Tile) -> float:
    """Return the bytes that are read from or written to global memory, for all warps."""
    if instruction.kind == "UTMALDG":
        return tile.copied
    if instruction.kind in ("LDG", "LDGSTS", "STG"):
        return 32 * _width(instruction) * warps
    return 0.0


def _width(instruction: Instruction) -> int:
    """Return the bytes a lane moves."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    marks = instruction.name.split(".")
    return next((widths[mark] for mark in reversed(marks) if mark in widths), 4)


def _hgmma_shape(instruction: Instruction) -> tuple[int, int, int]:
    found = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.name)
    if found is None:
        raise ValueError(f"no shape in {instruction.name}")
    m, n, k = (int(size) for size in found.groups())
    return m, n, k
