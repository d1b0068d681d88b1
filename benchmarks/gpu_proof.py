"""Proves every kernel and op on the GPU at hand: numbers, equal bits, memory, graphs, speed.

    python benchmarks/gpu_proof.py --minutes 8

Nothing needs to be installed but PyTorch with its Triton. Results go to
benchmarks/results/<gpu>/proof.json after every check; another call goes on where the last one
stopped, and does again what belongs to another source. The most important checks come first.
Without a GPU this is a rehearsal: the small cases, in Triton's interpreter.

Exit status: 0 all is proven; 1 something is wrong, and the last lines say what; 3 nothing is wrong,
but something is not proven yet.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=0, help="start nothing later than this; 0: no limit")
    add("--out", type=Path, help="where <gpu>/proof.json goes; default benchmarks/results")
    add("--fresh", action="store_true", help="forget earlier results")
    add("--ops", nargs="+", help="these ops only")
    add("--checks", nargs="+", help="these checks only")
    add("--brief", action="store_true", help="one case of each size, in one dtype")
    add("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    add("--launches", type=int, help="equal launches in `repeat`; default 200, in a rehearsal 2")
    add("--workers", type=int, help="processes at a time; default 4, in a rehearsal 1")
    add("--job-seconds", type=float, default=240, help="the longest that one check may take")
    add("--commit", help="what to record where git cannot be asked")
    add("--cases", type=Path, action="append", default=[], help="another folder of case files")
    add("--only-cases", action="store_true", help="leave out the case files of this repository")
    add("--sanitizer", help="path of compute-sanitizer; default: looked for")
    add("--runner", type=Path, help="a script in place of `python -m sparseattn bench`")
    add("--list", action="store_true", help="say what would be done, and what is known of it")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prove what is asked for."""
    args = parse(argv)
    # what is proven is the checkout this file lies in, whatever is installed
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent)]
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, here and in the workers
    args.launches = args.launches or (200 if args.device == "cuda" else 2)
    from proof import discover

    own = () if args.only_cases else (discover.OWN_CASES,)
    args.cases = tuple(dict.fromkeys((*own, *args.cases)))
    if args.worker:
        from proof.worker import serve

        return serve(args.device, args.launches, args.cases)
    from proof.session import prove

    return prove(args)


if __name__ == "__main__":
    sys.exit(main())
