"""Methods: what they leave out, when they attend densely instead, and that they trace."""

import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sparseattn import BlockMask, SparseAttention
from sparseattn.layers import method as methods
from sparseattn.layers.registry import METHODS, make_method

EMBED, HEADS, TOKENS = 32, 2, 70
SPARSE = {
    "topk": {"keep": 0.25, "block_size": 16, "prefix": 1, "fallback": "never"},
    "saliency": {"keep": 0.25, "prefix": 1, "predictor": True},
    "window": {"radius": 2, "grid": (3, 23), "prefix": 1, "block_size": 16},
}


def layer_of(name, **options):
    return SparseAttention(EMBED, HEADS, batch_first=True, method=name, **options).eval()


APPROXIMATE = {
    "performer": {"features": 24, "seed": 1},
    "nystrom": {"num_landmarks": 12},
    "linformer": {"tokens": 400, "num_landmarks": 12},
    "linear": {"feature_map": "elu"},
}
ALL = SPARSE | APPROXIMATE


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(methods, "_SAID", set())


@torch.no_grad()
@pytest.mark.parametrize("name", SPARSE)
def test_weights_are_those_of_the_result(name):
    layer = layer_of(name, **SPARSE[name])
    x = torch.randn(2, TOKENS, EMBED)
    hidden = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [50]])
    out, weights = layer(x, x, x, hidden, need_weights=True, average_attn_weights=False)
    share = (weights != 0).float().mean()
    assert 0 < share < 0.8
    torch.testing.assert_close(weights.sum(-1)[0], torch.ones(HEADS, TOKENS))
    assert not weights[1, :, :, 50:].any()
    v = layer._project(x, x, x, True)[2]
    attended = layer.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out[~hidden], attended[~hidden])


@torch.no_grad()
def test_class_tokens_see_and_are_seen_by_all():
    layer = layer_of("topk", **SPARSE["topk"] | {"keep": 1, "prefix": 17})
    x = torch.randn(1, TOKENS, EMBED)
    _, weights = layer(x, x, x, need_weights=True)
    assert weights[0, :, :32].all() and weights[0, :32].all()
    assert (weights[0, 32:, 32:] == 0).any()


@torch.no_grad()
def test_window_is_the_window():
    layer = layer_of("window", **SPARSE["window"])
    x = torch.randn(2, TOKENS, EMBED)
    _, weights = layer(x, x, x, need_weights=True)
    shown = BlockMask.window((3, 23), 2, prefix=1, block_size=16).to_dense()[0, 0]
    assert torch.equal(weights != 0, shown.expand(2, -1, -1))
    with pytest.raises(ValueError, match="mask has q_len=70; expected q_len=60"):
        layer(x[:, :60], x[:, :60], x[:, :60])
    assert layer.to("meta").method.mask.device.type == "cpu"  # nothing could refill it


# -- falling back to dense attention -----------------------------------------------------------


@torch.no_grad()
def test_short_inputs_are_attended_to_densely_and_said_once(caplog):
    layers = [layer_of("topk", keep=1) for _ in range(2)]
    dense = layer_of("dense")
    dense.load_state_dict(layers[0].state_dict())
    x = torch.randn(1, 200, EMBED)
    with caplog.at_level(logging.WARNING, "sparseattn"):
        for layer in layers * 2:
            out, _ = layer(x, x, x)
    assert [record.name for record in caplog.records] == ["sparseattn"]
    assert "topk: all keys are attended to, since dense attention is faster" in caplog.text
    assert "below 512 keys" in layers[0].method.fell_back
    assert torch.equal(layers[0](x, x, x)[0], dense(x, x, x)[0])
    long = torch.randn(1, 1024, EMBED)
    layers[0](long, long, long)
    assert layers[0].method.fell_back is None
    layers[1].method.fallback = "never"
    assert not torch.allclose(layers[1](x, x, x)[0], out)


@torch.no_grad()
def test_keeping_most_is_attended_to_densely():
    layer, x = layer_of("topk", keep=0.6), torch.randn(1, 1100, EMBED)
    layer(x, x, x)
    assert "where over 50% are kept" in layer.method.fell_back
    assert layer.method.dense_reason(1 << 20, torch.device("cpu")) is not None
    assert layer.method.dense_reason(20, torch.device("cuda")) is None  # not measured there


def test_fallback_is_checked():
    with pytest.raises(ValueError, match="topk: fallback is 'always'; expected one of"):
        make_method("topk", {"fallback": "always"}, "here")


# -- tracing -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["topk", "saliency", *APPROXIMATE])
def test_two_compiles_serve_twenty_lengths(name):
    layer = layer_of(name, **ALL[name])
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in [33 + 17 * step for step in range(20)]:
        x = torch.randn(2, length, EMBED)
        hidden = torch.arange(length) >= torch.tensor([[length], [length - 7]])
        assert torch.equal(compiled(x, x, x, hidden)[0], layer(x, x, x, hidden)[0])
    assert counter.frame_count <= 2


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_exports_with_padding(name):
    layer = layer_of(name, **ALL[name])
    x = torch.randn(2, TOKENS, EMBED)
    floats = torch.zeros(2, TOKENS)
    floats[1, 50:] = -torch.inf
    program = torch.export.export(layer, (x, x, x, floats)).module()
    assert torch.equal(program(x, x, x, floats)[0], layer(x, x, x, floats)[0])


def test_every_method_names_its_options():
    assert set(METHODS) == {"dense", *ALL}
    for name, options in ALL.items():
        method = make_method(name, options, "here")
        assert all(f"{option}=" in repr(method) for option in method.options)
        assert options.keys() - method.options <= {"predictor"}  # a module, shown as one
        assert not method.state_dict()
