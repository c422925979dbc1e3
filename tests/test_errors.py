"""Bad input at the door of `run`: one clear sentence, value found and value wanted, before any work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import checks
import pytest
import torch
from cases import Case, make

from fi_backend import KVCache, run, variants
from fi_backend.variants import (
    CAUSAL,
    DOCUMENT,
    PACKED_MASK,
    PREFIX_LM,
    SINKS,
    SOFT_CAP,
    TREE,
    WINDOW,
    Argument,
    define,
)

CASE = Case((1, 3), (40, 17))
WARMTH = define("WARMTH", Argument("warmth", "tensor", per="token"), logits="x * warmth[q_token]")
BF16 = torch.bfloat16


def _cache(
    pages: int = 8, tokens: int = 16, heads: int = 2, dim: int = 64, dim_vo: int = 64, dtype=BF16
) -> KVCache:
    return KVCache.separate(*(torch.zeros(pages, tokens, heads, d, dtype=dtype) for d in (dim, dim_vo)))


def _q(tokens: int = 6, heads: int = 4, dim: int = 64, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(tokens, heads, dim, dtype=dtype)


def _words(tokens: int) -> torch.Tensor:
    return torch.zeros(tokens, dtype=torch.int64)


def _tree(**changes: Any) -> dict[str, Any]:
    return {"variant": CAUSAL + TREE, "tree_mask": _words(6), "tree_tokens": 2} | changes


def _documents(*shape: int, **changes: Any) -> dict[str, Any]:
    ids = torch.zeros(*shape, dtype=torch.int32)
    return {"variant": CAUSAL + DOCUMENT, "document_ids": ids} | changes


def _packed(packed: int, *indptr: int) -> dict[str, Any]:
    starts = torch.tensor(indptr, dtype=torch.int32)
    bits = torch.zeros(packed, dtype=torch.uint8)
    return {"variant": CAUSAL + PACKED_MASK, "packed_mask": bits, "mask_indptr": starts}


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": _q(dim=96)}, ValueError, "expected head_dim 64 in q, got 96"),
    ({"q": _q(heads=6)}, ValueError, r"expected 4 q heads \(2 kv heads x group 2\), got 6"),
    (
        {"q": _q(tokens=3), "out": _q(tokens=3)},
        ValueError,
        r"expected q of at least 4 tokens \(qo_indptr.*got 3",
    ),
    ({"q": _q(dtype=torch.float16)}, TypeError, "expected out of dtype float16, got bfloat16"),
    (
        {"q": _q(dtype=torch.float64)},
        TypeError,
        "expected q of bfloat16, float16 or float32, got torch.float64",
    ),
    ({"q": [[[0.0]]]}, TypeError, "expected q to be a tensor, got list"),
    ({"q": _q()[0]}, ValueError, r"expected q \[tokens, q_heads, head_dim\], got shape \[4, 64\]"),
    ({"q": _q(dim=128)[..., ::2]}, ValueError, "expected q with a contiguous last dimension, got stride 2"),
    ({"kv": _cache(dim=96)}, ValueError, "expected head_dim 64 in k, got 96"),
    ({"kv": _cache(dim_vo=32)}, ValueError, "expected head_dim 64 in v, got 32"),
    ({"kv": _cache(heads=3)}, ValueError, "expected 2 kv heads, got 3"),
    ({"kv": _cache(tokens=8)}, ValueError, r"expected page_size 16 \(the batch's\), got a cache of 8"),
    ({"kv": _cache(dtype=torch.float16)}, TypeError, "expected k of dtype bfloat16, got float16"),
    ({"out": _q(tokens=5)}, ValueError, r"expected out of shape \[6, 4, 64\], got \[5, 4, 64\]"),
    ({"out": _q(dtype=torch.float32)}, TypeError, "expected out of dtype bfloat16, got float32"),
    ({"lse": torch.zeros(6, 2)}, ValueError, r"expected lse contiguous of shape \[6, 4\], got \[6, 2\]"),
    ({"lse": torch.zeros(6, 4, dtype=BF16)}, TypeError, "expected lse of dtype float32, got bfloat16"),
    ({"variant": variants.FULL}, ValueError, r"expected a causal variant \(the plan dropped keys.*got FULL"),
    ({"variant": "CAUSAL"}, TypeError, "expected variant to be a Variant, got str"),
    ({"window": 3}, ValueError, "variant CAUSAL takes no arguments, got unknown argument window"),
    (
        {"variant": CAUSAL + SOFT_CAP},
        ValueError,
        r"variant CAUSAL\+SOFT_CAP needs argument soft_cap \(float\), got none",
    ),
    ({"variant": CAUSAL + SOFT_CAP, "soft_cap": 0.0}, ValueError, "expected soft_cap >= 1e-06, got 0.0"),
    ({"variant": CAUSAL + SOFT_CAP, "soft_cap": float("nan")}, ValueError, "got nan"),
    (
        {"variant": CAUSAL + SOFT_CAP, "soft_cap": float("inf")},
        ValueError,
        "expected soft_cap <= 1000, got inf",
    ),
    ({"variant": CAUSAL + SOFT_CAP, "soft_cap": None}, ValueError, "soft_cap to be a float, got None"),
    ({"variant": CAUSAL + WINDOW, "window": 0}, ValueError, "expected window >= 1, got 0"),
    ({"variant": CAUSAL + WINDOW, "window": 2.5}, ValueError, "expected window to be an int, got 2.5"),
    ({"variant": CAUSAL + WINDOW, "window": 1 << 31}, ValueError, "window <= 1073741824, got 2147483648"),
    ({"variant": CAUSAL + WINDOW, "window": float("inf")}, ValueError, "window to be an int, got inf"),
    ({"scale": -0.125}, ValueError, "expected a finite scale above 0 in float32, got -0.125"),
    ({"scale": 0.0}, ValueError, "expected a finite scale above 0 in float32, got 0"),
    ({"scale": 1e-60}, ValueError, "expected a finite scale above 0 in float32, got 1e-60"),
    ({"scale": float("nan")}, ValueError, "expected a finite scale above 0 in float32, got nan"),
    ({"scale": float("inf")}, ValueError, "expected a finite scale above 0 in float32, got inf"),
    (
        {"variant": CAUSAL + SINKS, "sinks": torch.zeros(2)},
        ValueError,
        r"expected sinks contiguous float32 \[4\]",
    ),
    ({"variant": CAUSAL + SINKS, "sinks": 1.0}, TypeError, "expected sinks to be a tensor, got float"),
    (_tree(tree_mask=7), TypeError, "expected tree_mask to be a tensor, got int"),
    (
        _tree(tree_mask=torch.zeros(6)),
        ValueError,
        r"tree_mask contiguous int64 \[words\], got torch.float32 \[6\]",
    ),
    (_tree(tree_mask=_words(6).int()), ValueError, r"tree_mask contiguous int64 .*, got torch.int32 \[6\]"),
    (_tree(tree_mask=_words(12)[::2]), ValueError, r"tree_mask contiguous .* \[6\] with strides \[2\]"),
    (_tree(tree_mask=_words(6)[None]), ValueError, r"tree_mask contiguous .*, got torch.int64 \[1, 6\]"),
    (_tree(tree_mask=_words(6).to("meta")), ValueError, "expected tree_mask on cpu, got meta"),
    (_tree(tree_tokens=0), ValueError, "expected tree_tokens >= 1, got 0"),
    (_tree(tree_tokens=65), ValueError, "expected tree_tokens <= 64, got 65"),
    (_tree(tree_tokens=2.5), ValueError, "expected tree_tokens to be an int, got 2.5"),
    (
        _tree(tree_tokens=4),
        ValueError,
        r"expected tree_mask of at least 8 words \(2 requests x tree_tokens 4\), got 6",
    ),
    (
        _documents(2, 40, document_ids=torch.zeros(2, 40)),
        ValueError,
        r"document_ids contiguous int32 \[requests, positions\], got torch.float32 \[2, 40\]",
    ),
    (_documents(80), ValueError, r"document_ids contiguous int32 \[requests, positions\], got .* \[80\]"),
    (_documents(2, 0), ValueError, r"document_ids contiguous int32 .*, got torch.int32 \[2, 0\]"),
    (_documents(1, 40), ValueError, r"expected document_ids of at least 2 requests \(the batch's\), got 1"),
    (
        _documents(2, 39),
        ValueError,
        r"expected document_ids of at least 40 positions \(the longest request's keys\), got 39",
    ),
    (
        {"variant": CAUSAL + PREFIX_LM, "prefix_len": torch.zeros(1, dtype=torch.int32)},
        ValueError,
        r"expected prefix_len of at least 2 requests \(the batch's\), got 1",
    ),
    (
        {"variant": CAUSAL + WARMTH, "warmth": torch.zeros(5)},
        ValueError,
        r"expected warmth of at least 6 tokens \(q's\), got 5",
    ),
    (_packed(12, 0), ValueError, "expected mask_indptr of at least 2 requests"),
    (
        _packed(11, 0, 5),
        ValueError,
        "packed_mask: request 1 needs 7 bytes from mask_indptr 5 on, expected them within 0 to 10",
    ),
    (_packed(12, -1, 5), ValueError, "packed_mask: request 0 needs 5 bytes from mask_indptr -1 on"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=[m[:40] for _, _, m in REFUSED])
def test_run_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = make(CASE)
    plan = checks.planner_for(inputs).plan(inputs.batch)
    given = {"q": inputs.q, "kv": inputs.kv, "out": inputs.out} | changes
    with pytest.raises(error, match=message) as caught:
        run(plan, **given)
    assert "\n" not in str(caught.value)
    untouched = given["out"].isnan() if "out" not in changes else given["out"] == 0
    assert untouched.all(), "something was written"


def test_a_plan_that_was_overwritten() -> None:
    inputs, other = make(CASE), make(replace(CASE, q_lens=(2, 2)))
    planner = checks.planner_for(inputs)
    plan = planner.plan(inputs.batch)
    planner.plan(inputs.batch)  # the same lengths: the same work items
    checks.run_inputs(plan, inputs)
    planner.plan(other.batch)
    with pytest.raises(ValueError, match="expected the last plan of its planner, got one whose work items"):
        checks.run_inputs(plan, inputs)
    with pytest.raises(ValueError, match="expected the last plan of its planner, got one whose work items"):
        checks.run_inputs(plan.rebind(inputs.batch), inputs)


def test_a_page_size_beyond_int32() -> None:
    inputs = make(CASE)
    plan = checks.planner_for(inputs).plan(replace(inputs.batch, page_size=(1 << 32) + 16))
    with pytest.raises(ValueError, match="expected page_size of at most 2147483647, got 4294967312"):
        run(plan, inputs.q, inputs.kv)


def test_window_wider_than_the_plan() -> None:
    inputs = make(replace(CASE, variant="CAUSAL+WINDOW", window=10))
    plan = checks.planner_for(inputs).plan(inputs.batch)
    with pytest.raises(ValueError, match=r"expected window of at most 10 .*, got 11"):
        run(plan, inputs.q, inputs.kv, variant=CAUSAL + WINDOW, window=11)
    with pytest.raises(ValueError, match=r"expected a variant with WINDOW .* 10 keys a row\), got CAUSAL"):
        run(plan, inputs.q, inputs.kv)


@pytest.mark.parametrize("dim", [12, 100, 264])
def test_unsupported_head_dim(dim: int) -> None:
    with pytest.raises(ValueError, match=f"expected head_dim to be a multiple of 8 from 8 to 256, got {dim}"):
        inputs = make(replace(CASE, head_dim=dim))
        run(checks.planner_for(inputs).plan(inputs.batch), inputs.q, inputs.kv)


def test_tiles_that_the_executor_is_not_compiled_for() -> None:
    inputs = make(CASE)
    tiles = replace(checks.planner_for(inputs).tiles, kv=128)
    plan = checks.planner_for(inputs, tiles=tiles).plan(inputs.batch)
    with pytest.raises(ValueError, match=r"expected tiles of .*, got \(.*128, \d+\)"):
        run(plan, inputs.q, inputs.kv)


@pytest.mark.parametrize(
    ("table", "value", "message"),
    [
        ("block", 7, r"request 0, entry 1: expected a page of 0 to 6, got 7"),
        ("block", -1, r"request 0, entry 1: expected a page of 0 to 6, got -1"),
        ("csr", 99, r"request 0, entry 1: expected a page of 0 to 6, got 99"),
        ("token", 7 * 16, r"request 0, entry 1: expected a slot of 0 to 111, got 112"),
    ],
)
def test_page_table_entry_out_of_range(table: str, value: int, message: str, monkeypatch) -> None:
    monkeypatch.setenv("FI_DEBUG", "1")
    inputs = make(replace(CASE, table=table))
    batch = inputs.batch
    flat = torch.as_strided(batch.table, (batch.table_size,), (1,))
    start = 0 if batch.starts is None else int(batch.starts[0]) * batch.start_stride
    flat[start + batch.entry_step] = value
    with pytest.raises(ValueError, match=message):
        run(checks.planner_for(inputs).plan(batch), inputs.q, inputs.kv)


def test_page_table_too_short(monkeypatch) -> None:
    monkeypatch.setenv("FI_DEBUG", "1")
    inputs = make(CASE)
    plan = checks.planner_for(inputs, max_kv_len=4000).plan(inputs.batch)
    inputs.batch.kv_len[1] = 3000
    with pytest.raises(
        ValueError, match=r"request 1 needs 188 pages, entries \d+ to \d+, expected entries of 0 to"
    ):
        run(plan, inputs.q, inputs.kv)


@pytest.mark.parametrize("table", ["block", "token"])
def test_page_table_row_too_short(table: str, monkeypatch) -> None:
    """The entries after a row are the next request's: they lie in the table, but answer for somebody else."""
    monkeypatch.setenv("FI_DEBUG", "1")
    inputs = make(replace(CASE, table=table))
    plan = checks.planner_for(inputs, max_kv_len=4000).plan(inputs.batch)
    inputs.batch.kv_len[0] = 100
    with pytest.raises(
        ValueError, match=r"request 0 needs 7 pages of 16 tokens, expected .* row of \d+ entr"
    ):
        run(plan, inputs.q, inputs.kv)


def test_debug_mode_accepts_what_is_right(monkeypatch) -> None:
    monkeypatch.setenv("FI_DEBUG", "1")
    for table in ("block", "token", "csr"):
        checks.check_attention(replace(CASE, table=table, variant="CAUSAL+WINDOW+SINKS", window=20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "tensors"}, "argument a: expected kind to be one of float, int, tensor, got tensors"),
        ({"per": "page"}, "expected per to be one of head, request, token, key, dim, pair, word, got page"),
        ({"dtype": torch.float16}, "expected dtype to be one of torch.float32, .*, got torch.float16"),
    ],
)
def test_arguments_that_do_not_exist(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Argument(**({"name": "a", "kind": "tensor"} | changes))


def test_too_many_arguments() -> None:
    args = [Argument(f"a{i}", "tensor", per="key") for i in range(5)]
    with pytest.raises(ValueError, match="at most 8 arguments, a tensor per key counting twice, got 10"):
        define("FIVE", *args, mask="True")


def test_variant_names() -> None:
    assert variants.parse("window+CAUSAL") is CAUSAL + WINDOW is WINDOW + CAUSAL
    assert variants.parse("TREE+SOFT_CAP+CAUSAL") is CAUSAL + TREE + SOFT_CAP
    with pytest.raises(ValueError, match=r"expected a variant made of FULL, CAUSAL, .* got 'CAUSAL.ROTE'"):
        variants.parse("CAUSAL+ROTE")
