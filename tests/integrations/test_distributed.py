"""Converted models under DistributedDataParallel and FSDP2: two processes, gloo."""

import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


def test_two_processes_have_the_gradients_of_one(tmp_path):
    assert torch.distributed.is_gloo_available()
    command = [sys.executable, str(WORKER)]
    store = str(tmp_path / "store")
    workers = [
        subprocess.Popen([*command, str(rank), "2", store], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        printed = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0]
    assert printed == ["ddp agrees\nfsdp2 agrees\n"] * 2
