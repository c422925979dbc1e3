"""What SGLang 0.5.16 needs where there is no GPU. Lies in the site-packages of its CPU environment only.

`import torch` calls `prepare` (entry point of the group torch.backends), so every process of the engine has
it before SGLang is imported.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

import torch


def prepare() -> None:
    # For a backend it does not know, SGLang writes its page tables with Triton kernels of its own.
    os.environ.setdefault("TRITON_INTERPRET", "1")

    if torch.version.cuda is None:
        # torchvision's wheel on PyPI is built for CUDA: its library does not load beside a CPU torch, and it
        # then stops at operators that this library would have defined.
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)

    # SGLang's rotary embedding looks this function up on a device that it takes for unknown, and never calls
    # it. Only this module: `import vllm` still fails, as it should.
    operators = ModuleType("vllm._custom_ops")
    operators.__dict__["rotary_embedding"] = None
    sys.modules[operators.__name__] = operators
