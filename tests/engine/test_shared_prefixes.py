"""Greedy tokens of SmolLM2 with prefixes read once (FI_PREFIX=on) and for every request (off)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import answers

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("FI_TEST_MODEL") or ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct")
# an environment has one engine
ENGINE = next((name for name in ("vllm", "sglang") if importlib.util.find_spec(name)), "")
PROMPT, TAIL = 320, 3  # tokens; a sample is so many tokens shorter than the one before
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "PYTHONWARNINGS": "ignore::UserWarning",
    "FI_BACKEND_CPU": "1",
}
SLOW = ENGINE == "sglang" and not torch.cuda.is_available() and "FI_TEST_MODEL" not in os.environ
# (prompts, samples, tokens of an answer, gap of log-probabilities between two equally good tokens)
HERE = (4, 4, 8, 1e-3)
GPU = (32, 4, 32, 0.1)  # float16

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not ENGINE, reason="neither vLLM nor SGLang"),
    pytest.mark.skipif(SLOW, reason="90 s on two cores: by hand, with FI_TEST_MODEL=FOLDER"),
    pytest.mark.skipif(not MODEL.exists(), reason=f"no model in {MODEL}: ./demo and ./test make it"),
]


def options(requests: int, on_gpu: bool) -> dict[str, Any]:
    """Of the engine, beside those that run_vllm and run_sglang give it."""
    if ENGINE == "sglang":
        found = {"context_length": 512, "max_running_requests": requests, "max_total_tokens": 400 * requests}
        found |= {"page_size": 1, "chunked_prefill_size": 512, "attention_backend": "fi"}
        gpu: dict[str, Any] = {"device": "cuda", "disable_cuda_graph": False, "sampling_backend": "pytorch"}
        return found | (gpu | {"dtype": "float16", "mem_fraction_static": 0.5} if on_gpu else {})
    found = {"max_num_seqs": requests, "max_num_batched_tokens": 512, "enable_prefix_caching": True}
    gpu = {
        "attention_backend": "CUSTOM",
        "dtype": "float16",
        "enforce_eager": False,
        "gpu_memory_utilization": 0.3,
    }
    gpu |= {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    return found | (gpu if on_gpu else {})


def serve(prompts: list[list[int]], max_tokens: int, on_gpu: bool) -> dict[str, Any]:
    """{"on": result, "off": result}."""
    batch: Any = {"prompts": prompts, "n": 1} if ENGINE == "sglang" else prompts
    jobs = [
        {
            "name": prefix,
            "prefix": prefix,
            "model": str(MODEL),
            "engine": options(len(prompts), on_gpu),
            "rounds": [batch],
            "max_tokens": max_tokens,
            "gaps": True,
        }
        for prefix in ("on", "off")
    ]
    # a second engine of a process cannot capture CUDA graphs: the first one's memory pool is gone
    return run([jobs[0]]) | run([jobs[1]]) if on_gpu else run(jobs)


def run(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """What each job came to, all of one process."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.engine.run_{ENGINE}"],
        input=json.dumps(jobs),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **QUIET},
    )
    lines = [x.removeprefix("RESULT ") for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert done.returncode == 0, f"the engine ended with {done.returncode}: {done.stdout[-2000:]}"
    return {name: result for line in lines for name, result in json.loads(line).items()}


@pytest.mark.parametrize("sizes", [HERE, pytest.param(GPU, marks=pytest.mark.gpu)], ids=["here", "gpu"])
def test_greedy_tokens_are_the_same(sizes: tuple[int, int, int, float]) -> None:
    prompts, samples, max_tokens, equally_good = sizes
    on_gpu = sizes is GPU
    if torch.cuda.is_available() != on_gpu:
        pytest.skip("sizes for another machine")
    text = [token for chunk in answers.tokens_of(MODEL, None)["chunks"] for token in chunk]
    begins = [text[PROMPT * i : PROMPT * (i + 1)] for i in range(prompts)]
    asked = [begin[: PROMPT - TAIL * sample] for begin in begins for sample in range(samples)]
    found = serve(asked, max_tokens, on_gpu)
    assert found["on"]["plans"] > 0 and found["off"]["plans"] > 0, "not served by our backend"
    assert found["on"]["saved"] > 0, "no prefix was shared"
    assert found["off"]["saved"] == 0, "a prefix was shared though FI_PREFIX=off"
    for i, (on, off) in enumerate(zip(found["on"]["tokens"][0], found["off"]["tokens"][0], strict=True)):
        step = next((s for s, (a, b) in enumerate(zip(on, off, strict=True)) if a != b), None)
        if step is not None:
            gap = found["off"]["gaps"][0][i][step]
            assert gap < equally_good, f"prompt {i}, token {step}: {on[step]}, not {off[step]} (gap {gap})"
