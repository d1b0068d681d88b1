"""Models of timm, Hugging Face, MONAI and torch with their attention made sparse.

Tiny ones with random weights. Blocks of 16 tokens cut their few tokens into several blocks.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from sparseattn import convert, revert
from sparseattn.layers.method import Method
from sparseattn.testing.tolerance import judge, require

BLOCKS = {"block_size": 16, "fallback": "never"}
METHODS = {"topk": {"keep": 0.25, **BLOCKS}, "saliency": {"keep": 0.25, "predictor": True}}


def timm_model(name, size=64, **options):
    import timm

    small = {"img_size": size, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 40}
    model = timm.create_model(name, pretrained=False, **small, **options)
    return model, {"x": torch.randn(2, 3, size, size)}


def hf_vision(kind):
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        **small, intermediate_size=64, image_size=64, patch_size=8
    )
    model = getattr(transformers, f"{kind}Model")(config)
    return model, {"pixel_values": torch.randn(2, 3, 64, 64)}


def hf_bert():
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    mask = (torch.arange(50) < torch.tensor([[50], [21]])).long()
    inputs = {"input_ids": torch.randint(0, 50, (2, 50)), "attention_mask": mask}
    return transformers.BertModel(config), inputs


def monai_vit():
    from monai.networks.nets import ViT

    model = ViT(
        1, (32, 32), (4, 4), hidden_size=32, mlp_dim=64, num_layers=2, num_heads=2,
        classification=True, num_classes=40, spatial_dims=2,
    )  # fmt: skip
    return model, {"x": torch.randn(2, 1, 32, 32)}


def monai_unetr():
    from monai.networks.nets import UNETR

    model = UNETR(
        1, 2, (128, 128), feature_size=4, hidden_size=16, mlp_dim=32, num_heads=1, spatial_dims=2
    )
    return model, {"x_in": torch.randn(1, 1, 128, 128)}


def torch_encoder():
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    hidden = torch.arange(50) >= torch.tensor([[50], [21]])
    inputs = {"src": torch.randn(2, 50, 32), "src_key_padding_mask": hidden}
    return nn.TransformerEncoder(layer, 2), inputs


HOSTS = {
    "timm vit": lambda: timm_model("vit_small_patch16_224", patch_size=8),
    "timm deit": lambda: timm_model("deit_small_distilled_patch16_224", patch_size=8),
    "timm dinov2": lambda: timm_model("vit_small_patch14_reg4_dinov2", 98, init_values=1.0),
    "timm eva02": lambda: timm_model("eva02_tiny_patch14_224", 98, init_values=1.0),
    "timm dinov3": lambda: timm_model("vit_small_patch16_dinov3", 112, init_values=1.0),
    "hf vit": lambda: hf_vision("ViT"),
    "hf dinov2": lambda: hf_vision("Dinov2"),
    "hf bert": hf_bert,
    "monai vit": monai_vit,
    "monai unetr": monai_unetr,
    "torch encoder": torch_encoder,
}
LAYERS = {"monai unetr": 12}  # cannot be chosen; all others have 2
BUILT = {}


def fresh(name):
    """Return a copy of a host model in eval, and its inputs."""
    if name not in BUILT:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same whichever test comes first
            BUILT[name] = HOSTS[name]()
    model, inputs = BUILT[name]
    return copy.deepcopy(model).eval(), inputs


@pytest.fixture(params=HOSTS)
def host(request):
    """A fresh copy of a model in eval, its inputs, and how many attention layers it has."""
    return *fresh(request.param), LAYERS.get(request.param, 2)


QUICK = {("timm vit", "saliency"), ("hf bert", "topk"), ("torch encoder", "topk")}
EVERY_METHOD = [
    pytest.param((name, method), id=f"{name}, {method}", marks=marks)
    for name in HOSTS
    for method in METHODS
    for marks in [() if (name, method) in QUICK else pytest.mark.slow]
]


@pytest.fixture
def converted(request):
    """A copy of a model that keeps a quarter by some method, and its inputs."""
    name, method = request.param
    model, inputs = fresh(name)
    convert(model, method, **METHODS[method])
    return model, inputs


every_method = pytest.mark.parametrize("converted", EVERY_METHOD, indirect=True)


def run(model, inputs):
    """The output with padding cut off, whose values mean nothing."""
    out = model(**inputs)
    if isinstance(out, tuple):  # MONAI's ViT also returns hidden states
        out = out[0]
    out = getattr(out, "last_hidden_state", out)
    if "attention_mask" in inputs:
        return out[inputs["attention_mask"].bool()]
    if "src_key_padding_mask" in inputs:
        return out[:, : inputs["src"].shape[1]][~inputs["src_key_padding_mask"]]
    return out


def wide(inputs):
    return {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}


def gradients(model, inputs):
    """Of a loss in which every output has a weight of its own."""
    model.zero_grad()
    out = run(model, inputs).float()
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def methods(model):
    return [module for module in model.modules() if isinstance(module, Method)]


def test_keeping_everything_gives_the_dense_output(host):
    model, inputs, layers = host
    names, before = list(model.state_dict()), dict(model.named_parameters())
    with torch.no_grad():
        naive, truth = run(model, inputs), run(copy.deepcopy(model).double(), wide(inputs))
        report = convert(model, "topk", keep=1.0, **BLOCKS)
        found = run(model, inputs)
    assert len(report.swapped) == layers == len(methods(model)) and not report.skipped
    require(judge("out", found, naive, truth))
    assert list(model.state_dict()) == names
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)


@torch.no_grad()
def test_reverting_gives_the_same_bits(host):
    model, inputs, layers = host
    kinds, before = [type(module) for module in model.modules()], run(model, inputs)
    convert(model, "topk", keep=1, **BLOCKS)
    sparse = run(model, inputs)
    assert not torch.allclose(sparse, before, rtol=1e-4)  # it was another attention
    report = convert(model, "topk", keep=2, **BLOCKS)  # again, with other options
    assert len(report.swapped) == layers == len(methods(model))
    assert not torch.equal(run(model, inputs), sparse)
    revert(model)
    assert torch.equal(run(model, inputs), before)
    assert [type(module) for module in model.modules()] == kinds


@torch.no_grad()
def test_copies_and_pickles(host):
    model, inputs, _ = host
    convert(model, "topk", keep=0.25, **BLOCKS)
    expected = run(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied, inputs), expected)
        revert(copied)  # does not reach the original
    assert torch.equal(run(model, inputs), expected)


@every_method
def test_trains(converted):
    model, inputs = converted
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    target = torch.randn_like(run(model, inputs))
    losses = []
    for _ in range(6):
        loss = nn.functional.mse_loss(run(model, inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


@every_method
def test_compiles_without_a_graph_break(converted):
    model, inputs = converted
    expected, wanted = run(model, inputs), gradients(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(run(compiled, inputs), expected)
    found = gradients(compiled, inputs)
    assert all(torch.equal(found[f"_orig_mod.{name}"], wanted[name]) for name in wanted)


@torch.no_grad()
@every_method
def test_exports(converted):
    model, inputs = converted
    program = torch.export.export(model, (), inputs)
    assert torch.equal(run(program.module(), inputs), run(model, inputs))


def test_autocast(host):  # with gradients: torch's fused encoder layer fails in autocast
    model, inputs, _ = host
    convert(model, "topk", keep=1.0, **BLOCKS)
    narrow = {}
    for name, each in (("sparse", model), ("dense", copy.deepcopy(model))):
        if name == "dense":
            revert(each)
        with torch.autocast("cpu", torch.bfloat16):
            narrow[name] = run(each, inputs)
    with torch.no_grad():
        truth = run(copy.deepcopy(each).double(), wide(inputs))
    assert narrow["sparse"].dtype == narrow["dense"].dtype
    require(judge("out", narrow["sparse"].detach(), narrow["dense"].detach(), truth))


@every_method
def test_autocast_has_gradients_for_all_that_learns(converted):
    model, inputs = converted
    wanted = gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, inputs)
    assert found.keys() == wanted.keys()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())


@every_method
def test_checkpointing_gives_the_same_gradients(converted):
    model, inputs = converted
    wanted = gradients(model.train(), inputs)
    if hasattr(model, "set_grad_checkpointing"):  # timm
        model.set_grad_checkpointing()
    elif hasattr(model, "gradient_checkpointing_enable"):  # transformers
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        for layer in getattr(model, "layers", getattr(model, "blocks", model)).children():
            checkpointed(layer)
    found = gradients(model, inputs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def checkpointed(layer):
    from torch.utils.checkpoint import checkpoint

    forward = layer.forward
    layer.forward = lambda *a, **k: checkpoint(forward, *a, use_reentrant=False, **k)
