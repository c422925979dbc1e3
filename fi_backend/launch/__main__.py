"""Serve a model folder with our attention: `python -m fi_backend.launch --engine vllm|sglang --model FOLDER`.

One prompt, streamed to stdout, or with --port an OpenAI-compatible endpoint on 127.0.0.1. Progress and
figures go to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import sys
from pathlib import Path

import torch

from .. import env
from ..jit import BuildError, toolchain

ENGINES = ("vllm", "sglang")
# Read when the engine is imported, so they are set before; what the user set wins.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def check(args: argparse.Namespace, plugins: str, gpu: bool) -> None:
    """Raises ValueError or BuildError for what an engine would only come to after a long start, if at all.

    plugins: the engine's environment variable that names the plugins to load.
    """
    if not (Path(args.model) / "config.json").is_file():
        raise ValueError(f"expected --model to be a folder with a config.json, got {args.model}")
    if args.max_tokens < 1:
        raise ValueError(f"expected --max-tokens of at least 1, got {args.max_tokens}")
    named = os.environ.get(plugins)
    if named is not None and "fi_backend" not in named.split(","):
        raise ValueError(f"expected {plugins} to name fi_backend or to be unset, got {named!r}")
    if args.port is not None:
        _check_port(args.port)
    toolchain.host_version()
    if gpu:
        toolchain.nvcc_version()


def _check_port(port: int) -> None:
    if not 0 < port < 65536:
        raise ValueError(f"expected --port between 1 and 65535, got {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"expected --port to be free on 127.0.0.1, got {port}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fi_backend.launch", description=__doc__)
    parser.add_argument("--engine", default="vllm", help="vllm (default) or sglang")
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--prompt", default="Why is the sky blue?", help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--port", type=int, help="serve instead of answering one prompt")
    args = parser.parse_args()
    if args.engine not in ENGINES:
        parser.error(f"expected --engine vllm or sglang, got {args.engine}")
    engine = importlib.import_module(f".{args.engine}", __package__)
    gpu = torch.cuda.is_available()
    try:
        check(args, engine.PLUGINS, gpu)
        for name, value in {**ENVIRONMENT, **engine.environment(gpu)}.items():
            os.environ.setdefault(name, value)
        options = engine.options(args.model, gpu)
        if args.port is not None:
            engine.serve(options, args.port)
        else:
            engine.answer(options, args.prompt, args.max_tokens)
    except (BuildError, NotImplementedError, ValueError) as error:
        if env.debug():
            raise
        sys.exit(f"launch: {error}")
    except KeyboardInterrupt:
        sys.exit("launch: interrupted")


if __name__ == "__main__":
    main()
