"""Draws the schedule of a batch: `python -m fi_backend.show --kv-lens 64x4096 --out plan.svg`.

Lengths are like 4096,100,128x1: 128x1 stands for 128 requests of length 1. Without --measure no GPU is
needed: the plan is that of a GPU of --arch with --sms multiprocessors. With it the batch runs on this
machine, on its GPU if there is one, and measured times are drawn beside the predicted ones.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace

import torch

from .. import BlockSparse, KVCache, Plan, Planner, Tiles, Times, jit, measure, variants


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        plan = _plan(args)
        print(plan.show(args.out, _measure(plan, args) if args.measure else None))
    except (jit.BuildError, ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fi_backend.show",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kv-lens", required=True, help="keys of each request")
    parser.add_argument("--q-lens", help="query tokens of each request, default 1")
    parser.add_argument("--q-heads", type=int, default=32, help="default %(default)s")
    parser.add_argument("--kv-heads", type=int, default=8, help="default %(default)s")
    parser.add_argument("--head-dim", type=int, default=128, help="default %(default)s")
    parser.add_argument("--window", type=int, help="sliding window in tokens, default none")
    parser.add_argument("--batch-invariant", action="store_true", help="as Planner(batch_invariant=True)")
    parser.add_argument(
        "--page-size", type=int, default=16, help="tokens, for --measure; default %(default)s"
    )
    parser.add_argument("--arch", help="compute capability of the GPU, default 9.0")
    parser.add_argument("--sms", type=int, help="its multiprocessors, default 132")
    parser.add_argument("--workers", type=int, help="instead of what the kernel has on each multiprocessor")
    parser.add_argument(
        "--measure", action="store_true", help="run the batch, in bfloat16, and draw its times"
    )
    parser.add_argument("--out", help="write a chart to this file, which ends in .svg")
    return parser


def _lengths(flag: str, text: str) -> list[int]:
    lengths: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(?:(\d{1,7})x)?(\d{1,10})", part.strip())
        if not found:
            raise ValueError(f"expected {flag} like 4096,100,128x1, got {part.strip()!r} in {text!r}")
        lengths += int(found[1] or 1) * [int(found[2])]
    return lengths


def _tiles(args: argparse.Namespace, device: torch.device) -> Tiles:
    if args.measure:
        for flag, value in (("--arch", args.arch), ("--sms", args.sms)):
            if value is not None:
                raise ValueError(
                    f"expected no {flag} with --measure, which runs on this machine, got {value}"
                )
        tiles = Tiles.for_device(device, args.head_dim, args.head_dim, args.batch_invariant)
    else:
        arch, sms = jit.parse_arch(args.arch or "9.0"), 132 if args.sms is None else args.sms
        jit.check_gpu_arch(arch)
        jit.check_head_dims(arch, args.head_dim, args.head_dim)
        if sms < 1:
            raise ValueError(f"expected --sms of at least 1, got {sms}")
        tiles = Tiles.for_arch(arch, sms, args.head_dim, args.head_dim, args.batch_invariant)
    return tiles if args.workers is None else replace(tiles, workers=args.workers)


def _plan(args: argparse.Namespace) -> Plan:
    kv_lens = _lengths("--kv-lens", args.kv_lens)
    q_lens = _lengths("--q-lens", args.q_lens) if args.q_lens else [1] * len(kv_lens)
    if len(q_lens) != len(kv_lens):
        raise ValueError(
            f"expected as many --q-lens as --kv-lens, got {len(q_lens)} query and {len(kv_lens)} key lengths"
        )
    if args.page_size < 1:
        raise ValueError(f"expected --page-size of at least 1, got {args.page_size}")
    device = torch.device("cuda" if args.measure and torch.cuda.is_available() else "cpu")
    planner = Planner(
        q_heads=args.q_heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_requests=len(kv_lens),
        max_tokens=max(sum(q_lens), 1),
        max_kv_len=max(*kv_lens, 1),
        window=args.window,
        batch_invariant=args.batch_invariant,
        device=device,
        tiles=_tiles(args, device),
    )
    qo_indptr = torch.tensor([0, *q_lens]).cumsum(0, dtype=torch.int32).to(device)
    kv_len = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    no_pages = torch.zeros(len(kv_lens), 1, dtype=torch.int32, device=device)
    return planner.plan(BlockSparse.from_block_table(qo_indptr, kv_len, no_pages, args.page_size))


def _measure(plan: Plan, args: argparse.Namespace) -> Times:
    lengths, device = plan.batch, plan.planner.device
    starts = torch.nn.functional.pad(-(lengths.kv_len.long() // -args.page_size), (1, 0)).cumsum(0)
    pages = torch.randperm(int(starts[-1]), dtype=torch.int32, device=device)  # scattered, as in an engine
    batch = BlockSparse.from_csr(lengths.qo_indptr, lengths.kv_len, starts, pages, args.page_size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, args.head_dim, dtype=torch.bfloat16, device=device)

    q = normal(int(batch.qo_indptr[-1]), args.q_heads)
    k, v = normal(2, max(len(pages), 1), args.page_size, args.kv_heads)
    variant, window = variants.CAUSAL, {}
    if args.window:
        variant, window = variant + variants.WINDOW, {"window": args.window}
    return measure(plan.rebind(batch), q, KVCache.separate(k, v), variant=variant, **window)


if __name__ == "__main__":
    raise SystemExit(main())
