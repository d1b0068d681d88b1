"""`sparseattn explain`: what an attention op would run for a shape, and what that must cost."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from sparseattn.explain import GPUS, OPS, explain
from sparseattn.ops.dispatch import IMPLS

EPILOG = """\
examples:
  sparseattn explain topk_attention --tokens 4096 --keep 0.15
  sparseattn explain saliency_attention --tokens 16384 --dtype bfloat16 --gpu H100 --json
  sparseattn explain nystrom_attention --tokens 65536 --landmarks 128 --gpu H100
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of `sparseattn explain`."""
    parser = subparsers.add_parser(
        "explain",
        help="what an op would run for a shape, and what that must cost",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("op", choices=OPS, metavar="OP", help=", ".join(OPS))
    add("--batch", type=int, default=1, help="default 1")
    add("--heads", type=int, default=6, help="of the queries (default 6)")
    add("--key-heads", type=int, help="default: those of the queries")
    add("--tokens", type=int, default=4096, help="default 4096")
    add("--key-tokens", type=int, help="default: as many as queries")
    add("--head-dim", type=int, default=64, help="default 64")
    add("--keep", type=_keep, help="a count, or a share with a point (default 0.25)")
    add("--block", type=int, default=64, help="tokens in a block (default 64)")
    add("--landmarks", type=int, help="of performer (features), nystrom and linformer attention")
    add("--dtype", default="float32", choices=("float32", "float16", "bfloat16", "float64"))
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--impl", default="auto", choices=IMPLS)
    add("--gpu", choices=GPUS, help="whose floor to give; default: the GPU that is here")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Print the explanation, and return 0."""
    queries = (args.batch, args.heads, args.tokens, args.head_dim)
    key_heads = args.heads if args.key_heads is None else args.key_heads
    key_tokens = args.tokens if args.key_tokens is None else args.key_tokens
    keys = (args.batch, key_heads, key_tokens, args.head_dim)
    options = {name: getattr(args, name) for name in ("keep", "landmarks", "device", "impl", "gpu")}
    try:
        found = explain(
            args.op, queries, keys, block_size=args.block, dtype=getattr(torch, args.dtype),
            **options,
        )  # fmt: skip
    except (TypeError, ValueError, NotImplementedError) as error:
        args.parser.error(str(error))
    print(json.dumps(found.as_dict(), indent=2) if args.json else found)
    return 0


def _keep(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)
