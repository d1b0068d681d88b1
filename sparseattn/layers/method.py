"""What the methods of attending have in common, and the one that is not sparse."""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparseattn.layers.dense import attention_weights, dense_attention, with_extra_keys
from sparseattn.ops.block_sparse_attention import Impl, block_sparse_attention
from sparseattn.structures.block_mask import BlockMask

_LOG = logging.getLogger("sparseattn")
_SAID: set[str] = set()  # a model of forty layers says it once
Fallback = Literal["auto", "never"]


class Call(NamedTuple):
    """What a method is called with; see ``Method.forward``."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    attn_bias: Tensor | None = None
    extra: tuple[Tensor, Tensor] | None = None
    scale: float | None = None
    dropout: float = 0.0
    saliency: Tensor | None = None
    is_shortened: bool = False  # k and v are of the tokens that ``Method.shorten`` returned


class Place(NamedTuple):
    """Where a method attends; None is what the host does not tell.

    width: of the tokens that ``predict`` will see. heads: of the keys. head_dim: D.
    """

    width: int | None = None
    heads: int | None = None
    head_dim: int | None = None


class Shortened(NamedTuple):
    """Tokens projected along the sequence, E x [B, m, width], and what they weigh, E 1 [B, m]."""

    keys: Tensor
    key_sums: Tensor
    values: Tensor
    value_sums: Tensor


class Method(nn.Module):
    """Which keys each query attends to.

    ``forward(q, k, v)`` with q [B, H, Nq, D] and k, v [B, G, Nk, D] returns o [B, H, Nq, D].
    A method is a module, so that ``.to()``, copies and pickles take it along. Most have nothing in
    a state_dict; ``prepare`` makes what the others have: a predictor ("saliency"), random features
    ("performer"), projections ("linformer"), filters ("nystrom").

    impl: passed to the op. fallback: "auto" attends densely where sparse attention would be
    slower; the log "sparseattn" says so once, and ``fell_back`` is the reason of the last eager
    call that did. "never" does not.
    """

    name: ClassVar[str] = ""
    options: ClassVar[tuple[str, ...]] = ("impl", "fallback")
    takes_attn_bias: ClassVar[bool] = False  # any bias of the logits, hence any mask
    takes_extra_keys: ClassVar[bool] = True
    takes_saliency: ClassVar[bool] = False
    approximates: ClassVar[bool] = False  # its weights are no softmax over keys
    needs_place: bool = False  # has something of its own that ``prepare`` makes

    def __init__(self, impl: Impl = "auto", fallback: Fallback = "auto") -> None:
        super().__init__()
        if fallback not in ("auto", "never"):
            raise ValueError(
                f"{self.name}: fallback is {fallback!r}; expected one of 'auto', 'never'"
            )
        self.impl: Impl = impl
        self.fallback: Fallback = fallback
        self.fell_back: str | None = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        saliency: Tensor | None = None,
    ) -> Tensor:
        """Attend; o [B, H, Nq, D].

        Args:
            q: [B, H, Nq, D].
            k: [B, G, Nk, D]; H is a multiple of G.
            v: [B, G, Nk, D].
            key_mask: bool [B, Nk]; True = take part.
            query_mask: bool [B, Nq]; a query that is False has no say in what others attend to.
                Its own result means nothing. In self-attention, it is the key_mask.
            attn_bias: added to the logits, [B or 1, H or 1, Nq, Nk]; for the method "dense" only.
            extra: keys and values [B, H, E, D] that every query sees besides the chosen ones.
            scale: multiplies q . k; default D ** -0.5.
            dropout: share of the attention weights (method "dense"), or else of the elements of o,
                that is dropped. A layer in eval gives 0.
            saliency: [B, Nk] in (0, 1], of the keys; for the method "saliency" only.
        """
        return self.attend(
            Call(q, k, v, key_mask, query_mask, attn_bias, extra, scale, dropout, saliency)
        )

    def attend(self, call: Call) -> Tensor:
        """Do what ``forward`` does."""
        self._refuse_saliency(call)
        if call.attn_bias is not None:
            raise NotImplementedError(
                f"{self.name}: attn_bias is given; expected None: this method takes masks of keys "
                "only, method='dense' any"
            )
        reason = self.dense_reason(call.k.shape[2], call.k.device)
        if not torch.compiler.is_compiling():
            self._say(reason)
        out = self._attend(call) if reason is None else attend_densely(call, self._dense_bias(call))
        return nn.functional.dropout(out, call.dropout) if call.dropout else out

    def dense_reason(self, k_len: int, device: torch.device) -> str | None:
        """Return why queries attend densely to that many keys, or None if they do not."""
        return None

    @property
    def needs_saliency(self) -> bool:
        """Say whether every call must bring a saliency."""
        return False

    def obstacle(self, place: Place) -> str | None:
        """Return what ``prepare`` misses there, if so."""
        return None

    def prepare(self, place: Place, device: Any = None, dtype: Any = None) -> None:
        """Make the parameters and buffers, if the method has any."""

    def reset_parameters(self) -> None:
        """Draw the parameters anew, if the method has any."""

    def predict(self, x: Tensor) -> Tensor | None:
        """Return the saliency [B, Nk] of tokens x [B, Nk, width], if the method predicts it."""
        return None

    def shorten(self, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Shortened | None:
        """Return fewer tokens to make keys and values of, if the method does so; [B, Nk, width]."""
        return None

    def weights(self, call: Call) -> Tensor:
        """Return the attention weights [B, H, Nq, Nk]; extra keys stand at the end of Nk."""
        k = call.k
        bias = self.logit_bias(call)
        if call.key_mask is not None:
            zero = torch.zeros((), device=k.device) if bias is None else bias
            bias = torch.where(call.key_mask[:, None, None], zero, -math.inf)
            k = k.masked_fill(~call.key_mask[:, None, :, None], 0)
        if call.extra is not None:
            k = torch.cat([k, call.extra[0]], 2)
            bias = None if bias is None else nn.functional.pad(bias, (0, call.extra[0].shape[2]))
        return attention_weights(call.q, k, bias, call.scale)

    def logit_bias(self, call: Call) -> Tensor | None:
        """Return what is added to the logits, broadcastable to [B, H, Nq, Nk]; -inf hides.

        Dense attention with this bias and the key mask gives what the method gives.
        """
        if self.dense_reason(call.k.shape[2], call.k.device) is not None:
            return self._dense_bias(call)
        return self._sparse_bias(call)

    def _mask(self, call: Call) -> BlockMask:
        raise NotImplementedError

    def _attend(self, call: Call) -> Tensor:
        out, lse = block_sparse_attention(
            call.q, call.k, call.v, self._mask(call), key_mask=call.key_mask, scale=call.scale,
            return_lse=True, impl=self.impl,
        )  # fmt: skip
        if call.extra is None:
            return out
        return with_extra_keys(out, lse, call.q, *call.extra, call.scale)

    def _sparse_bias(self, call: Call) -> Tensor | None:
        shown = self._mask(call).to_dense()
        return torch.zeros_like(shown, dtype=torch.float32).masked_fill(~shown, -math.inf)

    def _dense_bias(self, call: Call) -> Tensor | None:
        return None

    def _refuse_saliency(self, call: Call) -> None:
        if call.saliency is not None and not self.takes_saliency:
            raise NotImplementedError(
                f"{self.name}: saliency is given; expected None: method='saliency' alone takes it"
            )

    def _say(self, reason: str | None) -> None:
        if reason is not None and reason not in _SAID:
            _SAID.add(reason)
            _LOG.warning(
                "%s: all keys are attended to, since %s (fallback='never' turns this off)",
                self.name, reason,
            )  # fmt: skip
        self.fell_back = reason

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(f"{option}={getattr(self, option)!r}" for option in self.options)


class Dense(Method):
    """Every query attends to every key, by torch's scaled_dot_product_attention."""

    name = "dense"
    options = ()
    takes_attn_bias = True

    def __init__(self) -> None:
        super().__init__()

    def attend(self, call: Call) -> Tensor:
        """Do what ``forward`` does. Dropout is that of the attention weights."""
        self._refuse_saliency(call)
        return attend_densely(call, call.attn_bias, call.dropout)

    def _sparse_bias(self, call: Call) -> Tensor | None:
        return call.attn_bias


def attend_densely(call: Call, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attend to all keys, with `bias` on the logits."""
    k, v, key_mask = call.k, call.v, call.key_mask
    if call.extra is not None:
        count = call.extra[0].shape[2]
        k, v = torch.cat([k, call.extra[0]], 2), torch.cat([v, call.extra[1]], 2)
        bias = None if bias is None else nn.functional.pad(bias, (0, count))
        if key_mask is not None:
            key_mask = nn.functional.pad(key_mask, (0, count), value=True)
    return dense_attention(
        call.q, k, v, key_mask=key_mask, bias=bias, scale=call.scale, dropout=dropout
    )
