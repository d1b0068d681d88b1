"""The command `sparseattn bench`."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseattn.benchmarks import machine, registry, results
from sparseattn.benchmarks.registry import Provider
from sparseattn.cli.main import main

OP = "block_sparse_attention"
SMALL = [
    OP, "--device", "cpu", "--shapes", "heads=2", "head_dim=16", "tall=1", "tokens=128,256",
    "density=0.5,1",
    "--dtypes", "float32", "--providers", "sparseattn", "sdpa-flash", "--rounds", "2",
]  # fmt: skip


@pytest.fixture
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matmul_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(machine, "copy_rate", lambda device: 1e10)


@pytest.mark.usefixtures("quick_rates")
def test_prints_writes_appends_and_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    assert main(["bench", *SMALL, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("gain fwd") == 4
    assert (
        f"{OP} float32 batch=1 heads=2 head_dim=16 block=64 tall=1 tokens=256 density=0.5"
        in printed
    )
    assert "sparseattn full: break-even density" in printed
    assert "matrix product: 0.1 TFLOP/s float32; copy: 10 GB/s" in printed
    assert main(["bench", *SMALL, "--json", str(file), "--append", "--modes", "forward"]) == 0
    first, second = results.load_runs(file)
    assert len(first["records"]) == 4 * (5 + 3) and len(second["records"]) == 4 * 2
    assert {"python", "torch", "triton", "commit", "threads", "date"} <= set(first["machine"])
    capsys.readouterr()
    assert main(["bench", "--replay", str(file)]) == 0
    assert capsys.readouterr().out.count("gain fwd") == 4


@pytest.mark.usefixtures("quick_rates")
def test_a_wrong_result_of_ours_ends_with_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = registry.load(OP)

    def build(case):  # type: ignore[no-untyped-def]
        problem = benchmark.build(case)
        ours = Provider("sparseattn", lambda q, k, v: q + k + v, ours=True)
        return type(problem)(**{**problem.__dict__, "providers": (ours,)})

    broken = type(benchmark)(**{**benchmark.__dict__, "build": build})
    monkeypatch.setattr(registry, "load", lambda op: broken)
    assert main(["bench", *SMALL]) == 1
    printed = capsys.readouterr().out
    assert "sparseattn: wrong result: out: max error" in printed


@pytest.mark.usefixtures("quick_rates")
def test_no_case_starts_after_the_minutes_are_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    assert main(["bench", *SMALL, "--minutes", "1e-9", "--json", str(file)]) == 0
    assert "--minutes is over: 0 of 4 cases were run" in capsys.readouterr().out
    assert results.load_runs(file)[0]["records"] == []


def test_small_sizes_give_way_to_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--small", "--shapes", "tokens=128", "--device", "cpu", "--list"]
    assert main(["bench", OP, *options]) == 0
    printed = capsys.readouterr().out
    assert "  tokens = 128\n" in printed and "  head_dim = 16\n" in printed


def test_list_names_axes_and_providers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--list"]) == 0
    printed = capsys.readouterr().out
    assert f"{OP}: 4 cases, the first is batch=1 heads=2 " in printed
    assert "  tokens = 128, 256\n" in printed
    assert "  sdpa-cudnn: needs a GPU\n" in printed and "  sparseattn\n" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "OP is 'nothing'; expected one of "),
        ([OP, "--modes", "sideways"], "--modes is 'sideways'; expected one of forward, "),
        ([OP, "--shapes", "tokens"], "--shapes is 'tokens'; expected AXIS=V[,V]"),
        ([OP, "--shapes", "tokens=many"], "--shapes is 'tokens=many'; expected AXIS=V[,V]"),
        ([OP, "--shapes", "tokens=0"], "--shapes is 'tokens=0'; expected AXIS=V[,V], V > 0"),
        ([OP, "--shapes", "tokens=64.5"], "tokens is 64.5; expected a whole number"),
        ([OP, "--shapes", "block=50"], "block_size is (50, 50); expected one or two mult"),
        ([OP, "--shapes", "colour=1"], "there is no axis 'colour'; expected one of batch, "),
        ([OP, "--rounds", "0"], "--rounds is 0; expected 1 or more"),
        ([OP, "--seconds", "0"], "--seconds is 0.0; expected more than 0"),
        ([OP, "--append"], "--append needs --json"),
        (["--replay", "absent.json"], "--replay is absent.json; there is no such file"),
        (["--replay", "pyproject.toml"], "pyproject.toml is not a result file"),
        (["--replay", "a.json", "--list"], "--replay measures nothing"),
    ],
)
@pytest.mark.usefixtures("quick_rates")
def test_bad_options_end_with_code_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
