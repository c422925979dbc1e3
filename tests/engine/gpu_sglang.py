"""Our backend in the real GPU engine of SGLang against its Triton backend.

`python -m tests.engine.gpu_sglang --model FOLDER --out FILE` runs one engine process per line of ENGINES,
several at a time: perplexity, greedy answers (also from the prefix cache, and by speculation), the host's
work per step, and SGLang's own client for deterministic inference. Every stage of every engine is in FILE
as soon as it is known. A second call with the same FILE runs what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engine_process import tell
from benchmarks.serve import machine

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
    run_engines,
)

MODULE = "tests.engine.gpu_sglang"
NGRAM = {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 12, "max_running_requests": 32}
BASELINE = "triton"
ENGINES: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "fi": {},
    "fi-page64": {"page_size": 64},
    "fi-eager": {"page_size": 16, "disable_cuda_graph": True, "enable_mixed_chunk": True},
    "fi-tree": {**NGRAM, "speculative_ngram_max_bfs_breadth": 4},
    "fi-chain": {**NGRAM, "speculative_ngram_max_bfs_breadth": 1, "page_size": 64},
    "fi-deterministic": {"enable_deterministic_inference": True},
    "fa3": {},
}
COMMON: dict[str, Any] = {
    "dtype": DTYPE,
    "random_seed": 0,
    "context_length": CONTEXT,
    "max_running_requests": MAX_REQUESTS,
    "chunked_prefill_size": 512,  # prompts are prefilled in chunks
    "cuda_graph_bs_decode": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "cuda_graph_bs_prefill": [16, 64, 256, 512],
    "sampling_backend": "pytorch",  # FlashInfer's is compiled for a minute
    "skip_server_warmup": True,
    "mem_fraction_static": 0.5,
    "max_total_tokens": 65536,  # other engines come and go on this GPU
}
MAX_STEP_US = 100.0  # of an eager step, planned on the host's time; a graph's replay costs a tenth
TRIALS = {"single": 8, "prefix": 8, "radix_cache": 1, "p_vs_d": 4}  # of SGLang's deterministic client


def options_of(name: str) -> dict[str, Any]:
    options = {**COMMON, **ENGINES[name]}
    if "speculative_algorithm" in options:
        options["cuda_graph_bs_decode"] = [n for n in COMMON["cuda_graph_bs_decode"] if n <= 32]
    return {"attention_backend": name.partition("-")[0], **options}


# ---- in the engine process


def child(args: argparse.Namespace) -> None:
    begin = time.monotonic()
    if "deterministic" in args.child:
        serve_deterministic(args)
    else:
        serve(args)
    tell(done=True, seconds=round(time.monotonic() - begin, 1))


def serve(args: argparse.Namespace) -> None:
    data = json.loads(args.tokens.read_text())
    begin = time.monotonic()
    from sglang.srt.entrypoints.engine import Engine

    from .sglang_probe import probed_scheduler

    class Probed(Engine):
        run_scheduler_process_func = staticmethod(probed_scheduler)

    options = options_of(args.child)
    engine = Probed(model_path=str(args.model), skip_tokenizer_init=True, **options)
    tell(start_seconds=round(time.monotonic() - begin, 1))
    ours, speculates = options["attention_backend"] == "fi", "speculative_algorithm" in options
    if ours:
        engine.collective_rpc("guard_plans")

    greedy = {"temperature": 0, "max_new_tokens": ANSWER, "stop_token_ids": [END]}

    def answer(round_name: str, with_gaps: bool) -> None:
        wanted = {"return_logprob": True, "top_logprobs_num": 2} if with_gaps else {}
        outputs = engine.generate(input_ids=data["prompts"], sampling_params=greedy, **wanted)
        found: dict[str, Any] = {"tokens": [o["output_ids"] for o in outputs], "gaps": None}
        about = [o["meta_info"] for o in outputs]
        if with_gaps:
            steps = [m["output_top_logprobs"] for m in about]
            found["gaps"] = [[round(s[0][0] - s[1][0], 4) for s in answered] for answered in steps]
        found["cached"] = sum(m["cached_tokens"] for m in about)
        if speculates:  # tokens per forward
            found["accepted"] = round(sum(m["spec_accept_length"] for m in about) / len(about), 2)
        tell(**{round_name: found})

    answer("answers", not speculates)
    answer("answers_cached", not speculates)  # finds its prompts in the prefix cache
    if "enable_mixed_chunk" in options:  # SGLang mixes only what needs no log-probabilities
        engine.flush_cache()
        answer("answers_mixed", False)

    if not speculates:
        outputs = engine.generate(
            input_ids=data["chunks"],
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
        )
        scored = [o["meta_info"]["input_token_logprobs"][1:] for o in outputs]
        losses = [-logprob for chunk in scored for logprob, *_ in chunk]
        tell(perplexity=math.exp(math.fsum(losses) / len(losses)), scored_tokens=len(losses))
        engine.generate(
            input_ids=[[100 + i, *range(200, 208)] for i in range(MAX_REQUESTS)],
            sampling_params={"temperature": 0, "max_new_tokens": 16, "ignore_eos": True},
        )
    if ours:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "answers.json")
            engine.collective_rpc("write_answers", path=str(path))
            tell(host=json.loads(path.read_text()))
    engine.shutdown()


def serve_deterministic(args: argparse.Namespace) -> None:
    """SGLang's own client against a server: how many different texts each mode got, or whether it passed."""
    from sglang.test import test_deterministic as client

    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    randint = random.randint
    # the radix_cache mode draws token ids up to 50000, which not every model has
    client.random.randint = lambda a, b: randint(a, min(b, vocab - 1))
    with server(args) as port:
        for mode, trials in TRIALS.items():
            options = client.BenchArgs(host="127.0.0.1", port=port, test_mode=mode, n_trials=trials)
            tell(**{mode: client.test_deterministic(options)})


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[int]:
    """An HTTP server of the engine while the block runs; its port."""
    begin = time.monotonic()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(args.model)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    for name, value in options_of(args.child).items():
        command.append("--" + name.replace("_", "-"))
        if value is not True:
            command += map(str, value) if isinstance(value, list) else [str(value)]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        while not answers(f"{url}/health"):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with exit code {process.returncode}")
            time.sleep(0.5)
        tell(start_seconds=round(time.monotonic() - begin, 1))
        with urllib.request.urlopen(f"{url}/get_server_info") as reply:
            info = json.load(reply)
        tell(server={k: info[k] for k in ("attention_backend", "disable_radix_cache", "sampling_backend")})
        yield port
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


# ---- in the parent


def judge(name: str, results: Results) -> dict[str, Any]:
    """Verdict of an engine: what was measured and what of it misses the goals."""
    engine = results.engine(name)
    if engine.get("failed") or not engine.get("done"):
        return {"problems": [engine.get("failed") or "did not finish"]}
    if "deterministic" in name:
        return judge_deterministic(engine)
    speculates = "speculative_algorithm" in ENGINES[name]
    base_name = "fi" if speculates else BASELINE
    base = results.engine(base_name)
    if not base.get("done"):
        return {"problems": [f"{base_name} did not finish"]}
    verdict: dict[str, Any] = {"against": base_name}
    problems: list[str] = []
    for kind in (k for k in engine if k.startswith("answers")):
        equal, partings = agreement(engine[kind], base.get(kind, base["answers"]))
        verdict[kind] = {"agreeing": equal, "of": PROMPTS, "partings": partings}
        if equal < MIN_AGREEING:
            problems.append(f"{kind}: {equal} of {PROMPTS} agree")
        if speculates:
            verdict[kind]["accepted"] = engine[kind]["accepted"]
    if engine["answers_cached"]["cached"] == 0:
        problems.append("the prefix cache was not used")
    if speculates:
        if engine["answers_cached"]["accepted"] <= 1.5:
            problems.append("hardly a draft was accepted")
    else:
        difference = engine["perplexity"] / base["perplexity"] - 1
        verdict |= {"perplexity": engine["perplexity"], "perplexity_difference": round(difference, 6)}
        if abs(difference) > MAX_DIFFERENCE:
            problems.append(f"perplexity {engine['perplexity']:.4f}, {base_name} {base['perplexity']:.4f}")
    if host := engine.get("host"):
        problems += judge_host(host, speculates, verdict)
    return {**verdict, "problems": problems}


def judge_host(host: dict[str, Any], speculates: bool, verdict: dict[str, Any]) -> list[str]:
    verdict["host"] = host
    problems = [] if host["plans"] else ["no plan of ours was made"]
    step = host.get("decode_256") or host.get("replay_256")
    if step is None and not speculates:
        problems.append(f"no decode step of {MAX_REQUESTS} requests was seen")
    elif step and step["median_us"] > MAX_STEP_US:
        problems.append(f"a step costs the host {step['median_us']} us")
    return problems


def judge_deterministic(engine: dict[str, Any]) -> dict[str, Any]:
    found = {mode: engine[mode] for mode in TRIALS}
    wanted = {mode: [1] * len(values) for mode, values in found.items()}
    problems = [
        f"{mode}: {values}, expected all 1" for mode, values in found.items() if values != wanted[mode]
    ]
    if engine["server"]["disable_radix_cache"] or engine["server"]["attention_backend"] != "fi":
        problems.append(f"served with {engine['server']}")
    return {**found, "problems": problems}


def run_all(args: argparse.Namespace) -> Results:
    results = run_engines(MODULE, [BASELINE, *args.engine], args, first_alone=False)
    results.data["meta"] = machine("sglang")
    results.data["verdicts"] = {n: judge(n, results) for n in args.engine}
    results.add(BASELINE, {})
    return results


def table(results: Results) -> str:
    """One line an engine."""
    lines = ["engine            perplexity  difference  answers  cached  other   host us  problems"]
    for name, v in results.data["verdicts"].items():
        agreeing = {k: str(x["agreeing"]) for k, x in v.items() if k.startswith("answers")}
        host = v.get("host", {})
        step = host.get("decode_256") or host.get("replay_256") or {}
        other = agreeing.get("answers_mixed") or " ".join(f"{m} {v[m]}" for m in TRIALS if m in v)
        cells = (
            f"{name:17}",
            f"{v['perplexity']:10.4f}" if "perplexity" in v else " " * 10,
            f"{100 * v['perplexity_difference']:9.3f} %" if "perplexity" in v else " " * 11,
            f"{agreeing.get('answers', ''):>7}",
            f"{agreeing.get('answers_cached', ''):>6}",
            f"{other:>6}",
            f"{step.get('median_us', ''):>8}",
            "; ".join(v["problems"]) or "none",
        )
        lines.append(" ".join(cells))
    return "\n".join(lines)


def main() -> None:
    args = parser(MODULE, list(ENGINES), __doc__).parse_args()
    if args.child:
        child(args)
        return
    args.engine = args.engine or list(ENGINES)
    results = run_all(args)
    print(json.dumps(results.data["verdicts"], indent=1))
    print(table(results))
    if any(v["problems"] for name, v in results.data["verdicts"].items() if name.startswith("fi")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
