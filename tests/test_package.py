"""What is shipped: one pure wheel that carries the C++ sources and the plugin, and works once unpacked."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Run where nothing but the unpacked wheel is called fi_backend.
PROBE = """
import importlib.metadata, pathlib, fi_backend
import fi_backend.sglang.register, fi_backend.vllm.register
from fi_backend import jit
registers = {
    "sglang.srt.plugins": fi_backend.sglang.register, "vllm.general_plugins": fi_backend.vllm.register,
}
here = pathlib.Path.cwd()
for path in (fi_backend.__file__, *(r.__file__ for r in registers.values()), jit.csrc()):
    assert here in pathlib.Path(path).resolve().parents, path
points = importlib.metadata.distribution("fi-backend").entry_points
assert {p.group: p.load() for p in points} == {group: r.register for group, r in registers.items()}, points
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
    ]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_one_pure_wheel(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 2_000_000
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {f"fi_backend/{source}" for source in sources} <= names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fi_backend").rglob("*.py")}
    adapters = ROOT / "integrations"
    modules |= {f"fi_backend/{p.relative_to(adapters).as_posix()}" for p in adapters.rglob("*.py")}
    assert modules <= names
    assert not [n for n in names if n.split("/")[0] in ("tests", "benchmarks", "scripts")]


def test_unpacked_wheel_works(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
