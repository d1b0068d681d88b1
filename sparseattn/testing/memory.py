"""How much memory a call takes beyond what was held before."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def peak_extra_bytes(call: Callable[[], Result]) -> tuple[Result, int]:
    """Return what `call` returns, and the most bytes it held at once beyond what was held before.

    With a GPU this is `torch.cuda.max_memory_allocated`. Otherwise it is the running sum of the
    allocations and frees that torch's profiler saw from torch's CPU allocator; scratch memory
    that MKL or oneDNN takes for itself is not seen.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    with _silent_stderr():
        profiler.start()
    result = call()
    with _silent_stderr(), tempfile.TemporaryDirectory() as folder:
        profiler.stop()
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: float(event["ts"])):
        held += change["args"]["Bytes"]
        peak = max(peak, held)
    return result, peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Send the process's stderr nowhere: the profiler's C++ side logs there and cannot be told."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
