"""`sparseattn bench`: times ops against their peers, on shapes of your own if you like."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

EPILOG = """\
examples:
  sparseattn bench --list
  sparseattn bench block_sparse_attention --shapes tokens=4096,8192 density=0.1,0.5
  sparseattn bench block_sparse_attention --json results.json --append --plots plots
  sparseattn bench --replay results.json --plots plots

Nothing is timed before its result was held against float64. Calls take turns in one process;
times are medians with the 20th and 80th percentile. "index" builds masks or lists, "both" is
forward and backward, "full" all three. A gain is over the fastest dense baseline of the same case;
"!" marks a loss. At the end stand geometric means over the cases, and which cases lose. "useful"
counts the FLOPs that the sparse op needs, "dense-eq." those of the dense one. The floor is the
greater of useful FLOPs at the rate of a large matrix product and bytes that must move at the rate
of a large copy, both measured first. Pairs are forward / both.
Exit code 1: one of our results is wrong.
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of this subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="time ops against their peers",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="which ops; --list names them; default: all")
    add("--list", action="store_true", help="list ops, axes and providers; time nothing")
    add("--shapes", nargs="+", default=[], metavar="AXIS=V[,V]", help="your values of an axis")
    add("--dtypes", nargs="+", default=[], choices=("float32", "float16", "bfloat16"))
    add("--modes", nargs="+", default=[], metavar="MODE", help="forward backward both index full")
    add("--providers", nargs="+", default=[], metavar="NAME", help="only these")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--threads", type=int, help="of the CPU; default: torch's own choice")
    add("--rounds", type=int, default=7, help="timed runs of each call (default 7)")
    add("--warmup", type=int, default=2, help="runs before them (default 2)")
    add("--seconds", type=float, default=2.0, help="the most one call may take for all its runs")
    add("--memory", type=float, metavar="GB", help="scratch a peer may need (1, half a GPU)")
    add("--minutes", type=float, help="start no further case after these")
    add("--small", action="store_true", help="sizes of the tests, where --shapes says nothing")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write the records here")
    add("--append", action="store_true", help="add to that file instead of replacing it")
    add("--plots", type=Path, metavar="FOLDER", help="draw plots into this folder")
    add("--replay", type=Path, nargs="+", metavar="FILE", help="show these again")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    import torch

    from sparseattn.benchmarks import registry, results

    known = registry.ops()
    _check(args, known)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        cases = [] if args.replay else _cases(args, device)
        records = results.read(args.replay) if args.replay else []
    except ValueError as error:
        args.parser.error(str(error))
    if args.list:
        return _list(cases)
    if args.replay:
        records = [record for record in records if record["op"] in (args.ops or known)]
        results.show(records)
    else:
        records = _measure(args, cases, device)
    if args.plots:
        from sparseattn.benchmarks.plots import draw

        for path in draw(records, args.plots):
            print(f"plot: {path}")
    return int(any(record.get("wrong") and record["ours"] for record in records))


def _check(args: argparse.Namespace, known: list[str]) -> None:
    """End with code 2 on arguments that cannot be."""
    from sparseattn.benchmarks.runner import MODES

    error = args.parser.error
    for kind, given, allowed in (("OP", args.ops, known), ("--modes", args.modes, MODES)):
        for name in given:
            if name not in allowed:
                error(f"{kind} is {name!r}; expected one of {', '.join(allowed)}")
    for name, low in (("rounds", 1), ("warmup", 1), ("seed", 0), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            error(f"--{name} is {value}; expected {low} or more")
    if not args.seconds > 0:
        error(f"--seconds is {args.seconds}; expected more than 0")
    if args.append and not args.json:
        error("--append needs --json")
    if args.replay and (args.json or args.list or args.shapes):
        error("--replay measures nothing; it goes with OP and --plots only")
    for path in args.replay or []:
        if not path.is_file():
            error(f"--replay is {path}; there is no such file")


def _changes(shapes: list[str]) -> dict[str, tuple[float, ...]]:
    """Read AXIS=V[,V]; ValueError if one is not of this form."""
    changes = {}
    for shape in shapes:
        axis, _, values = shape.partition("=")
        try:
            changes[axis] = tuple(_value(value) for value in values.split(","))
        except ValueError:
            raise ValueError(f"--shapes is {shape!r}; expected AXIS=V[,V], V > 0") from None
    return changes


def _value(text: str) -> float:
    value = int(text) if text.isdigit() else float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _cases(args: argparse.Namespace, device: Any) -> list[tuple[Any, list[Any]]]:
    """Return every benchmark that was asked for, with its cases."""
    from sparseattn.benchmarks import registry

    changes = _changes(args.shapes)
    found = []
    for op in args.ops or registry.ops():
        benchmark = registry.load(op)
        own = {**benchmark.small, **changes} if args.small else changes
        cases = benchmark.cases(device, tuple(args.dtypes), own, args.seed)
        found.append((benchmark, list(cases)))
    return found


def _list(found: list[tuple[Any, list[Any]]]) -> int:
    """Print the ops, their axes, and who can run the first case."""
    from sparseattn.benchmarks.runner import providers_of

    for benchmark, cases in found:
        print(f"{benchmark.op}: {len(cases)} cases, the first is {cases[0]}")
        for axis in benchmark.axes:
            values = dict.fromkeys(case.axes[axis] for case in cases)
            print(f"  {axis} = {', '.join(f'{value:g}' for value in values)}")
        for name, reason in providers_of(benchmark, cases[0]):
            print(f"  {name}{': ' + reason if reason else ''}")
    return 0


def _measure(
    args: argparse.Namespace, found: list[tuple[Any, list[Any]]], device: Any
) -> list[dict[str, Any]]:
    """Run all cases, printing and writing each when it is done."""
    from sparseattn.benchmarks import machine, results
    from sparseattn.benchmarks.runner import MODES, Settings, run_case
    from sparseattn.benchmarks.table import break_even_lines, case_table, mean_lines
    from sparseattn.benchmarks.timing import make_timer

    settings = Settings(
        modes=tuple(args.modes) or MODES,
        providers=tuple(args.providers),
        rounds=args.rounds,
        warmup=args.warmup,
        seconds=args.seconds,
        memory_bytes=_memory(args.memory, device),
    )
    dtypes = list(dict.fromkeys(case.dtype for _, cases in found for case in cases))
    about = machine.describe(device)
    print(machine.banner(about))
    about |= machine.rates(dtypes, device)
    print(results.rates_line(about), flush=True)
    out = results.Writer(args.json, args.append, about, sys.argv[1:])
    out.write([])
    timer = make_timer(device)
    records: list[dict[str, Any]] = []
    started = time.monotonic()
    todo = [(benchmark, case) for benchmark, cases in found for case in cases]
    for count, (benchmark, case) in enumerate(todo):
        if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
            print(f"\n--minutes is over: {count} of {len(todo)} cases were run")
            break
        try:
            done = run_case(benchmark, case, about, timer, settings)
        except (TypeError, ValueError) as error:  # of the case: what a provider raises is a note
            args.parser.error(f"{case}: {error}")
        print("\n" + case_table(done), flush=True)
        records += done
        out.write(records)
    print("\n" + "\n".join([*mean_lines(records), *break_even_lines(records)]))
    return records


def _memory(limit: float | None, device: Any) -> float:
    if limit is not None:
        return 1e9 * limit
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] / 2
    return 1e9
