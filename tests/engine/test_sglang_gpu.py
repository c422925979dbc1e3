"""Served by SGLang on the GPU: perplexity and greedy answers against Triton, speculation, determinism."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from benchmarks.engine_process import ROOT

from . import answers, gpu_sglang

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(1800)]

# FI_TEST_MODEL: another model folder than the one `./demo` makes
MODEL = Path(os.environ.get("FI_TEST_MODEL") or ROOT / ".cache/models/SmolLM2-135M-Instruct")
OURS = [name for name in gpu_sglang.ENGINES if name.startswith("fi")]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    if not (MODEL / "tokenizer.json").exists():
        pytest.skip(f"no model folder {MODEL}")
    out = tmp_path_factory.mktemp("engines") / "results.json"
    options = ["--model", str(MODEL), "--out", str(out), "--minutes", "25"]
    args = answers.parser(gpu_sglang.MODULE, list(gpu_sglang.ENGINES), None).parse_args(options)
    args.engine = OURS
    found: dict[str, dict[str, object]] = gpu_sglang.run_all(args).data["verdicts"]
    return found


@pytest.mark.parametrize("name", OURS)
def test_engine(name: str, verdicts: dict[str, dict[str, object]]) -> None:
    assert verdicts[name]["problems"] == [], verdicts[name]
