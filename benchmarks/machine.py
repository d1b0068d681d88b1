"""What a result was measured on: versions, GPU, commit, and the rates the machine reaches."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from sparseattn import __version__
from sparseattn.benchmarks.registry import dtype_name
from sparseattn.benchmarks.timing import Job, Span, interleave, make_timer

ROOT = Path(__file__).resolve().parents[1]
GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat a measurement on this device."""
    triton = importlib.util.find_spec("triton") is not None
    about: dict[str, Any] = {
        "device": device.type,
        "name": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if triton else None,
        "sparseattn": __version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        about |= {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "memory_bytes": found.total_memory,
            "processors": found.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **_nvidia_smi(device),
        }
    return about


def banner(about: dict[str, Any]) -> str:
    """Say the machine in one line."""
    parts = [about["name"]]
    if about["device"] == "cuda":
        clocks = (about.get("clocks.sm", "?"), about.get("clocks.max.sm", "?"))
        parts += [f"driver {about.get('driver_version', '?')}", f"CUDA {about['cuda']}"]
        parts += ["clock {} of {}".format(*clocks), f"power limit {about.get('power.limit', '?')}"]
    else:
        parts.append(f"{about['threads']} threads")
    parts += [f"torch {about['torch']}", f"Triton {about['triton']}", f"commit {about['commit']}"]
    return ", ".join(str(part) for part in parts)


def cpu_name() -> str:
    """Return the model of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of the checkout, with a + if files differ from it; "" outside of one."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=10", "--exclude=*"]
    try:
        changed = [*command[:3], "status", "--porcelain", "--untracked-files=no"]
        name, status = (
            subprocess.run(c, capture_output=True, text=True, check=True, timeout=30).stdout
            for c in (command, changed)
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return name.strip() + ("+" if status.strip() else "")


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of a large product of two matrices: the rate that floors are made of."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def copy_rate(device: torch.device) -> float:
    """Return bytes per second, read and written, of a copy that no cache holds."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**27, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() * 4 / _seconds(lambda: target.copy_(source), device)


def rates(dtypes: list[torch.dtype], device: torch.device) -> dict[str, Any]:
    """Measure both rates; the best of some runs, since they stand for what is possible."""
    products = {dtype_name(dtype): matmul_rate(dtype, device) / 1e12 for dtype in dtypes}
    return {"matmul_tflops": products, "copy_gbps": copy_rate(device) / 1e9}


def _seconds(call: Any, device: torch.device) -> float:
    span: Span = interleave({"": Job(lambda _: call())}, make_timer(device), 3, 10, 1.0)[""]
    return span.p20 / 1e3


def _nvidia_smi(device: torch.device) -> dict[str, str]:
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        line = told.strip().splitlines()[device.index or 0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(GPU_FIELDS, (value.strip() for value in line.split(",")), strict=False))
