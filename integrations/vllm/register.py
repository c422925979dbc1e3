"""Entry point of the `vllm.general_plugins` group: puts our class into vLLM's backend registry.

vLLM calls `register` in every process it starts, also in those that only parse arguments: no CUDA, no build.
"""

from __future__ import annotations

import os
import sys

from fi_backend import env

BACKEND = "fi_backend.vllm.backend.FiAttentionBackend"


def register() -> None:
    """Idempotent, and never raises: an error here would end the process that only loads plugins."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
        slots = ["CUSTOM"]
        if env.cpu_backend():
            # the CPU platform serves this slot whatever backend the user names
            register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
            slots.append("CPU_ATTN")
    except Exception as error:
        _say_once(f"fi_backend: not registered with vLLM ({type(error).__name__}: {error})")
        return
    _say_once(f"fi_backend: registered as vLLM attention backend {' and '.join(slots)}")


def _say_once(line: str) -> None:
    # vLLM's worker and inspection processes inherit the environment: they speak if they differ from the first
    if os.environ.get(env.ANNOUNCED) != line:
        os.environ[env.ANNOUNCED] = line
        print(line, file=sys.stderr, flush=True)
