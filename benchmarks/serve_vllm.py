"""Whole-engine figures: Llama-3.1-8B shape with dummy weights in vLLM, ours and FLASH_ATTN.

`python -m benchmarks.serve_vllm --out FILE` starts one engine process after another and times the starts: the
peer, ours with an empty kernel cache, the peer again (warm machine), ours again (kernels cached). Every
figure is in FILE at once; what no longer fits into --minutes is left out and said so. Compare figures only
within one run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .engine_process import ROOT, run, tell
from .lengths import sharegpt

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
CASES: dict[str, list[tuple[int, int]]] = {  # (prompt tokens, output tokens) of every request
    "128 x 1024 in, 256 out": [(1024, 256)] * 128,
    "1 x 8192 in, 256 out": [(8192, 256)],
    "256 x ShareGPT-like": sharegpt(256),
    "16 x 16384 in, 128 out": [(16384, 128)] * 16,
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def buffers(worker: Any) -> list[dict[str, int]]:
    """Runs in the worker: bytes of our planners, empty for another backend."""
    from fi_backend.vllm.builder import planners

    return [
        {"plan_bytes": p.planner.plan_bytes, "workspace_bytes": p.planner.workspace_bytes} for p in planners()
    ]


def child(args: argparse.Namespace) -> None:
    """One engine: start-up, then the cases."""
    begin = time.monotonic()
    from vllm import LLM, SamplingParams

    imported = time.monotonic()
    llm = LLM(
        model=str(args.model),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        seed=0,
        max_model_len=32768,
        max_num_seqs=256,
        gpu_memory_utilization=0.9,
        enable_prefix_caching=False,
        attention_backend=args.child,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    )
    started = time.monotonic()
    tell(case="start-up", seconds=round(started - imported, 2), import_seconds=round(imported - begin, 2))
    for sizes in llm.collective_rpc(buffers)[0]:
        tell(case="buffers", **sizes)

    def generate(requests: list[tuple[int, int]], seed: int) -> float:
        prompts: list[Any] = [
            {"prompt_token_ids": [(seed + 7 * i + 3 * j) % 120000 + 10 for j in range(n)]}
            for i, (n, _) in enumerate(requests)
        ]
        sampling = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            for _, n in requests
        ]
        start = time.monotonic()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.monotonic() - start
        for output, (_, n) in zip(outputs, requests, strict=True):
            if len(output.outputs[0].token_ids) != n:
                raise RuntimeError(f"expected {n} tokens, got {len(output.outputs[0].token_ids)}")
        return seconds

    if args.start_only:
        tell(case="first answer", seconds=round(generate([(64, 4)], 1), 3))
        return
    generate([(300, 8)] * 32, 1)  # first use of the sampler's and the runner's own kernels
    for case, requests in CASES.items():
        if args.case and case not in args.case:
            continue
        times: list[float] = []
        for i in range(args.repeat):
            last = times[-1] if times else 0.0
            if time.monotonic() + last > begin + args.seconds:
                break
            times.append(round(generate(requests, 100 * i), 3))
        if times:
            tell(case=case, seconds=min(times), all_seconds=times)
        else:
            tell(case=case, failed="no time left")


def machine() -> dict[str, str]:
    """Card, driver, versions; asked in another process, because a CUDA context here would hold GPU memory."""
    code = (
        "import json, torch, vllm; from benchmarks.__main__ import meta;"
        "device = torch.device('cuda' if torch.cuda.is_available() else 'cpu');"
        "print(json.dumps({**meta(device), 'vllm': vllm.__version__}))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, str] = json.loads(output.stdout.splitlines()[-1])
    return found


class Report:
    """The results file, written again after every figure."""

    def __init__(self, path: Path | None, meta: dict[str, str]) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.meta = meta

    def add(self, **row: Any) -> None:
        self.rows.append({"suite": "serve", **row})
        say(f"  {row}")
        self.write()

    def write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"meta": self.meta, "rows": self.rows}, indent=1) + "\n")


def engine(
    backend: str,
    condition: str,
    seconds: float,
    args: argparse.Namespace,
    model: Path,
    cache: Path,
    report: Report,
) -> None:
    """One engine process; its figures go to the report. `condition` names what was cached at its start."""
    command = [sys.executable, "-m", "benchmarks.serve_vllm", "--child", backend, "--model", str(model)]
    command += ["--repeat", str(args.repeat), "--seconds", f"{seconds - 15:.0f}"]
    command += ["--start-only"] if condition == "warm" else []
    for case in args.case:
        command += ["--case", case]
    say(f"{backend}, {condition} start, at most {seconds:.0f} s ...")

    def receive(row: dict[str, Any]) -> None:
        if row["case"] == "start-up":
            row["case"] = f"start-up, {condition}"
        report.add(impl=backend, **row)

    if code := run(command, seconds, receive, {"FI_CACHE_DIR": str(cache)}):
        report.add(impl=backend, case=f"{condition} run", failed=f"exit code {code}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_vllm", description=__doc__)
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="time for everything (default: %(default)s)"
    )
    parser.add_argument("--peer", default="FLASH_ATTN", help="backend to compare with (default: %(default)s)")
    parser.add_argument(
        "--case", action="append", default=[], choices=CASES, help="only this case (repeatable)"
    )
    parser.add_argument("--repeat", type=int, default=2, help="runs of a case, the best counts")
    parser.add_argument("--skip-warm", action="store_true", help="leave out the second start of each backend")
    for name, kind in (("--child", str), ("--model", Path), ("--seconds", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--start-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    end = time.monotonic() + 60 * args.minutes
    report = Report(args.out, machine())
    with tempfile.TemporaryDirectory() as folder:
        model, cache = Path(folder, "llama-8b"), Path(folder, "kernels")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(CONFIG))
        stages = [(args.peer, "first"), ("CUSTOM", "cold")]
        stages += [] if args.skip_warm else [(args.peer, "warm"), ("CUSTOM", "warm")]
        for backend, condition in stages:
            left = end - time.monotonic()
            if left < 60:
                report.add(impl=backend, case=f"{condition} run", failed="no time left")
                continue
            share = left / 2 if condition == "first" else left
            engine(backend, condition, share, args, model, cache, report)


if __name__ == "__main__":
    main()
