"""State dicts of other libraries' linear attentions, as those of SparseAttention.

    from sparseattn.integrations.state_dicts import from_performer_pytorch

    own = from_performer_pytorch(trained.state_dict(), prefix="layers.0.0.fn.")
    options = {"method": "performer", "features": len(own["method.projection"]), "eps": 1e-4}
    layer = SparseAttention(512, 8, batch_first=True, **options)
    layer.load_state_dict(own)

Each function takes the state dict of one attention module, or with ``prefix`` that of a model it is
part of, and names every key that it does not know or misses. Tensors are those given, or views and
copies of them. Where the other library has fewer parameters, they are repeated, and are free to
part in further training: a projection without bias gets one of zeros beside another that has one,
shared keys and values become two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparseattn import checks

State = Mapping[str, Tensor]


def from_performer_pytorch(state_dict: State, *, prefix: str = "") -> dict[str, Tensor]:
    """Convert a ``SelfAttention`` or ``CrossAttention`` of performer-pytorch.

    For the method "performer" with ``features`` = m and ``eps=1e-4``, or ``kernel="relu"`` for
    generalized_attention=True. Its keys: to_q, to_k, to_v, to_out, and
    fast_attention.projection_matrix [m, D].

    Args:
        state_dict: of the module, or of a model around it.
        prefix: what the module's keys begin with there.

    Returns:
        The state dict of SparseAttention(E, H), E = H * D; with bias=False if it has no biases.

    Raises:
        TypeError: a value is no tensor.
        ValueError: unknown or missing keys (local attention heads have no place here), or a width
            H * D that is not that of the tokens.

    Notes:
        What a state dict does not tell: causal attention, no_projection, and other functions than
        ReLU for generalized_attention are other functions. A padding mask of performer-pytorch
        leaves hidden keys in the denominator; here they take no part.
    """
    op = "from_performer_pytorch"
    names = [f"to_{name}" for name in ("q", "k", "v", "out")]
    own = _take(
        op, state_dict, prefix,
        [f"{name}.weight" for name in names] + ["fast_attention.projection_matrix"],
        [f"{name}.bias" for name in names],
    )  # fmt: skip
    found = _projections(op, own, *names)
    return found | {"method.projection": own["fast_attention.projection_matrix"]}


def from_linformer(state_dict: State, *, prefix: str = "") -> dict[str, Tensor]:
    """Convert a ``LinformerSelfAttention`` of linformer.

    For the method "linformer" with ``tokens`` = seq_len and ``num_landmarks`` = k, ``sharing``
    "key-value" for share_kv=True, else "headwise". Its keys: to_q, to_k, to_v, to_out, and proj_k,
    proj_v [seq_len, k]; to_v and proj_v are missing with share_kv=True. The one head of
    one_kv_head=True is repeated.

    Args:
        state_dict: of the module, or of a model around it.
        prefix: what the module's keys begin with there.

    Returns:
        The state dict of SparseAttention(E, H), E = H * D.

    Raises:
        TypeError: a value is no tensor.
        ValueError: unknown or missing keys, or a width H * D that is not that of the tokens.
    """
    op = "from_linformer"
    shared = f"{prefix}to_v.weight" not in state_dict and f"{prefix}proj_v" not in state_dict
    names = ["to_q", "to_k", "to_k" if shared else "to_v", "to_out"]
    kinds = ["k"] if shared else ["k", "v"]
    required = [*dict.fromkeys(f"{name}.weight" for name in names), "to_out.bias"]
    own = _take(op, state_dict, prefix, required + [f"proj_{kind}" for kind in kinds], [])
    width = own["to_q.weight"].shape[0]
    for name in set(names[1:3]):
        weight = own[f"{name}.weight"]
        if weight.shape[0] and weight.shape[0] < width and width % weight.shape[0] == 0:
            own[f"{name}.weight"] = weight.repeat(width // weight.shape[0], 1)
    found = _projections(op, own, *names)
    targets = {"k": "method.key_projection", "v": "method.value_projection"}
    return found | {targets[kind]: own[f"proj_{kind}"].mT.contiguous() for kind in kinds}


def from_nystrom_attention(state_dict: State, *, prefix: str = "") -> dict[str, Tensor]:
    """Convert a ``NystromAttention`` of nystrom-attention.

    For the method "nystrom" with its num_landmarks and pinv_iterations, ``legacy_start=True``, and
    ``residual_kernel`` = residual_conv_kernel unless residual=False. Its keys: to_qkv, to_out.0,
    and res_conv.weight [H, 1, residual_conv_kernel, 1].

    Args:
        state_dict: of the module, or of a model around it.
        prefix: what the module's keys begin with there.

    Returns:
        The state dict of SparseAttention(E, H), E = H * dim_head.

    Raises:
        TypeError: a value is no tensor.
        ValueError: unknown or missing keys, or a width H * dim_head that is not that of the tokens.

    Notes:
        The same results where num_landmarks divides the number of tokens, none of them masked. Of
        other numbers it pads the front with zeros, which take part unless a mask is given.
    """
    op = "from_nystrom_attention"
    required = ["to_qkv.weight", "to_out.0.weight", "to_out.0.bias"]
    own = _take(op, state_dict, prefix, required, ["res_conv.weight"])
    weights = own["to_qkv.weight"].chunk(3)
    names = ("to_q", "to_k", "to_v")
    named = {f"{name}.weight": weight for name, weight in zip(names, weights, strict=True)}
    found = _projections(op, own | named, *names, "to_out.0")
    return found | _residual(own, "res_conv.weight")


def from_nystromformer(state_dict: State, *, prefix: str = "") -> dict[str, Tensor]:
    """Convert a ``NystromformerAttention`` of transformers.

    For the method "nystrom" with num_landmarks of its configuration, ``legacy_start=True``, and
    ``residual_kernel`` = conv_kernel_size unless that is None. Its keys: self.query, self.key,
    self.value, self.conv.weight [H, 1, conv_kernel_size, 1] and output.dense. output.LayerNorm is
    not a part of attention, and left out.

    Args:
        state_dict: of the module, or of a model around it.
        prefix: what the module's keys begin with there, "nystromformer.encoder.layer.0.attention."
            in a NystromformerForMaskedLM.

    Returns:
        The state dict of SparseAttention(E, H).

    Raises:
        TypeError: a value is no tensor.
        ValueError: unknown or missing keys.

    Notes:
        The same results where num_landmarks divides segment_means_seq_len and no token is masked:
        transformers' segment means take masked tokens in. With num_landmarks equal to
        segment_means_seq_len it attends densely, and so does the method "dense".
    """
    op = "from_nystromformer"
    names = ["self.query", "self.key", "self.value", "output.dense"]
    left_out = ["output.LayerNorm.weight", "output.LayerNorm.bias"]
    own = _take(
        op, state_dict, prefix, [f"{name}.{kind}" for name in names for kind in ("weight", "bias")],
        ["self.conv.weight", *left_out],
    )  # fmt: skip
    return _projections(op, own, *names) | _residual(own, "self.conv.weight")


def _residual(own: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {"method.residual": own[key]} if key in own else {}


def _take(
    op: str, state_dict: State, prefix: str, required: list[str], optional: list[str]
) -> dict[str, Tensor]:
    """Return the tensors under the prefix, without it; name what is unknown and what is missing."""
    own = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    where = f" under {prefix!r}" if prefix else ""
    if unknown := sorted(own.keys() - {*required, *optional}):
        raise ValueError(
            f"{op}: state_dict has the keys {unknown}{where}; expected none but "
            f"{sorted([*required, *optional])}"
        )
    if missing := [key for key in required if key not in own]:
        raise ValueError(f"{op}: state_dict has no {missing}{where}; expected them")
    for key, value in own.items():
        checks.require_tensor(op, key, value)
    return own


def _projections(
    op: str, own: dict[str, Tensor], q: str, k: str, v: str, out: str
) -> dict[str, Tensor]:
    """Return the projections of q, k, v and of the result under torch's names."""
    shapes = checks.Shapes(op)
    shapes.set("E", own[f"{q}.weight"].shape[-1], f"{q}.weight")
    for name in (q, k, v, out):
        shapes.bind(f"{name}.weight", own[f"{name}.weight"], "E E")
        if f"{name}.bias" in own:
            shapes.bind(f"{name}.bias", own[f"{name}.bias"], "E")
    weights = [own[f"{name}.weight"] for name in (q, k, v)]
    found = {"in_proj_weight": torch.cat(weights), "out_proj.weight": own[f"{out}.weight"]}
    if any(f"{name}.bias" in own for name in (q, k, v, out)):
        zeros = weights[0].new_zeros(weights[0].shape[0])
        biases = [own.get(f"{name}.bias", zeros) for name in (q, k, v, out)]
        found |= {"in_proj_bias": torch.cat(biases[:3]), "out_proj.bias": biases[3].clone()}
    return found
