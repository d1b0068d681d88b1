"""`sparseattn validate`: claims of the papers, measured on this machine."""

import argparse
import dataclasses
from pathlib import Path

from sparseattn.cli.extras import explain_missing

COLUMNS = ("", "claim", "measured here", "verdict")
NAMES = ("V1", "V2", "V2b", "V8", "V9")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `validate`."""
    text = "Measure claims of the papers on real samples: what holds, what does not, and why."
    parser = subparsers.add_parser("validate", help="check the papers' claims", description=text)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(NAMES)} (default all)")
    add("--seeds", type=int, default=5, help="trainings of each kind (default 5)")
    add("--epochs", type=int, default=60, help="of each training (default 60)")
    add("--json", type=Path, help="write the findings to this file too")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print the table; the exit code is 1 if a claim does not hold."""
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        args.parser.error(f"NAME is {unknown[0]}; expected one of {', '.join(NAMES)}")
    if args.seeds < 1 or args.epochs < 1:
        args.parser.error("--seeds and --epochs are counts; expected 1 or more")
    try:
        explain_missing()
        from sparseattn.training.options import write_json
        from sparseattn.training.validation import CHECKS, CLINICAL, Effort

        effort = Effort(args.seeds, args.epochs)
        found = {name: CHECKS[name](effort) for name in args.names or NAMES}
    except ImportError as error:
        args.parser.exit(2, f"{args.parser.prog}: error: {error}\n")
    rows = [(name, *dataclasses.astuple(f)) for name, f in [*found.items(), ("", CLINICAL)]]
    print("\n" + "| " + " | ".join(COLUMNS) + " |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if args.json is not None:
        write_json(args.json, {name: dataclasses.asdict(f) for name, f in found.items()})
    return int(any(finding.verdict == "does not hold" for finding in found.values()))
