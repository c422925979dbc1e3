"""Whole-engine figures: Llama-3.1-8B shape with dummy weights in SGLang, ours and SGLang's own backends.

`python -m benchmarks serve --engine sglang --out FILE` starts all engines at once and lets them use the GPU
one after another: four full starts in a row would take most of ten minutes, and most of a start is imports
and builds on the CPU. First each backend serves a one-layer model, side by side, which fills every cache of
compiled kernels; meanwhile the engines to be measured import what they need and wait at a gate. Only the
engine whose gate is open works on the GPU or the CPU. A start-up counts from the gate to the engine that is
ready.
Every figure is in FILE at once; a backend that breaks costs its own rows. Compare figures within one run.
"""

from __future__ import annotations

import argparse
import functools
import threading
import time
from pathlib import Path
from typing import Any

from . import turns
from .engine_process import say, tell
from .serve import (
    CASES,
    CONTEXT,
    MAX_REQUESTS,
    Parent,
    Requests,
    add_options,
    make_model,
    parent,
    prompts,
    time_cases,
)

BACKENDS: dict[str, dict[str, Any]] = {
    "fi": {"attention_backend": "fi"},
    "fi-page64": {"attention_backend": "fi", "page_size": 64},
    **{name: {"attention_backend": name} for name in ("fa3", "triton", "flashinfer")},
}
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "dtype": "bfloat16",
    "random_seed": 0,
    "context_length": CONTEXT,
    "max_running_requests": MAX_REQUESTS,
    "chunked_prefill_size": 8192,
    "cuda_graph_max_bs_decode": MAX_REQUESTS,
    "disable_prefill_cuda_graph": True,  # they take half of a start, and attention runs between them
    "disable_radix_cache": True,
    "sampling_backend": "pytorch",  # FlashInfer's is compiled for a minute
    "skip_server_warmup": True,
    "mem_fraction_static": 0.8,
}
# a one-layer model beside the others: its kernels have the same shapes
WARM_OPTIONS = OPTIONS | {"mem_fraction_static": 0.5, "max_total_tokens": 65536}


# ---- in the engine's processes


def gated_scheduler(gate: Path, *args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process, which alone uses the GPU: imports, then waits until the gate is there."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    turns.wait_for_turn(gate)
    run_scheduler_process(*args, **kwargs)


def child(args: argparse.Namespace) -> None:
    """One engine: start-up, then the cases; or, warming, every case with few output tokens."""
    from sglang.srt.entrypoints.engine import Engine

    class Gated(Engine):
        run_scheduler_process_func = staticmethod(functools.partial(gated_scheduler, args.gate))

    options = WARM_OPTIONS if args.warm else OPTIONS
    # neighbours that start together must not pick each other's port
    engine = Gated(model_path=str(args.model), nccl_port=args.port, **{**options, **BACKENDS[args.child]})
    if not args.warm:
        tell(case="start-up", seconds=round(time.time() - turns.begin(args.gate), 2))

    def generate(requests: Requests, seed: int) -> float:
        sampling = [{"temperature": 0, "max_new_tokens": n, "ignore_eos": True} for _, n in requests]
        ids = prompts(requests, seed)
        start = time.monotonic()
        outputs = engine.generate(input_ids=ids, sampling_params=sampling)
        seconds = time.monotonic() - start
        for output, (_, n) in zip(outputs, requests, strict=True):
            if len(output["output_ids"]) != n:
                raise RuntimeError(f"expected {n} tokens, got {len(output['output_ids'])}")
        return seconds

    first = generate([(64, 4)], 1)
    if args.warm:
        for case in args.case or CASES:
            generate([(n, min(m, 4)) for n, m in CASES[case]], 1)
        tell(warm=True)
    else:
        tell(case="first answer", seconds=round(first, 3))
        generate([(300, 8)] * 32, 1)  # first use of the sampler's own kernels
        time_cases(generate, args.case, args.repeat, turns.deadline(args.gate))
    engine.shutdown()


# ---- in the parent


def contender(name: str, port: int, warm: bool, args: argparse.Namespace, p: Parent) -> turns.Contender:
    model, run = ("one-layer", "warming") if warm else ("llama-8b", "run")
    log = args.out.with_name(f"{args.out.stem}-{name}{'-warm' if warm else ''}.log")
    options = ["--port", str(port), *(["--warm"] if warm else [])]
    return p.contender(name, p.folder / model, *options, run=run, log=log)


def measure(args: argparse.Namespace, p: Parent) -> None:
    make_model(p.folder / "llama-8b")
    make_model(p.folder / "one-layer", layers=1)
    names: list[str] = args.backends
    ports = iter(range(args.port, args.port + 2 * len(names)))
    warmers = [contender(n, next(ports), True, args, p) for n in names if not args.skip_warm]
    contenders = [contender(n, next(ports), False, args, p) for n in names]
    try:
        begin = time.monotonic()
        limit = (p.end - begin) * 0.4
        threads = [threading.Thread(target=w.run, args=(limit,)) for w in warmers]
        say(f"{', '.join(names)}: warming, at most {limit:.0f} s ...")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        say(f"warm after {time.monotonic() - begin:.0f} s")
        turns.take_turns(contenders, p.end, 45)
    finally:
        for engine in (*warmers, *contenders):
            engine.process.stop()


def backend_names(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in BACKENDS:
            raise argparse.ArgumentTypeError(f"expected backends among {', '.join(BACKENDS)}, got {name}")
    return names


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks serve --engine sglang", description=__doc__)
    parser.add_argument(
        "--backends",
        type=backend_names,
        default="fi,fa3,triton,fi-page64,flashinfer",
        help="in the order of their turns (default: %(default)s)",
    )
    parser.add_argument("--skip-warm", action="store_true", help="the caches are full from an earlier call")
    parser.add_argument("--port", type=int, default=29600, help="first of two ports for each backend")
    add_options(parser)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(out=Path("serve_sglang.json"))
    args = parser.parse_args(arguments)
    if args.child:
        child(args)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)  # for logs
    with parent(args, "sglang") as p:
        measure(args, p)
