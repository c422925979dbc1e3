"""Every environment variable of ours, read when asked (tests and launchers may change them)."""

from __future__ import annotations

import os
from pathlib import Path

# The line of the first engine process that registered us; its children inherit it and do not repeat it.
ANNOUNCED = "FI_BACKEND_ANNOUNCED"


def _flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no")


def debug() -> bool:
    """FI_DEBUG=1: `run` checks page tables, and each index of a variant. Synchronises; not for serving."""
    return _flag("FI_DEBUG")


def cpu_backend() -> bool:
    """FI_BACKEND_CPU=1: take the CPU attention slot of an engine."""
    return _flag("FI_BACKEND_CPU")


def variant() -> str:
    """FI_VARIANT=FILE.py:NAME: a variant of one's own for every layer that an engine serves."""
    return os.environ.get("FI_VARIANT", "")


def prefix() -> str:
    """FI_PREFIX=auto|off|on: whether planners of engines read keys that requests share once. Default auto."""
    given = os.environ.get("FI_PREFIX") or "auto"
    if given not in ("auto", "off", "on"):
        raise ValueError(f"expected FI_PREFIX=auto, off or on, got {given!r}")
    return given


def cache_dir() -> Path:
    """FI_CACHE_DIR: where compiled libraries are kept. Default ~/.cache/fi_backend."""
    given = os.environ.get("FI_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fi_backend"


def host_compiler() -> str:
    """CXX: the C++ compiler of the host. Default g++."""
    return os.environ.get("CXX") or "g++"


def cuda_home() -> str | None:
    """CUDA_HOME: root of the CUDA toolkit, asked when torch knows none."""
    return os.environ.get("CUDA_HOME") or None
