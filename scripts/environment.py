"""Virtual environments of ./demo and ./test, one per engine under .venv/. Standard library only.

An environment is a list of steps; a stamp remembers those that finished, so a second run (or one after an
interruption) does only what is missing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def _load(path: Path) -> ModuleType:
    # By file: importing the package would need torch, which this module is about to install.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Ticker = _load(ROOT / "fi_backend" / "progress.py").Ticker


# Threads that wait by spinning starve each other when a machine is shared: measured 2 tokens a second against
# 20 with other processes on two cores. Read when the OpenMP runtime is loaded, so it comes from outside.
# Bytecode: pip would compile every module of an engine. Those that are imported are compiled then, and kept
# even where the shell forbids it: every start of an engine would compile them again.
RUN_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
RUN_ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)


class SetupError(Exception):
    """One sentence for the person at the terminal."""


@dataclass(frozen=True)
class Step:
    label: str
    pip: Sequence[str]  # arguments of pip install
    depends_on: Path | None = None  # run again when this file changes

    def key(self) -> str:
        text = json.dumps([self.label, *self.pip])
        if self.depends_on is not None:
            text += self.depends_on.read_text()
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Distribution:
    """One that no index has: metadata, and a module if it has code."""

    name: str
    version: str
    entry_points: str = ""
    module: Path | None = None


@dataclass(frozen=True)
class Environment:
    name: str
    steps: list[Step] = field(default_factory=list)
    distributions: list[Distribution] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return ROOT / ".venv" / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def _finds_nvcc() -> bool:
    roots = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return shutil.which("nvcc") is not None or any(Path(r, "bin", "nvcc").exists() for r in roots if r)


def check_machine() -> None:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise SetupError(f"no C++ compiler: expected {compiler} on PATH (Debian and Ubuntu: apt install g++)")
    if has_gpu() and not _finds_nvcc():
        raise SetupError(
            "no CUDA compiler: expected nvcc on PATH or under CUDA_HOME, to build the kernels for this GPU; "
            "install the CUDA toolkit"
        )
    try:
        import ensurepip  # noqa: F401
    except ImportError as error:
        raise SetupError(
            "this Python cannot make virtual environments (Debian and Ubuntu: apt install python3-venv)"
        ) from error


_building = threading.Lock()  # two editable installs at once would write the same egg-info


def make(env: Environment) -> Path:
    """Bring `env` up to date and return its Python. Raises SetupError with one sentence."""
    check_machine()
    stamp = env.folder / "steps.json"
    # no stamp: the environment was never finished; no Python: the one it was made with is gone
    made = stamp.exists() and env.python.exists()
    done: list[str] = json.loads(stamp.read_text()) if made else []
    todo = [s for s in env.steps if s.key() not in done]
    if todo:
        print(f"environment {env.name}: {len(todo)} of {len(env.steps)} steps to do", file=sys.stderr)
    if not made:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(env.folder)], check=True)
        stamp.write_text("[]")
    for step in todo:
        title = f"setup of {env.name} {env.steps.index(step) + 1}/{len(env.steps)}: {step.label}"
        with _building if "-e" in step.pip else nullcontext():
            _pip(env, title, step.pip)
        done.append(step.key())
        stamp.write_text(json.dumps(done))
    for distribution in env.distributions:
        _declare(env, distribution)
    return env.python


def _declare(env: Environment, it: Distribution) -> None:
    site = next((env.folder / "lib").glob("python3*/site-packages"))
    info = site / f"{it.name}-{it.version}.dist-info"
    files = {
        info / "METADATA": f"Metadata-Version: 2.1\nName: {it.name}\nVersion: {it.version}\n",
        info / "INSTALLER": "fi_backend\n",
        info / "RECORD": "",
    }
    if it.entry_points:
        files[info / "entry_points.txt"] = it.entry_points
    if it.module is not None:
        files[site / it.module.name] = it.module.read_text()
    info.mkdir(exist_ok=True)
    for path, text in files.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def _pip(env: Environment, title: str, arguments: Sequence[str]) -> None:
    command = [str(env.python), "-m", "pip", "install", "--no-compile", "--progress-bar", "off", *arguments]
    log = env.folder / "pip.log"
    with log.open("a") as out, Ticker(title) as ticker:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            out.write(line)
            if line.lstrip().split(" ", 1)[0] in ("Collecting", "Downloading", "Installing", "Building"):
                ticker.note = " ".join(line.split()[:2])
        code = process.wait()
        ticker.ok = code == 0
    if code != 0:
        tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
        raise SetupError(f"pip failed in the step '{title}' (whole log: {log}):\n{tail}")
