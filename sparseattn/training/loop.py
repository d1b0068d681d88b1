"""The training loop: one for all models, on one CPU, one GPU, or many under `accelerate launch`.

What a step does depends on the seed, the step's number and the weights alone: the order of the
data comes from the seed and the epoch, and torch's generator is seeded anew for every step. So a
run that was killed continues from its last checkpoint with the same bits, on one device.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.utils.data import DataLoader

from sparseattn.data.split import Split, count
from sparseattn.training import checkpoint
from sparseattn.training.logs import Logs, Progress
from sparseattn.training.options import TrainOptions, read_json, write_json
from sparseattn.training.recipe import Recipe, recipe_type

CONFIG, CHECKPOINTS, MODEL = "config.json", "checkpoints", "model"
SKIPPED = "skipped.csv"


def train(model: str, options: TrainOptions, changes: Mapping[str, Any] | None = None) -> Path:
    """Train a model and write a run folder; return it.

    The folder holds config.json, steps.csv, epochs.csv, tensorboard/, checkpoints/ and model/:
    the weights after the latest epoch, for `from_pretrained`. No epoch is picked by its result on
    the test examples.

    Args:
        model: name of a recipe.
        options: how to train.
        changes: fields of the model's config that differ from its default.

    Raises:
        ValueError: there is no such model or data, or the folder holds a run already.
        FloatingPointError: the loss is not finite.
    """
    kind = recipe_type(model)
    out = Path(options.out)
    if (out / CONFIG).exists():
        raise ValueError(f"train: {out} holds a run; expected another folder, or `resume` for it")
    changes = changes or {}
    if options.begin is not None:
        changes = {**_begun_config(kind, Path(options.begin)), **changes}
    split = kind.load(options)
    recipe = kind(kind.configure(split, changes))
    _Run(recipe, options, split).train(None)
    return out


def resume(out: Path) -> Path:
    """Continue a run from its latest checkpoint, or from its start if it has none.

    Raises:
        ValueError: the folder holds no run, or was trained by another number of processes and
            stopped inside an epoch.
    """
    recipe, options = load_run(out)
    found = checkpoint.all_of(out / CHECKPOINTS)
    if found:  # what it began with is in its weights
        options = dataclasses.replace(options, begin=None)
    _Run(recipe, options, recipe.load(options)).train(found[-1] if found else None)
    return out


def load_run(out: Path) -> tuple[Recipe, TrainOptions]:
    """Return the recipe and the options of a run folder, which may have been moved."""
    if not (out / CONFIG).is_file():
        raise ValueError(f"{out} holds no {CONFIG}; expected the folder of a run")
    saved = read_json(out / CONFIG)
    kind = recipe_type(saved["model"])
    options = TrainOptions(**{**saved["options"], "out": str(out)})
    return kind(kind.config_type(**saved["config"])), options


def _begun_config(kind: type[Recipe], begin: Path) -> dict[str, Any]:
    """Return the config of the run that a training begins with, if it is one of the right model."""
    recipe, _ = load_run(begin)
    if recipe.name != kind.begins_with:
        raise ValueError(
            f"train: begin is {begin}, a run of {recipe.name}; expected "
            f"{f'a run of {kind.begins_with}' if kind.begins_with else 'none'}, model={kind.name}"
        )
    return dataclasses.asdict(recipe.config)


def make_accelerator(options: TrainOptions) -> Any:
    """Return accelerate's Accelerator for these options, or say what to install."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DataLoaderConfiguration
    except ImportError as error:
        raise ImportError('training needs accelerate; pip install "sparseattn[train]"') from error
    AcceleratorState._reset_state()  # a process may train twice, with another precision
    return Accelerator(
        cpu=options.device == "cpu",
        mixed_precision=options.precision,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=options.seed
        ),
    )


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters that learn in two groups: those that decay, and those that do not.

    Biases, norms and single tokens do not: they have one dimension that is longer than 1 at most.
    """
    learn = [p for p in model.parameters() if p.requires_grad]
    flat = [p for p in learn if sum(size > 1 for size in p.shape) <= 1]
    deep = [p for p in learn if sum(size > 1 for size in p.shape) > 1]
    groups = [(deep, weight_decay), (flat, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def make_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> LRScheduler:
    """Return a linear climb over the first share of the steps, and a cosine to 0 after it."""
    climb = min(round(steps * warmup), steps - 1)
    fall = CosineAnnealingLR(optimizer, steps - climb)
    if climb == 0:
        return fall
    rise = LinearLR(optimizer, start_factor=1 / (climb + 1), total_iters=climb)
    return SequentialLR(optimizer, [rise, fall], [climb])


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of torch's generator for one step of one process."""
    import numpy as np

    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def losses_of(output: Any) -> dict[str, Tensor]:
    """Return the losses of a model's output by name, without gradient."""
    found = output._asdict().items()
    return {k: v.detach() for k, v in found if k.endswith("loss") and isinstance(v, Tensor)}


class _Run:
    """One run while it trains."""

    def __init__(self, recipe: Recipe, options: TrainOptions, split: Split) -> None:
        self.recipe, self.options, self.split = recipe, options, split
        self.out = Path(options.out)
        self.accelerator = make_accelerator(options)
        self.main = bool(self.accelerator.is_main_process)
        torch.manual_seed(options.seed)
        self.plain = recipe.build()  # unwrapped: what the recipe sees and what is saved
        if options.begin is not None:
            kind: Any = recipe_type(recipe.begins_with).model_type
            recipe.begin(self.plain, kind.from_pretrained(str(Path(options.begin) / MODEL)))
        learn = optimizer_groups(self.plain, options.weight_decay)
        prepare = self.accelerator.prepare
        loaders = (self._loader(train=True), self._loader(train=False))
        self.model, wrapped = prepare(self.plain, torch.optim.AdamW(learn, lr=options.lr))
        self.loader, self.test_loader = prepare(*loaders)
        self.wrapped_optimizer, self.optimizer = wrapped, wrapped.optimizer
        steps = options.epochs * len(self.loader)
        self.schedule = make_schedule(self.optimizer, steps, options.warmup)
        self.step = self.epoch = self.batches = 0
        self.sums: dict[str, Tensor] = {}  # of the losses of this epoch

    def train(self, start: Path | None) -> None:
        """Train from a checkpoint, or from the start."""
        if start is not None:
            self._restore(start)
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            if start is None:
                write_json(self.out / CONFIG, self._config())
            if self.split.problems.found:
                self.split.problems.write(self.out / SKIPPED)
        self.logs = Logs(self.out, write=self.main, after=self.step if start else None)
        self.progress = Progress(show=self.main)
        self.progress.say(self._greeting(start))
        while self.epoch < self.options.epochs:
            self._train_epoch()
            self._end_epoch()
        self.logs.close()
        self.accelerator.wait_for_everyone()

    def _loader(self, *, train: bool) -> DataLoader:
        data = self.split.train if train else self.split.test
        size = self.options.batch_size
        if train and count(data) < size and self.recipe.drop_last:
            raise ValueError(
                f"train: batch_size is {size}; expected at most the number of examples, "
                f"examples={count(data)} (from data)"
            )
        return DataLoader(
            data,
            batch_size=size,
            shuffle=train,
            num_workers=self.options.workers,
            drop_last=train and self.recipe.drop_last,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _train_epoch(self) -> None:
        number, total = self.epoch + 1, self.options.epochs
        loader = self.accelerator.skip_first_batches(self.loader, self.batches)
        loader.set_epoch(self.epoch)
        share = self.options.batch_size * self.accelerator.num_processes
        self.progress.begin(number, total, count(self.split.train), self.batches * share)
        self.model.train()
        self.since, self.seen = time.perf_counter(), 0
        last = len(self.loader)
        for batch in loader:
            losses = self._step(batch)
            self.batches += 1
            size = len(next(iter(batch.values()))) * self.accelerator.num_processes
            self.seen += size
            self.progress.advance(size)
            if self.step % self.options.log_every == 0:
                self._log_step(losses)
            if self.step % self.options.checkpoint_every == 0 and self.batches < last:
                self._save()

    def _step(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        rank = self.accelerator.process_index
        torch.manual_seed(step_seed(self.options.seed, self.step, rank))
        output = self.model(**batch)
        self.accelerator.backward(output.loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.wrapped_optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # fp16 found an infinite gradient
            self.schedule.step()
        self.wrapped_optimizer.zero_grad()
        self.step += 1
        losses = losses_of(output)
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.double()
        return losses

    def _log_step(self, losses: Mapping[str, Tensor]) -> None:
        values = {k: float(v) for k, v in self._mean(losses).items()}
        if not all(map(torch.isfinite, self.sums.values())):
            raise FloatingPointError(
                f"train: the loss is not finite by step {self.step}: {values}; try a lower --lr, "
                f"and continue from before with `sparseattn resume {self.out}`"
            )
        seconds = time.perf_counter() - self.since
        speed = self.seen / seconds
        self.since, self.seen = time.perf_counter(), 0
        rate = self.optimizer.param_groups[0]["lr"]
        row = {"step": self.step, "epoch": self.epoch + 1, "lr": rate, **values}
        self.logs.step({**row, "images_per_second": round(speed, 1)})
        self.progress.loss(values["loss"])

    def _end_epoch(self) -> None:
        means = self._mean({name: value / self.batches for name, value in self.sums.items()})
        losses = {name: float(value) for name, value in means.items()}
        metrics = evaluate_model(self.accelerator, self.recipe, self.model, self.test_loader)
        save_model(self.recipe, self.accelerator, self.model, self.out / MODEL)
        extra = self.recipe.after_epoch(self.plain, losses, self.options)
        self.epoch, self.batches, self.sums = self.epoch + 1, 0, {}
        row = {"step": self.step, "epoch": self.epoch, **losses, **metrics, **extra}
        self.logs.epoch(row)
        self.progress.end(self.epoch, self.options.epochs, row)
        self._save()

    def _mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Average over processes."""
        reduced: dict[str, Tensor] = self.accelerator.reduce(dict(values), reduction="mean")
        return reduced

    def _save(self) -> None:
        scaler = self.accelerator.scaler
        state = {
            **self._config(),
            "step": self.step,
            "epoch": self.epoch,
            "batches": self.batches,
            "processes": self.accelerator.num_processes,
            "sums": {name: float(value) for name, value in self._mean(self.sums).items()},
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "recipe": self.recipe.state_dict(),
        }
        folder = self.out / CHECKPOINTS
        checkpoint.save(folder, self.step, self.model, self.optimizer, state, write=self.main)

    def _restore(self, path: Path) -> None:
        checkpoint.load_model(path, self.model)
        state = checkpoint.load_optimizer(path, self.model, self.optimizer)
        processes = self.accelerator.num_processes
        if state["batches"] and state["processes"] != processes:
            raise ValueError(
                f"resume: {path} was saved inside an epoch by {state['processes']} processes; "
                f"expected as many, processes={processes} (from the launcher)"
            )
        self.step, self.epoch, self.batches = state["step"], state["epoch"], state["batches"]
        device = self.accelerator.device
        self.sums = {
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in state["sums"].items()
        }
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.recipe.load_state_dict(state["recipe"])

    def _config(self) -> dict[str, Any]:
        from sparseattn import __version__

        return {
            "model": self.recipe.name,
            "config": dataclasses.asdict(self.recipe.config),
            "options": dataclasses.asdict(self.options),
            "classes": list(self.split.classes),
            "versions": {"sparseattn": __version__, "torch": torch.__version__},
        }

    def _greeting(self, start: Path | None) -> str:
        learn = sum(p.numel() for p in self.plain.parameters() if p.requires_grad)
        lines = [
            f"{self.recipe.name}: {learn:,} parameters learn, on {self.accelerator.device}, "
            f"{self.accelerator.num_processes} process(es)",
            f"{self.split.about}: {count(self.split.train)} train, {count(self.split.test)} test",
        ]
        for kind, times in self.split.problems.counts().items():
            lines.append(f"left out: {times} x {kind}; see {self.out / SKIPPED}")
        if start is not None:
            lines.append(f"continues from {start}")
        return "\n".join(lines)


def save_model(recipe: Recipe, accelerator: Any, model: nn.Module, folder: Path) -> None:
    """Save the whole model for `from_pretrained`; every file is replaced in one step."""
    saved = checkpoint.weights(model)
    if not accelerator.is_main_process:
        return
    plain: Any = recipe.build()
    plain.load_state_dict(saved)
    part = folder.with_name(f".part-{folder.name}")
    plain.save_pretrained(part)
    folder.mkdir(parents=True, exist_ok=True)
    for path in part.iterdir():
        path.replace(folder / path.name)
    part.rmdir()


@torch.no_grad()
def evaluate_model(
    accelerator: Any, recipe: Recipe, model: nn.Module, loader: Any
) -> dict[str, float]:
    """Return the metrics of a model over a prepared loader; each example counts once."""
    model.eval()
    torch.manual_seed(0)
    parts: dict[str, list[Tensor]] = {}
    for batch in loader:
        found = accelerator.gather_for_metrics(recipe.measured(batch, model(**batch)))
        for name, value in found.items():
            parts.setdefault(name, []).append(value.cpu())
    return recipe.metrics({name: torch.cat(values) for name, values in parts.items()})
