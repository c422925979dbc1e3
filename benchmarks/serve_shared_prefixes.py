"""Prompts that begin alike: Llama-3.1-8B shape with dummy weights in vLLM, prefix caching on.

`python -m benchmarks serve --engine vllm --shared-prefixes --out FILE` starts all engines at once:
FLASH_ATTN, ours by default (FI_PREFIX=auto), and ours that reads shared prefixes again for every request
(FI_PREFIX=off). When they have imported vLLM they start up and serve in turns. The requests of a case come at
once; its decode phase begins with the last first token. n samples of a prompt are n requests, as in vLLM.
Every figure is in FILE at once; compare figures only within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

from . import turns
from .engine_process import COMMAND, EngineProcess, tell
from .lengths import sharegpt
from .open_loop import drive, figures
from .serve import CONTEXT, MAX_REQUESTS, Report, add_process_options, machine, make_model, prompts
from .serve_open_loop import sender, start_engine
from .serve_vllm import engine_options

ENGINES = {  # name -> backend, FI_PREFIX
    "FLASH_ATTN": ("FLASH_ATTN", "off"),
    "CUSTOM": ("CUSTOM", "auto"),
    "CUSTOM, FI_PREFIX=off": ("CUSTOM", "off"),
}


class Case(NamedTuple):
    """Prompts of so many tokens, each continued `each` times by suffix own and outputs[i] new tokens."""

    prefixes: list[int]
    each: int
    suffix: int
    outputs: list[int]

    def requests(self, seed: int, divisor: int) -> tuple[list[list[int]], list[int]]:
        """Tokens of every prompt, and how many to generate. divisor: of all lengths."""

        def tokens(lengths: list[int], seed: int) -> list[list[int]]:
            return prompts([(-(-n // divisor), 0) for n in lengths], seed)

        shared = tokens(self.prefixes, seed)
        own = tokens([self.suffix] * len(shared) * self.each, seed + 500)
        ids = [shared[i // self.each] + suffix for i, suffix in enumerate(own)]
        return ids, [max(2, self.outputs[i // self.each] // divisor) for i in range(len(ids))]


def _samples(n: int) -> Case:
    """As many prompts as can be served at once, at most 64; long outputs are cut: few would be left."""
    lengths = sharegpt(min(64, MAX_REQUESTS // n), seed=n)
    return Case([p for p, _ in lengths], n, 0, [min(o, 256) for _, o in lengths])


CASES = {
    "4 prefixes of 8192, 64 requests each, 256 out": Case([8192] * 4, 64, 128, [256] * 4),
    "8 prompts of 8192, n = 16, 128 out": Case([8192] * 8, 16, 0, [128] * 8),
    **{f"ShareGPT-like, n = {n}": _samples(n) for n in (1, 2, 4, 8, 16, 32, 64)},
}


def saved_bytes(worker: Any) -> int:
    """Runs in the worker: what shared prefixes have saved; 0 for another backend."""
    from fi_backend.serving import saved

    return saved.total()


def decode_phase(outputs: list[tuple[int, float, int]]) -> dict[str, float]:
    """outputs: request, time and number of tokens of each. From the last first token to the end."""
    first: dict[int, float] = {}
    for request, at, _ in outputs:
        first[request] = min(at, first.get(request, at))
    begin, end = max(first.values()), max(at for _, at, _ in outputs)
    tokens = sum(added for _, at, added in outputs if at > begin)
    return {"decode_tokens_s": round(tokens / max(end - begin, 1e-9), 1), "decode_s": round(end - begin, 3)}


def child(args: argparse.Namespace) -> None:
    asyncio.run(_serve(args))


async def _serve(args: argparse.Namespace) -> None:
    """One engine, all cases."""
    turns.wait_for_turn(args.gate)
    backend, _ = ENGINES[args.child]
    options = engine_options(args.model, backend) | {"enable_prefix_caching": True}
    engine = start_engine(options | {"max_model_len": CONTEXT // args.divisor})

    async def serve(case: Case, seed: int, name: str) -> dict[str, float]:
        ids, wanted = case.requests(seed, args.divisor)
        outputs: list[tuple[int, float, int]] = []
        send = sender(engine, ids, wanted, name)

        async def heard(number: int) -> AsyncIterator[int]:
            async for added in send(number):
                outputs.append((number, time.perf_counter(), added))
                yield added

        before = sum(await engine.collective_rpc(saved_bytes))
        served = await drive(heard, [0.0] * len(ids))
        for n, found in zip(wanted, served, strict=True):
            if found.tokens != n:
                raise RuntimeError(f"expected {n} tokens, got {found.tokens}")
        saved = sum(await engine.collective_rpc(saved_bytes)) - before
        return {**decode_phase(outputs), **figures(served), "saved_gb": round(saved / 1e9, 3)}

    # first use of the sampler's and the runner's own kernels
    await serve(Case([300] * 8, 4, 8, [8] * 8), 0, "warm")
    for number, name in enumerate(args.case or CASES, 1):
        # seeds so far apart that no prompt is found in the cache
        tell(case=name, **await serve(CASES[name], 1000 * number, str(number)))
    engine.shutdown()


def contender(name: str, args: argparse.Namespace, folder: Path, report: Report) -> turns.Contender:
    gate = folder / f"gate-{list(ENGINES).index(name)}"
    command = [*COMMAND, "vllm", "--shared-prefixes", "--child", name, "--model", str(folder / "llama")]
    command += ["--gate", str(gate), "--divisor", str(args.divisor)]
    for case in args.case:
        command += ["--case", case]

    def add(case: str, **values: Any) -> None:
        report.add(name, case, suite="shared prefixes", **values)

    process = EngineProcess(command, lambda row: add(**row), {"FI_PREFIX": ENGINES[name][1]})
    return turns.Contender(name, process, gate, lambda reason: add("run", failed=reason))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks serve --engine vllm --shared-prefixes", description=__doc__
    )
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    parser.add_argument(
        "--case", action="append", default=[], choices=CASES, help="only this case (repeatable)"
    )
    parser.add_argument(
        "--only", action="append", default=[], choices=ENGINES, help="only this engine (repeatable)"
    )
    parser.add_argument("--layers", type=int, default=32, help="fewer only to try it (%(default)s)")
    parser.add_argument("--divisor", type=int, default=1, help="of lengths, above 1 only to try it")
    parser.add_argument("--gate", type=Path, help=argparse.SUPPRESS)
    add_process_options(parser)
    args = parser.parse_args(arguments)
    if args.child:
        child(args)
        return
    end = time.monotonic() + 60 * args.minutes
    report = Report(args.out, machine("vllm"))
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "llama"), args.layers)
        engines = [contender(name, args, Path(folder), report) for name in args.only or ENGINES]
        turns.take_turns(engines, end, 30, lambda left, n: left)
