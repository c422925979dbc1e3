"""Greedy tokens of the real CPU engine: ours against the native CPU_ATTN, random weights, float32.

One process serves every scenario with one backend, because starting vLLM costs more than the scenario. The
engine is the one this interpreter has, so the same tests run for every vLLM version.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from . import models, run_vllm

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not current_platform.is_cpu(), reason="this vLLM is not a CPU build"),
]

MIXED = [models.prompt(n, seed) for seed, n in enumerate((5, 150, 1, 33, 200, 64, 17, 80, 49, 16))]
SHARED = models.prompt(100, 50)
PREFIX = [SHARED + models.prompt(n, 60 + n) for n in (3, 40)]
REPEATED = [models.prompt(6, 70) * 12, models.prompt(9, 71) * 5]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}

# scenario -> (model, engine options, rounds of prompts)
SCENARIOS: dict[str, tuple[str, dict[str, Any], list[list[list[int]]]]] = {
    "chunked prefill and mixed batches": ("llama", {}, [MIXED]),
    "prefix caching": ("llama", {"enable_prefix_caching": True}, [PREFIX[:1], PREFIX]),
    "ngram speculation": ("llama", {"speculative_config": NGRAM}, [REPEATED + MIXED[:2]]),
    "sliding window": ("mistral", {}, [MIXED]),
    "soft cap and alternating windows": ("gemma2", {}, [MIXED]),
}
# control -> (scenario, what our layers are told instead)
CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "window too short by one": ("sliding window", {"sliding_window": models.WINDOW - 1}),
    "soft cap ignored": ("soft cap and alternating windows", {"logits_soft_cap": None}),
    "scale off": ("chunked prefill and mixed batches", {"scale": 0.1}),
}
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "variants_to_serve.py"
FIRST, RECENT = 4, 40  # tokens of the streaming window: prompts are longer
MAX_TOKENS = 24
SPAWNED = "chunked prefill and mixed batches"


@functools.cache
def folder(name: str, root: Path) -> str:
    return str(models.write(name, root))


def job(name: str, root: Path, scenario: str, layer: dict[str, Any] | None = None) -> dict[str, Any]:
    model, engine, rounds = SCENARIOS[scenario]
    return {
        "name": name,
        "model": folder(model, root),
        "engine": engine,
        "rounds": rounds,
        "max_tokens": MAX_TOKENS,
        "layer": layer or {},
        "prefix": "on" if "enable_prefix_caching" in engine else "auto",
    }


def with_variant(plain: dict[str, Any], name: str, variant: str) -> dict[str, Any]:
    """The same job with a variant of one's own, FILE:NAME."""
    engine = plain["engine"] | {"additional_config": {"fi_variant": variant}}
    return {**plain, "name": name, "engine": engine}


def serve(jobs: list[dict[str, Any]], **environment: str) -> dict[str, Any]:
    """Runs the jobs in one fresh process. stderr goes to the terminal, so a slow start is not silent."""
    # drafting imports numba, and with that in the process vLLM 0.32 cannot start another engine
    jobs = sorted(jobs, key=lambda j: "speculative_config" in j["engine"])
    base = {k: v for k, v in os.environ.items() if not k.startswith("FI_BACKEND")}
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # counts plans inside the engine process
    }
    done = subprocess.run(
        [sys.executable, run_vllm.__file__],
        input=json.dumps(jobs),
        stdout=subprocess.PIPE,
        text=True,
        env={**base, **quiet, **environment},
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(run_vllm.MARK)]
    assert done.returncode == 0 and lines, f"the engine ended with {done.returncode}: {done.stdout[-2000:]}"
    results: dict[str, Any] = json.loads(lines[-1][len(run_vllm.MARK) :])
    return results


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def native(root: Path) -> dict[str, Any]:
    return serve([job(s, root, s) for s in SCENARIOS])


OWN = """
from fi_backend.variants import Argument, define

LAST = define("LAST", Argument("keys", "int", at_least=1), mask="q_pos - kv_pos < keys"), {"keys": %d}
"""
STREAMING = f"""
import runpy

variant, _ = runpy.run_path({str(EXAMPLES)!r})["STREAMING"]
STREAMING = variant, {{"first": {FIRST}, "recent": {RECENT}}}
"""


@pytest.fixture(scope="module")
def ours(root: Path) -> dict[str, Any]:
    jobs = [job(s, root, s) for s in SCENARIOS]
    own = root / "own.py"
    own.write_text(OWN % models.WINDOW)
    unwindowed = {**job("no window", root, "sliding window"), "model": folder("wide", root)}
    jobs += [unwindowed, with_variant(unwindowed, "own window", f"{own}:LAST")]
    streaming = root / "streaming.py"
    streaming.write_text(STREAMING)
    plain = job(SPAWNED, root, SPAWNED)
    jobs += [
        with_variant(plain, "streaming", f"{streaming}:STREAMING"),
        with_variant(plain, "sigmoid", f"{EXAMPLES}:SIGMOID"),
    ]
    jobs += [job(name, root, scenario, layer) for name, (scenario, layer) in CONTROLS.items()]
    return serve(jobs, FI_BACKEND_CPU="1")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_greedy_tokens_equal_native(scenario: str, native: dict[str, Any], ours: dict[str, Any]) -> None:
    assert native[scenario]["plans"] == 0, "the native run went through our backend"
    assert ours[scenario]["plans"] > 0, "our run did not go through our backend"
    assert ours[scenario]["tokens"] == native[scenario]["tokens"]


def test_variant_of_ones_own(native: dict[str, Any], ours: dict[str, Any]) -> None:
    # the same weights without a window in the model: it comes from --additional-config
    assert ours["own window"]["tokens"] == native["sliding window"]["tokens"] != ours["no window"]["tokens"]


def streaming(logits: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    seen = (k <= q) & ((k < FIRST) | (q - k < RECENT))
    return logits.masked_fill(~seen, -torch.inf).softmax(-1)


def sigmoid(logits: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (logits - 7).sigmoid() * (k <= q)


def by_transformers(model: str, weights: Callable[..., torch.Tensor]) -> list[list[int]]:
    """Greedy answers to MIXED by Hugging Face's model with this attention."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    def attend(module: Any, q: Any, k: Any, v: Any, *_: Any, scaling: float, **__: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        positions = torch.arange(q.shape[2])
        found = weights(q @ k.mT * scaling, positions[:, None], positions) @ v
        return found.transpose(1, 2).contiguous(), None

    AttentionInterface.register("of_the_test", attend)
    network = AutoModelForCausalLM.from_pretrained(
        model, attn_implementation="of_the_test", dtype=torch.float32
    )
    answers = []
    for prompt in MIXED:
        ids = torch.tensor([prompt])
        for _ in range(MAX_TOKENS):
            with torch.inference_mode():
                last = network(ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("weights", [streaming, sigmoid])
def test_examples_served(weights: Any, root: Path, ours: dict[str, Any]) -> None:
    found = ours[weights.__name__]
    assert found["plans"] > 0 and found["tokens"] != ours[SPAWNED]["tokens"]
    assert found["tokens"] == [by_transformers(folder("llama", root), weights)]


def test_the_prefix_cache_was_used(ours: dict[str, Any]) -> None:
    # the second round finds the full pages of the shared prefix twice
    assert ours["prefix caching"]["cached"] >= 2 * (len(SHARED) // run_vllm.BLOCK) * run_vllm.BLOCK


def test_prefixes_were_shared(ours: dict[str, Any]) -> None:
    assert {name for name, result in ours.items() if result["saved"]} == {"prefix caching"}


def test_cache_groups_with_equal_lengths_share_a_plan(ours: dict[str, Any]) -> None:
    # the same prompts in the same steps: one plan for two windowed groups, one for the full one
    one_group = ours["sliding window"]["plans"]
    assert ours["soft cap and alternating windows"]["plans"] == 2 * one_group


@pytest.mark.parametrize("control", CONTROLS)
def test_negative_control_changes_tokens(control: str, native: dict[str, Any], ours: dict[str, Any]) -> None:
    scenario, _ = CONTROLS[control]
    assert ours[control]["plans"] > 0
    assert ours[control]["tokens"] != native[scenario]["tokens"]


def test_engine_in_a_spawned_process(root: Path, native: dict[str, Any]) -> None:
    spawned = serve([job("spawned", root, SPAWNED)], FI_BACKEND_CPU="1", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert spawned["spawned"]["plans"] > 0
    assert spawned["spawned"]["tokens"] == native[SPAWNED]["tokens"]
