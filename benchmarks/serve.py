"""What whole-engine figures share: the model's shape, cases and their clock, the results file, the parent."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import turns
from .engine_process import ROOT, EngineProcess, last_error, say, tell
from .lengths import sharegpt

Requests = list[tuple[int, int]]  # (prompt tokens, output tokens) of every request

CONFIG: dict[str, Any] = {  # Llama-3.1-8B
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
CASES: dict[str, Requests] = {
    "128 x 1024 in, 256 out": [(1024, 256)] * 128,
    "1 x 8192 in, 1 out": [(8192, 1)],
    "1 x 8192 in, 256 out": [(8192, 256)],
    "256 x ShareGPT-like": sharegpt(256),
    "16 x 16384 in, 128 out": [(16384, 128)] * 16,
}
MAX_REQUESTS, CONTEXT = 256, 32768


def make_model(folder: Path, layers: int = 32) -> Path:
    """A model folder of that many layers, without weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    return folder


def prompts(requests: Requests, seed: int) -> list[list[int]]:
    """Token ids of every prompt; no two seeds below 100 times another share one."""
    return [
        [(seed + 7 * i + 3 * j) % (CONFIG["vocab_size"] - 8256) + 10 for j in range(n)]
        for i, (n, _) in enumerate(requests)
    ]


def time_cases(
    generate: Callable[[Requests, int], float], names: list[str], repeat: int, deadline: float
) -> None:
    """Tells the best time of each case. All cases once, then again, as long as time.monotonic() permits.

    generate: serves the requests with prompts of a seed and returns the seconds it took.
    """
    times: dict[str, list[float]] = {name: [] for name in names or CASES}
    for i in range(repeat):
        for case, found in times.items():
            if time.monotonic() + (found[-1] if found else 0.0) <= deadline:
                found.append(round(generate(CASES[case], 100 * i), 3))
                tell(case=case, seconds=min(found), all_seconds=found)
    for case, found in times.items():
        if not found:
            tell(case=case, failed="no time left")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--case", action="append", default=[], choices=CASES, help="only this case (repeatable)"
    )
    parser.add_argument("--repeat", type=int, default=2, help="runs of a case, the best counts")
    add_process_options(parser)


def add_process_options(parser: argparse.ArgumentParser, model: str = argparse.SUPPRESS) -> None:
    """model: help for the option, where a user may choose it."""
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="time for everything (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, help=model)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--gate", type=Path, help=argparse.SUPPRESS)


def machine(engine: str) -> dict[str, str]:
    """Card, driver, versions; asked in another process, because a CUDA context here would hold GPU memory."""
    code = (
        "import json, torch; from importlib.metadata import packages_distributions, version;"
        "from benchmarks.meta import meta;"
        "device = torch.device('cuda' if torch.cuda.is_available() else 'cpu');"
        f"found = version(packages_distributions()[{engine!r}][0]);"
        f"print(json.dumps({{**meta(device), {engine!r}: found}}))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, str] = json.loads(output.stdout.splitlines()[-1])
    return found


class Report:
    """The results file, written again after every figure. A later figure of a case replaces the earlier."""

    def __init__(self, path: Path | None, meta: dict[str, str]) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.meta = meta
        self._lock = threading.Lock()

    def add(self, impl: str, case: str, suite: str = "serve", **values: Any) -> None:
        row = {"suite": suite, "impl": impl, "case": case, **values}
        say(f"  {row}")
        with self._lock:
            same = (i for i, r in enumerate(self.rows) if (r["impl"], r["case"]) == (impl, case))
            at = next(same, len(self.rows)) if case in CASES else len(self.rows)
            self.rows[at : at + 1] = [row]
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps({"meta": self.meta, "rows": self.rows}, indent=1) + "\n")


@dataclass
class Parent:
    """The command that was called: each of its engines is the same command once more, with --child."""

    report: Report
    suite: str
    end: float  # by time.monotonic()
    folder: Path  # temporary

    def contender(
        self,
        name: str,
        model: Path,
        *options: str,
        run: str = "run",
        environment: dict[str, str] | None = None,
        log: Path | None = None,
    ) -> turns.Contender:
        """An engine whose rows go to the report. run: which of its runs this is; log: takes its stderr."""
        gate = self.folder / f"{name}-{run}"
        command = [sys.executable, "-m", "benchmarks", *sys.argv[1:], *options]
        command += ["--child", name, "--model", str(model.resolve()), "--gate", str(gate)]
        heard: list[dict[str, Any]] = []

        def receive(row: dict[str, Any]) -> None:
            heard.append(row)
            if "case" in row:
                self.report.add(name, suite=self.suite, **row)

        def problem(code: int) -> str:
            if heard and not code:
                return ""
            return f"exit code {code}" + (f": {last_error(log)}" if log else "")

        def fail(reason: str) -> None:
            self.report.add(name, run, suite=self.suite, failed=reason)

        with log.open("w") if log else contextlib.nullcontext() as errors:
            process = EngineProcess(command, receive, environment or {}, errors)
        return turns.Contender(name if run == "run" else f"{name}, {run}", process, gate, fail, problem)


@contextlib.contextmanager
def parent(args: argparse.Namespace, engine: str, suite: str = "serve") -> Iterator[Parent]:
    end = time.monotonic() + 60 * args.minutes
    report = Report(args.out, machine(engine))
    with tempfile.TemporaryDirectory() as folder:
        yield Parent(report, suite, end, Path(folder))
