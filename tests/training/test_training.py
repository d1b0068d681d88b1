"""The training loop: what it writes, that it resumes with the same bits, and on two processes."""

import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("accelerate", reason='needs pip install "sparseattn[train]"')
pytest.importorskip("sklearn", reason='needs pip install "sparseattn[samples]"')

from sparseattn.cli.main import main
from sparseattn.models import SparseAttnNet
from sparseattn.testing.files import cut, picture
from sparseattn.training import checkpoint
from sparseattn.training.logs import CsvLog, read_csv
from sparseattn.training.loop import (
    load_run,
    make_schedule,
    optimizer_groups,
    resume,
    step_seed,
    train,
)
from sparseattn.training.options import TrainOptions, parse_changes

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = {"dim": 16, "heads": 2, "depth": 1, "coarse_width": 4, "embed_width": 16, "frequencies": 0}
WORDS = ["--set", *(f"{name}={value}" for name, value in TINY.items())]


def options(out: Path, **changes) -> TrainOptions:
    given = {"epochs": 2, "batch_size": 64, "checkpoint_every": 7, "lr": 1e-2, "device": "cpu"}
    return TrainOptions(data="digits", out=str(out), **{**given, **changes})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("sparseattnnet", options(tmp_path_factory.mktemp("run") / "new" / "run"), TINY)


def test_loss_falls_and_the_run_is_written_down(trained: Path) -> None:
    epochs = read_csv(trained / "epochs.csv")
    assert [row["epoch"] for row in epochs] == [1, 2] and [row["step"] for row in epochs] == [
        22,
        44,
    ]
    assert epochs[-1]["loss"] < 0.9 * math.log(10)
    steps = read_csv(trained / "steps.csv")
    assert [row["step"] for row in steps] == [10, 20, 30, 40]
    assert all(row["images_per_second"] > 0 for row in steps)
    saved = json.loads((trained / "config.json").read_text())
    assert saved["model"] == "sparseattnnet" and saved["config"]["dim"] == 16
    assert any((trained / "tensorboard").iterdir())
    assert [p.name for p in checkpoint.all_of(trained / "checkpoints")] == [
        "step-000000042",
        "step-000000044",
    ]
    assert not list(trained.rglob(".part*")) and not list(trained.rglob("*.part"))


def test_the_model_loads_and_is_the_one_that_was_measured(trained: Path) -> None:
    from sparseattn.data.samples import digits

    model = SparseAttnNet.from_pretrained(str(trained / "model")).eval()
    test = digits().test.columns
    accuracy = (model(test["images"]).logits.argmax(1) == test["labels"]).float().mean()
    assert float(accuracy) == pytest.approx(read_csv(trained / "epochs.csv")[-1]["accuracy"])


def test_evaluate_writes_a_page_of_its_own(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", str(trained)]) == 0
    assert "accuracy" in capsys.readouterr().out
    result = json.loads((trained / "evaluation.json").read_text())
    assert result["accuracy"] == pytest.approx(read_csv(trained / "epochs.csv")[-1]["accuracy"])
    page = (trained / "report" / "index.html").read_text(encoding="utf-8")
    pictures = {path.name for path in (trained / "report").glob("*.png")}
    assert pictures == {"chosen_pixels.png", "share_of_pixels.png", "losses.png"}
    assert page.count("data:image/png;base64,") == 3 and "http" not in page


def test_a_stopped_run_continues_with_the_same_bits(trained: Path, tmp_path: Path) -> None:
    """From the middle of the second epoch, as if the process had died after some more steps."""
    stopped = tmp_path / "stopped"
    shutil.copytree(trained, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-000000044")
    (stopped / "checkpoints" / ".part-step-000000049").mkdir()  # half of a checkpoint
    (stopped / "model" / "model.safetensors").unlink()
    resume(stopped)
    assert same(trained, stopped)
    for name in ("epochs.csv", "steps.csv"):
        found, expected = read_csv(stopped / name), read_csv(trained / name)
        for row in (*found, *expected):
            row.pop("images_per_second", None)
        assert found == expected
    states = [path / "checkpoints" / "step-000000044" for path in (trained, stopped)]
    first, second = (load_file(path / "optimizer.safetensors") for path in states)
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (json.loads((path / "state.json").read_text()) for path in states)
    assert first.pop("options") != second.pop("options") and first == second


def test_a_killed_run_loses_one_interval_at_most(tmp_path: Path) -> None:
    """SIGKILL after the second checkpoint; what is resumed has the bits of what was not killed."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    words = ["train", "sparseattnnet", "--data", "digits", "--device", "cpu", "--epochs", "5"]
    words += ["--batch-size", "64", "--checkpoint-every", "7"]
    command = [sys.executable, "-m", "sparseattn", *words]
    killed = subprocess.Popen(
        [*command, "--out", str(out), *WORDS], stdout=subprocess.DEVNULL, env=ONE_THREAD
    )
    until = time.monotonic() + 120
    while len(checkpoint.all_of(out / "checkpoints")) < 2 and time.monotonic() < until:
        time.sleep(0.002)
    killed.kill()
    assert killed.wait() == -9  # it was still running
    last = checkpoint.all_of(out / "checkpoints")[-1]
    steps = read_csv(out / "steps.csv")
    assert not steps or steps[-1]["step"] < int(last.name[5:]) + 7
    program = (
        "import sys; from sparseattn.cli.main import main\n"
        "main(sys.argv[3:]); from sparseattn.training.loop import resume\n"
        "from pathlib import Path; resume(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", program, str(out), "", *words, "--out", str(whole), *WORDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert f"continues from {last}" in done.stdout
    assert same(out, whole)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate launch": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    return train("sparseattnnet", options(out, epochs=1, lr=2e-3), {**TINY, "explore": 0.0})


@pytest.mark.parametrize(
    "launcher", ["torchrun", pytest.param("accelerate launch", marks=pytest.mark.slow)]
)
def test_two_processes_train_one_model(launcher: str, alone: Path, tmp_path: Path) -> None:
    """With gloo: the weights of one process with batches of twice the size."""
    pair = tmp_path / "pair"
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "sparseattn", "train"]
    command += ["sparseattnnet", "--data", "digits", "--out", str(pair), "--device", "cpu"]
    command += ["--epochs", "1", "--batch-size", "32", "--lr", "2e-3", *WORDS, "explore=0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and done.stdout.count("epoch 1/1") == 1
    first, second = (read_csv(out / "epochs.csv")[-1] for out in (pair, alone))
    assert first["step"] == second["step"] == 22
    # the last batches are filled up, so the epochs differ by one example at most
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-2)
    assert first["accuracy"] == pytest.approx(second["accuracy"], abs=0.05)
    a, b = weights(pair), weights(alone)
    moved = SparseAttnNet.from_pretrained(str(alone / "model")).head.weight
    assert (a["head.weight"] - b["head.weight"]).abs().mean() < 0.02 * moved.abs().mean()


def test_a_sharded_model_continues_with_the_same_bits(tmp_path: Path) -> None:
    """FSDP2 on two processes, gloo."""
    worker = Path(__file__).with_name("sharded_worker.py")
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"], str(worker), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees") == 2  # torchrun's processes share a pipe: lines may mix


def test_bf16_trains(tmp_path: Path) -> None:
    out = train("sparseattnnet", options(tmp_path, precision="bf16"), TINY)
    assert read_csv(out / "epochs.csv")[-1]["loss"] < 0.9 * math.log(10)


def test_a_folder_of_pictures_trains(tmp_path: Path) -> None:
    """With a truncated file, which is listed; nothing is written outside the run's folder."""
    data = tmp_path / "data"
    for i in range(8):
        for name, value in (("dark", 20), ("light", 230)):
            picture(data / name / f"{i}.png", np.full((10, 10), value + i, dtype=np.uint8))
    cut(picture(data / "dark" / "cut.png", side=64))
    before = sorted(path for path in tmp_path.rglob("*"))
    words = ["--set", "dim=16", "heads=2", "depth=1", "keep=1.0"]
    command = ["train", "sparseattnnet", "--data", str(data), "--out", str(tmp_path / "run")]
    command += ["--image-size", "8", "--epochs", "8", "--batch-size", "4", "--device", "cpu"]
    assert main([*command, "--on-error", "skip", *words]) == 0
    skipped = (tmp_path / "run" / "skipped.csv").read_text()
    assert "cut.png,truncated file" in skipped and len(skipped.splitlines()) == 2
    assert read_csv(tmp_path / "run" / "epochs.csv")[-1]["loss"] < 0.5 * math.log(2)
    outside = [p for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "run")]
    assert sorted(outside) == before


def test_a_folder_with_a_run_is_left_alone(trained: Path) -> None:
    with pytest.raises(ValueError, match="holds a run"):
        train("sparseattnnet", options(trained), TINY)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises((FloatingPointError, ValueError), match=r"not finite|loss is nan"):
        train("sparseattnnet", options(tmp_path, lr=1e30, clip=1e30, warmup=0.0, log_every=1), TINY)


def test_half_a_checkpoint_is_named(trained: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut)
    last = checkpoint.all_of(cut / "checkpoints")[-1] / "model.safetensors"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        resume(cut)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_run(tmp_path)


def test_checkpoint_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path, 1, model, optimizer, {}, write=True)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "write_json", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, 2, model, optimizer, {}, write=True)
    assert [path.name for path in checkpoint.all_of(tmp_path)] == ["step-000000001"]


def test_tied_weights_and_frozen_ones_survive_a_checkpoint(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
        model[1].weight = model[0].weight
        model[0].bias.requires_grad_(False)
        return model, torch.optim.AdamW(optimizer_groups(model, 0.1), lr=0.1)

    model, optimizer = make()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    path = checkpoint.save(tmp_path, 3, model, optimizer, {"a": [1, 2]}, write=True)
    other, again = make()
    checkpoint.load_model(path, other)
    assert checkpoint.load_optimizer(path, other, again) == {"a": [1, 2]}
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )
    x = torch.randn(8, 4)
    for m, o in ((model, optimizer), (other, again)):
        o.zero_grad()
        m(x).square().sum().backward()
        o.step()
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_rate_climbs_and_falls_as_a_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, rates = make_schedule(optimizer, 50, 0.1), []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:6] == pytest.approx([2 * (i + 1) / 6 for i in range(6)])
    expected = [1 + math.cos(math.pi * i / 45) for i in range(45)]
    assert rates[5:] == pytest.approx(expected)


def test_what_decays() -> None:
    model = SparseAttnNet()
    deep, flat = optimizer_groups(model, 0.1)
    assert deep["weight_decay"] == 0.1 and flat["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for p in flat["params"]}
    assert "class_token" in kept and "norm.weight" in kept and "head.bias" in kept
    assert len(deep["params"]) + len(flat["params"]) == len(names)


def test_seeds_differ() -> None:
    seeds = {step_seed(s, n, r) for s in range(3) for n in range(3) for r in range(3)}
    assert len(seeds) == 27 and step_seed(1, 2, 3) == step_seed(1, 2, 3)


def test_csv_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = CsvLog(path)
    for step in range(5):
        log.write({"step": step, "loss": step / 3})
    path.write_text(path.read_text() + "5,0.")  # killed while it wrote
    CsvLog(path, after=2).write({"step": 3, "loss": 7.0})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"] and rows[3]["loss"] == "7.0"
    assert read_csv(path)[1]["loss"] == 1 / 3


@dataclasses.dataclass
class Kinds:
    """A config with a field of each kind."""

    size: int = 1
    rate: float | None = None
    deep: bool = False
    name: str = "a"


def test_changes_have_the_types_of_the_fields() -> None:
    words = ["size=3", "rate=1e-2", "deep=true", "name=b=c"]
    assert parse_changes(Kinds, words) == {"size": 3, "rate": 0.01, "deep": True, "name": "b=c"}
    assert parse_changes(Kinds, ["rate=none"]) == {"rate": None}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("size=x", "size is 'x'; expected an int"),
        ("deep=1", "expected true or false"),
        ("rate=x", "expected a number"),
        ("depth=1", "expected NAME=VALUE of size=1"),
        ("size", "expected NAME=VALUE"),
    ],
)
def test_wrong_changes_are_refused(word: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_changes(Kinds, [word])


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"lr": 0.0}, {"warmup": 1.0}, {"precision": "fp8"}, {"device": "tpu"}],
)
def test_wrong_options_are_refused(change: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"train: {next(iter(change))} is"):
        options(tmp_path, **change)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "sparseattnnet", "--data", "nothing"], "source is 'nothing'"),
        (["resume", "no_such_folder"], "holds no config.json"),
        (["train", "sparseattnnet", "--data", "digits", "--set", "dim=30"], "multiple of heads"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: list[str], says: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # nothing was written
