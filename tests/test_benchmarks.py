"""The kernel benchmarks on the CPU executor, small: figures mean nothing, the path is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.__main__ import measure, peer_names
from benchmarks.cases import CASES, SUITES, Case, lengths, of_suite

SMALL = Case("small", "mixed", (1, 1, 20), (40, 17, 33), q_heads=4, kv_heads=2, head_dim=64)


def test_case_names_are_unique() -> None:
    assert len({c.id for c in CASES}) == len(CASES)
    assert all(of_suite(suite) for suite in SUITES)


def test_lengths() -> None:
    assert lengths("zipf", 16, 1024)[:4] == (459, 16, 3169, 3169)
    assert all(512 <= n <= 1024 for n in lengths("uniform", 64, 1024))
    with pytest.raises(ValueError, match="got normal"):
        lengths("normal", 1, 1)


def test_least_work() -> None:
    decode = next(c for c in CASES if c.id == "decode-64x4096")
    prefill = next(c for c in CASES if c.id == "prefill-16x1024")
    assert decode.bytes == pytest.approx(1.0748e9, rel=1e-3)
    assert prefill.flops == pytest.approx(1.3757e11, rel=1e-3)


def test_measure_and_report(tmp_path: Path) -> None:
    row = measure(SMALL, "fi", torch.device("cpu"))
    assert row["us"] > 0
    assert row["rel_err"] < 5e-3
    meta = {"card": "cpu", "driver": "", "torch": torch.__version__, "commit": "0" * 40, "date": "2026-01-01"}
    rows = [row, row | {"impl": "fa3", "us": 2 * row["us"]}]
    file, page = tmp_path / "r.json", tmp_path / "page.md"
    file.write_text(json.dumps({"meta": meta, "rows": rows}))
    text = report.table(json.loads(file.read_text()))
    assert "| small |" in text
    assert "| 0.50 |" in text
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.replace_block(page, text)
    assert page.read_text() == f"before\n{report.BEGIN}\n{text}\n{report.END}\nafter\n"


def test_peers() -> None:
    assert peer_names("fa3,flashinfer_fa2,fa3") == ["fa3", "flashinfer_fa2"]
    assert peer_names("") == []
