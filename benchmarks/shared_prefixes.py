"""Prompts that begin alike: Llama-3.1-8B shape with dummy weights, the engine's prefix cache on.

`python -m benchmarks serve --engine {vllm,sglang} --shared-prefixes --out FILE` starts all at once: peers,
ours by default (FI_PREFIX=auto), and ours that reads shared prefixes again for every request (FI_PREFIX=off).
When they have imported the engine they start up and serve in turns. The requests of a case come at once; its
decode phase begins with the last first token. n samples of a prompt are n requests, as in vLLM.
Every figure is in FILE at once; compare figures only within one run.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from . import turns
from .engine_process import tell
from .lengths import sharegpt
from .open_loop import Send, drive, figures
from .serve import MAX_REQUESTS, add_process_options, make_model, parent, prompts

# tokens of every prompt, how many follow, a name that no other sender of the engine has
Sender = Callable[[list[list[int]], list[int], str], Send]


class Case(NamedTuple):
    """Prompts of so many tokens, each continued `each` times by suffix own and outputs[i] new tokens."""

    prefixes: list[int]
    each: int
    suffix: int
    outputs: list[int]
    shuffled: bool = False

    def requests(self, seed: int, divisor: int) -> tuple[list[list[int]], list[int]]:
        """Tokens of every prompt, and how many to generate. divisor: of all lengths."""

        def tokens(lengths: list[int], seed: int) -> list[list[int]]:
            return prompts([(-(-n // divisor), 0) for n in lengths], seed)

        shared = tokens(self.prefixes, seed)
        own = tokens([self.suffix] * len(shared) * self.each, seed + 500)
        order = list(range(len(own)))
        if self.shuffled:
            random.Random(seed).shuffle(order)
        wanted = [max(2, self.outputs[i // self.each] // divisor) for i in order]
        return [shared[i // self.each] + own[i] for i in order], wanted


def _samples(n: int) -> Case:
    """As many prompts as can be served at once, at most 64; long outputs are cut: few would be left."""
    lengths = sharegpt(min(64, MAX_REQUESTS // n), seed=n)
    return Case([p for p, _ in lengths], n, 0, [min(o, 256) for _, o in lengths])


CASES = {
    # what SGLang's own generated-shared-prefix asks for by default: more than are served at once
    "64 prefixes of 2048, 16 requests each, 256 out": Case([2048] * 64, 16, 128, [256] * 64, shuffled=True),
    "4 prefixes of 8192, 64 requests each, 256 out": Case([8192] * 4, 64, 128, [256] * 4),
    "8 prompts of 8192, n = 16, 128 out": Case([8192] * 8, 16, 0, [128] * 8),
    **{f"ShareGPT-like, n = {n}": _samples(n) for n in (1, 2, 4, 8, 16, 32, 64)},
}


def decode_phase(outputs: list[tuple[int, float, int]]) -> dict[str, float]:
    """outputs: request, time and number of tokens of each. From the last first token to the end."""
    first: dict[int, float] = {}
    for request, at, _ in outputs:
        first[request] = min(at, first.get(request, at))
    begin, end = max(first.values()), max(at for _, at, _ in outputs)
    tokens = sum(added for _, at, added in outputs if at > begin)
    return {"decode_tokens_s": round(tokens / max(end - begin, 1e-9), 1), "decode_s": round(end - begin, 3)}


async def serve_cases(
    sender: Sender, saved: Callable[[], Awaitable[int]], names: list[str], divisor: int
) -> None:
    """Tells the figures of each case. saved: bytes that shared prefixes have saved until now."""

    async def serve(case: Case, seed: int, name: str) -> dict[str, float]:
        ids, wanted = case.requests(seed, divisor)
        outputs: list[tuple[int, float, int]] = []
        send = sender(ids, wanted, name)

        async def heard(number: int) -> AsyncIterator[int]:
            async for added in send(number):
                outputs.append((number, time.perf_counter(), added))
                yield added

        before = await saved()
        served = await drive(heard, [0.0] * len(ids))
        for n, found in zip(wanted, served, strict=True):
            if found.tokens != n:
                raise RuntimeError(f"expected {n} tokens, got {found.tokens}")
        gigabytes = round((await saved() - before) / 1e9, 3)
        return {**decode_phase(outputs), **figures(served), "saved_gb": gigabytes}

    # first use of the sampler's and the runner's own kernels
    await serve(Case([300] * 8, 4, 8, [8] * 8), 0, "warm")
    for number, name in enumerate(names, 1):
        # seeds so far apart that no prompt is found in the cache
        tell(case=name, **await serve(CASES[name], 1000 * number, str(number)))


def main(
    engine: str,
    engines: dict[str, str],
    usual: list[str],
    cases: list[str],
    child: Callable[[argparse.Namespace], None],
    arguments: list[str],
) -> None:
    """engines: name -> FI_PREFIX; usual, cases: engines and cases of a call that names none."""
    prog = f"python -m benchmarks serve --engine {engine} --shared-prefixes"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--case", action="append", default=[], choices=CASES, help="only this case (repeatable)"
    )
    parser.add_argument(
        "--only", action="append", default=[], choices=engines, help="only this engine (repeatable)"
    )
    parser.add_argument("--layers", type=int, default=32, help="fewer only to try it (%(default)s)")
    parser.add_argument("--divisor", type=int, default=1, help="of lengths, above 1 only to try it")
    add_process_options(parser)
    args = parser.parse_args(arguments)
    args.case = args.case or cases
    if args.child:
        child(args)
        return
    with parent(args, engine, "shared prefixes") as p:
        model = make_model(p.folder / "model", args.layers)
        contenders = [
            p.contender(name, model, environment={"FI_PREFIX": engines[name]}) for name in args.only or usual
        ]
        turns.take_turns(contenders, p.end, 30, lambda left, n: left)
