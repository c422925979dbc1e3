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
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import engine_process
from benchmarks.engine_process import tell

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
CONTEXT, PROMPTS, ANSWER = 2048, 32, 32
END = 2  # <|im_end|>
# bf16 logits of this model come in steps of 0.125: the best two are often equal, and FLASH_ATTN itself
# answers 10 of 32 prompts differently when it finds them in the prefix cache. f16 has steps of 1/64.
DTYPE = "float16"
PERPLEXITY_TOKENS = 22_000
MAX_REQUESTS = 256
BUILDS, BUILD_BATCHES = 50, 20  # builds timed in a row, and how often
MANUAL = 200  # tokens of the text that half of the questions come after, the same for all of them
QUESTIONS = (
    """\
What is the capital of France?|How many days are there in a week?|What is two plus two?
Name the largest planet of the solar system.|What colour do you get when you mix blue and yellow?
Who wrote Romeo and Juliet?|What is the boiling point of water?|What is the opposite of hot?
Which animal is known as the king of the jungle?|How many legs does a spider have?
What is the chemical symbol of gold?|In which country are the pyramids of Giza?|What do bees make?
What is the first month of the year?|Which ocean lies between Europe and America?|What is ten minus four?
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
MAX_DIFFERENCE, MIN_AGREEING, MAX_BUILD_US = 0.002, 30, 40.0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
    """Host microseconds of one build() at MAX_REQUESTS decodes, the device idle before it.

    Other engines share the processors: the batch of builds with the smallest median was disturbed least.
    """
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
    for _ in range(BUILDS):  # warm-up
        build()
    batches = []
    for _ in range(BUILD_BATCHES):
        batches.append(sorted(build() for _ in range(BUILDS)))
        time.sleep(0.1)  # lets a neighbour's burst pass
    quiet = min(batches, key=statistics.median)
    return {
        "median_us": round(statistics.median(quiet), 1),
        "p90_us": round(quiet[BUILDS * 9 // 10], 1),
        "medians_us": sorted(round(statistics.median(b), 1) for b in batches),
    }


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


def tokens_of(model: Path, text: Path | None) -> dict[str, Any]:
    """Token ids: chunks of real English text to score, and questions, half of them after a shared text."""
    from tokenizers import Tokenizer

    if text is not None:
        words = text.read_text()
    else:  # the documentation that every Python carries: prose, 150 k tokens
        from pydoc_data import topics

        words = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(words).ids
    # a chunk leaves room for the one token that is generated
    size = CONTEXT - 8
    chunks = [ids[i : i + size] for i in range(0, PERPLEXITY_TOKENS, size)]
    if sum(len(c) - 1 for c in chunks) < 20_000:
        raise SystemExit(f"expected a text of at least 20,000 tokens, got {len(ids)}")
    prompts = []
    for i in range(PROMPTS):
        manual = "Keep this text in mind:\n" + tokenizer.decode(ids[:MANUAL]) + "\n\n" if i % 2 else ""
        question = QUESTIONS[i // 2 % len(QUESTIONS)]
        turns = (
            ("system", "You are a helpful AI assistant.<|im_end|>\n"),
            ("user", f"{manual}{question}<|im_end|>\n"),
            ("assistant", ""),
        )
        prompts.append(tokenizer.encode("".join(f"<|im_start|>{role}\n{say}" for role, say in turns)).ids)
    return {"chunks": chunks, "prompts": prompts}


class Results:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.data.setdefault("engines", {})

    def engine(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.data["engines"].setdefault(name, {})
        return found

    def add(self, name: str, values: dict[str, Any]) -> None:
        with self._lock:
            self.engine(name).update(values)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data) + "\n")


def run_engine(name: str, args: argparse.Namespace, tokens: Path, end: float, results: Results) -> None:
    left = end - time.monotonic()
    if left < 45:
        say(f"{name}: no time left")
        return
    say(f"{name}: starting, at most {left:.0f} s")
    results.add(name, {"failed": None})
    runner = "1" if "-V2-" in name else "0"
    command = [sys.executable, "-m", "tests.engine.gpu_vllm", "--child", name]
    command += ["--model", str(args.model), "--tokens", str(tokens)]
    log = args.out.with_name(f"{args.out.stem}-{name}.log")

    def receive(values: dict[str, Any]) -> None:
        results.add(name, values)
        shown = [f"{k} {'done' if k.startswith('answers') else v}" for k, v in values.items()]
        say(f"{name}: {', '.join(shown)}")

    with log.open("w") as errors:
        code = engine_process.run(command, left, receive, {"VLLM_USE_V2_MODEL_RUNNER": runner}, errors)
    if code != 0:
        tail = engine_process.last_words(log)
        results.add(name, {"failed": f"exit code {code}: {tail}"})
        say(f"{name}: failed, exit code {code}\n{tail}")


def agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[int, list[str]]:
    """How many answers agree in all tokens; for the others where they part and how close that choice was."""
    equal, partings = 0, []
    for i, (a, b) in enumerate(zip(ours["tokens"], theirs["tokens"], strict=True)):
        step = next((s for s, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if step is None:  # one that ends earlier differs in its last token, <|im_end|>
            equal += 1
            continue
        gap, other = theirs["gaps"][i][step], ours["gaps"][i][step]
        partings.append(f"prompt {i} token {step}: {b[step]} against {a[step]}, logit gaps {gap} and {other}")
    return equal, partings


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
    end = time.monotonic() + 60 * args.minutes
    results = Results(args.out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tokens = args.out.with_name(f"{args.out.stem}-tokens.json")
    tokens.write_text(json.dumps(tokens_of(args.model, args.text)))
    todo = [n for n in [BASELINE, *args.engine] if not results.engine(n).get("done")]
    todo = list(dict.fromkeys(todo))
    if todo:  # one alone first: the others find its compiled kernels
        run_engine(todo[0], args, tokens, end, results)
    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(lambda n: run_engine(n, args, tokens, end, results), todo[1:]))
    results.data["verdicts"] = {n: judge(n, results) for n in args.engine if n != BASELINE}
    base = results.engine(BASELINE)
    if base.get("done"):  # how much of a disagreement is the peer's own
        results.data["baseline_with_itself"] = agreement(base["answers_cached"], base["answers"])
    results.add(BASELINE, {})
    return results


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.engine.gpu_vllm", description=__doc__)
    made.add_argument("--model", type=Path, required=True, help="model folder with a tokenizer.json")
    made.add_argument("--out", type=Path, default=Path("gpu_vllm.json"), help="results (JSON)")
    made.add_argument("--text", type=Path, help="English text to score (default: Python's own documentation)")
    made.add_argument("--engine", action="append", choices=ENGINES, help="only this one (repeatable)")
    made.add_argument("--parallel", type=int, default=3, help="engines at a time on the GPU")
    made.add_argument("--minutes", type=float, default=8.5, help="time for everything (default: %(default)s)")
    made.add_argument("--child", help=argparse.SUPPRESS)
    made.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    return made


def main() -> None:
    args = parser().parse_args()
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
