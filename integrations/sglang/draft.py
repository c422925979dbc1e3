"""The decode steps of a draft model (EAGLE, standalone drafts): one FiAttentionBackend for each."""

from __future__ import annotations

from typing import Any

from fi_backend.serving.refuse import refuse

from .backend import FiAttentionBackend
from .step import Draft


class FiDraftBackend:
    """What SGLang's draft workers call. Step i runs under attn_backends[i]; the last token needs no attention."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any, topk: int, steps: int) -> None:
        if topk > 1 and runner.page_size > 1:
            refuse(f"expected page size 1 with {topk} draft branches, got {runner.page_size}")
        if topk > 1 and topk * steps > 64:
            refuse(f"expected at most 64 draft slots a request, got {topk} branches of {steps} steps")
        self.attn_backends = [FiAttentionBackend(runner, Draft(i, steps, topk)) for i in range(steps - 1)]
        self.max_context_len = self.attn_backends[0].max_context_len

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata_out_graph(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata_in_graph(forward_batch)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def draft_extend_metadata_captured_in_graph(self) -> bool:
        return False
