"""Served by the GPU engine: perplexity and greedy answers against FLASH_ATTN, plans without synchronising."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from benchmarks.engine_process import ROOT

from . import answers, gpu_vllm

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(1800)]

# FI_TEST_MODEL: another model folder than the one `./demo` makes
MODEL = Path(os.environ.get("FI_TEST_MODEL") or ROOT / ".cache/models/SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    if not (MODEL / "tokenizer.json").exists():
        pytest.skip(f"no model folder {MODEL}")
    out = tmp_path_factory.mktemp("engines") / "results.json"
    options = ["--model", str(MODEL), "--out", str(out), "--minutes", "25"]
    args = answers.parser(gpu_vllm.MODULE, gpu_vllm.ENGINES, None).parse_args(options)
    args.engine = gpu_vllm.ENGINES
    found: dict[str, dict[str, object]] = gpu_vllm.run_all(args).data["verdicts"]
    return found


@pytest.mark.parametrize("name", [n for n in gpu_vllm.ENGINES if n != gpu_vllm.BASELINE])
def test_engine(name: str, verdicts: dict[str, dict[str, object]]) -> None:
    assert verdicts[name]["problems"] == [], verdicts[name]
