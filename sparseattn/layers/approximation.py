"""What the methods have in common that replace softmax attention by something linear."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from sparseattn.layers.method import Call, Method
from sparseattn.ops.attention_factors import AttentionFactors


class Approximation(Method):
    """A method in which every query attends to all keys, but not by a softmax over them.

    A subclass has ``_attend`` and ``factors``. Never falls back to dense attention, whose results
    are others.
    """

    takes_extra_keys = False
    approximates = True

    def attend(self, call: Call) -> Tensor:
        """Do what ``forward`` does."""
        if call.extra is not None:
            raise NotImplementedError(
                f"{self.name}: extra is given; expected None: this method has no extra keys"
            )
        return super().attend(call)

    def factors(self, call: Call) -> AttentionFactors:
        """Return the attention weights as the product of two thin matrices."""
        raise NotImplementedError

    def weights(self, call: Call) -> Tensor:
        """Return the attention weights [B, H, Nq, Nk]."""
        with torch.autocast(call.q.device.type, enabled=False):
            return self.factors(call).dense().to(call.q.dtype)

    def logit_bias(self, call: Call) -> NoReturn:
        """Refuse: there are no logits."""
        raise NotImplementedError(f"{self.name}: has no logits; its weights are in factors(call)")
