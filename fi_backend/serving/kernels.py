"""Kernels of this process's layers: building starts when a layer is made, beside the weight loading."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from .. import jit

_lock = threading.Lock()
_specs: set[jit.Spec] = set()
_builds: dict[str, Future[Path]] = {}
_pool: ThreadPoolExecutor | None = None


def start(spec: jit.Spec) -> None:
    """Build what this executor needs at run time, in the background, unless that began already."""
    global _pool
    with _lock:
        if spec in _specs:
            return
        _specs.add(spec)
        _pool = _pool or ThreadPoolExecutor(4, thread_name_prefix="fi-build")
        for library in jit.needed([spec]):
            if library.label not in _builds:
                _builds[library.label] = _pool.submit(jit.build, library)


def load() -> None:
    """Wait for every build, then load it: no step, no graph capture opens a library. Raises BuildError."""
    with _lock:
        specs, builds = list(_specs), list(_builds.values())
    for build in builds:
        build.result()
    jit.core()
    for spec in specs:
        jit.executor(spec)
        if spec.arch != jit.CPU:
            jit.smxx(spec.arch)


def loaded() -> list[str]:
    """Executors of this process's layers, in words."""
    with _lock:
        return sorted(map(str, _specs))
