"""The methods that replace softmax attention by something linear, in layers and in hosts."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sparseattn import SparseAttention, convert, patch_sdpa, redraw_features, revert
from sparseattn.layers.method import Place
from sparseattn.layers.registry import make_method
from sparseattn.testing.landmarks import require_close

EMBED, HEADS, TOKENS = 32, 2, 37
METHODS = {
    "performer": ("performer", {"features": 24}),
    "cosh": ("performer", {"features": 24, "kernel": "cosh", "norms": "sqrt"}),
    "eps": ("performer", {"features": 24, "eps": 1e-4}),
    "nystrom": ("nystrom", {"num_landmarks": 9, "iterations": 2}),  # more amplify roundings
    "residual": ("nystrom", {"num_landmarks": 9, "iterations": 2, "residual_kernel": 5}),
    "headwise": ("linformer", {"tokens": 50, "num_landmarks": 9}),
    "key-value": ("linformer", {"tokens": 50, "num_landmarks": 9, "sharing": "key-value"}),
    "unshared": ("linformer", {"tokens": 50, "num_landmarks": 9, "sharing": "none"}),
    "elu": ("linear", {}),
    "relu": ("linear", {"feature_map": "relu"}),
}
every = pytest.mark.parametrize("name", METHODS)


def layer_of(name, **arguments):
    method, options = METHODS[name]
    arguments = {"batch_first": True, "dtype": torch.float64} | arguments
    layer = SparseAttention(EMBED, HEADS, method=method, **arguments, **options).eval()
    with torch.no_grad():
        for bias in (layer.in_proj_bias, layer.out_proj.bias):
            if bias is not None:  # torch begins with zeros
                bias.normal_()
    return layer


def inputs():
    hidden = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [28], [0]])
    return torch.randn(3, TOKENS, EMBED, dtype=torch.float64), hidden


def require_same(found, truth):
    require_close("out", found, truth, truth.norm(), torch.float64)


@torch.no_grad()
@every
@pytest.mark.parametrize(
    "variant", [{}, {"bias": False}, {"kdim": 24, "vdim": 40}, {"batch_first": False}]
)
def test_weights_are_those_of_the_result(name, variant):
    """Also that tokens may be projected before keys are made of them: weights come without."""
    layer = layer_of(name, **variant)
    x, hidden = inputs()
    qkv = (x, x, x)
    if "kdim" in variant:
        wide = torch.randn(3, TOKENS, 64, dtype=torch.float64)
        asking = x if METHODS[name][0] == "nystrom" else x[:, :30]  # self-attention only
        qkv = (asking, wide[..., :24], wide[..., 24:])
    if not layer.batch_first:
        qkv = (x.transpose(0, 1),) * 3
    out, none = layer(*qkv, hidden)
    again, weights = layer(*qkv, hidden, need_weights=True, average_attn_weights=False)
    assert none is None
    require_same(out, again)
    first = [t if layer.batch_first else t.transpose(0, 1) for t in qkv]
    v = layer._project(*first, "kdim" not in variant)[2]
    attended = layer.out_proj((weights @ v).transpose(1, 2).flatten(2))
    require_same(out if layer.batch_first else out.transpose(0, 1), attended)
    assert not weights[1, :, :, 28:].any() and not weights[2].any()
    _, average = layer(*qkv, hidden, need_weights=True)
    require_same(average, weights.mean(1))


@torch.no_grad()
@every
def test_padding_is_as_if_it_were_not_there(name):
    layer = layer_of(name)
    x, hidden = inputs()
    dirty = x.masked_fill(hidden[..., None], torch.nan)
    out, _ = layer(dirty, dirty, dirty, hidden)
    short, _ = layer(x[1:2, :28], x[1:2, :28], x[1:2, :28])
    require_same(out[1:2, :28], short)
    nothing, _ = layer(x, dirty, dirty, hidden)
    require_same(nothing[2], layer.out_proj.bias.expand(TOKENS, -1))


@every
def test_all_parameters_learn_and_dropout_drops(name):
    layer = layer_of(name, dropout=0.5).train()
    x, hidden = inputs()
    x.requires_grad_()
    out, _ = layer(x, x, x, hidden)
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    assert x.grad.isfinite().all()
    assert not torch.equal(out, layer(x, x, x, hidden)[0])


def test_filters_of_a_grid_begin_at_zero_and_learn():
    options = {"method": "nystrom", "num_landmarks": (2, 3), "grid": (6, 6)}
    mha = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    plain = SparseAttention.from_torch(mha, **options)
    layer = SparseAttention.from_torch(mha, residual_kernel=(3, 5), **options)
    assert layer.method.residual.shape == (HEADS, 1, 3, 5)
    x, hidden = inputs()  # a class token and 36 others
    out, _ = layer(x, x, x, hidden)
    assert torch.equal(out, plain(x, x, x, hidden)[0])
    out.square().sum().backward()
    assert layer.method.residual.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["performer", "headwise", "elu"])
def test_under_autocast_the_projections_are_cast_too(name):
    layer, (x, hidden) = layer_of(name, dtype=torch.float32), inputs()
    x = x.float()
    exact, _ = layer(x, x, x, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = layer(x, x, x, hidden, need_weights=True)
        plain, _ = layer(x, x, x, hidden)
    assert plain.dtype == torch.bfloat16 and weights.isfinite().all()
    for found in (out, plain):
        assert (found - exact).norm() < 0.05 * exact.norm()


# -- what a layer owns -------------------------------------------------------------------------

OWN = {
    "performer": {"projection": [24, 16]},
    "residual": {"residual": [2, 1, 5, 1]},
    "headwise": {"key_projection": [9, 50], "value_projection": [9, 50]},
    "key-value": {"key_projection": [9, 50]},
    "unshared": {"key_projection": [2, 9, 50], "value_projection": [2, 9, 50]},
    "elu": {},
}


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_state_dict_has_what_the_method_owns(name):
    layer, (x, hidden) = layer_of(name), inputs()
    plain = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    own = {f"method.{key}": shape for key, shape in OWN[name].items()}
    state = layer.state_dict()
    assert list(state) == [*plain.state_dict(), *own]
    assert {key: list(state[key].shape) for key in own} == own
    expected, _ = layer(x, x, x, hidden)
    other = layer_of(name)
    other.load_state_dict(state)
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, x, x, hidden)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_layers_from_the_meta_device_can_be_filled(name):
    layer = layer_of(name, device="meta", dtype=torch.float32)
    assert all(t.is_meta for t in layer.state_dict().values())
    layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(torch.nan)
    layer.reset_parameters()
    filled = layer.state_dict().values()
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in filled)
    if "key_projection" in OWN[name]:  # independent tokens keep their variance
        assert 0.8 < layer.method.key_projection.std() * 50**0.5 < 1.2


def test_features_are_drawn_from_the_seed_and_redrawn():
    def projection(**options):
        method = make_method("performer", {"features": 5, **options}, "here")
        method.prepare(Place(head_dim=16))
        return method.projection

    assert torch.equal(projection(seed=3), projection(seed=3))
    assert not torch.equal(projection(seed=3), projection(seed=4))
    assert not torch.equal(projection(), projection())
    torch.testing.assert_close(projection(norms="sqrt").norm(dim=1), torch.full((5,), 4.0))
    model = nn.ModuleList([layer_of("performer"), layer_of("elu"), layer_of("eps")])
    before = copy.deepcopy(model)
    places = [model[i].method.projection.data_ptr() for i in (0, 2)]
    for each in (model, before):
        assert redraw_features(each, torch.Generator().manual_seed(0)) == 2
    assert [model[i].method.projection.data_ptr() for i in (0, 2)] == places
    for i in (0, 2):
        assert torch.equal(model[i].method.projection, before[i].method.projection)
    assert not torch.equal(model[0].method.projection, model[2].method.projection)


def test_options_are_checked():
    for method, options, message in (
        ("performer", {"features": 0}, "performer: features is 0; expected"),
        ("performer", {"kernel": "exp"}, "performer: kernel is 'exp'; expected"),
        ("performer", {"norms": "one"}, "performer: norms is 'one'; expected"),
        ("performer", {"seed": -1}, "performer: seed is -1; expected"),
        ("nystrom", {"num_landmarks": 0}, "nystrom: num_landmarks is 0; expected"),
        ("nystrom", {"iterations": 0}, "nystrom: iterations is 0; expected"),
        (
            "nystrom",
            {"residual_kernel": 4},
            "nystrom: residual_kernel is 4 .*; expected an odd int",
        ),
        (
            "nystrom",
            {"residual_kernel": (3, 3, 3), "grid": (6, 6)},
            "one for each axis of the grid",
        ),
        ("linformer", {"tokens": 0}, "linformer: tokens is 0; expected"),
        ("linformer", {"tokens": 9, "sharing": "all"}, "linformer: sharing is 'all'; expected"),
        ("linear", {"feature_map": "exp"}, "linear: feature_map is 'exp'; expected"),
    ):
        with pytest.raises(ValueError, match=message):
            make_method(method, options, "here")
    with pytest.raises(TypeError, match="SparseAttention: method 'linformer' is given no tokens"):
        SparseAttention(EMBED, HEADS, method="linformer")


@pytest.mark.parametrize("name", ["performer", "nystrom", "residual", "headwise", "elu"])
def test_calls_that_cannot_be_are_refused(name):
    layer, (x, _) = layer_of(name), inputs()
    with pytest.raises(NotImplementedError, match="attn_mask has shape"):
        layer(x, x, x, attn_mask=torch.zeros(TOKENS, TOKENS))
    with pytest.raises(NotImplementedError, match="has no extra keys"):
        layer_of(name, add_bias_kv=True)
    q = torch.randn(1, 2, 9, 16)
    with pytest.raises(NotImplementedError, match="extra is given"):
        layer.method(q, q, q, extra=(q, q))
    if name == "nystrom":
        with pytest.raises(ValueError, match=r"of the tokens of q, N=30 \(from q\)"):
            layer(x[:, :30], x, x)
    if name in ("elu", "nystrom"):
        return
    if name == "headwise":
        with pytest.raises(ValueError, match="k has 51 tokens; expected at most tokens=50"):
            layer(x, *(torch.randn(3, 51, EMBED, dtype=torch.float64),) * 2)
    method, options = METHODS[name]
    with pytest.raises(RuntimeError, match="expected a call of prepare"):
        make_method(method, options, "here")(q, q, q)
    with pytest.raises(ValueError, match=r"patch_sdpa: method is .* expected one without"):
        patch_sdpa(method, **options)


# -- hosts -------------------------------------------------------------------------------------


def timm_vit():
    timm = pytest.importorskip("timm", reason='needs pip install "sparseattn[test]"')
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_small_patch16_224", **sizes), torch.randn(2, 3, 32, 32)


def hf_vit():
    transformers = pytest.importorskip(
        "transformers", reason='needs pip install "sparseattn[test]"'
    )
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=4,
    )  # fmt: skip
    return transformers.ViTModel(config), torch.randn(2, 3, 32, 32)


def monai_block():
    blocks = pytest.importorskip(
        "monai.networks.blocks", reason='needs pip install "sparseattn[test]"'
    )
    return blocks.TransformerBlock(32, 64, 2), torch.randn(2, 65, 32)


def torch_encoder():
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.randn(2, 65, 32)


def result(model, x):
    out = model(x)
    return getattr(out, "last_hidden_state", out)


@pytest.mark.parametrize("make", [timm_vit, hf_vit, monai_block, torch_encoder])
def test_hosts_convert_train_and_go_back(make):
    model, x = make()
    model.eval()
    before = result(model, x)
    for method, options in (
        ("performer", {"features": 2048, "norms": "sqrt"}),
        ("linformer", {"tokens": 65, "num_landmarks": 8, "sharing": "none"}),
        ("nystrom", {"num_landmarks": (4, 4), "grid": (8, 8), "residual_kernel": 3}),
        ("linear", {}),
    ):
        report = convert(model, method, **options)
        assert report.swapped and not report.skipped
        assert "no softmax attention: train the model with it" in str(report)
        out = result(model, x)
        out.square().sum().backward()
        own = [p for n, p in model.named_parameters() if ".method." in f".{n}"]
        assert bool(own) == (method in ("linformer", "nystrom")) and all(p.grad.any() for p in own)
        error = (out - before).norm() / before.norm()
        assert error > 1e-6
        if method == "performer":  # many features of small q and k: close to softmax
            assert error < 0.05
    revert(model)
    assert not [name for name in model.state_dict() if "method" in name]
    assert torch.equal(result(model, x), before)


def test_heads_that_a_module_does_not_tell_are_reported():
    model, _ = hf_vit()
    layers = [module for module in model.modules() if hasattr(module, "head_dim")]
    for layer in layers:
        del layer.head_dim
    reasons = set(convert(model, "performer").skipped.values())
    assert layers and reasons == {"method='performer' needs the head dim"}
