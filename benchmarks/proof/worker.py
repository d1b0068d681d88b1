"""A process that does jobs: one line of JSON in, one out.

A kernel that reads where it must not takes its process down, and every later call in it fails. So
jobs run in processes of their own, and whoever sends them starts a new one when one is lost.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import torch

from proof import checks, discover
from proof.case import Case
from proof.jobs import Job
from sparseattn.testing import sources


def serve(device: str, launches: int, folders: tuple[Path, ...]) -> int:
    """Answer jobs until the input ends, or until a fault of the GPU leaves this process useless."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    matmul = torch.backends.cuda.matmul  # the naive reference as exact as it can be
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False  # of convolutions in float32, here and in the op
    files = discover.case_files(folders)
    cases: dict[str, dict[str, Case]] = {}
    _send(replies, "ready")
    for line in sys.stdin:
        job = Job(*json.loads(line))
        if job.op not in cases:
            cases[job.op] = {case.name: case for case in discover.load(files[job.op])}
        setting = checks.Setting(torch.device(device), getattr(torch, job.dtype), launches)
        reply, usable = answer(cases[job.op][job.case], job.check, setting)
        _send(replies, reply)
        if not usable:
            return 1
    return 0


def answer(case: Case, check: str, setting: checks.Setting) -> tuple[dict[str, Any], bool]:
    """Do one check; return what it found, and whether this process can go on."""
    started = time.perf_counter()
    usable = True
    with discover.noted_launches() as launched:
        try:
            status, detail = "passed", checks.CHECKS[check](case, setting)
            if setting.gpu:
                torch.cuda.synchronize()  # a fault of a kernel is raised here at the latest
        except checks.Wrong as wrong:
            status, detail = "wrong", str(wrong)
        except torch.cuda.OutOfMemoryError as error:
            status, detail = "memory", str(error).splitlines()[0]
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            status, detail = "failed", f"{type(error).__name__} at {where}: {str(error)[:2000]}"
            usable = "CUDA" not in str(error)
    if usable and setting.gpu:
        gc.collect()
        torch.cuda.empty_cache()
    names = sorted(launched & set(sources.kernels()))
    seconds = round(time.perf_counter() - started, 2)
    return {"status": status, "detail": detail, "seconds": seconds, "kernels": names}, usable


def _send(replies: TextIO, reply: Any) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()
