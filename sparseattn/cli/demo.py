"""`sparseattn demo`: dense against block-sparse attention on a real chest radiograph."""

import argparse
import importlib.util
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from sparseattn import __version__, saliency_attention
from sparseattn.cli import demo_vit as vit
from sparseattn.cli.demo_measure import Job, attention_job, compare, relative_error, stack_job
from sparseattn.cli.demo_page import Findings, write_page
from sparseattn.cli.demo_saliency import SaliencyPanel, saliency_panel
from sparseattn.cli.demo_systems import PANELS, write_systems_page
from sparseattn.cli.extras import explain_missing
from sparseattn.data import Radiograph, load_radiograph, to_square
from sparseattn.viz.report import (
    Row,
    Selection,
    difference,
    rows_table,
    selections_table,
    text_table,
)

BLOCKS = (16, 64, 256)  # squares of patches that are also block sizes of BlockMask
NEEDED = {
    "pydicom": "pydicom",
    "pydicom-data": "data_store",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}
SAMPLES_OF = {"sklearn": "scikit-learn", "nilearn": "nilearn", "nibabel": "nibabel"}


@dataclass(frozen=True)
class Options:
    """Checked options. `budget` is the seconds of timed rounds that each job may take."""

    size: int
    depth: int
    keep: float
    block: int
    device: torch.device
    out: Path
    seed: int
    image: Path | None
    budget: float

    @property
    def tile(self) -> int:
        """Side of a tile, in pixels."""
        return vit.PATCH * isqrt(self.block)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `demo`."""
    text = "Run a ViT-shaped stack on a chest radiograph, dense against block-sparse attention."
    parser = subparsers.add_parser("demo", help="run on a real radiograph", description=text)
    add = parser.add_argument
    add("--size", type=int, help="side of the picture in pixels (default 1024; 256 with --quick)")
    add("--depth", type=int, help="transformer blocks (default 4; 12 on a GPU; 2 with --quick)")
    add("--keep", type=float, default=0.15, help="share of key tiles to keep (default 0.15)")
    add("--block", type=int, default=64, help="tokens per tile: 16, 64 or 256 (default 64)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: GPU if any")
    add("--out", type=Path, default=Path("demo_output"), help="folder of the page")
    add("--quick", action="store_true", help="small and few repeats: a check, not a measurement")
    add("--seed", type=int, default=0, help="of the random weights (default 0)")
    add("--image", type=Path, help="a DICOM radiograph (default: RG1 of pydicom-data)")
    text = "page of the five reference models (default: also; none with --quick)"
    add("--systems", choices=("also", "only", "none"), help=text)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Run the demo; print the tables, write the page, return the exit code."""
    options = _checked_options(args)
    missing = [name for name, module in NEEDED.items() if not importlib.util.find_spec(module)]
    if missing:
        args.parser.exit(1, f'demo needs {", ".join(missing)}; pip install "sparseattn[demo]"\n')
    started = time.perf_counter()
    systems = args.systems or ("none" if args.quick else "also")
    try:
        radiograph = load_radiograph(options.image)
        options.out.mkdir(parents=True, exist_ok=True)
        if systems != "only":
            findings = _measure(radiograph, options, started)
            _print(findings, write_page(findings, options.out))
        if systems != "none":
            _systems(options, systems == "only", started)
    except (OSError, ValueError, ImportError) as error:
        args.parser.error(str(error))
    print(f"total {time.perf_counter() - started:.0f} s")
    return 0


def _systems(options: Options, asked_for: bool, started: float) -> None:
    """Write the page of the reference models; without what it needs, say so."""
    try:
        explain_missing()
        for module, package in SAMPLES_OF.items():
            if not importlib.util.find_spec(module):
                raise ImportError(f'needs {package}; pip install "sparseattn[test]"')
    except ImportError as error:
        if asked_for:
            raise
        print(f"the page of the reference models is left out: {error}")
        return
    progress = _Progress(len(PANELS), started)
    print(f"page: {write_systems_page(options.out, options.seed, progress.stage)}")
    progress.close()


def _checked_options(args: argparse.Namespace) -> Options:
    """Turn the arguments into Options, or end with exit code 2 and one sentence."""
    refuse = args.parser.error
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        refuse("--device is cuda, but torch sees no GPU; expected auto or cpu here")
    device = torch.device("cuda" if has_gpu and args.device != "cpu" else "cpu")
    if args.block not in BLOCKS:
        refuse(f"--block is {args.block}; expected one of {', '.join(map(str, BLOCKS))}")
    size = args.size if args.size is not None else (256 if args.quick else 1024)
    tile = vit.PATCH * isqrt(args.block)
    if size < tile or size % tile:
        refuse(f"--size is {size}; expected a multiple of {tile} (the tile of --block in pixels)")
    if not 0 < args.keep <= 1:
        refuse(f"--keep is {args.keep}; expected a share above 0 and at most 1")
    usual_depth = 2 if args.quick else (12 if device.type == "cuda" else 4)
    depth = args.depth if args.depth is not None else usual_depth
    if depth < 1:
        refuse(f"--depth is {depth}; expected 1 or more")
    if args.seed < 0:
        refuse(f"--seed is {args.seed}; expected 0 or more")
    if args.out.exists() and not args.out.is_dir():
        refuse(f"--out is {args.out}, which is a file; expected a folder")
    if args.image is not None and not args.image.is_file():
        refuse(f"--image is {args.image}; there is no such file")
    return Options(
        size=size,
        depth=depth,
        keep=args.keep,
        block=args.block,
        device=device,
        out=args.out,
        seed=args.seed,
        image=args.image,
        budget=0.2 if args.quick else 12.0,
    )


class _Progress:
    """A bar on a terminal; a line per stage everywhere."""

    def __init__(self, total: int, started: float) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        self._bar = tqdm(
            total=total, disable=not sys.stderr.isatty(), leave=False, bar_format="{l_bar}{bar}"
        )
        self._started = started

    def stage(self, text: str) -> None:
        """Say what begins now."""
        line = f"[{time.perf_counter() - self._started:5.1f} s] {text}"
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def tick(self) -> None:
        """Count one part as done."""
        self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


@dataclass(frozen=True, eq=False)
class _Scene:
    """The picture at one size, as the stack's input."""

    picture: Tensor  # [S, S] in [0, 1]
    patches: Tensor  # [1, N, PATCH * PATCH]
    where: Tensor  # [N, EMBED]
    sparse: vit.TileAttention


def _scene(radiograph: Radiograph, size: int, options: Options) -> _Scene:
    picture = to_square(radiograph.pixels, size).to(options.device)
    normal = (picture - picture.mean()) / picture.std()
    where = vit.positions(size // vit.PATCH, options.block).to(options.device)
    sparse = vit.TileAttention(
        vit.tile_contrast(picture, options.block), options.keep, options.block
    )
    return _Scene(picture, vit.picture_tokens(normal, options.block), where, sparse)


def _sizes(options: Options) -> list[int]:
    """The picture sizes that attention alone is timed at: the given one, and larger ones."""
    factors = (1.0, 2.0, 4.0) if options.device.type == "cuda" else (1.0, 1.5)
    sizes = [int(factor * options.size) // options.tile * options.tile for factor in factors]
    return [max(size, options.size + i * options.tile) for i, size in enumerate(sizes)]


def _measure(radiograph: Radiograph, options: Options, started: float) -> Findings:
    """Run every job, and collect what the page shows."""
    sizes = _sizes(options)
    progress = _Progress(2 * (len(sizes) + 3) + 2, started)
    height, width = radiograph.pixels.shape
    progress.stage(
        f"{radiograph.file_name}: {radiograph.modality} {radiograph.body_part}, "
        f"{width} x {height}, {radiograph.bits} bit, {radiograph.photometric}"
    )
    stack = vit.VitStack(options.depth, options.seed).to(options.device)
    rows: list[Row] = []

    def timed(job: Job, sparse: vit.Attend, budget: float) -> Row:
        progress.stage(f"{job.name}, {job.tokens} tokens")
        row = compare(job, vit.dense_attention, sparse, budget, progress.tick)
        if isinstance(sparse, vit.TileAttention):
            masks = sparse.masks or []
            shares = [float(mask.density().float().mean()) for mask in masks]
            row = replace(row, kept=sum(shares) / len(shares))
            sparse.masks = []
        rows.append(row)
        return row

    first = _scene(radiograph, options.size, options)
    first_qkv = _first_heads(stack, first, options)
    for size in sizes:
        scene = first if size == options.size else _scene(radiograph, size, options)
        qkv = first_qkv if size == options.size else _first_heads(stack, scene, options)
        job = attention_job(f"attention, {size}²", qkv, options.seed)
        scene.sparse.masks = []
        timed(job, scene.sparse, options.budget)
    name = f"{options.depth}-block ViT-S/16, {options.size}²"
    timed(
        stack_job(name, stack, first.patches, first.where, options.seed),
        first.sparse,
        options.budget,
    )
    progress.stage("a predictor of saliency learns on the picture")
    panel = _saliency(stack, first, first_qkv, options)
    progress.tick()

    def salient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return saliency_attention(q, k, v, panel.saliency, options.keep)

    job = attention_job(f"salient tokens, {options.size}²", first_qkv, options.seed)
    timed(job, salient, options.budget / 3)
    rows[-1] = replace(rows[-1], kept=panel.share)
    exact = [x.float() for x in first_qkv]
    name = f"all tiles kept, {options.size}², fp32"
    everything = vit.full_attention(
        options.block, "triton" if options.device.type == "cuda" else "torch"
    )
    timed(attention_job(name, exact, options.seed), everything, options.budget / 3)
    progress.stage("which tiles are kept, and what that changes")
    first.sparse.masks = None
    findings = _look_inside(first, first_qkv, rows, panel, options)
    progress.tick()
    progress.close()
    return replace(findings, facts=_facts(radiograph, options, stack, sizes, rows))


def _first_heads(stack: vit.VitStack, scene: _Scene, options: Options) -> tuple[Tensor, ...]:
    """q, k and v of the first block, bfloat16 on a GPU."""
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    with torch.no_grad():
        tokens = stack.tokens(scene.patches, scene.where)
        heads = stack.blocks[0].heads(tokens)  # type: ignore[operator]
    return tuple(x.to(dtype) for x in heads)


def _saliency(
    stack: vit.VitStack, scene: _Scene, qkv: tuple[Tensor, ...], options: Options
) -> SaliencyPanel:
    """Learn what the first block attends to."""
    with torch.no_grad():
        tokens = stack.blocks[0].norm_attention(  # type: ignore[operator, union-attr]
            stack.tokens(scene.patches, scene.where)
        )
    exact = [x.float() for x in qkv]
    return saliency_panel(tokens, exact, options.keep, options.block, options.seed)


def _look_inside(
    scene: _Scene,
    qkv: tuple[Tensor, ...],
    rows: list[Row],
    panel: SaliencyPanel,
    options: Options,
) -> Findings:
    """Errors, masks and other ways to choose, for the first block's attention."""
    q, k, v = (x.float() for x in qkv)
    chooser = scene.sparse
    dense, dense_lse = vit.attention_and_lse(q, k, v, vit.all_tiles(q, options.block))
    generator = torch.Generator().manual_seed(options.seed)
    mask = chooser.select(q, k)
    tiles = mask.num_k_blocks
    chance = torch.rand(1, vit.HEADS, tiles, tiles, generator=generator).to(q.device)
    ways = {
        "query-key product and contrast (used here)": mask,
        "query-key product alone": replace(chooser, contrast_weight=0.0).select(q, k),
        "local contrast alone": replace(chooser, score_weight=0.0, contrast_weight=1.0).select(
            q, k
        ),
        "chance": chooser.from_scores(chance),
    }
    selections = []
    for name, way in ways.items():
        out, lse = vit.attention_and_lse(q, k, v, way)
        share = float(way.density().float().mean())
        mass = float((lse - dense_lse).exp().mean())
        selections.append(Selection(name, share, mass, relative_error([out], [dense])))
    out, _ = vit.attention_and_lse(q, k, v, mask)
    token_errors = (out - dense).square().sum((1, 3)) / dense.square().sum((1, 3))  # [1, N]
    return Findings(
        rows=rows,
        selections=selections,
        picture=scene.picture.cpu(),
        states=mask.block_states()[0].cpu(),
        errors=vit.to_picture_grid(token_errors[0].sqrt().cpu(), options.block),
        saliency=panel,
        tile=options.tile,
        facts=(),
    )


def _facts(
    radiograph: Radiograph,
    options: Options,
    stack: vit.VitStack,
    sizes: list[int],
    rows: Sequence[Row],
) -> tuple[tuple[str, str], ...]:
    """What was run, for the foot of the page."""
    on_gpu = options.device.type == "cuda"
    processor = torch.cuda.get_device_name() if on_gpu else _cpu_name()
    height, width = radiograph.pixels.shape
    parameters = sum(p.numel() for p in stack.parameters()) / 1e6
    grown = [size for size in sizes if size > min(height, width)]
    source = f"{radiograph.file_name}, {radiograph.modality} {radiograph.body_part}"
    stored = f"{width} x {height}, {radiograph.bits} bit, {radiograph.photometric}"
    enlarged = f"; enlarged to {', '.join(map(str, grown))}" if grown else ""
    return (
        ("picture", f"{source}, {stored}; centre square{enlarged}"),
        (
            "stack",
            f"{options.depth} blocks (ViT-S has 12), {parameters:.1f} million random weights",
        ),
        ("shape", f"embedding {vit.EMBED}, {vit.HEADS} heads, patch {vit.PATCH}"),
        ("mask", f"tiles of {options.block} tokens = {options.tile} x {options.tile} pixels"),
        ("keep", f"{options.keep:g} of the key tiles, and the query's own tile always"),
        ("saliency", f"{options.keep:g} of the patches, chosen for all queries and heads alike"),
        ("numbers", "bfloat16 (autocast); all tiles kept: float32" if on_gpu else "float32"),
        ("device", f"{processor}, {torch.get_num_threads()} CPU threads"),
        ("versions", f"sparseattn {__version__}, torch {torch.__version__}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("timed runs", ", ".join(f"{row.job}: {row.runs}" for row in rows)),
        ("seed", str(options.seed)),
    )


def _cpu_name() -> str:
    """Return the CPU's name where Linux tells it, else what Python knows."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _print(findings: Findings, page: Path) -> None:
    exact = findings.rows[-1]
    print()
    print(text_table(rows_table(findings.rows)))
    print()
    print(
        "all tiles kept against torch's SDPA: largest difference "
        f"{difference(exact.output_difference)} in the output, "
        f"{difference(exact.gradient_difference)} in the gradients"
    )
    print()
    print(text_table(selections_table(findings.selections)))
    print()
    print(f"saliency: {findings.saliency.summary()}")
    print()
    print(f"page: {page}")
