"""explain: it says what the ops do, and its figures are those of the definition."""

import json
from dataclasses import asdict

import pytest
import torch

import sparseattn
from sparseattn import BlockMask, explain
from sparseattn.cli.main import main
from sparseattn.explain import GPUS
from sparseattn.explain import OPS as ALL
from sparseattn.layers import break_even
from sparseattn.layers.registry import make_method
from sparseattn.ops.block_sparse_attention import unsupported

OPS = ("block_sparse_attention", "saliency_attention", "topk_attention")  # of chosen pairs
LINEAR = ("linear_attention", "linformer_attention", "nystrom_attention", "performer_attention")
SHAPE = (2, 6, 300, 40)
CPU = torch.device("cpu")


def on_the_cpu(op="topk_attention", shape=SHAPE, *rest, **options):
    return explain(op, shape, *rest, device="cpu", **options)


def test_these_are_the_ops():
    assert sorted(ALL) == sorted(OPS + LINEAR)


@pytest.mark.parametrize("op", ALL)
def test_every_op_is_public_and_answers(op):
    assert callable(getattr(sparseattn, op))
    found = on_the_cpu(op)
    assert found.runs == "torch" and set(found.reasons) == {"triton", "reference"}
    assert all(found.reasons.values())
    assert json.loads(json.dumps(found.as_dict()))["work"] == asdict(found.work)


def test_the_density_is_that_of_the_op():
    q, k, v = torch.randn(3, 1, 2, 320, 16).unbind()
    for keep in (0.3, 2, 1.0, 100):
        _, mask = sparseattn.topk_attention(q, k, v, keep, block_size=32, return_mask=True)
        found = on_the_cpu("topk_attention", tuple(q.shape), keep=keep, block_size=32)
        assert found.density == pytest.approx(float(mask.density()))
        assert found.pairs == pytest.approx(float(mask.to_dense().expand(1, 2, -1, -1).sum()))
        saliency = torch.rand(1, 320) + 0.1
        _, tokens = sparseattn.saliency_attention(q, k, v, saliency, keep, return_indices=True)
        found = on_the_cpu("saliency_attention", tuple(q.shape), keep=keep)
        assert found.density == (tokens >= 0).sum() / 320
    ragged = BlockMask.window(300, 20, block_size=64)
    found = on_the_cpu("block_sparse_attention", keep=ragged)
    assert found.pairs == 12 * ragged.to_dense().sum()


def test_work_is_counted_from_the_definition():
    found = on_the_cpu("saliency_attention", SHAPE, (2, 3, 500, 40), keep=50, dtype=torch.float16)
    pairs = 2 * 6 * 300 * 50
    q, k, lse = 2 * 6 * 300 * 40, 2 * 3 * 500 * 40, 2 * 6 * 300
    assert found.work.flops == 2 * 2 * 40 * pairs and found.work.backward_flops == 10 * 40 * pairs
    assert found.work.dense_flops == 10 * found.work.flops
    assert found.work.bytes == 2 * (q + k + k + q) + 4 * lse
    assert found.work.backward_bytes == 2 * (q + k + k + q + q + q + k + k) + 4 * lse


def test_work_of_linear_ops_is_counted_from_docs_math():
    """G = B H N D elements of two bytes each; the formulas are those of its tables."""
    G, N = 2 * 6 * 300 * 40, 300
    expected = {  # flops, bytes of both directions
        "performer_attention": (8 * G * 32, 4 * G, 16 * G * 32, 7 * G),
        "linformer_attention": (8 * G * 32, 4 * G + 64 * N, 18 * G * 32, 7 * G + 128 * N),
        "linear_attention": (4 * G * 40, 4 * G, 8 * G * 40, 7 * G),
        "nystrom_attention": (
            8 * G * 32 + 12 * (8 * 6 * 32**3 + 4 * 32**2 * 40), 5 * G,
            20 * G * 32 + 12 * (30 * 6 * 32**3 + 10 * 32**2 * 40), 9 * G,
        ),
    }  # fmt: skip
    for op in LINEAR:
        options = {} if op == "linear_attention" else {"landmarks": 32}
        found = on_the_cpu(op, dtype=torch.float16, **options)
        work = found.work
        counted = (work.flops, work.bytes / 2, work.backward_flops, work.backward_bytes / 2)
        assert counted == expected[op]
        assert work.dense_flops == 4 * G * N
        assert found.landmarks == options.get("landmarks") and found.density is found.pairs is None
        grouped = on_the_cpu(op, SHAPE, (2, 3, 300, 40), **options).work
        assert work.flops / 2 < grouped.flops <= work.flops and grouped.bytes < 2 * work.bytes


@pytest.mark.parametrize("gpu", GPUS)
def test_the_floor_is_that_of_the_data_sheet(gpu):
    chip = GPUS[gpu]
    large = explain(OPS[0], (1, 8, 16384, 64), dtype=torch.bfloat16, device="cpu", gpu=gpu).floor
    flops = 4 * 64 * 8 * 16384 * 16384 * 0.25
    assert large.bound_by == "operations"
    assert large.forward_ms == pytest.approx(flops / chip.half / 1e9)
    assert large.both_ms == pytest.approx(3.5 * large.forward_ms)
    small = explain(OPS[0], (1, 8, 16384, 64), keep=0, dtype=torch.bfloat16, device="cpu", gpu=gpu)
    moved = 4 * 8 * 16384 * 64 * 2 + 4 * 8 * 16384
    assert small.floor.bound_by == "bytes"
    assert small.floor.forward_ms == pytest.approx(moved / chip.bandwidth / 1e6)


def test_float32_has_the_floor_of_what_torch_allows():
    shape, before = (1, 8, 16384, 64), torch.backends.cuda.matmul.allow_tf32
    found = []
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            found.append(on_the_cpu(OPS[0], shape, gpu="H100").floor)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    exact, loose = found
    assert exact.both_ms == pytest.approx(3 * loose.both_ms)
    assert on_the_cpu(OPS[0], shape, gpu="H100", dtype=torch.float64).floor is None
    assert on_the_cpu(OPS[0], shape).floor is None


def test_reasons_are_those_of_the_op(monkeypatch):
    import sparseattn.ops.dispatch as dispatch

    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    q = torch.empty(1, 1, 64, 24, dtype=torch.float64)
    found = on_the_cpu(OPS[0], tuple(q.shape), dtype=torch.float64)
    assert found.reasons["triton"] == unsupported(q) and len(unsupported(q)) == 2
    with pytest.raises(NotImplementedError, match=r"cannot run this: tensors are on cpu.*float64"):
        on_the_cpu(OPS[0], tuple(q.shape), dtype=torch.float64, impl="triton")
    asked = on_the_cpu(OPS[0], impl="reference")
    assert asked.runs == "reference" and asked.reasons["torch"] == [
        "impl='reference' was asked for"
    ]


def test_break_even_is_what_the_layers_go_by():
    for tokens, keep, slower in (
        (300, 0.1, "below 512 keys"),
        (600, 0.25, None),
        (600, 0.5, "where over 33% are kept"),
        (8192, 0.5, None),
        (8192, 0.9, "where over 50% are kept"),
    ):
        found = on_the_cpu("topk_attention", (1, 6, tokens, 64), keep=keep)
        assert found.slower == make_method("topk", {"keep": keep}, "").dense_reason(tokens, CPU)
        assert (found.slower is None) == (slower is None) and (slower or "") in str(found)
        assert "50% from 768 keys on" in str(found) and found.break_even.source in str(found)
    most = on_the_cpu("saliency_attention", (1, 6, 1024, 64), keep=0.65)
    assert most.slower is None and most.break_even.share(1024) > most.break_even.share(1023)
    assert break_even.measured("topk_attention", torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (("conv", SHAPE), {}, ValueError, "op is 'conv'; expected one of block_sparse_attention"),
        ((OPS[0], (1, 2, 3)), {}, ValueError, r"q_shape is \(1, 2, 3\)"),
        ((OPS[0], (1, 2, -3, 4)), {}, ValueError, "q_shape is -3"),
        ((OPS[0], SHAPE, (2, 4, 9, 40)), {}, ValueError, "G a divisor of H=6"),
        ((OPS[0], SHAPE), {"dtype": "float32"}, TypeError, "dtype is 'float32'"),
        ((OPS[0], SHAPE), {"gpu": "Riva"}, ValueError, "gpu is 'Riva'; expected one of A100"),
        ((OPS[0], SHAPE), {"keep": 1.5}, ValueError, "keep is 1.5"),
        ((OPS[0], SHAPE), {"block_size": 9}, ValueError, "block_size is 9"),
        ((OPS[0], SHAPE), {"impl": "fast"}, ValueError, "impl is 'fast'"),
        ((OPS[0], SHAPE), {"keep": BlockMask.window(64, 3)}, ValueError, "keep has q_len=64"),
        ((OPS[2], SHAPE), {"keep": BlockMask.window(300, 3)}, TypeError, "keep is a BlockMask"),
        ((LINEAR[0], SHAPE), {"keep": 0.5}, TypeError, "keep is 0.5 .*; expected None for linear"),
        ((LINEAR[0], SHAPE), {"landmarks": 8}, TypeError, "landmarks is 8 .*; expected None"),
        ((OPS[0], SHAPE), {"landmarks": 8}, TypeError, "landmarks is 8 .*; expected None for bl"),
        ((LINEAR[3], SHAPE), {"landmarks": 0}, ValueError, "landmarks is 0"),
        ((LINEAR[2], SHAPE, (2, 6, 9, 40)), {}, ValueError, "expected the tokens of q for nystrom"),
    ],
)  # fmt: skip
def test_errors(arguments, options, error, text):
    with pytest.raises(error, match=text):
        on_the_cpu(*arguments, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_said_so():
    with pytest.raises(ValueError, match="device is cuda; expected cpu, since torch sees no GPU"):
        explain(OPS[0], SHAPE, device="cuda")


def test_nothing_of_the_size_is_allocated():
    huge = (64, 64, 2**24, 128)
    assert on_the_cpu("topk_attention", huge, keep=8).pairs == 64 * 64 * 2**24 * 8 * 64


def test_the_command_prints_the_same(capsys):
    command = ["explain", "topk_attention", "--tokens", "8192", "--key-heads", "2", "--keep", "0.1"]
    command += ["--device", "cpu", "--dtype", "bfloat16", "--gpu", "H100"]
    shapes = (1, 6, 8192, 64), (1, 2, 8192, 64)
    found = on_the_cpu("topk_attention", *shapes, keep=0.1, dtype=torch.bfloat16, gpu="H100")
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text == f"{found}\n"
    for part in ("runs", "not triton", "density", "GFLOP", "MB", "on H100", "break-even"):
        assert part in text
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.as_dict()))
    linear = ["explain", "nystrom_attention", "--landmarks", "49", "--device", "cpu"]
    assert main(linear) == 0
    text = capsys.readouterr().out
    assert text == f"{on_the_cpu('nystrom_attention', (1, 6, 4096, 64), landmarks=49)}\n"
    assert "landmarks     49, for 4096 keys" in text and "density" not in text
    with pytest.raises(SystemExit) as ended:
        main([*linear, "--keep", "0.5"])
    assert ended.value.code == 2 and "keep is 0.5" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*command, "--head-dim", "0"])
    assert ended.value.code == 2 and "D=0" in capsys.readouterr().err
