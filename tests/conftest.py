"""Set-up of every test: the interpreter without a GPU, two threads, seeds, poisoned memory."""

import importlib.util
import os
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

# Each worker of pytest-xdist computes with two threads. Where that is more threads than cores,
# OpenMP's waiting threads would hold the core that the working one needs: they sleep instead.
# The library reads the variable when it is loaded, with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import numpy as np
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()

# Triton reads the variable when it is imported: later would be too late for its own functions.
if not HAS_CUDA:
    if "triton" in sys.modules:
        raise RuntimeError("something imported Triton before tests/conftest.py could set it up")
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(2)

# The interpreter is slow and uneven, so an example has no deadline.
hypothesis.settings.register_profile("sparseattn", deadline=None, print_blob=True)
hypothesis.settings.load_profile("sparseattn")


class TorchRandom:
    """PyTorch's generator as Hypothesis wants it: every example replays with the same numbers."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> bytes:
        return torch.get_rng_state().numpy().tobytes()

    def setstate(self, state: bytes) -> None:
        torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


TORCH_RANDOM = TorchRandom()  # Hypothesis keeps a weak reference only
hypothesis.register_random(TORCH_RANDOM)


def mend_torchvision() -> None:
    """Declare torchvision's operators where its C library does not load.

    A torchvision of another build than torch makes timm and transformers fail at import with
    "operator torchvision::nms does not exist". They need the names only. With a torchvision
    that works this does nothing, and without one nothing at all.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    try:
        (library,) = Path(spec.submodule_search_locations[0]).glob("_C*.*")
        torch.ops.load_library(library)
    except (OSError, ValueError):
        global _torchvision  # the operators live as long as this object
        _torchvision = torch.library.Library("torchvision", "FRAGMENT")
        _torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


mend_torchvision()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_CUDA:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none"))


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seed from the test's name: the same numbers in any order of tests, others in each test."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For many small steps: on busy cores two threads wait for each other at each of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill new memory: NaN for floats, the largest value for integers, True for bools.

    Covers torch.empty, empty_like, empty_strided, empty_permuted, new_empty and resize_, also
    inside PyTorch. PyTorch fills only in deterministic mode, and there an operator without a
    deterministic form warns here instead of raising.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]
