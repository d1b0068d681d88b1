"""The method "linear": weights are products of features of single tokens."""

from __future__ import annotations

from torch import Tensor

from sparseattn.layers.approximation import Approximation
from sparseattn.layers.method import Call
from sparseattn.ops.attention_factors import AttentionFactors
from sparseattn.ops.linear_attention import FeatureMap, Impl, check_feature_map, linear_attention


class Linear(Approximation):
    """Every query attends to all keys with weights f(q) . f(k).

    feature_map: f, "elu" (elu(x) + 1), "relu" or "identity". The scale of the layer has no part.
    """

    name = "linear"
    options = ("feature_map", "impl")

    def __init__(self, feature_map: FeatureMap = "elu", impl: Impl = "auto") -> None:
        super().__init__(impl)
        check_feature_map(feature_map, self.name)
        self.feature_map: FeatureMap = feature_map

    def factors(self, call: Call) -> AttentionFactors:
        """Return the attention weights as the product of two thin matrices."""
        return AttentionFactors.linear(call.q, call.k, self.feature_map, key_mask=call.key_mask)

    def _attend(self, call: Call) -> Tensor:
        return linear_attention(
            call.q, call.k, call.v, self.feature_map, key_mask=call.key_mask, impl=self.impl
        )
