"""Served by SGLang on the GPU: perplexity and greedy answers against Triton, speculation, determinism."""

from __future__ import annotations

import pytest

pytest.importorskip("sglang")

from . import answers, gpu_sglang

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(1800)]

OURS = [name for name in gpu_sglang.ENGINES if name.startswith("fi")]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    return answers.verdicts_for_tests(gpu_sglang, OURS, tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("name", OURS)
def test_engine(name: str, verdicts: dict[str, dict[str, object]]) -> None:
    assert verdicts[name]["problems"] == [], verdicts[name]
