"""docs/map.md names every file, and no file that is gone; adapters only translate."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fi_backend", "csrc", "integrations", "examples", "tests", "benchmarks", "docs", "scripts")
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh", ".md"}


def test_every_file_has_a_sentence() -> None:
    files = {p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES}
    files = {p for p in files if p.name != "__init__.py" or p.read_text()}
    named = set(re.findall(r"`([\w./-]+)`", (ROOT / "docs" / "map.md").read_text()))
    tails = {p: {"/".join(p.parts[-n:]) for n in (1, 2, 3)} for p in files}
    unnamed = [
        str(p.relative_to(ROOT)) for p in files if not tails[p] & named and f"{p.parent.name}/" not in named
    ]
    gone = [n for n in named if Path(n).suffix in SUFFIXES and not any(n in tail for tail in tails.values())]
    assert not unnamed, f"expected a sentence for each in docs/map.md: {sorted(unnamed)}"
    assert not gone, f"expected only files that exist in docs/map.md: {sorted(gone)}"


def test_adapters_are_short() -> None:
    for engine in ("vllm", "sglang"):
        lines = sum(len(p.read_text().splitlines()) for p in (ROOT / "integrations" / engine).glob("*.py"))
        assert lines < 400, f"expected what both need in fi_backend/serving, got {lines} lines in {engine}"
