"""How an op gives its cases to the proof: one file `cases/<op>.py` with a tuple `CASES`.

    from proof.case import Case
    CASES = (Case("small", "small", make, call, reference), ...)

A file is found by its name; nothing else is registered. `sizes` and `checks` say what is done with
a case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn.testing.tolerance import Judgement, judge

Size = Literal["small", "full", "edge", "huge"]
Arguments = dict[str, Any]

BFLOAT16, FLOAT16, FLOAT32 = "bfloat16", "float16", "float32"


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        name: unique in the op; letters, digits and dashes.
        size: "small": a fraction of a second in Triton's interpreter, with two samples where the
            op has samples; every check runs on it, and nothing else runs on a CPU. "full": what
            users run; the float64 reference may take some 8 GiB. "edge": odd shapes, held against
            the reference on a GPU and no more. "huge": more than 2^31 elements in one tensor, at
            most 40 GiB in all, bfloat16 only; the reference sees the first and the last sample.
        make: make(dtype, device, seed) -> the arguments of `call` and `reference`: tensors, frozen
            dataclasses of tensors (BlockMask), numbers. Another seed gives other values, masks
            and indices too, in the same shapes.
        call: the op, with impl="triton". What users do inside a step, selecting and building
            masks, is done inside it. Returns a tensor or a tuple of them.
        reference: the same results in naive PyTorch, for any float dtype.
        results: names of what `call` returns.
        gradients: the arguments that get a gradient. A normal one is sent into every result.
        batched: the arguments and results whose first dimension is the sample.
        magnitudes: magnitudes(arguments, sent, truth, dtype) -> the size of the terms that each
            result is summed of, as in `sparseattn.testing.tolerance.judge`; arguments, the sent
            gradients and the truth are float64, dtype is that of the call.
        judge: the rule, called as `sparseattn.testing.tolerance.judge`: that one, or for linear
            attentions `sparseattn.testing.landmarks.judge`.
        dtypes: in which the numbers are checked; the other checks take the first.
        skip: a reason for each check that cannot hold for this case.
        terms: terms(arguments, sent) -> how many terms each result is summed of, where they are so
            many that their order matters; in float64, as `judge` takes them.
    """

    name: str
    size: Size
    make: Callable[[torch.dtype, torch.device, int], Arguments]
    call: Callable[..., Any]
    reference: Callable[..., Any]
    results: tuple[str, ...] = ("out",)
    gradients: tuple[str, ...] = ("q", "k", "v")
    batched: tuple[str, ...] = ()
    magnitudes: Callable[..., Mapping[str, Tensor]] | None = None
    judge: Callable[..., Judgement] = judge
    dtypes: tuple[str, ...] = (BFLOAT16, FLOAT16, FLOAT32)
    skip: Mapping[str, str] = field(default_factory=dict)
    terms: Callable[..., Mapping[str, Tensor]] | None = None
