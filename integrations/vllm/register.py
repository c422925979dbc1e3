"""Entry point of the `vllm.general_plugins` group: puts our class into vLLM's backend registry.

vLLM calls `register` in every process it starts, also in those that only parse arguments: no CUDA, no build.
"""

from __future__ import annotations

from fi_backend import env
from fi_backend.serving.announce import announce

BACKEND = "fi_backend.vllm.backend.FiAttentionBackend"


def register() -> None:
    """Idempotent, and never raises."""
    announce("vLLM", _register)


def _register() -> str:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    slots = ["CUSTOM"]
    if env.cpu_backend():
        slots.append("CPU_ATTN")  # the CPU platform serves this slot whatever backend the user names
    for slot in slots:
        register_backend(AttentionBackendEnum[slot], BACKEND)
    return " and ".join(slots)
