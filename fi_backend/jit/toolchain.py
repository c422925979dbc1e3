"""Finds and calls the compilers. Everything here is asked only when something must be built or named."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from .. import env


class BuildError(RuntimeError):
    """A library could not be built; the message says what is missing or shows the compiler's own words."""


@functools.cache
def log() -> logging.Logger:
    logger = logging.getLogger("fi_backend")
    if not logger.hasHandlers():  # nobody configured logging: a build of seconds must not look like a hang
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fi_backend: %(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    return logger


def call(command: list[str], label: str) -> str:
    """stdout and stderr of a compiler. Raises BuildError."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        raise BuildError(f"no compiler: {command[0]} not found, needed for {label}") from None
    if done.returncode != 0:
        raise BuildError(f"cannot build {label}: {shlex.join(command)}\n{done.stdout[-6000:]}")
    return done.stdout


@functools.lru_cache(maxsize=8)
def _version(compiler: str, what: str, remedy: str) -> str:
    if shutil.which(compiler) is None:
        raise BuildError(f"no {what}: {compiler} not found; {remedy}")
    return call([compiler, "--version"], what).strip()


def host_version() -> str:
    return _version(env.host_compiler(), "C++ compiler", "install g++ or set CXX")


@functools.lru_cache(maxsize=8)
def _toolkit_root(cuda_home: str | None, path: str | None) -> Path:
    from torch.utils import cpp_extension

    for root in (cpp_extension.CUDA_HOME, cuda_home):
        if root and (Path(root) / "bin" / "nvcc").exists():
            return Path(root)
    if found := shutil.which("nvcc"):
        # nvcc on PATH may be a wrapper script, so its own folder says nothing
        dry = subprocess.run([found, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        if top := re.search(r"^#\$ TOP=(.*)$", dry.stderr + dry.stdout, re.M):
            return Path(top[1].strip()).resolve()
    raise BuildError(
        "no CUDA compiler: nvcc is neither under CUDA_HOME nor on PATH; install the CUDA toolkit"
    )


def nvcc() -> str:
    return str(_toolkit_root(env.cuda_home(), os.environ.get("PATH")) / "bin" / "nvcc")


def nvcc_version() -> str:
    return _version(nvcc(), "CUDA compiler", "install the CUDA toolkit") + host_version()


@functools.cache
def cpu_features() -> str:
    """What -march=native stands for: a cache shared by unlike machines must not mix their builds."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine() + platform.processor()
    lines = re.findall(r"^(?:flags|Features|model name)\s*:.*$", text, re.M)
    return hashlib.sha256("\n".join(sorted(set(lines))).encode()).hexdigest()


@functools.cache
def openmp_runtime() -> str:
    """The OpenMP library that torch itself loaded: two runtimes would keep two pools of spinning threads."""
    import torch

    root = Path(torch.__file__).parent
    for folder in (root / "lib", root.parent / "torch.libs"):
        if found := sorted(folder.glob("libgomp*.so*")):
            return str(found[0])
    return "-lgomp"
