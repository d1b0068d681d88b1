"""`sparseattn info`: truthful about what runs here, what is proven, and what was measured."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseattn
from sparseattn.cli import info, proofs
from sparseattn.cli.main import main
from sparseattn.kernels.block_attention import tuning
from sparseattn.kernels.tables import unmeasured
from sparseattn.ops import block_sparse_attention as engine
from sparseattn.testing import sources

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "block_attention_fwd_kernel"
GPU = "nvidia-h100"


def record(status: str = "passed", check: str = "numbers", **changed: object) -> dict:
    made = {"op": "block_sparse_attention", "case": "window", "check": check, "dtype": "bfloat16"}
    return made | {"status": status, "kernels": sources.kernel_hashes()} | changed


def store(folder: Path, *records: dict, gpu: str = GPU, name: str = "proof.json") -> Path:
    folder.joinpath(gpu).mkdir(parents=True, exist_ok=True)
    folder.joinpath(gpu, name).write_text(json.dumps({"runs": [{}], "records": list(records)}))
    return folder


def test_a_kernel_is_unproven_after_a_change_of_one_line(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sparseattn", tmp_path / "sparseattn", symlinks=True)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    store(tmp_path / "benchmarks" / "results", record())
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def told() -> dict:
        command = [sys.executable, "-m", "sparseattn", "info", "--json"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)["kernels"]

    assert all(kernel["proven"] == [GPU] for kernel in told().values())
    path = tmp_path / "kernels/block_attention/forward.py"
    text = path.read_text()
    assert "m + tl.log2(l))" in text
    path.write_text(text.replace("m + tl.log2(l))", "m + tl.log2(l) + 1)", 1))
    kernels = told()
    assert kernels[KERNEL]["proven"] == []
    assert kernels[KERNEL]["why"] == "unproven: changed since it was proven"
    assert kernels["block_lists_count_kernel"]["proven"] == [GPU]


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([], "no result of a GPU names it"),
        ([record(check="repeat")], "its numbers were never checked"),
        ([record("wrong")], "numbers of block_sparse_attention wrong on nvidia-h100"),
        ([record(), record("wrong", "repeat")], "repeat of block_sparse_attention wrong on nvidia"),
        ([record(), record("failed", "graph")], "graph of block_sparse_attention failed on nvidia"),
        ([record("wrong"), record()], None),  # the same check again: the last one counts
        ([record(), record("skipped", "graph")], None),
        ([record(kernels={KERNEL: "0" * 16})], "changed since it was proven"),
        ([record("wrong", kernels={KERNEL: "0" * 16}, case="old"), record()], None),
    ],
)  # fmt: skip
def test_what_proves_a_kernel(records: list[dict], why: str | None, tmp_path: Path) -> None:
    kernel = proofs.kernels(store(tmp_path, *records))[KERNEL]
    assert kernel["proven"] == ([] if why else [GPU])
    assert (why or "") in kernel["why"]
    assert bool(kernel["why"]) == bool(why)


def test_other_files_prove_nothing(tmp_path: Path) -> None:
    store(tmp_path, record(), gpu=proofs.REHEARSAL)
    tmp_path.joinpath(GPU).mkdir()
    tmp_path.joinpath(GPU, "bench_block_sparse_attention.json").write_text('{"rows": []}')
    assert proofs.kernels(tmp_path)[KERNEL]["proven"] == []


def test_one_wrong_gpu_does_not_speak_for_another(tmp_path: Path) -> None:
    store(tmp_path, record(), gpu="a100")
    store(tmp_path, record("wrong"), gpu="h100")
    assert proofs.kernels(tmp_path)[KERNEL]["proven"] == ["a100"]


def test_every_op_answers() -> None:
    assert "block_sparse_attention" in info.ops()
    for name, op in info.ops().items():
        answers = info.usable(op, torch.device("cpu"))
        assert list(answers) == ["float32", "float16", "bfloat16", "float64"], name
        for answer in answers.values():
            assert answer["auto"] in ("torch", "triton", "reference")
            assert all(isinstance(reason, str) for reason in answer["triton"])


def test_reasons_are_those_of_the_op() -> None:
    answers = info.usable(sparseattn.block_sparse_attention, torch.device("cpu"))
    q = torch.empty((1, 1, 64, 64), dtype=torch.float64)
    assert answers["float64"]["triton"] == engine.unsupported(q)
    assert any("float64" in reason for reason in answers["float64"]["triton"])


def test_an_op_without_reasons_is_found_out() -> None:
    def op(q: torch.Tensor, impl: str = "auto") -> None: ...

    with pytest.raises(LookupError, match=r"op takes impl, but .* no function unsupported"):
        info.usable(op, torch.device("cpu"))


def test_tables_are_unmeasured_until_they_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MEASURED", {})
    assert info.unmeasured()["block_attention.FORWARD"] == [80, 90]
    monkeypatch.setattr(tuning, "MEASURED", {"FORWARD": {90: "H100, torch 2.11, 2026-11-21"}})
    assert unmeasured(tuning)["FORWARD"] == [80]
    everywhere = {capability: "somewhere" for capability in (80, 90)}
    monkeypatch.setattr(tuning, "MEASURED", {"FORWARD": everywhere})
    assert "FORWARD" not in unmeasured(tuning)


def test_info_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from sparseattn.cli.main import main; main(['info'])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "triton      none" in done.stdout
    assert "not triton: Triton is not installed" in done.stdout
    assert "block_attention.FORWARD" in done.stdout


def test_the_text_says_what_the_data_says(capsys: pytest.CaptureFixture) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in [*info.ops(), *sources.kernels(), *info.unmeasured()]:
        assert name in text
    assert f"torch       {torch.__version__}" in text
    assert "    not triton in float64: dtype is float64; expected" in text
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"] == torch.__version__
