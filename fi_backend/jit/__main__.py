"""Command line of the JIT.

`compile` builds for other machines' GPUs, `warmup` for a model on this one; `explain` says which kernel a
spec gets, and why.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from .. import env, jit
from ..serving.own_variant import own_variant
from ..variants import WINDOW, parse
from . import models, toolchain

_PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'"
    r".*?bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)

# (dtype, head_dim_qk, head_dim_vo, variant): what served models ask for
COMMON = [
    *(("bf16", d, d, "CAUSAL") for d in (64, 80, 96, 112, 128, 192, 256)),
    ("bf16", 192, 128, "CAUSAL"),
    ("f16", 64, 64, "CAUSAL"),
    ("f16", 128, 128, "CAUSAL"),
    ("bf16", 128, 128, "FULL"),
    ("bf16", 128, 128, "CAUSAL+WINDOW"),
    ("bf16", 256, 256, "CAUSAL+SOFT_CAP"),
    ("bf16", 256, 256, "CAUSAL+WINDOW+SOFT_CAP"),
    ("bf16", 128, 128, "CAUSAL+ALIBI"),
    ("bf16", 64, 64, "CAUSAL+SINKS"),
    ("bf16", 64, 64, "CAUSAL+WINDOW+SINKS"),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fi_backend.jit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_compile(commands.add_parser("compile", help="compile kernels; needs nvcc, no GPU"))
    _add_warmup(commands.add_parser("warmup", help="build what one model needs on this machine"))
    _add_explain(commands.add_parser("explain", help="say which kernel a spec gets and why; needs no GPU"))
    args = parser.parse_args(argv)
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return int(args.run(args))
    except (jit.BuildError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_specs(parser: argparse.ArgumentParser, arch: str) -> None:
    parser.add_argument(
        "--arch", default=arch, help="compute capabilities, comma-separated, or cpu; default %(default)s"
    )
    parser.add_argument(
        "--all-common", action="store_true", help=f"the {len(COMMON)} specs that served models use"
    )
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128], help="default 128")
    parser.add_argument("--head-dim-vo", type=int, help="head dim of V, default --head-dim")
    types = list(jit.DTYPES.values())
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=types, help="default bf16")
    parser.add_argument("--variant", nargs="+", default=["CAUSAL"], help="like CAUSAL+WINDOW, default CAUSAL")
    parser.add_argument("--batch-invariant", action="store_true", help="for Planner(batch_invariant=True)")


def _specs(args: argparse.Namespace) -> list[jit.Spec]:
    wanted = (
        COMMON
        if args.all_common
        else [
            (dtype, d, d if args.head_dim_vo is None else args.head_dim_vo, variant)
            for dtype in args.dtype
            for d in args.head_dim
            for variant in args.variant
        ]
    )
    arches = [jit.CPU if a.strip() == "cpu" else jit.parse_arch(a) for a in args.arch.split(",")]
    return [jit.Spec(a, t, qk, vo, parse(v), args.batch_invariant) for a in arches for t, qk, vo, v in wanted]


def _add_compile(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compiles kernels into the cache and prints what ptxas says of each."
    _add_specs(parser, "8.0,9.0a")
    parser.add_argument("--fail-on-spill", action="store_true", help="exit 1 if a kernel spills registers")
    parser.add_argument("--jobs", type=int, help="compilers at once, default one per CPU")
    parser.set_defaults(run=_compile)


def _compile(args: argparse.Namespace) -> int:
    specs = _specs(args)
    libs = [lib for lib in jit.needed(specs) if lib.name != "core"]
    start = time.perf_counter()
    folders = jit.build_all(libs, args.jobs)
    spills = sum(_report(lib.label, folder) for lib, folder in zip(libs, folders, strict=True))
    print(f"{len(libs)} libraries in {time.perf_counter() - start:.0f} s, {spills} kernels spill registers")
    return 1 if spills and args.fail_on_spill else 0


def _report(label: str, folder: Path) -> int:
    """Prints one line per kernel, returns how many spill."""
    spilling = 0
    print(label)
    for kernel in _PTXAS.finditer((folder / "build.log").read_text()):
        spill = int(kernel["stores"]) + int(kernel["loads"])
        spilling += spill > 0
        smem = re.search(r"(\d+) bytes smem", kernel["rest"])
        print(
            f"  {_demangled(kernel['name']):60} {kernel['arch']:7} {kernel['registers']:>3} registers, "
            f"{spill} bytes spilled, {smem[1] if smem else 0} bytes static smem"
        )
    return spilling


def _demangled(symbol: str) -> str:
    try:
        text = subprocess.run(["c++filt", "-p", symbol], capture_output=True, text=True).stdout.strip()
    except OSError:
        return symbol
    return text if text and len(text) <= 60 else (text or symbol)[:57] + "..."


def _add_warmup(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Builds every library that serving this model on this machine needs (with FI_VARIANT's, and, unless "
        "FI_PREFIX=off, what shares prefixes)."
    )
    parser.add_argument("--model", type=Path, required=True, help="folder with a Hugging Face config.json")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=list(jit.DTYPES.values()), help="default: the model's own")
    parser.add_argument("--batch-invariant", action="store_true", help="for Planner(batch_invariant=True)")
    parser.add_argument("--skip", metavar="VARIANT", help="for Planner(skip=VARIANT), of layers that have it")
    parser.add_argument("--jobs", type=int, help="compilers at once, default one per CPU")
    parser.set_defaults(run=_warmup)


def _warmup(args: argparse.Namespace) -> int:
    config = args.model / "config.json" if args.model.is_dir() else args.model
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = models.specs(json.loads(config.read_text()), jit.arch_of(device), args.dtype)
    own, _ = own_variant()
    specs = [replace(s, variant=s.variant + own, batch_invariant=args.batch_invariant) for s in found]
    skip = parse(args.skip) if args.skip else None
    if skip is not None:
        specs = [replace(s, tile_list=skip in s.variant) for s in specs]
        if not any(s.tile_list for s in specs):
            names = " or ".join(str(s.variant) for s in specs)
            raise ValueError(f"expected --skip of what a layer has all of, {names}, got {skip}")
    if env.prefix() != "off":
        specs += [replace(s, levels=True) for s in specs if _may_share(s)]
    for spec in specs:
        print(spec)
    start = time.perf_counter()
    jit.build_all(jit.needed(specs, skip), args.jobs)
    toolchain.log().info("ready in %.1f s: %s", time.perf_counter() - start, env.cache_dir())
    return 0


def _may_share(spec: jit.Spec) -> bool:
    changed = any(f.key or f.value for f in spec.variant.features)
    return not (changed or spec.batch_invariant or spec.tile_list or WINDOW in spec.variant)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Says which kernel a spec gets and why, how it is shaped, and where the cache keeps it."
    )
    _add_specs(parser, "9.0a")
    parser.add_argument("--page-size", type=int, help="tokens of a page of the KV cache, default: any")
    parser.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> int:
    if args.page_size is not None and args.page_size < 1:
        raise ValueError(f"expected --page-size of at least 1, got {args.page_size}")
    for spec in _specs(args):
        dims = spec.head_dim_qk, spec.head_dim_vo
        room, reasons = jit.choose_room(spec.arch, *dims, spec.batch_invariant)
        q_wide, q_narrow, kv = tuple(jit.core().plan_tiles(room, spec.arch, *dims))[:3]
        print(
            f"{spec}\n"
            f"  arch     {jit.arch_name(spec.arch)}\n"
            f"  room     {jit.arch_name(room)}\n"
            f"  reason   {'; '.join(reasons) or 'every condition of sm90 holds'}\n"
            f"  tiles    q_wide {q_wide}, q_narrow {q_narrow}, kv {kv}\n"
            f"  K and V  {_loads(room, args.page_size)}\n"
            f"  library  {_place(spec)}"
        )
    return 0


def _loads(room: int, page_size: int | None) -> str:
    if room == jit.CPU:
        return "read in place"
    if room != 90:
        return "cp.async"
    # map_cache, BoxTiles and is_run in csrc/sm90
    tma = "TMA; cp.async for tiles with tokens that are no keys or before all windows"
    runs = "TMA where half a tile's tokens lie one behind the other in the cache; cp.async for others"
    if page_size is None:
        return f"page sizes that are powers of two from 8 up: {tma}\n{' ' * 11}other page sizes: {runs}"
    boxes = page_size >= 8 and page_size & (page_size - 1) == 0
    return tma if boxes else f"{runs}; page size {page_size} is not a power of two from 8 up"


def _place(spec: jit.Spec) -> str:
    try:
        folder = jit.library(spec).folder()
    except jit.BuildError as error:  # the compiler's version is part of the name
        return f"not known on this machine: {error}"
    return f"{folder} ({'built' if (folder / 'lib.so').exists() else 'not built'})"


if __name__ == "__main__":
    raise SystemExit(main())
