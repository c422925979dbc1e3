"""Entry point of the `sglang.srt.plugins` group: makes `--attention-backend fi` a choice.

SGLang calls `register` in every process that it starts: no CUDA, no build.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fi_backend.serving.announce import announce, require

NAME = "fi"
DRAFT_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend"


def register() -> None:
    announce("SGLang", _add)


def _add() -> str:
    """Idempotent."""
    require("sglang", (0, 5, 16))
    from sglang.srt import server_args
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if NAME not in attention_registry.ATTENTION_BACKENDS:
        attention_registry.register_attention_backend(NAME)(_create)
        server_args.add_attention_backend_choices([NAME])
        server_args.add_deterministic_attention_backend_choices([NAME])
        server_args.add_radix_supported_deterministic_attention_backend_choices([NAME])
        if hasattr(server_args, "add_draft_attention_backend_choices"):  # from 0.5.19 on
            server_args.add_draft_attention_backend_choices([NAME])
        HookRegistry.register(DRAFT_FACTORY, _create_draft, HookType.AROUND)
    return NAME


def _create(runner: Any) -> Any:
    from .backend import FiAttentionBackend

    return FiAttentionBackend(runner)


def _create_draft(
    original: Callable[..., Any], factory: Any, role: str, known: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Adds ours to the table of draft backends, which SGLang makes anew for every call."""

    def create() -> Any:
        from .draft import FiDraftBackend

        runner = factory.draft_model_runner
        if "decode" in known["triton"].__name__:  # the role names the flag to read, not the use
            backend: Any = FiDraftBackend(runner, factory.topk, factory.speculative_num_steps)
        else:
            backend = _create(runner)
        return backend if hasattr(factory, "server_args") else (NAME, backend)  # a pair from 0.5.19 on

    return original(factory, role, {**known, NAME: create}, *args, **kwargs)
