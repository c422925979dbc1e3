"""An engine in a process of its own: it tells what it finds line by line, and its time is limited."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_MARK = "FOUND "  # everything else on stdout is the engine's


def tell(**values: Any) -> None:
    """Child to parent, one line at once."""
    print(_MARK + json.dumps(values), flush=True)


def run(
    command: list[str],
    seconds: float,
    receive: Callable[[dict[str, Any]], None],
    environment: dict[str, str],
    errors: IO[str] | None = None,
) -> int:
    """Runs the command, at most `seconds`; `receive` gets what it tells, at once. Returns its exit code."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, **ENVIRONMENT, **environment},
        cwd=ROOT,
    )
    limit = threading.Timer(seconds, process.kill)
    limit.start()
    assert process.stdout is not None
    for line in process.stdout:  # ends with the process
        if line.startswith(_MARK):
            receive(json.loads(line[len(_MARK) :]))
    limit.cancel()
    return process.wait()
