"""SparseAttention against nn.MultiheadAttention, whose constructor, forward and state_dict it has.

The methods are told to keep everything, so that the result is known; what they leave out is the
matter of test_methods.py.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from sparseattn import SparseAttention
from sparseattn.testing.tolerance import judge, require

EMBED, HEADS, TOKENS = 32, 2, 37
EVERYTHING = {  # options with which a method hides nothing
    "dense": {},
    "topk": {"keep": 1.0, "block_size": 16, "fallback": "never"},
    "window": {"radius": TOKENS, "grid": TOKENS, "block_size": 16},
}
VARIANTS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "other widths": {"kdim": 24, "vdim": 40},
    "no bias": {"bias": False},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "a zero key": {"add_zero_attn": True},
}
METHODS = list(EVERYTHING)


def pair(method, **variant):
    """A torch layer in eval and a sparse one with its parameters."""
    torch_layer = nn.MultiheadAttention(EMBED, HEADS, **variant).eval()
    with torch.no_grad():  # torch starts biases at 0
        for parameter in torch_layer.parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.1)
    layer = SparseAttention(EMBED, HEADS, method=method, **EVERYTHING[method], **variant).eval()
    layer.load_state_dict(torch_layer.state_dict())
    return torch_layer, layer


def inputs_for(layer, q_len=TOKENS, k_len=TOKENS, batch=3):
    def tokens(length, width):
        shape = (batch, length, width) if layer.batch_first else (length, batch, width)
        return torch.randn(shape)

    x = tokens(q_len, EMBED)
    if q_len == k_len and layer.kdim == layer.vdim == EMBED:
        return x, x, x
    return x, tokens(k_len, layer.kdim), tokens(k_len, layer.vdim)


def padding(k_len=TOKENS, batch=3):
    """Three samples: whole, short, shorter."""
    return torch.arange(k_len) >= torch.tensor([[k_len], [k_len - 9], [5]])[:batch]


def require_same(layer, torch_layer, *inputs, **arguments):
    """Hold out and weights against torch's layer in float64, by the tolerance rule."""
    arguments.setdefault("need_weights", True)
    wide = {n: a.double() if _floats(a) else a for n, a in arguments.items()}
    with torch.no_grad():
        truth = copy.deepcopy(torch_layer).double()(*(x.double() for x in inputs), **wide)
        naive, found = torch_layer(*inputs, **arguments), layer(*inputs, **arguments)
    hidden = arguments.get("key_padding_mask")
    if (
        hidden is not None and not _floats(hidden) and inputs[0] is inputs[1]
    ):  # what a padded token gets means nothing
        shown = ~hidden if layer.batch_first or hidden.dim() == 1 else ~hidden.mT
        truth, naive, found = ((out[shown], w[~hidden]) for out, w in (truth, naive, found))
    require(*map(judge, ("out", "weights"), found, naive, truth))


def _floats(value):
    return torch.is_tensor(value) and value.is_floating_point()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_gives_what_torch_gives(method, variant):
    torch_layer, layer = pair(method, **variant)
    assert list(layer.state_dict()) == list(torch_layer.state_dict())
    inputs = inputs_for(layer)
    require_same(layer, torch_layer, *inputs)
    require_same(layer, torch_layer, *inputs, key_padding_mask=padding())
    require_same(layer, torch_layer, *inputs, average_attn_weights=False)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_gives_torchs_gradients(method, variant):
    torch_layer, layer = pair(method, **variant)
    wide = copy.deepcopy(torch_layer).double()
    inputs, hidden = inputs_for(layer), padding()
    gradients = []
    for each, dtype in ((layer, None), (torch_layer, None), (wide, torch.double)):
        out, _ = each(*(x.to(dtype or x.dtype) for x in inputs), hidden, need_weights=False)
        ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        ramp = ramp * (~hidden if layer.batch_first else ~hidden.mT)[..., None]
        gradients.append(torch.autograd.grad((out * ramp).sum(), list(each.parameters())))
    found, naive, truth = gradients
    names = [name for name, _ in layer.named_parameters()]
    # a gradient is a sum over tokens that may cancel: its terms are as large as the largest
    sizes = [t.abs().max().expand_as(t) for t in truth]
    require(*map(judge, names, found, naive, truth, sizes))


@pytest.mark.parametrize("method", ["dense", "topk"])
def test_cross_attention_and_inputs_without_a_batch(method):
    torch_layer, layer = pair(method)
    inputs = inputs_for(layer, q_len=21, k_len=50)
    hidden = padding(50)
    require_same(layer, torch_layer, *inputs, key_padding_mask=hidden)
    single = [x[:, 1] for x in inputs]
    require_same(layer, torch_layer, *single, key_padding_mask=hidden[1])
    assert layer(*single)[0].shape == (21, EMBED)


@pytest.mark.parametrize("method", METHODS)
def test_padding_as_a_float_mask(method):
    _, layer = pair(method, batch_first=True)
    x, hidden = torch.randn(3, TOKENS, EMBED), padding()
    floats = torch.zeros(3, TOKENS).masked_fill(hidden, -torch.inf)
    as_bool, as_float = (layer(x, x, x, mask)[0] for mask in (hidden, floats))
    assert torch.equal(as_float, as_bool)


@pytest.mark.parametrize("method", ["topk", "window"])
def test_sparse_methods_refuse_other_float_padding(method):
    _, layer = pair(method, batch_first=True)
    x = torch.randn(3, TOKENS, EMBED)
    with pytest.raises(RuntimeError, match="expected 0 or -inf, method='" + method):
        layer(x, x, x, torch.full((3, TOKENS), -1e9))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("floats", [False, True])
def test_dense_takes_any_mask(dims, floats):
    torch_layer, layer = pair("dense", batch_first=True)
    x = torch.randn(3, TOKENS, EMBED)
    mask = torch.rand(3 * HEADS, TOKENS, TOKENS) if dims == 3 else torch.rand(TOKENS, TOKENS)
    mask = mask if floats else mask > 0.7
    hidden = torch.rand(3, TOKENS) * 2 if floats else padding()
    require_same(layer, torch_layer, x, x, x, attn_mask=mask)
    require_same(layer, torch_layer, x, x, x.clone(), attn_mask=mask, key_padding_mask=hidden)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_keys_gives_the_bias_alone(method):
    _, layer = pair(method, batch_first=True)
    x = torch.randn(2, TOKENS, EMBED, requires_grad=True)
    hidden = torch.tensor([[False], [True]]).expand(2, TOKENS)
    out, weights = layer(x, x, x, hidden, need_weights=True)
    assert torch.equal(out[1], layer.out_proj.bias.expand(TOKENS, EMBED))
    assert torch.equal(weights[1], torch.zeros(TOKENS, TOKENS))
    out[1].sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_aliases_of_one_tensor_are_self_attention():
    """FSDP2 hands on three aliases of x; taken for three tensors, padding had a say."""
    options = {"keep": 1, "block_size": 16, "fallback": "never"}
    layer = SparseAttention(32, 2, batch_first=True, method="topk", **options)
    x, hidden = torch.randn(2, 60, 32), torch.arange(60) >= torch.tensor([[60], [21]])
    out, _ = layer(x, x, x, hidden)
    assert torch.equal(layer(x, x.view_as(x), x.detach(), hidden)[0], out)
    apart, _ = layer(x, x.clone(), x.clone(), hidden)
    assert not torch.allclose(apart[~hidden], out[~hidden])


@pytest.mark.parametrize("method", METHODS)
def test_padding_may_hold_nan(method):
    _, layer = pair(method, batch_first=True)
    x, hidden = torch.randn(3, TOKENS, EMBED), padding()
    dirty = x.masked_fill(hidden[..., None], torch.nan)
    clean_out, dirty_out = (layer(each, each, each, hidden)[0] for each in (x, dirty))
    assert torch.equal(clean_out[~hidden], dirty_out[~hidden])


def test_unsupported_arguments_say_what_is_supported():
    _, layer = pair("topk", batch_first=True)
    x = torch.randn(3, TOKENS, EMBED)
    causal = torch.ones(TOKENS, TOKENS).triu(1).bool()
    with pytest.raises(
        NotImplementedError, match=r"'topk' supports key_padding_mask.*'dense' both"
    ):
        layer(x, x, x, attn_mask=causal)
    with pytest.raises(ValueError, match="is_causal is True; expected an attn_mask"):
        layer(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \[37, 3\]; expected \[B, Nk"):
        layer(x, x, x, padding().mT)
    with pytest.raises(TypeError, match=r"key_padding_mask has dtype torch.int64"):
        layer(x, x, x, padding().long())
    with pytest.raises(ValueError, match=r"value has shape \[3, 37, 16\]; expected .*vdim=32"):
        layer(x, x, x[..., :16])
    with pytest.raises(ValueError, match=r"query has shape .*expected 2 or 3 dimensions"):
        layer(x[None], x, x)
    nested = torch.nested.nested_tensor([x[0], x[1, :5]])
    with pytest.raises(NotImplementedError, match="use_nested_tensor=False"):
        layer(nested, nested, nested)


def test_bad_options_name_the_good_ones():
    with pytest.raises(ValueError, match="method is 'topkk'; expected one of 'dense', 'topk'"):
        SparseAttention(EMBED, HEADS, method="topkk")
    with pytest.raises(TypeError, match=r"radius is no option of method 'topk'.*keep, block_size"):
        SparseAttention(EMBED, HEADS, method="topk", radius=3)
    with pytest.raises(ValueError, match=r"keep is 1.5; expected"):
        SparseAttention(EMBED, HEADS, keep=1.5)
    with pytest.raises(TypeError, match="mha is 3"):
        SparseAttention.from_torch(3)


# -- dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_for_training_only(method):
    _, layer = pair(method, batch_first=True, dropout=0.5)
    x = torch.randn(1, TOKENS, EMBED).expand(400, TOKENS, EMBED)
    expected = layer(x, x, x)[0]
    assert torch.equal(layer(x, x, x)[0], expected)
    drawn = layer.train()(x, x, x)[0]
    assert not torch.equal(drawn[0], drawn[1])
    error = (drawn.mean(0) - expected[0]) / (drawn.std(0) / 400**0.5)
    assert error.abs().mean() < 1  # of a standard normal it is 0.8


def test_dense_drops_weights_as_torch_does():
    torch_layer, layer = (each.train() for each in pair("dense", batch_first=True, dropout=0.5))
    x = torch.randn(3, TOKENS, EMBED)
    outs = []
    for each in (torch_layer, layer):
        torch.manual_seed(0)
        outs.append(each(x, x, x, need_weights=False)[0])
    assert torch.equal(*outs)


# -- modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_copies_pickles_and_repr(method):
    _, layer = pair(method, batch_first=True)
    x = torch.randn(2, TOKENS, EMBED)
    expected = layer(x, x, x)[0]
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x, x, x)[0], expected)
        assert copied.out_proj.weight is not layer.out_proj.weight
    assert type(layer.method).__name__ in repr(layer)


@pytest.mark.parametrize("method", METHODS)
def test_made_on_the_meta_device(method):
    layer = SparseAttention(
        EMBED, HEADS, batch_first=True, device="meta", method=method, **EVERYTHING[method]
    )
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    torch_layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    torch_layer.load_state_dict(layer.state_dict())
    assert torch.equal(layer.in_proj_bias, torch.zeros(3 * EMBED))
    assert 0 < layer.in_proj_weight.std() < 1
    x = torch.randn(2, TOKENS, EMBED)
    require_same(layer, torch_layer, x, x, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    layers = [layer.to(dtype) for layer in pair("topk", batch_first=True)]
    x = torch.randn(2, TOKENS, EMBED, dtype=dtype)
    assert layers[1](x, x, x)[0].dtype == dtype
    require_same(layers[1], layers[0], x, x, x)


def test_from_torch_shares_the_parameters():
    torch_layer = nn.MultiheadAttention(EMBED, HEADS, dropout=0.25, batch_first=True).eval()
    layer = SparseAttention.from_torch(torch_layer, "topk", keep=0.5, block_size=16)
    assert all(map(lambda a, b: a is b, layer.parameters(), torch_layer.parameters()))
    assert type(torch_layer) is nn.MultiheadAttention and not hasattr(torch_layer, "method")
    assert torch_layer._qkv_same_embed_dim and not layer.training
    assert layer.dropout == 0.25 and layer.method.keep == 0.5


# -- inside nn.TransformerEncoderLayer ---------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_fused_path_never_goes_around_it(grad, activation, monkeypatch):
    """The encoder layer's fused path in eval would not call self_attn at all."""
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 64, activation=activation, batch_first=True)
    x = torch.randn(2, TOKENS, EMBED)
    with torch.set_grad_enabled(grad):
        dense = layer.eval()(x)
        options = {"keep": 1, "block_size": 16, "fallback": "never"}
        layer.self_attn = SparseAttention.from_torch(layer.self_attn, "topk", **options)
        assert not torch.allclose(layer(x), dense, rtol=0.01)
        fused = torch._transformer_encoder_layer_fwd
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", None)
        layer(x)
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", fused)


def test_an_encoder_built_from_a_sparse_layer_packs_no_nested_tensors():
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 64, batch_first=True)
    layer.self_attn = SparseAttention.from_torch(layer.self_attn, "topk", **EVERYTHING["topk"])
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        encoder = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        assert (
            encoder(torch.randn(3, TOKENS, EMBED), src_key_padding_mask=padding()).isfinite().all()
        )
