"""The method "linformer": softmax attention to tokens that are projected along the sequence."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparseattn import checks
from sparseattn.layers.approximation import Approximation
from sparseattn.layers.method import Call, Place, Shortened
from sparseattn.ops.attention_factors import AttentionFactors
from sparseattn.ops.linformer_attention import (
    Impl,
    attend_projected,
    linformer_attention,
    project_tokens,
)

Sharing = Literal["none", "headwise", "key-value"]


class Linformer(Approximation):
    """Every query attends to num_landmarks projected keys in place of all.

    tokens: the largest number of keys; fewer take the first columns of the projections.
    num_landmarks: projected keys. sharing: as the paper has it, "none": every head has projections
    of its own for keys and for values; "headwise": the heads share them; "key-value": keys and
    values share them, too.

    The projections are trained: the parameters ``key_projection`` [num_landmarks, tokens], or
    [G, num_landmarks, tokens] with "none", and ``value_projection`` unless "key-value".

    Where heads share them, a layer that is given tokens projects these before it makes keys and
    values of them: E (x W + b) = (E x) W + (E 1) b, the same for less work.
    """

    name = "linformer"
    options = ("tokens", "num_landmarks", "sharing", "impl")
    needs_place = True
    key_projection: nn.Parameter | None
    value_projection: nn.Parameter | None

    def __init__(
        self,
        tokens: int,
        num_landmarks: int = 256,
        sharing: Sharing = "headwise",
        impl: Impl = "auto",
    ) -> None:
        super().__init__(impl)
        checks.require_int(self.name, "tokens", tokens, low=1)
        checks.require_int(self.name, "num_landmarks", num_landmarks, low=1)
        if sharing not in ("none", "headwise", "key-value"):
            raise ValueError(
                f"{self.name}: sharing is {sharing!r}; expected one of 'none', 'headwise', "
                "'key-value'"
            )
        self.tokens, self.num_landmarks = tokens, num_landmarks
        self.sharing: Sharing = sharing
        self.register_parameter("key_projection", None)
        self.register_parameter("value_projection", None)

    def obstacle(self, place: Place) -> str | None:
        """Return what the method misses there, if so."""
        if self.sharing == "none" and not place.heads:
            return "method='linformer' with sharing='none' needs the number of heads"
        return None

    def prepare(self, place: Place, device: Any = None, dtype: Any = None) -> None:
        """Make the projections."""
        shape: tuple[int, ...] = (self.num_landmarks, self.tokens)
        if self.sharing == "none":
            if not place.heads:
                raise ValueError(f"{self.name}: heads is {place.heads}; expected an int >= 1")
            shape = (place.heads, *shape)
        self.key_projection = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if self.sharing != "key-value":
            self.value_projection = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections anew: independent tokens keep their variance."""
        for projection in (self.key_projection, self.value_projection):
            if projection is not None:
                nn.init.normal_(projection, std=self.tokens**-0.5)

    def shorten(self, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Shortened | None:
        """Return projected tokens, where that is the same as projecting keys and values."""
        if self.sharing == "none":
            return None
        of_keys, of_values = self._projections(key.shape[1])
        keys = project_tokens(of_keys, key, key_mask)
        if of_values is None and value is key:
            return Shortened(*keys, *keys)
        of_values = of_keys if of_values is None else of_values
        return Shortened(*keys, *project_tokens(of_values, value, key_mask))

    def factors(self, call: Call) -> AttentionFactors:
        """Return the attention weights as the product of two thin matrices."""
        projections = self._projections(call.k.shape[2])
        return AttentionFactors.linformer(
            call.q, call.k, *projections, key_mask=call.key_mask, scale=call.scale
        )

    def _attend(self, call: Call) -> Tensor:
        if call.is_shortened:
            return attend_projected(call.q, call.k, call.v, call.scale, self.impl)
        return linformer_attention(
            call.q, call.k, call.v, *self._projections(call.k.shape[2]), key_mask=call.key_mask,
            scale=call.scale, impl=self.impl,
        )  # fmt: skip

    def _projections(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Return the columns for that many keys."""
        if self.key_projection is None:
            raise RuntimeError(f"{self.name}: has no projections yet; expected a call of prepare")
        if length > self.tokens:
            raise ValueError(
                f"{self.name}: k has {length} tokens; expected at most tokens={self.tokens} "
                "(from the method)"
            )
        of_values = self.value_projection
        return (
            self.key_projection[..., :length],
            None if of_values is None else of_values[..., :length],
        )
