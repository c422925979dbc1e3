"""A step of an engine in CUDA graphs, one per batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch

Outputs = TypeVar("Outputs", torch.Tensor, tuple[torch.Tensor, ...])


class Buckets(Generic[Outputs]):
    """Captures step(*inputs) in a CUDA graph per batch size, and replays the tightest one.

    inputs: static tensors of any dtype, [rows, ...] with at least as many rows as the largest bucket, all on
    one device. step sees the leading rows of each, as many as the bucket has, and returns a tensor
    [rows, ...] or a tuple of such. sizes: rows of the buckets, in any order.

    Write the n rows of a batch into the inputs, on the current stream, then call with n: the rows from n to
    the bucket's end become padding, one number per input that must make a row harmless. A slot of -1 makes
    `append` skip a row; a kv_len of 0 makes `run` read no key for it. Capturing runs step on padding alone.

        buckets = Buckets(step, (token, kv_len, slot), padding=(0, 0, -1), sizes=(1, 2, 4, 8))
        buckets.capture()
        token[:3], kv_len[:3], slot[:3] = ...
        logits = buckets(3)  # the bucket of 4, its first 3 rows

    What step does on the host happens once, at capture: lengths must reach it through tensors, and a plan
    made in it must be made on="device". All graphs share one memory pool: they must not overlap, and outputs
    hold until the next call. A replay writes the plan into its planner, over any other plan.

    On a CPU the same slices go to step directly. Raises ValueError for inputs, padding or sizes that do not
    fit together.
    """

    def __init__(
        self,
        step: Callable[..., Outputs],
        inputs: Sequence[torch.Tensor],
        padding: Sequence[float],
        sizes: Sequence[int],
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"expected bucket sizes of at least 1, got {list(sizes)}")
        if not inputs or len(inputs) != len(padding):
            raise ValueError(
                f"expected inputs, and one number of padding for each, got {len(inputs)} inputs and "
                f"{len(padding)} numbers"
            )
        self.sizes = sorted(set(sizes))
        for i, x in enumerate(inputs):
            if x.dim() == 0 or x.shape[0] < self.sizes[-1]:
                raise ValueError(
                    f"expected input {i} of at least {self.sizes[-1]} rows (the largest bucket), "
                    f"got shape {list(x.shape)}"
                )
            if x.device != inputs[0].device:
                raise ValueError(f"expected input {i} on {inputs[0].device}, got {x.device}")
        self.device = inputs[0].device
        self._step: Callable[..., Outputs] = step
        self._inputs, self._padding = tuple(inputs), tuple(padding)
        self._replays: dict[int, Callable[[], Outputs]] = {}

    @torch.no_grad()
    def capture(self) -> None:
        """Runs step once on each bucket, which builds and loads its kernels, and captures it, largest first.

        Overwrites the inputs with padding. Raises ValueError for outputs that do not have the bucket's rows.
        """
        self._pad(0, self.sizes[-1])
        if self.device.type == "cpu":
            for size in reversed(self.sizes):
                self._run(size)
                self._replays[size] = partial(self._run, size)
            return
        with torch.cuda.device(self.device):
            # A first run and its capture need one stream: libraries keep a workspace for each.
            stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            stream.wait_stream(torch.cuda.current_stream())
            for size in reversed(self.sizes):
                with torch.cuda.stream(stream):
                    self._run(size)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    outputs = self._run(size)
                self._replays[size] = _replay(graph, outputs)
            torch.cuda.current_stream().wait_stream(stream)

    def size_for(self, n: int) -> int:
        """The smallest bucket of at least n rows. Raises ValueError if there is none, or n is below 1."""
        if not 1 <= n <= self.sizes[-1]:
            raise ValueError(f"expected 1 to {self.sizes[-1]} rows (the largest bucket), got {n}")
        return next(size for size in self.sizes if size >= n)

    @torch.no_grad()
    def __call__(self, n: int) -> Outputs:
        """The outputs' first n rows, for the first n rows of the inputs; never synchronises.

        Raises ValueError for more rows than the largest bucket, RuntimeError before `capture`.
        """
        size = self.size_for(n)
        if size not in self._replays:
            raise RuntimeError("expected capture() before the first call, got none")
        self._pad(n, size)
        outputs = self._replays[size]()
        return outputs[:n] if isinstance(outputs, torch.Tensor) else tuple(x[:n] for x in outputs)

    def _pad(self, begin: int, end: int) -> None:
        if begin < end:
            for x, value in zip(self._inputs, self._padding, strict=True):
                x[begin:end].fill_(value)

    def _run(self, size: int) -> Outputs:
        outputs = self._step(*(x[:size] for x in self._inputs))
        for x in (outputs,) if isinstance(outputs, torch.Tensor) else outputs:
            if x.dim() == 0 or x.shape[0] != size:
                raise ValueError(f"expected step to return {size} rows, got shape {list(x.shape)}")
        return outputs


def _replay(graph: torch.cuda.CUDAGraph, outputs: Outputs) -> Callable[[], Outputs]:
    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay
