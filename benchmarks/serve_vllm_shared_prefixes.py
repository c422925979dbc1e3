"""Prompts that begin alike in vLLM: FLASH_ATTN, and ours with and without shared prefixes."""

from __future__ import annotations

import argparse
import asyncio
from functools import partial
from typing import Any

from . import shared_prefixes, turns
from .serve import CONTEXT
from .serve_vllm import engine_options
from .serve_vllm_open_loop import sender, start_engine

ENGINES = {"FLASH_ATTN": "off", "CUSTOM": "auto", "CUSTOM, FI_PREFIX=off": "off"}
CASES = list(shared_prefixes.CASES)[1:]


def saved_bytes(worker: Any) -> int:
    """Runs in the worker: what shared prefixes have saved; 0 for another backend."""
    from fi_backend.serving import saved

    return saved.total()


def child(args: argparse.Namespace) -> None:
    asyncio.run(_serve(args))


async def _serve(args: argparse.Namespace) -> None:
    """One engine, all cases."""
    turns.wait_for_turn(args.gate)
    options = engine_options(args.model, args.child.partition(",")[0]) | {"enable_prefix_caching": True}
    engine = start_engine(options | {"max_model_len": CONTEXT // args.divisor})

    async def saved() -> int:
        return sum(await engine.collective_rpc(saved_bytes))

    await shared_prefixes.serve_cases(partial(sender, engine), saved, args.case, args.divisor)
    engine.shutdown()


def main(arguments: list[str]) -> None:
    shared_prefixes.main("vllm", ENGINES, list(ENGINES), CASES, child, arguments)
