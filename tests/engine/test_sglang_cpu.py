"""Greedy tokens of the real SGLang engine on the CPU: ours against torch_native, random weights, float32.

SGLang's torch_native knows no soft cap, so the soft-cap model is compared with transformers' own attention.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from . import models, run_sglang

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA build of SGLang has no CPU path"),
]

ANSWER = 24
MIXED = [models.prompt(n, seed) for seed, n in enumerate((5, 150, 1, 33, 200, 64, 17, 80, 49, 16))]
SHARED = models.prompt(100, 50)
PREFIX = [SHARED + models.prompt(n, 60 + n) for n in (3, 40)]
ROUNDS = [
    {"prompts": MIXED, "n": 1},
    {"prompts": PREFIX[:1], "n": 1},
    {"prompts": PREFIX, "n": 1},
    {"prompts": PREFIX[:1], "n": 4},
]
# scenario -> (model, engine options)
SCENARIOS: dict[str, tuple[str, dict[str, Any]]] = {
    "page 1, overlap": ("llama", {"page_size": 1}),
    "page 16, no overlap": ("llama", {"page_size": 16, "disable_overlap_schedule": True}),
    # chunks are whole pages, and running requests take from their size: 64 would leave none
    "window, page 64": ("gemma3", {"page_size": 64, "chunked_prefill_size": 128}),
    "soft cap and windows, page 16": ("gemma2-even", {"page_size": 16}),
}
PREFIX_MODES = {"page 1, overlap": "on", "page 16, no overlap": "off"}
PEERS = {"llama": "page 1, overlap", "gemma3": "window, page 64"}  # served by torch_native too
# control -> (scenario, what our layers are told instead)
CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "window too short by one": ("window, page 64", {"sliding_window_size": models.WINDOW - 2}),
    "soft cap and scale off": ("soft cap and windows, page 16", {"logit_cap": 0.0, "scaling": 0.1}),
}


def job(name: str, root: Path, scenario: str, backend: str, **layer: Any) -> dict[str, Any]:
    model, engine = SCENARIOS[scenario]
    return {
        "name": name,
        "model": str(models.write(model, root)),
        "engine": {**engine, "attention_backend": backend},
        "rounds": ROUNDS,
        "max_tokens": ANSWER,
        "layer": layer,
        "prefix": PREFIX_MODES.get(scenario, "auto"),
    }


def serve(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs the jobs in one fresh process. stderr goes to the terminal, so a slow start is not silent."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore::UserWarning"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.run_sglang"],
        input=json.dumps(jobs),
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, **quiet},
        timeout=800,
    )
    results: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith(run_sglang.MARK):
            results |= json.loads(line[len(run_sglang.MARK) :])
    served = ", ".join(results)
    assert done.returncode == 0, f"an engine ended with {done.returncode}, after those of: {served}"
    return results


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, Any]:
    """Ours by scenario and control, and torch_native's by model."""
    jobs = [job(s, root, s, "fi") for s in SCENARIOS]
    jobs += [job(name, root, s, "fi", **layer) for name, (s, layer) in CONTROLS.items()]
    jobs += [job(model, root, s, "torch_native") for model, s in PEERS.items()]
    return serve(jobs)


@pytest.fixture(scope="module")
def transformers_tokens(root: Path) -> list[list[list[int]]]:
    """gemma2's greedy answers without any engine."""
    from transformers import AutoModelForCausalLM

    folder = models.write("gemma2-even", root)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    options = {"max_new_tokens": ANSWER, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def answer(ids: list[int]) -> list[int]:
        return model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()

    return [[t for p in r["prompts"] for t in [answer(p)] * r["n"]] for r in ROUNDS]


def expected(scenario: str, request: pytest.FixtureRequest) -> Any:
    model = SCENARIOS[scenario][0]
    if model not in PEERS:
        return request.getfixturevalue("transformers_tokens")
    peer = request.getfixturevalue("results")[model]
    assert peer["plans"] == 0, "the peer's run went through our backend"
    return peer["tokens"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_greedy_tokens_equal_the_peers(
    scenario: str, results: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    assert results[scenario]["plans"] > 0, "our run did not go through our backend"
    assert results[scenario]["mixed"] > 0, "no step held both prefills and decodes"
    assert results[scenario]["tokens"] == expected(scenario, request)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_radix_tree_was_used(scenario: str, results: dict[str, Any]) -> None:
    page = SCENARIOS[scenario][1]["page_size"]
    # the third round finds the shared prefix twice
    assert results[scenario]["cached"] >= 2 * (len(SHARED) // page) * page


def test_prefixes_were_shared(results: dict[str, Any]) -> None:
    saved = {name: results[name]["saved"] for name in PREFIX_MODES}
    assert saved["page 1, overlap"] > 0 and saved["page 16, no overlap"] == 0


@pytest.mark.parametrize("control", CONTROLS)
def test_negative_control_changes_tokens(
    control: str, results: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    assert results[control]["plans"] > 0
    assert results[control]["tokens"] != expected(CONTROLS[control][0], request)
