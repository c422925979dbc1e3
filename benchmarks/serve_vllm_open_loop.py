"""Latencies under load: Llama-3.1-8B shape with dummy weights in vLLM, ours and vLLM's own backends.

`python -m benchmarks serve --engine vllm --open-loop --rate 20 --out FILE` starts all engines at once; when
they have imported vLLM they start up and serve in turns. To each come the same requests of ShareGPT-like
lengths at the same times. Every figure is in FILE at once; what no longer fits into --minutes is left out and
said so. Compare figures only within one run.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Any

from . import turns
from .engine_process import tell
from .lengths import sharegpt
from .open_loop import Send, arrivals, drive, figures
from .serve import Requests, add_process_options, make_model, parent, prompts
from .serve_vllm import engine_options


def child(args: argparse.Namespace) -> None:
    asyncio.run(_serve(args))


async def _serve(args: argparse.Namespace) -> None:
    """One engine, all rates."""
    turns.wait_for_turn(args.gate)
    engine = start_engine(engine_options(args.model, args.child))

    def send(requests: Requests, name: str) -> Send:
        return sender(engine, prompts(requests, 0), [n for _, n in requests], name)

    # first use of the sampler's and the runner's own kernels
    await drive(send([(300, 8)] * 32, "warm"), [0.0] * 32)
    for rate in args.rate:
        requests = sharegpt(max(1, round(rate * args.traffic)))
        served = await drive(send(requests, f"{rate}"), arrivals(len(requests), rate))
        for (_, wanted), found in zip(requests, served, strict=True):
            if found.tokens != wanted:
                raise RuntimeError(f"expected {wanted} tokens, got {found.tokens}")
        tell(case=f"{rate:g} requests/s", requests=len(requests), **figures(served))
    engine.shutdown()


def start_engine(options: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    found = AsyncEngineArgs(**options, disable_log_stats=True)
    # steps as long as those of `vllm serve`
    return AsyncLLM.from_engine_args(found, usage_context=UsageContext.OPENAI_API_SERVER)


def sender(engine: Any, ids: list[list[int]], outputs: list[int], name: str) -> Send:
    """ids: tokens of every prompt; outputs: how many follow. No two senders of an engine share a name."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def send(number: int) -> AsyncIterator[int]:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=outputs[number],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt: Any = {"prompt_token_ids": ids[number]}
        async for output in engine.generate(prompt, sampling, f"{name}-{number}"):
            yield len(output.outputs[0].token_ids)

    return send


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks serve --engine vllm --open-loop", description=__doc__
    )
    parser.add_argument("--rate", type=float, nargs="+", required=True, help="requests a second")
    parser.add_argument("--traffic", type=float, default=60, help="seconds of arrivals a rate (%(default)s)")
    parser.add_argument(
        "--backends", default="FLASH_ATTN,CUSTOM,TRITON_ATTN,FLASHINFER", help="in turn (%(default)s)"
    )
    parser.add_argument("--layers", type=int, default=32, help="fewer only to try it (%(default)s)")
    add_process_options(parser)
    args = parser.parse_args(arguments)
    if args.child:
        child(args)
        return
    with parent(args, "vllm", "open loop") as p:
        model = make_model(p.folder / "model", args.layers)
        engines = [p.contender(name, model) for name in args.backends.split(",")]
        turns.take_turns(engines, p.end, 25 + args.traffic)
