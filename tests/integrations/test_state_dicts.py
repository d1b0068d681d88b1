"""State dicts of other libraries: from layouts written down here to what their formulas give."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparseattn import SparseAttention
from sparseattn.integrations.state_dicts import (
    from_linformer,
    from_nystrom_attention,
    from_nystromformer,
    from_performer_pytorch,
)
from sparseattn.testing.landmarks import require_close

HEADS, DIM, TOKENS = 4, 64, 50
E = HEADS * DIM


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def heads(x):
    return x.unflatten(2, (-1, DIM)).transpose(1, 2)


def drawn(shapes):
    return {
        key: torch.randn(shape, dtype=torch.float64) / max(shape) ** 0.5
        for key, shape in shapes.items()
    }


# -- performer-pytorch 1.1.4 -------------------------------------------------------------------


def performer(qkv_bias=False, out_bias=True, features=266):
    """The keys and shapes of its SelfAttention(dim=256, heads=4)."""
    shapes = {}
    for name in ("to_q", "to_k", "to_v", "to_out"):
        shapes[f"{name}.weight"] = (E, E)
        if out_bias if name == "to_out" else qkv_bias:
            shapes[f"{name}.bias"] = (E,)
    state = drawn(shapes)
    state["fast_attention.projection_matrix"] = torch.randn(features, DIM, dtype=torch.float64)
    return state


def performer_formula(state, x, is_relu):
    """Features with an eps beside exponents shifted by the largest, as that package makes them."""
    q, k, v = (heads(linear(state, f"to_{name}", x)) for name in "qkv")
    w = state["fast_attention.projection_matrix"]
    of_q, of_k = (t * DIM**-0.25 @ w.T for t in (q, k))
    if is_relu:
        phi_q, phi_k = (t.relu() + 0.001 for t in (of_q, of_k))
    else:
        size_q, size_k = (t.square().sum(-1, keepdim=True) / 2 * DIM**-0.5 for t in (q, k))
        phi_q = (of_q - size_q - of_q.amax(-1, keepdim=True)).exp() + 1e-4
        phi_k = (of_k - size_k - of_k.amax((-1, -2), keepdim=True)).exp() + 1e-4
    above = phi_q @ (phi_k.mT @ v)
    out = above / (phi_q @ phi_k.sum(2)[..., None])
    return linear(state, "to_out", out.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("is_relu", [False, True])
@pytest.mark.parametrize(("qkv_bias", "out_bias"), [(False, True), (True, True), (False, False)])
def test_performer_pytorch(qkv_bias, out_bias, is_relu):
    state = performer(qkv_bias, out_bias)
    around = {f"layers.0.{key}": value for key, value in state.items()} | {"norm.g": torch.ones(1)}
    options = {"kernel": "relu"} if is_relu else {"eps": 1e-4}
    layer = SparseAttention(
        E, HEADS, bias=qkv_bias or out_bias, batch_first=True, dtype=torch.float64,
        method="performer", features=266, **options,
    )  # fmt: skip
    layer.load_state_dict(from_performer_pytorch(around, prefix="layers.0."))
    x = torch.randn(2, TOKENS, E, dtype=torch.float64)
    truth = performer_formula(state, x, is_relu)
    require_close("out", layer(x, x, x)[0], truth, truth.norm(), torch.float64)


# -- linformer 0.2.3 ---------------------------------------------------------------------------


def linformer(share_kv=False, one_kv_head=False, seq_len=64, landmarks=16):
    """The keys and shapes of its LinformerSelfAttention(256, 64, k=16, heads=4)."""
    kv = (DIM if one_kv_head else E, E)
    shapes = {"proj_k": (seq_len, landmarks), "to_q.weight": (E, E), "to_k.weight": kv}
    if not share_kv:
        shapes |= {"proj_v": (seq_len, landmarks), "to_v.weight": kv}
    return drawn(shapes | {"to_out.weight": (E, E), "to_out.bias": (E,)})


def linformer_formula(state, x):
    q, k = (heads(linear(state, f"to_{name}", x)) for name in "qk")
    v = heads(linear(state, "to_v", x)) if "to_v.weight" in state else k
    of_k, of_v = state["proj_k"], state.get("proj_v", state["proj_k"])
    k, v = of_k[: x.shape[1]].T @ k, of_v[: x.shape[1]].T @ v
    out = (q @ k.mT * DIM**-0.5).softmax(-1) @ v
    return linear(state, "to_out", out.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("one_kv_head", [False, True])
@pytest.mark.parametrize("share_kv", [False, True])
def test_linformer(share_kv, one_kv_head):
    state = linformer(share_kv, one_kv_head)
    layer = SparseAttention(
        E, HEADS, batch_first=True, dtype=torch.float64, method="linformer", tokens=64,
        num_landmarks=16, sharing="key-value" if share_kv else "headwise",
    )  # fmt: skip
    layer.load_state_dict(from_linformer(state))
    for length in (64, TOKENS):
        x = torch.randn(2, length, E, dtype=torch.float64)
        truth = linformer_formula(state, x)
        require_close("out", layer(x, x, x)[0], truth, truth.norm(), torch.float64)


# -- nystrom-attention 0.0.14 and transformers -------------------------------------------------

LANDMARKS, NYSTROM_TOKENS = 8, 48


def nystrom(kernel=5):
    """The keys and shapes of NystromAttention(256, heads=4, residual_conv_kernel=5)."""
    shapes = {"to_qkv.weight": (3 * E, E), "to_out.0.weight": (E, E), "to_out.0.bias": (E,)}
    return drawn(shapes | ({"res_conv.weight": (HEADS, 1, kernel, 1)} if kernel else {}))


def nystrom_formula(state, x):
    """Means of segments of equal length; the start value is scaled by the largest of the batch."""
    q, k, v = (heads(t) for t in F.linear(x, state["to_qkv.weight"]).chunk(3, -1))
    queries, keys = (t.unflatten(2, (LANDMARKS, -1)).mean(3) for t in (q * DIM**-0.5, k))
    first = (q * DIM**-0.5 @ keys.mT).softmax(-1)
    middle, last = (queries @ keys.mT).softmax(-1), (queries @ k.mT).softmax(-1)
    z = middle.mT / (middle.sum(-1).max() * middle.sum(-2).max())
    one = torch.eye(LANDMARKS, dtype=x.dtype)
    for _ in range(6):
        y = middle @ z
        z = z @ (13 * one - y @ (15 * one - y @ (7 * one - y))) / 4
    out = first @ (z @ (last @ v))
    if "res_conv.weight" in state:
        weight = state["res_conv.weight"]
        out = out + F.conv2d(v, weight, padding=(weight.shape[2] // 2, 0), groups=HEADS)
    return linear(state, "to_out.0", out.transpose(1, 2).flatten(2))


def require_same_as_nystrom(state, truth, x):
    """Within 1e-9: roundings grow with the condition of the matrix that is inverted."""
    layer = SparseAttention(
        E, HEADS, batch_first=True, dtype=torch.float64, method="nystrom", num_landmarks=LANDMARKS,
        legacy_start=True, residual_kernel=5 if "method.residual" in state else None,
    )  # fmt: skip
    layer.load_state_dict(state)
    require_close("out", layer(x, x, x)[0], truth, 1000 * truth.norm(), torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [5, None])
def test_nystrom_attention(kernel):
    state = nystrom(kernel)
    x = torch.randn(2, NYSTROM_TOKENS, E, dtype=torch.float64)
    require_same_as_nystrom(from_nystrom_attention(state), nystrom_formula(state, x), x)


@torch.no_grad()
def test_nystromformer():
    modeling = pytest.importorskip(
        "transformers.models.nystromformer.modeling_nystromformer",
        reason='needs pip install "sparseattn[test]"',
    )
    config = modeling.NystromformerConfig(
        hidden_size=E, num_attention_heads=HEADS, num_landmarks=LANDMARKS, conv_kernel_size=5,
        segment_means_seq_len=NYSTROM_TOKENS, inv_coeff_init_option=False,
    )  # fmt: skip
    peer = modeling.NystromformerAttention(config).eval().double()
    for weight in peer.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    around = {f"layer.0.{name}": value for name, value in peer.state_dict().items()}
    x = torch.randn(2, NYSTROM_TOKENS, E, dtype=torch.float64)
    truth = peer.output.dense(peer.self(x)[0])
    require_same_as_nystrom(from_nystromformer(around, prefix="layer.0."), truth, x)


def nystromformer():
    """The keys and shapes of NystromformerAttention, without what is optional."""
    names = ("self.query", "self.key", "self.value", "output.dense")
    weights = {f"{name}.weight": (E, E) for name in names}
    return drawn(weights | {f"{name}.bias": (E,) for name in names})


# -- what is refused ---------------------------------------------------------------------------

PEERS = {  # name: (the function, a state dict, one of its keys)
    "performer": (from_performer_pytorch, performer, "to_k.weight"),
    "linformer": (from_linformer, linformer, "to_k.weight"),
    "nystrom-attention": (from_nystrom_attention, nystrom, "to_qkv.weight"),
    "nystromformer": (from_nystromformer, nystromformer, "self.key.weight"),
}


@pytest.mark.parametrize("name", PEERS)
def test_unknown_and_missing_keys_are_named(name):
    convert, make, key = PEERS[name]
    state = make()
    with pytest.raises(ValueError, match=re.escape("has the keys ['local_attn.rel_pos']")):
        convert(state | {"local_attn.rel_pos": torch.ones(1)})
    with pytest.raises(ValueError, match=re.escape(f"has no ['{key}']; expected")):
        convert({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=r"under 'layers\.1\.'; expected"):
        convert({f"layers.0.{k}": v for k, v in state.items()}, prefix="layers.1.")
    with pytest.raises(TypeError, match=re.escape(f"{key} is 3")):
        convert(state | {key: 3})


@pytest.mark.parametrize("name", PEERS)
def test_widths_that_have_no_place_are_refused(name):
    convert, make, _ = PEERS[name]
    queries = {"to_q.weight": DIM, "to_qkv.weight": 3 * DIM, "self.query.weight": DIM}
    narrow = {key: value[: queries.get(key, len(value))] for key, value in make().items()}
    with pytest.raises(ValueError, match=r"weight has shape \[64, 256\]; expected \[E, E\]"):
        convert(narrow)


def test_half_of_a_pair_is_missing():
    state = linformer()
    del state["proj_v"]
    with pytest.raises(ValueError, match=re.escape("has no ['proj_v']")):
        from_linformer(state)


def test_what_is_repeated_may_part_in_training():
    layer = SparseAttention(
        E, HEADS, batch_first=True, dtype=torch.float64, method="linformer", tokens=64,
        num_landmarks=16, sharing="key-value",
    )  # fmt: skip
    layer.load_state_dict(from_linformer(linformer(share_kv=True)))
    before = layer.in_proj_weight.detach().chunk(3)
    assert torch.equal(before[1], before[2])
    x = torch.randn(1, TOKENS, E, dtype=torch.float64)
    layer(x, x, x)[0].square().sum().backward()
    assert isinstance(layer.in_proj_weight, nn.Parameter)
    assert not torch.equal(*layer.in_proj_weight.grad.chunk(3)[1:])
