"""Suite jit: how long compiling from nothing takes, into an empty cache, one compiler per CPU."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch

from fi_backend import jit
from fi_backend.jit import models

from .serve import CONFIG


def arches(device: torch.device) -> list[int]:
    """This GPU's; without a GPU those that are compiled for other machines, and the CPU."""
    return [jit.arch_of(device)] if device.type == "cuda" else [jit.CPU, 80, 90]


def rows(arch: int) -> Iterator[dict[str, Any]]:
    """One spec, then all that a Llama model loads: core, planner and append, and its one spec."""
    specs = models.specs(CONFIG, arch)
    for name, libraries in (("spec", [jit.library(specs[0])]), ("llama", jit.needed(specs))):
        case = f"jit-{name}-{jit.arch_name(arch)}"
        yield {"suite": "jit", "case": case, "impl": "fi", **_timed(libraries)}


def _timed(libraries: Iterable[jit.Library]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, FI_CACHE_DIR=cache):
        start = time.perf_counter()
        folders = jit.build_all(libraries)
        seconds = time.perf_counter() - start
        size = sum((folder / "lib.so").stat().st_size for folder in folders)
    return {"seconds": round(seconds, 2), "libraries": len(folders), "bytes": size}
