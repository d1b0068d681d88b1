"""Entry point of the command `sparseattn`.

A subcommand is a module of this folder with a function `add_parser(subparsers)`, which adds its
parser and sets two defaults: `run` (takes the parsed arguments, returns the exit code) and
`parser` (so that `run` can call `args.parser.error`). To add one, write the module and name it in
`COMMANDS`.
"""

import argparse
from collections.abc import Sequence

from sparseattn import __version__
from sparseattn.cli import bench, demo, explain, info, train, validate

COMMANDS = (bench, demo, explain, info, train, validate)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command with all its subcommands."""
    parser = argparse.ArgumentParser(
        prog="sparseattn", description="Sparse attention for large images and volumes."
    )
    parser.add_argument("--version", action="version", version=f"sparseattn {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: `sys.argv[1:]`) and return its exit code."""
    args = build_parser().parse_args(argv)
    code: int = args.run(args)
    return code
