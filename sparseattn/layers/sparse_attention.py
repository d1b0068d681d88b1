"""SparseAttention: nn.MultiheadAttention that attends sparsely."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseattn import checks
from sparseattn.layers.method import Call, Method, Place, Shortened
from sparseattn.layers.registry import make_method

_OP = "SparseAttention"


class SparseAttention(nn.MultiheadAttention):
    """Drop-in ``nn.MultiheadAttention`` that attends sparsely: same parameters, same state_dict.

    ::

        layer = SparseAttention(384, 6, batch_first=True, method="topk", keep=0.25)
        out, _ = layer(x, x, x)

        layer = SparseAttention.from_torch(trained, method="topk", keep=0.25)

    Args:
        embed_dim: width E of the queries and of the result.
        num_heads: H; embed_dim is a multiple of it.
        dropout: in training only. The method "dense" drops attention weights, as torch does. The
            sparse methods have no weights to drop: they drop elements of what is attended, in
            front of out_proj.
        bias: whether the projections have biases.
        add_bias_kv: one learned key and value that every query sees besides the chosen ones.
        add_zero_attn: the same with a key and value of zeros.
        kdim: width of the keys, default embed_dim.
        vdim: width of the values, default embed_dim.
        batch_first: [B, N, E] instead of [N, B, E].
        device: of the parameters; "meta" works.
        dtype: of the parameters.
        method: "topk", "saliency", "window", "performer", "nystrom", "linformer", "linear" or
            "dense".
        options: of the method, by name; see docs/layers.md.

    What differs from ``nn.MultiheadAttention``:

    - ``need_weights`` is False unless asked for: the weights are N x N.
    - A query that sees nothing gets 0 (and the bias of out_proj), not NaN. What a padded token
      gets in self-attention means nothing.
    - Sparse methods take padding (bool, or float of 0 and -inf) but no attn_mask.
    - The fused path that nn.TransformerEncoderLayer takes in eval, around its attention layer, is
      off for this layer. nn.TransformerEncoder also packs padded batches into nested tensors:
      set its ``use_nested_tensor = False`` if you put this layer into one (``convert`` does).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        method: str = "topk",
        **options: Any,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        self._become_sparse(make_method(method, options, _OP))

    @classmethod
    def from_torch(
        cls, mha: nn.MultiheadAttention, method: str = "topk", **options: Any
    ) -> SparseAttention:
        """Return a sparse layer on the parameters of `mha`, which are shared and not copied."""
        if not isinstance(mha, nn.MultiheadAttention) or isinstance(mha, SparseAttention):
            raise TypeError(
                f"{_OP}.from_torch: mha {checks.describe(mha)}; expected an nn.MultiheadAttention"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name, value in vars(mha).items():
            own = value.copy() if isinstance(value, dict) else value
            layer.__dict__[name] = own
        layer._become_sparse(make_method(method, options, f"{_OP}.from_torch"))
        return layer

    def _become_sparse(self, method: Method) -> None:
        if not method.takes_extra_keys and has_extra_keys(self):
            raise NotImplementedError(
                f"{_OP}: add_bias_kv or add_zero_attn is True; expected False: "
                f"method={method.name!r} has no extra keys"
            )
        weight = self.out_proj.weight
        place = Place(self.kdim, self.num_heads, self.head_dim)
        method.prepare(place, weight.device, weight.dtype)
        # Read by nn.TransformerEncoderLayer and nn.TransformerEncoder in front of their fused
        # path, which would not call forward. How it is, in_proj_weight tells.
        self._qkv_same_embed_dim = False
        self.method = method

    def _reset_parameters(self) -> None:
        """Draw the parameters as nn.MultiheadAttention does."""
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        if "method" in self._modules:  # not yet, while the constructor of torch runs
            self.out_proj.reset_parameters()  # its bias is zeroed below
            self.method.reset_parameters()
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    reset_parameters = _reset_parameters  # the name that fills layers made on the meta device

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        saliency: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as ``nn.MultiheadAttention`` does.

        Args:
            query: [B, Nq, E] with batch_first, else [Nq, B, E]; or [Nq, E].
            key: likewise, Nk tokens of width kdim.
            value: likewise, Nk tokens of width vdim.
            key_padding_mask: [B, Nk], or [Nk] for inputs without a batch; bool, True = hidden, or
                floating point: 0, or -inf for hidden (the method "dense" adds any bias).
            need_weights: also return the attention weights; Nq x Nk memory.
            attn_mask: [Nq, Nk] or [B * H, Nq, Nk], bool, True = hidden, or floating point, added
                to the logits. The method "dense" takes it, the others do not.
            average_attn_weights: average the returned weights over the heads.
            is_causal: says that attn_mask is causal, which is not used.
            saliency: [B, Nk], or [Nk] for inputs without a batch, in (0, 1]: how much each key
                matters. The method "saliency" needs it unless it has a predictor, the others take
                none.

        Returns:
            The result, in the layout of query, and the weights [B, Nq, Nk] (with
            average_attn_weights=False [B, H, Nq, Nk]) or None. Weights are those before dropout.
            Extra keys (add_bias_kv, add_zero_attn) stand at the end of Nk.

        Raises:
            TypeError: a mask has the wrong dtype.
            ValueError: a shape is wrong, is_causal comes without attn_mask, or saliency is missing.
            NotImplementedError: a nested tensor, an attn_mask for a sparse method, or a saliency
                for a method that takes none.
        """
        self._check(query, key, value, key_padding_mask, saliency)
        itself = _is_same(query, key)
        same = itself and _is_same(key, value)
        self._check_attn_mask(attn_mask, is_causal)
        batched = query.dim() == 3
        query, key, value = (self._batch_first(x, batched) for x in (query, key, value))
        if same:
            key = value = query
        if not batched:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
            saliency = None if saliency is None else saliency[None]
        if saliency is None:
            saliency = self.method.predict(key)
        key_mask, bias = self._masks(key_padding_mask, attn_mask, query.shape[0])
        short = None if need_weights else self.method.shorten(key, value, key_mask)
        if short is None:
            q, k, v = self._project(query, key, value, same)  # [B, H, N, D]
        else:
            q, k, v = self._project_shortened(query, short)
        dropout = self.dropout if self.training else 0.0
        asking = key_mask if itself else None
        call = Call(
            q, k, v, key_mask, asking, bias, self._extra_keys(q), None, dropout, saliency,
            short is not None,
        )  # fmt: skip
        out = self.method.attend(call)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        out = out if self.batch_first and batched else out.transpose(0, 1)
        weights = self.method.weights(call) if need_weights else None
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out, weights = out.squeeze(1), None if weights is None else weights.squeeze(0)
        return out, weights

    def _check(self, query: Any, key: Any, value: Any, padding: Any, saliency: Any) -> None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            checks.require_tensor(_OP, name, x)
            if x.is_nested:
                raise NotImplementedError(
                    f"{_OP}: {name} is a nested tensor; expected a padded one and a "
                    "key_padding_mask (in an nn.TransformerEncoder, set use_nested_tensor=False)"
                )
        if query.dim() not in (2, 3):
            raise ValueError(f"{_OP}: query {checks.describe(query)}; expected 2 or 3 dimensions")
        shapes = checks.Shapes(_OP)
        for name, size in (("embed_dim", self.embed_dim), ("kdim", self.kdim), ("vdim", self.vdim)):
            shapes.set(name, size, "the layer")
        batch = "B " if query.dim() == 3 else ""
        layout = "{1}{0} {2}" if self.batch_first or not batch else "{0} {1}{2}"
        shapes.bind("query", query, layout.format("Nq", batch, "embed_dim"))
        shapes.bind("key", key, layout.format("Nk", batch, "kdim"))
        shapes.bind("value", value, layout.format("Nk", batch, "vdim"))
        if padding is not None:
            shapes.bind("key_padding_mask", padding, f"{batch}Nk")
            if padding.dtype != torch.bool:
                checks.require_floating(_OP, "key_padding_mask", padding)
        if saliency is not None:
            checks.require_tensor(_OP, "saliency", saliency)
            shapes.bind("saliency", saliency, f"{batch}Nk")
            checks.require_floating(_OP, "saliency", saliency)

    def _check_attn_mask(self, attn_mask: Any, is_causal: bool) -> None:
        if attn_mask is None:
            if is_causal:
                raise ValueError(
                    f"{_OP}: is_causal is True; expected an attn_mask with it, as torch does"
                )
            return
        checks.require_tensor(_OP, "attn_mask", attn_mask)
        if not self.method.takes_attn_bias:
            raise NotImplementedError(
                f"{_OP}: attn_mask {checks.describe(attn_mask)}; expected None: "
                f"method={self.method.name!r} supports key_padding_mask, method='dense' both"
            )
        if attn_mask.dtype != torch.bool:
            checks.require_floating(_OP, "attn_mask", attn_mask)
        if attn_mask.dim() not in (2, 3):
            raise ValueError(
                f"{_OP}: attn_mask {checks.describe(attn_mask)}; "
                f"expected [Nq, Nk] or [B * H, Nq, Nk], H={self.num_heads} (from num_heads)"
            )

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> tuple[Tensor, ...]:
        """Return q, k and v [B, H, N, D], as strided views of the projections."""
        heads = (self.num_heads, self.head_dim)
        if same and self.in_proj_weight is not None:
            qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            q, k, v = qkv.unflatten(2, (3, *heads)).permute(2, 0, 3, 1, 4).unbind()
            return q, k, v
        return tuple(
            F.linear(x, weight, bias).unflatten(2, heads).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), *self._in_proj(), strict=True)
        )

    def _project_shortened(self, query: Tensor, short: Shortened) -> tuple[Tensor, ...]:
        """Return q, and k and v [B, H, m, D] of projected tokens, (E x) W + (E 1) b."""
        weights, biases = self._in_proj()
        found = [F.linear(query, weights[0], biases[0])]
        pairs = ((short.keys, short.key_sums), (short.values, short.value_sums))
        for (x, sums), weight, bias in zip(pairs, weights[1:], biases[1:], strict=True):
            projected = F.linear(x, weight)
            found.append(projected if bias is None else projected + sums[..., None] * bias)
        heads = (self.num_heads, self.head_dim)
        return tuple(x.to(found[0].dtype).unflatten(2, heads).transpose(1, 2) for x in found)

    def _in_proj(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Return the weights and the biases of q, k and v."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return weights, (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)

    def _masks(
        self, padding: Tensor | None, attn_mask: Tensor | None, batch: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the key mask (True = take part) and the bias that dense attention adds."""
        bias = None
        if attn_mask is not None:
            bias = _additive(attn_mask)
            bias = bias[None, None] if bias.dim() == 2 else bias.unflatten(0, (batch, -1))
        if padding is None or padding.dtype == torch.bool:
            return None if padding is None else ~padding, bias
        if self.method.takes_attn_bias:
            shown = padding[:, None, None]
            return padding > -math.inf, shown if bias is None else bias + shown
        hidden = padding == -math.inf
        torch._assert_async(
            (hidden | (padding == 0)).all(),
            f"{_OP}: key_padding_mask has other values; expected 0 or -inf, "
            f"method={self.method.name!r} (method='dense' adds any bias)",
        )
        return ~hidden, bias

    def _extra_keys(self, q: Tensor) -> tuple[Tensor, Tensor] | None:
        shape = (q.shape[0], self.num_heads, 1, self.head_dim)
        keys, values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            heads = (1, self.num_heads, 1, self.head_dim)
            keys.append(self.bias_k.view(heads).expand(shape))
            values.append(self.bias_v.view(heads).expand(shape))
        if self.add_zero_attn:
            keys.append(q.new_zeros(shape))
            values.append(q.new_zeros(shape))
        if not keys:
            return None
        return torch.cat(keys, 2).to(q.dtype), torch.cat(values, 2).to(q.dtype)


def has_extra_keys(mha: nn.MultiheadAttention) -> bool:
    """Say whether the layer has keys that every query sees besides those of its inputs."""
    return mha.bias_k is not None or mha.add_zero_attn


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Say whether two arguments are one tensor, also where a wrapper has made aliases of it.

    FSDP2 and checkpointing hand on an alias for each argument, which `is` tells apart.
    """
    if a is b or torch.compiler.is_compiling() or type(a) is not Tensor or type(b) is not Tensor:
        return a is b
    whats = [(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in (a, b)]
    return whats[0] == whats[1]


def _additive(mask: Tensor) -> Tensor:
    """Turn a mask in which True hides into what is added to the logits."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -math.inf)
