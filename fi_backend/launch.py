"""Serve a model folder through vLLM with our attention: `python -m fi_backend.launch --model FOLDER`.

One prompt, streamed to stdout, or with --port an OpenAI-compatible endpoint on 127.0.0.1. Progress and
figures go to stderr.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import env
from .jit import BuildError, toolchain
from .progress import Ticker

# Read when vLLM is imported, so they are set before; what the user set wins.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it would compile kernels of its own for a minute and more
}
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check(model: str, port: int | None, max_tokens: int, gpu: bool) -> None:
    """Raises ValueError or BuildError for what vLLM would only come to after a long start, if at all."""
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"expected --model to be a folder with a config.json, got {model}")
    if max_tokens < 1:
        raise ValueError(f"expected --max-tokens of at least 1, got {max_tokens}")
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "fi_backend" not in plugins.split(","):
        raise ValueError(f"expected VLLM_PLUGINS to name fi_backend or to be unset, got {plugins!r}")
    if port is not None:
        _check_port(port)
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


def engine_options(model: str, gpu: bool) -> dict[str, Any]:
    """Arguments that vLLM's EngineArgs and its command line share."""
    common = {"model": model, "max_model_len": 2048, "max_num_seqs": 16, "seed": 0}
    if gpu:
        return {**common, "attention_backend": "CUSTOM", "gpu_memory_utilization": 0.5}
    # float32 is exact, and as fast as bfloat16 on a processor without bfloat16 arithmetic
    return {**common, "dtype": "float32", "enforce_eager": True, "block_size": 32}


def answer(options: dict[str, Any], prompt: str, max_tokens: int) -> None:
    """Start the engine, stream the answer to stdout as its tokens come, then say what ran and how fast.

    Raises RuntimeError if another attention backend served the prompt.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this loop steps the engine itself
    with Ticker("launch 1/2: start vLLM, build kernels"):
        from vllm import EngineArgs, SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.llm_engine import LLMEngine

        engine = LLMEngine.from_engine_args(EngineArgs(**options))
    say("launch 2/2: answer")
    tokenizer: Any = engine.get_tokenizer()
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA)
    engine.add_request("0", {"prompt_token_ids": ids}, sampling)
    tokens, first, start = 0, 0.0, time.monotonic()
    while engine.has_unfinished_requests():
        for output in engine.step():
            piece = output.outputs[0]
            print(piece.text, end="", flush=True)
            first = first or time.monotonic()
            tokens += len(piece.token_ids)
    print(flush=True)
    rate = (tokens - 1) / (time.monotonic() - first) if tokens > 1 else 0.0
    say(f"{tokens} tokens, the first after {first - start:.2f} s, then {rate:.1f} a second; {what_ran()}")


def what_ran() -> str:
    """The executors that this process's attention layers ran on. Raises RuntimeError if there were none."""
    from .serving import kernels, plans

    written = plans.plans_written()
    if written == 0:
        raise RuntimeError("expected vLLM to plan with fi_backend, but no plan was made: another backend ran")
    return f"{written} plans, executor {', '.join(kernels.loaded())}"


def serve(options: dict[str, Any], port: int) -> None:
    """`vllm serve` in this process, on 127.0.0.1; it ends with Ctrl-C."""
    with Ticker("launch 1/2: load vLLM"):
        from vllm.entrypoints.cli.main import main as vllm  # the `vllm` command: modules below it move

    model = options["model"]
    name = os.path.basename(os.path.normpath(model))
    words = ["serve", model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    for option, value in options.items():
        if option != "model":
            flag = "--" + option.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    say(f"launch 2/2: start vLLM, build kernels, then serve {name} at http://127.0.0.1:{port}/v1")
    sys.argv = ["vllm", *words]
    vllm()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fi_backend.launch", description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--prompt", default="Why is the sky blue?", help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--port", type=int, help="serve instead of answering one prompt")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    for name, value in (ENVIRONMENT if gpu else ENVIRONMENT | CPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    if not gpu:
        os.environ["FI_BACKEND_CPU"] = "1"  # puts our class into the CPU platform's only attention slot
    options = engine_options(args.model, gpu)
    try:
        check(args.model, args.port, args.max_tokens, gpu)
        if args.port is not None:
            serve(options, args.port)
        else:
            answer(options, args.prompt, args.max_tokens)
    except (BuildError, NotImplementedError, ValueError) as error:
        if env.debug():
            raise
        sys.exit(f"launch: {error}")
    except KeyboardInterrupt:
        sys.exit("launch: interrupted")


if __name__ == "__main__":
    main()
