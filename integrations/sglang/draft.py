"""The decode steps of a draft model (EAGLE, standalone drafts): one FiAttentionBackend for each."""

from __future__ import annotations

from typing import Any

from fi_backend.serving.refuse import refuse
from fi_backend.serving.tree import MAX_TOKENS

from .backend import FiAttentionBackend
from .step import Draft


def _for_each(name: str) -> Any:
    def call(self: FiDraftBackend, *args: Any, **kwargs: Any) -> None:
        for backend in self.attn_backends:
            getattr(backend, name)(*args, **kwargs)

    return call


class FiDraftBackend:
    """What draft workers call. Step i runs under attn_backends[i]; the last token needs no attention."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any, topk: int, steps: int) -> None:
        if topk > 1 and runner.page_size > 1:
            refuse(f"expected page size 1 with {topk} draft branches, got {runner.page_size}")
        if topk > 1 and topk * steps > MAX_TOKENS:
            refuse(f"expected at most {MAX_TOKENS} draft slots a request, got {topk} x {steps}")
        self.attn_backends = [FiAttentionBackend(runner, Draft(i, steps, topk)) for i in range(steps - 1)]
        self.max_context_len = self.attn_backends[0].max_context_len

    init_forward_metadata = _for_each("init_forward_metadata")
    init_cuda_graph_state = _for_each("init_cuda_graph_state")
    init_forward_metadata_out_graph = _for_each("init_forward_metadata_out_graph")
    init_forward_metadata_in_graph = _for_each("init_forward_metadata_in_graph")

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return self.attn_backends[0].get_cuda_graph_seq_len_fill_value()
