"""Served by the GPU engine: perplexity and greedy answers against FLASH_ATTN, plans without synchronising."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from . import answers, gpu_vllm

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    return answers.verdicts_for_tests(gpu_vllm, gpu_vllm.ENGINES, tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("name", [n for n in gpu_vllm.ENGINES if n != gpu_vllm.BASELINE])
def test_engine(name: str, verdicts: dict[str, dict[str, object]]) -> None:
    assert verdicts[name]["problems"] == [], verdicts[name]
