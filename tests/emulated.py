"""Device text of csrc compiled for the host, with tests/emulate in place of the GPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

from fi_backend import env

HERE = Path(__file__).resolve().parent / "emulate"
# each library has fibers of its own
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fno-gnu-unique", "-Wl,-Bsymbolic", "-Wno-unknown-pragmas"]


def library(source: str, folder: Path, *include: Path) -> ctypes.CDLL:
    """tests/emulate/source, with headers of `include`, compiled into the folder."""
    target = folder / "emulated.so"
    paths = [f"-I{path}" for path in include]
    subprocess.run([env.host_compiler(), *FLAGS, *paths, HERE / source, "-o", target], check=True)
    return ctypes.CDLL(str(target))


def address(function: Any) -> int:
    """Of a function of a library."""
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found
