"""An engine in a process of its own: it tells what it finds line by line, and its time is limited."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
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
    "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",  # it asks for a package's metadata, not for its kernels
}
_MARK = "FOUND "  # everything else on stdout is the engine's


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tell(**values: Any) -> None:
    """Child to parent, one line at once."""
    print(_MARK + json.dumps(values), flush=True)


class EngineProcess:
    """A command started now; `receive` gets what it tells, at once, on another thread."""

    def __init__(
        self,
        command: list[str],
        receive: Callable[[dict[str, Any]], None],
        environment: dict[str, str],
        errors: IO[str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **ENVIRONMENT, **environment},
            cwd=ROOT,
            start_new_session=True,  # its own processes are stopped with it
        )
        self._reader = threading.Thread(target=self._read, args=(receive,), daemon=True)
        self._reader.start()

    def _read(self, receive: Callable[[dict[str, Any]], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # ends with the process
            if line.startswith(_MARK):
                receive(json.loads(line[len(_MARK) :]))

    def wait(self, seconds: float) -> int:
        """Its exit code, after at most `seconds`: then it is stopped (-9)."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            try:
                self._process.wait(seconds)
            finally:
                self.stop()
        code = self._process.wait()
        self._reader.join()
        return code

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


def run(
    command: list[str],
    seconds: float,
    receive: Callable[[dict[str, Any]], None],
    environment: dict[str, str],
    errors: IO[str] | None = None,
) -> int:
    """Runs the command, at most `seconds`; `receive` gets what it tells, at once. Returns its exit code."""
    return EngineProcess(command, receive, environment, errors).wait(seconds)


def last_words(log: Path, lines: int = 12) -> str:
    """The end of an engine's log, without what every engine says."""
    noise = ("leaked", "nanobind")
    found = [x for x in log.read_text(errors="replace").splitlines() if x.strip()]
    return "\n".join([x for x in found if not any(n in x for n in noise)][-lines:])


def last_error(log: Path) -> str:
    """The last line of an engine's log that names an error, else its last line."""
    found = last_words(log, 1000).splitlines() or ["an empty log"]
    return next((x for x in reversed(found) if "Error" in x), found[-1])
