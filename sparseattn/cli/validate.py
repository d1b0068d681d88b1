"""`sparseattn validate`: claims of the papers, measured on this machine."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from sparseattn.cli.extras import explain_missing

NAMES = ("V1", "V2", "V2b", "V3", "V4", "V5", "V6", "V7", "V8", "V9", "V10")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `validate`."""
    text = "Measure claims of the papers on real samples: what holds, what does not, and why."
    parser = subparsers.add_parser("validate", help="check the papers' claims", description=text)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(NAMES)} (default all)")
    add("--seeds", type=int, default=5, help="trainings of each kind (default 5)")
    add("--epochs", type=int, default=40, help="of trainings on digits (default 40)")
    add("--seconds", type=float, default=10.0, help="of timing, for each call (default 10)")
    add("--json", type=Path, help="write the findings to this file too, beside others in it")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print the table; the exit code is 1 if a claim does not hold."""
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        args.parser.error(f"NAME is {unknown[0]}; expected one of {', '.join(NAMES)}")
    if args.seeds < 1 or args.epochs < 1 or not args.seconds > 0:
        args.parser.error("--seeds, --epochs and --seconds are too small; expected 1 or more")
    try:
        explain_missing()
        found = _measured(args)
    except (ImportError, ValueError, OSError) as error:
        args.parser.exit(2, f"{args.parser.prog}: error: {error}\n")
    return int(any(finding["verdict"] == "does not hold" for finding in found.values()))


def _measured(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure one claim after the other, and print them; return them with machine and time."""
    import torch

    from sparseattn.benchmarks import claims, machine, tables
    from sparseattn.claims.finding import Effort
    from sparseattn.claims.registry import CHECKS

    effort = Effort(args.seeds, args.epochs, args.seconds)
    about = machine.describe(torch.device("cpu"))
    place = {"machine": about["name"]} | {k: about[k] for k in ("threads", "torch", "commit")}
    found: dict[str, dict[str, Any]] = {}
    for name in args.names or NAMES:
        print(f"{name}: {CHECKS[name].__doc__ or name}", flush=True)
        started = time.perf_counter()
        finding = dataclasses.asdict(CHECKS[name](effort))
        seconds = round(time.perf_counter() - started, 1)
        print(f"{name}: {finding['verdict']}, after {seconds:.0f} s", flush=True)
        found[name] = {**finding, **place, "seeds": args.seeds, "epochs": args.epochs}
        found[name]["seconds"] = seconds
        if args.json is not None:
            claims.write(args.json, {name: found[name]})
    print("\n" + tables.markdown(claims.rows(found)))
    return found
