"""Our backend in the real GPU engine against FLASH_ATTN: perplexity, greedy answers, cost of a plan.

`python -m tests.engine.gpu_vllm --model FOLDER --out FILE` runs one engine process per combination of model
runner (V1, V2) and graph mode, several at a time, and compares each with FLASH_ATTN. Every stage of every
engine is in FILE as soon as it is known. A second call with the same FILE runs what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from typing import Any

from benchmarks.engine_process import tell

from .answers import (
    ANSWER,
    CONTEXT,
    DTYPE,
    END,
    MAX_DIFFERENCE,
    MAX_REQUESTS,
    MIN_AGREEING,
    PROMPTS,
    Results,
    agreement,
    parser,
    quietest,
    run_engines,
)

MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    # pieces are cut by the compiler
    "PIECEWISE": {"compilation_config": {"mode": 3, "cudagraph_mode": "PIECEWISE"}},
    "FULL_AND_PIECEWISE": {"compilation_config": {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"}},
    "FULL": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}},
}
BASELINE = "FLASH_ATTN-V2-eager"
ENGINES = [BASELINE, *(f"CUSTOM-{runner}-{mode}" for runner in ("V2", "V1") for mode in MODES)]
CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
MAX_BUILD_US = 40.0
MODULE = "tests.engine.gpu_vllm"


# ---- in the engine process


def guard_builds(worker: Any) -> None:
    """From here on every build() of ours raises if it synchronises with the device, and its time is kept."""
    import torch
    from fi_backend.vllm.builder import FiMetadataBuilder

    original = FiMetadataBuilder.build
    times: list[float] = []

    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        start = time.perf_counter()
        try:
            return original(self, *args, **kwargs)
        finally:
            times.append(time.perf_counter() - start)
            torch.cuda.set_sync_debug_mode(before)

    FiMetadataBuilder.build = build  # type: ignore[method-assign]
    FiMetadataBuilder.times = times  # type: ignore[attr-defined]


def guarded_builds(worker: Any) -> dict[str, Any]:
    from fi_backend.vllm.builder import FiMetadataBuilder

    times = getattr(FiMetadataBuilder, "times", [])
    return {
        "builds": len(times),
        "median_us": round(1e6 * statistics.median(times), 1) if times else None,
        "runner": type(worker.model_runner).__module__,
    }


def time_build(worker: Any) -> dict[str, Any]:
    """Host microseconds of one build() at MAX_REQUESTS decodes, the device idle before it."""
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

    runner = worker.model_runner
    builder = runner.attn_groups[0][0].get_metadata_builder(0)
    requests, device = MAX_REQUESTS, torch.device("cuda")
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
    lengths = torch.randint(1, CONTEXT, (requests,), dtype=torch.int32, device=device)
    table = torch.zeros(requests, CONTEXT // 16, dtype=torch.int32, device=device)
    slots = torch.full((requests,), -1, dtype=torch.int64, device=device)

    def build() -> float:
        common = CommonAttentionMetadata(
            query_start_loc=starts[:],
            query_start_loc_cpu=torch.arange(requests + 1, dtype=torch.int32),
            seq_lens=lengths[:],
            num_reqs=requests,
            num_actual_tokens=requests,
            max_query_len=1,
            max_seq_len=CONTEXT,
            block_table_tensor=table,
            slot_mapping=slots,
        )
        torch.cuda.set_sync_debug_mode("error")
        start = time.perf_counter()
        builder.build(0, common)
        seconds = time.perf_counter() - start
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        return 1e6 * seconds

    torch.cuda.synchronize()
    return quietest(build)


def child(args: argparse.Namespace) -> None:
    data = json.loads(args.tokens.read_text())
    backend, _, mode = args.child.split("-")
    begin = time.monotonic()
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = json.loads(json.dumps(MODES[mode]))
    if "compilation_config" in options:
        options["compilation_config"]["cudagraph_capture_sizes"] = CAPTURE_SIZES
    llm = LLM(
        model=str(args.model),
        skip_tokenizer_init=True,
        dtype=DTYPE,
        seed=0,
        max_model_len=CONTEXT,
        max_num_seqs=MAX_REQUESTS,
        max_num_batched_tokens=512,  # prompts are prefilled in chunks, beside decodes
        enable_prefix_caching=True,
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=4 << 30,  # other engines come and go on this GPU: no measuring
        attention_backend=backend,
        **options,
    )
    tell(start_seconds=round(time.monotonic() - begin, 1))
    ours = backend == "CUSTOM"
    if ours:
        llm.collective_rpc(guard_builds)

    greedy = SamplingParams(
        temperature=0, max_tokens=ANSWER, stop_token_ids=[END], detokenize=False, logprobs=2
    )
    for round_name in ("answers", "answers_cached"):  # the second round finds its prompts in the prefix cache
        outputs = llm.generate([{"prompt_token_ids": p} for p in data["prompts"]], greedy, use_tqdm=False)
        tokens, gaps = [], []
        for output in outputs:
            best = output.outputs[0]
            tokens.append(list(best.token_ids))
            ranked = [sorted((x.logprob for x in step.values()), reverse=True) for step in best.logprobs]
            gaps.append([round(r[0] - r[1], 4) if len(r) > 1 else None for r in ranked])
        cached = sum(o.num_cached_tokens or 0 for o in outputs)
        tell(**{round_name: {"tokens": tokens, "gaps": gaps, "cached": cached}})

    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in data["chunks"]], scored, use_tqdm=False)
    losses = []
    for output, ids in zip(outputs, data["chunks"], strict=True):
        for token, step in list(zip(ids, output.prompt_logprobs, strict=True))[1:]:
            losses.append(-step[token].logprob)
    tell(perplexity=math.exp(math.fsum(losses) / len(losses)), scored_tokens=len(losses))
    if ours:
        tell(served_builds=llm.collective_rpc(guarded_builds)[0])
        tell(build_256=llm.collective_rpc(time_build)[0])
    tell(done=True, seconds=round(time.monotonic() - begin, 1))


# ---- in the parent


def judge(name: str, results: Results) -> dict[str, Any]:
    """Verdict of one of our engines: what was measured and what of it misses the goals."""
    engine, base = results.engine(name), results.engine(BASELINE)
    problems: list[str] = []
    if engine.get("failed") or not engine.get("done"):
        return {"problems": [engine.get("failed") or "did not finish"]}
    if not base.get("done"):
        return {"problems": [f"{BASELINE} did not finish"]}
    difference = engine["perplexity"] / base["perplexity"] - 1
    if abs(difference) > MAX_DIFFERENCE:
        problems.append(f"perplexity {engine['perplexity']:.4f}, FLASH_ATTN {base['perplexity']:.4f}")
    verdict: dict[str, Any] = {"perplexity_difference": round(difference, 6)}
    for kind in ("answers", "answers_cached"):
        equal, partings = agreement(engine[kind], base[kind])
        verdict[kind] = {"agreeing": equal, "of": PROMPTS, "partings": partings}
        if equal < MIN_AGREEING:
            problems.append(f"{kind}: {equal} of {PROMPTS} agree")
    if engine["answers_cached"]["cached"] == 0:
        problems.append("the prefix cache was not used")
    if not engine["served_builds"]["builds"]:
        problems.append("no build() of ours was called")
    if ("-V2-" in name) != engine["served_builds"]["runner"].endswith(".gpu.model_runner"):
        problems.append(f"served by the runner {engine['served_builds']['runner']}")
    if engine["build_256"]["median_us"] > MAX_BUILD_US:
        problems.append(f"build() takes {engine['build_256']['median_us']} us")
    return {**verdict, "build_256": engine["build_256"], "problems": problems}


def run_all(args: argparse.Namespace) -> Results:
    results = run_engines(
        MODULE,
        [BASELINE, *args.engine],
        args,
        lambda name: {"VLLM_USE_V2_MODEL_RUNNER": "1" if "-V2-" in name else "0"},
    )
    results.data["verdicts"] = {n: judge(n, results) for n in args.engine if n != BASELINE}
    base = results.engine(BASELINE)
    if base.get("done"):  # how much of a disagreement is the peer's own
        results.data["baseline_with_itself"] = agreement(base["answers_cached"], base["answers"])
    results.add(BASELINE, {})
    return results


def main() -> None:
    args = parser(MODULE, ENGINES, __doc__).parse_args()
    if args.child:
        child(args)
        return
    args.engine = args.engine or ENGINES
    verdicts = run_all(args).data["verdicts"]
    print(json.dumps(verdicts, indent=1))
    if any(v["problems"] for v in verdicts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
