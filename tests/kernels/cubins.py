"""Compiles a launch row to a GPU binary, with no GPU, and reads what it needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparseattn.kernels import launch as launching
from sparseattn.kernels.block_attention import backward_dkv, backward_dq, forward, tuning

KERNELS = {
    "fwd": (forward.block_attention_fwd_kernel, tuning.FORWARD),
    "dkv": (backward_dkv.block_attention_bwd_dkv_kernel, tuning.BACKWARD_DKV),
    "dq": (backward_dq.block_attention_bwd_dq_kernel, tuning.BACKWARD_DQ),
}
PLAIN = dict.fromkeys(
    ("NEGATE", "HAS_BIAS", "HAS_GATE", "HAS_PARTIAL", "HAS_SPLITS", "NEEDS_BIAS", "NEEDS_GATE"),
    False,
)
LOADED = {**PLAIN, "HAS_BIAS": True, "HAS_GATE": True, "HAS_PARTIAL": True}
LOADED |= {"NEEDS_BIAS": True, "NEEDS_GATE": True}
# shared memory of a block in bytes; 8.0 rows must fit the smaller 8.6, 8.9 and 12.0 too
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Build(NamedTuple):
    """What one compiled row needs."""

    registers: int
    shared: int
    spills: int
    hgmma: int


def rows(kernel: str, capability: int) -> list[tuning.Row]:
    """Return the rows that a GPU of this capability would use."""
    table = KERNELS[kernel][1]
    return [r for r in table if tuning.pick(table, capability, r.itemsize, r.head_dim) == r]


def build(kernel: str, row: tuning.Row, capability: int, head_dim: int, flags: dict) -> Build:
    """Compile one row with 128-token blocks."""
    program = KERNELS[kernel][0]
    d0, d1 = launching.split_head_dim(head_dim)
    constants: dict[str, Any] = {
        **flags,
        "GROUP": 2 if flags["HAS_BIAS"] else 1,
        **{"D": head_dim, "D0": d0, "D1": d1, "MASK_BLOCK_Q": 128, "MASK_BLOCK_K": 128},
        **{"BLOCK_Q": row.launch.tile_q, "BLOCK_K": row.launch.tile_k, "PRECISION": row.float32},
    }
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for index, param in enumerate(program.params):
        kind = _kind(param, row.itemsize)
        signature[param.name] = kind
        if param.name.endswith("_ptr"):
            attributes[(index,)] = [["tt.divisibility", 16]]
        if isinstance(kind, tuple):
            attributes |= {(index, i): [["tt.divisibility", 16]] for i in range(len(kind))}
    source = ASTSource(
        fn=program,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in signature},
        attrs=attributes,
    )
    options = {"num_warps": row.launch.num_warps, "num_stages": row.launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, code = _dump(compiled.asm["cubin"], "-res-usage"), _dump(compiled.asm["cubin"], "-sass")
    return Build(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        spills=len(re.findall(r"\bSTL\b", code)),
        hgmma=len(re.findall(r"\bHGMMA\b", code)),
    )


def _kind(param: Any, itemsize: int) -> Any:
    name = param.name
    if param.is_constexpr:
        return "constexpr"
    if name.endswith("_strides"):
        counts = {"bias_strides": 2, "gate_strides": 4, "bits_strides": 4}
        return ("i32",) * counts.get(name, 3)
    if name.endswith("_ptr"):
        if name[:-4] in ("q", "k", "v", "o", "do", "dq", "dk", "dv"):
            return "*bf16" if itemsize == 2 else "*fp32"
        floats = ("bias", "gate", "lse", "delta", "dbias", "dgate")
        return "*fp32" if name[:-4] in floats else "*i32"
    return "fp32" if name == "scale" else "i32"


def _dump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [str(tool), option, file.name], capture_output=True, text=True, check=True
        ).stdout
