"""`sparseattn train`, `resume` and `evaluate`: the reference models, one loop for all."""

import argparse
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from sparseattn.cli.extras import explain_missing
from sparseattn.data.samples import SAMPLES, UNLABELLED
from sparseattn.data.sources import TABLES
from sparseattn.training.options import TrainOptions, parse_changes
from sparseattn.training.recipe import RECIPES, recipe_type

HELP = {
    "data": "a sample ({samples}) or a folder of your own",
    "out": "folder of the run (default runs/MODEL-DATA)",
    "epochs": "passes over the data",
    "batch_size": "examples a step, of each process",
    "lr": "largest learning rate of AdamW",
    "weight_decay": "of AdamW; biases and norms do not decay",
    "warmup": "share of the steps in which the rate climbs, before its cosine",
    "clip": "largest norm of the gradient",
    "seed": "of weights, order and every step",
    "precision": "no (float32), fp16 or bf16: automatic mixed precision",
    "checkpoint_every": "steps between checkpoints; one after every epoch besides",
    "log_every": "steps between rows of steps.csv",
    "workers": "processes that load data",
    "device": "auto or cpu",
    "begin": "folder of a run of the pre-trained model: its weights and config are taken over",
    "layout": "of a folder: folders, nnunet (volumes), or that of a table: {layouts}",
    "table": "CSV file of a layout that has one",
    "target": "finding of the table that is to be told",
    "uncertain": "what an uncertain finding becomes: usual, zero, one or ignore",
    "image_size": "side that pictures of a folder are resized to, or that volumes are cut to",
    "spacing": "mm that voxels of volumes are resampled to; 0 leaves them",
    "window": "of volumes: LOW,HIGH becomes 0 to 1, as in --window=-175,250; default: their range",
    "cache": "GiB of volumes that stay in memory; others are read again for each of their blocks",
    "on_error": "a bad file ends the run (raise), or is left out and listed in skipped.csv (skip)",
    "check": "read every file once before training; --no-check trusts them",
}

FLAGS = {"begin": "from"}  # which is no name in Python


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommands `train`, `resume` and `evaluate`."""
    text = (
        "Train a reference model. Several processes: `accelerate launch -m sparseattn train ...` "
        "or `torchrun -m sparseattn train ...`."
    )
    parser = subparsers.add_parser("train", help="train a reference model", description=text)
    parser.add_argument("model", metavar="MODEL", choices=RECIPES, help=", ".join(RECIPES))
    _add_options(parser)
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="fields of the model's config, such as dim=32",
    )
    parser.set_defaults(run=_guarded(_train), parser=parser)

    text = "Continue a run that was stopped, from its latest checkpoint, with its own options."
    parser = subparsers.add_parser("resume", help="continue a training", description=text)
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.set_defaults(run=_guarded(_resume), parser=parser)

    text = "Measure a run on its test examples; writes evaluation.json and report/index.html."
    parser = subparsers.add_parser("evaluate", help="measure a trained model", description=text)
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--data", help="other data than that of the run")
    parser.add_argument("--device", choices=("auto", "cpu"), help="default: that of the run")
    parser.set_defaults(run=_guarded(_evaluate), parser=parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of TrainOptions; those not given are left to the recipe."""
    for field in fields(TrainOptions):
        default = field.default
        kind: Any = str if default in (MISSING, None) else type(default)
        text = HELP[field.name].format(
            samples=", ".join((*SAMPLES, *UNLABELLED, "numbers")),
            layouts=", ".join(sorted(TABLES)),
        )
        if kind is bool:
            parser.add_argument(
                f"--{field.name}",
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
            continue
        parser.add_argument(
            f"--{FLAGS.get(field.name, field.name).replace('_', '-')}",
            dest=field.name,
            type=kind,
            required=field.name == "data",
            default=argparse.SUPPRESS,
            metavar=field.name.upper(),
            help=text if default is MISSING else f"{text} (default {default}, or the model's)",
        )


def _guarded(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Turn what a user can mend into one sentence and exit code 2, without a traceback."""

    def guarded(args: argparse.Namespace) -> int:
        try:
            explain_missing()
            code = run(args)
        except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
            args.parser.exit(2, f"{args.parser.prog}: error: {error}\n")
        except KeyboardInterrupt:
            args.parser.exit(130, "\nstopped; `sparseattn resume RUN` continues\n")
        from accelerate import PartialState

        PartialState().destroy_process_group()
        return code

    return guarded


def _train(args: argparse.Namespace) -> int:
    from sparseattn.training.loop import train

    recipe = recipe_type(args.model)
    names = {field.name for field in fields(TrainOptions)}
    given = {name: value for name, value in vars(args).items() if name in names}
    out = Path("runs") / f"{args.model}-{Path(given['data']).name}"
    options = TrainOptions(**{"out": str(out), **recipe.defaults, **given})
    folder = train(args.model, options, parse_changes(recipe.config_type, args.set))
    return _report(folder)


def _resume(args: argparse.Namespace) -> int:
    from sparseattn.training.loop import resume

    return _report(resume(args.folder))


def _evaluate(args: argparse.Namespace) -> int:
    return _report(args.folder, args.data, args.device)


def _report(folder: Path, data: str | None = None, device: Any = None) -> int:
    """Measure, write the page, and say where it is."""
    from sparseattn.training.evaluate import evaluate

    metrics = evaluate(folder, data, device)
    from accelerate import PartialState

    if PartialState().is_main_process:
        print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        print(f"page: {folder / 'report' / 'index.html'}")
    return 0
