"""What we aim for on one H100, and what that card reaches; figures of other cards have neither."""

from __future__ import annotations

from typing import Any

CARD = "H100"
# Measured on an NVIDIA H100 80GB HBM3: reading, and a dense bf16 product of 8192 x 8192 matrices.
READ_TB_S, TFLOP_S = 3.09, 741.0
GOAL_US = {
    "decode-16x1024": 31,
    "decode-16-uniform": 26,
    "decode-16-zipf": 32,
    "decode-64x4096": 362,
    "decode-64-zipf": 366,
    "decode-256x2048": 716,
    "decode-1x131072": 186,
    "decode-1x8192": 20,
    "decode-64x4096-page1": 366,
    "decode-64-zipf-page1": 372,
    "decode-64x4096-d64": 188,
    "verify-64x4-4096": 364,
    "prefill-16x1024": 300,
    "prefill-16-zipf": 600,
    "prefill-4x8192": 3650,
    "prefill-1x32768": 13600,
    "prefill-4x8192-page1": 3950,
    "chunk-512-over-32768": 430,
    "mixed-128dec-2chunk": 790,
    "prefix-16-8192-256": 40,
    "prefix-64-8192-256": 55,
    "prefix-64-32768-512": 110,
    "prefix-256-2048-256": 115,
    "prefix-128-16384-128": 80,
    "plan-16": 10,
    "plan-64": 10,
    "plan-256": 12,
}


def bound_us(row: dict[str, Any]) -> float:
    """The least time of a row's case at these rates."""
    return float(row["us"] * max(row["tb_s"] / READ_TB_S, row["tflop_s"] / TFLOP_S))


def memory_bound(row: dict[str, Any]) -> bool:
    return bool(row["tb_s"] / READ_TB_S > row["tflop_s"] / TFLOP_S)
