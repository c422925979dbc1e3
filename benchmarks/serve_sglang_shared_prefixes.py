"""Prompts that begin alike in SGLang, its radix cache on: fa3, and ours with and without shared prefixes."""

from __future__ import annotations

import argparse
import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from . import shared_prefixes
from .open_loop import Send
from .serve import CONTEXT
from .serve_sglang import OPTIONS, gated_scheduler

ENGINES = {"fa3": "off", "fi": "auto", "fi, FI_PREFIX=off": "off", "flashinfer": "off", "triton": "off"}
CASES = list(shared_prefixes.CASES)[:4]
PORT = 29600  # and one more for each engine: neighbours that start together must not pick each other's


def counting_scheduler(gate: Path, *args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process; its internal state also tells what shared prefixes have saved."""
    from sglang.srt.managers.scheduler import Scheduler

    from fi_backend.serving import saved

    original = Scheduler.get_internal_state

    def get_internal_state(self: Any, request: Any) -> Any:
        reply = original(self, request)
        reply.internal_state["saved"] = saved.total()
        return reply

    Scheduler.get_internal_state = get_internal_state
    gated_scheduler(gate, *args, **kwargs)


def child(args: argparse.Namespace) -> None:
    """One engine, all cases."""
    from sglang.srt.entrypoints.engine import Engine

    class Gated(Engine):
        run_scheduler_process_func = staticmethod(functools.partial(counting_scheduler, args.gate))

    options = OPTIONS | {
        "attention_backend": args.child.partition(",")[0],
        "context_length": CONTEXT // args.divisor,
        "disable_radix_cache": False,
        "log_level": "warning",
        "nccl_port": PORT + list(ENGINES).index(args.child),
    }
    engine = Gated(model_path=str(args.model), **options)

    def sender(ids: list[list[int]], outputs: list[int], name: str) -> Send:
        async def send(number: int) -> AsyncIterator[int]:
            sampling = {"temperature": 0, "max_new_tokens": outputs[number], "ignore_eos": True}
            answer = await engine.async_generate(input_ids=ids[number], sampling_params=sampling, stream=True)
            before = 0
            async for output in answer:
                tokens = output["meta_info"]["completion_tokens"]
                yield tokens - before
                before = tokens

        return send

    async def saved() -> int:
        return sum(state["saved"] for state in await engine.tokenizer_manager.get_internal_state())

    engine.loop.run_until_complete(shared_prefixes.serve_cases(sender, saved, args.case, args.divisor))
    engine.shutdown()


def main(arguments: list[str]) -> None:
    shared_prefixes.main("sglang", ENGINES, list(ENGINES)[:3], CASES, child, arguments)
