"""./demo: make the environment and the model folder, then hand over to fi_backend.launch inside it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from engines import sglang_environment, vllm_environment
from environment import ROOT, RUN_ENVIRONMENT, SetupError, Ticker, make

MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
ENGINES = {"vllm": vllm_environment, "sglang": sglang_environment}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./demo",
        description="Answer a prompt with SmolLM2-135M-Instruct, served by a real engine through "
        "fi_backend's attention. The first run makes everything it needs under .venv/ and .cache/.",
    )
    parser.add_argument("--prompt", default="Why is the sky blue?", help="what to ask (default: %(default)s)")
    parser.add_argument("--engine", default="vllm", help="serving engine: vllm (default) or sglang")
    parser.add_argument("--port", type=int, help="serve an OpenAI-compatible endpoint on 127.0.0.1 instead")
    parser.add_argument(
        "--max-tokens", type=int, default=200, help="length of the answer (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.engine not in ENGINES:
        parser.error(f"expected --engine vllm or sglang, got {args.engine}")
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"expected --port between 1 and 65535, got {args.port}")
    if args.max_tokens < 1:
        parser.error(f"expected --max-tokens of at least 1, got {args.max_tokens}")
    return args


def ensure_model(python: Path) -> Path:
    """Convert the packaged weights once; the converter publishes the folder by a rename."""
    if not (MODEL / "config.json").exists():
        with Ticker("model: convert SmolLM2-135M-Instruct"):
            subprocess.run([python, ROOT / "scripts" / "convert_gguf.py", MODEL], check=True)
    return MODEL


def main() -> None:
    args = parse(sys.argv[1:])
    try:
        python = make(ENGINES[args.engine]())
        model = ensure_model(python)
    except (SetupError, subprocess.CalledProcessError, OSError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; the next run continues where this one stopped")
    command = [str(python), "-m", "fi_backend.launch", "--engine", args.engine, "--model", str(model)]
    command += ["--port", str(args.port)] if args.port else [f"--prompt={args.prompt}"]
    command += ["--max-tokens", str(args.max_tokens)]
    os.execve(python, command, RUN_ENVIRONMENT)


if __name__ == "__main__":
    main()
