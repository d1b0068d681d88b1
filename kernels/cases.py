"""The inputs with which a family's kernels are compiled ahead of time, without a GPU.

A family says so in its own file `cases.py`, with a function `cases(capability)`; `make cubins`
finds it by its name. This file imports no Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One way to launch one kernel.

    kernel: the kernel's name. Others that `launch` starts on the way are left to their own cases.
    row: the line of a table of tuning.py that the launch takes; None for a kernel without a table.
    inputs: what the inputs are, as "bf16 D 72, bias"; unlike in other cases of the row.
    launch: calls the launcher as an op would. Tensors made inside with device="cuda" seem to lie on
        a GPU of the wanted capability; they hold no meaningful numbers.

    The first case of a row is its plain one: `make cubins` compiles it, and the table of resources
    shows it (for sm_80 and sm_100 only the first of a kernel). `make cubins-all` compiles all.
    """

    kernel: str
    row: Any
    inputs: str
    launch: Callable[[], object]
