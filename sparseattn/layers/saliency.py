"""The method "saliency": queries attend to the most salient tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparseattn import checks
from sparseattn.layers.method import Call, Method, Place
from sparseattn.ops.block_sparse_attention import Impl
from sparseattn.ops.saliency_attention import saliency_attention
from sparseattn.ops.token_selection import select_tokens


class Saliency(Method):
    """Every query attends to the tokens of highest saliency, whose log is part of the softmax.

    keep: tokens that are kept, a count or a fraction. prefix: class and register tokens at the
    front; they are always kept, with saliency 1, and count towards keep. prune_queries: dropped
    tokens ask nothing either, and attention gives them 0 (self-attention). Never falls back to
    dense attention.

    The saliency is an argument of the call; or with predictor=True it is the sigmoid of a linear
    map of the tokens, which learns: its weight and bias are the two parameters of ``predictor``.
    A saliency that is given goes before the predicted one.
    """

    name = "saliency"
    options = ("keep", "prefix", "prune_queries", "impl")
    takes_saliency = True
    takes_extra_keys = False

    def __init__(
        self,
        keep: int | float = 0.25,
        predictor: bool = False,
        prefix: int = 0,
        prune_queries: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(impl)
        checks.keep_share(self.name, keep)
        checks.require_bool(self.name, "predictor", predictor)
        checks.require_int(self.name, "prefix", prefix, low=0)
        checks.require_bool(self.name, "prune_queries", prune_queries)
        self.keep, self.prefix, self.prune_queries = keep, prefix, prune_queries
        self.predicts = predictor
        self.predictor: nn.Linear | None = None  # ``prepare`` makes it

    @property
    def needs_saliency(self) -> bool:
        """Say whether every call must bring a saliency."""
        return not self.predicts

    def prepare(self, place: Place, device: Any = None, dtype: Any = None) -> None:
        """Make the predictor, if there is to be one."""
        if self.predicts and place.width is not None:
            self.predictor = nn.Linear(place.width, 1, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the parameters of the predictor anew."""
        if self.predictor is not None:
            self.predictor.reset_parameters()

    def predict(self, x: Tensor) -> Tensor | None:
        """Return the saliency [B, Nk] of tokens x [B, Nk, width], in float32 or wider."""
        if self.predictor is None:
            return None
        logits = self.predictor(x).squeeze(-1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()

    def _attend(self, call: Call) -> Tensor:
        return saliency_attention(
            call.q, call.k, call.v, self._saliency(call), self.keep, key_mask=call.key_mask,
            always=self.prefix, scale=call.scale, prune_queries=self.prune_queries, impl=self.impl,
        )  # fmt: skip

    def _sparse_bias(self, call: Call) -> Tensor:
        saliency = self._saliency(call)
        forced = (torch.arange(saliency.shape[1], device=saliency.device) < self.prefix)[None]
        share = checks.keep_share(self.name, self.keep)
        chosen = select_tokens(saliency[:, None], share, call.key_mask, forced)
        kept = chosen.slots[:, 0] >= 0  # [B, Nk]
        log = saliency.where(kept & ~forced, 1).log()
        bias = log.masked_fill(~kept, -math.inf)[:, None, None]
        return bias.where(kept[:, None, :, None], -math.inf) if self.prune_queries else bias

    def _saliency(self, call: Call) -> Tensor:
        if call.saliency is None:
            raise ValueError(
                f"{self.name}: saliency is None; expected [B, Nk] in (0, 1], or a layer whose "
                "method has predictor=True"
            )
        if call.extra is not None:
            raise NotImplementedError(
                f"{self.name}: extra is given; expected None: this method has no extra keys"
            )
        return call.saliency
