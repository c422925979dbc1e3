"""The example of page importance: bounds hold, and attention is that of the chosen pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from page_importance import PageImportance  # noqa: E402

KV_HEADS, GROUP, PAGE_SIZE, HEAD_DIM = 2, 3, 8, 64
KV_LEN = (100, 1, 8, 0, 57)


def tensors(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    pages = [-(-n // PAGE_SIZE) for n in KV_LEN]
    k, v = torch.full(
        (2, sum(pages) + 3, KV_HEADS, PAGE_SIZE, HEAD_DIM), torch.nan
    )  # unread where no token is
    table = torch.zeros(len(KV_LEN), max(pages), dtype=torch.int32)
    free = torch.randperm(sum(pages)).int().tolist()
    for row, (n, count) in enumerate(zip(KV_LEN, pages, strict=True)):
        for place in range(count):
            table[row, place] = page = free.pop()
            tokens = min(PAGE_SIZE, n - place * PAGE_SIZE)
            for cache in (k, v):
                cache[page, :, :tokens] = torch.randn(KV_HEADS, tokens, HEAD_DIM)
    q = 3 * torch.randn(len(KV_LEN), KV_HEADS * GROUP, HEAD_DIM)
    floats = (x.to(device, dtype) for x in (q, k, v))
    return *floats, table.to(device), torch.tensor(KV_LEN, dtype=torch.int32, device=device)


def prepared(keep: int, device: str, dtype: torch.dtype) -> tuple[PageImportance, tuple[torch.Tensor, ...]]:
    q, k, v, table, kv_len = tensors(device, dtype)
    attend = PageImportance(k, v, q_heads=KV_HEADS * GROUP, max_requests=8, keep=keep)
    places = torch.arange(table.shape[1], device=device) * PAGE_SIZE
    tokens = (kv_len[:, None] - places).clamp(0, PAGE_SIZE)
    used = tokens > 0
    attend.summarize(table[used].long(), tokens[used])
    return attend, (q, k, v, table, kv_len)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("keep", [1, 3, 13, 40])
def test_attention_of_the_chosen_pages(device: str, keep: int) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    attend, (q, k, v, table, kv_len) = prepared(keep, device, dtype)
    bounds, (chosen, keys) = attend.bounds(q, table), attend.choose(q, table, kv_len)
    out = attend(q, table, kv_len)
    for r, n in enumerate(KV_LEN):
        pages = -(-n // PAGE_SIZE)
        for head in range(KV_HEADS * GROUP):
            h = head // GROUP
            seen = -(-int(keys[r]) // PAGE_SIZE)
            assert seen == min(keep, pages)
            if n == 0:
                assert not out[r, head].any()
                continue
            places = [table[r, :pages].tolist().index(page) for page in chosen[r, h, :seen].tolist()]
            assert len(set(places)) == seen
            assert places[-1] == pages - 1
            own = k[table[r, :pages].long(), h].flatten(0, 1)[:n].double() @ q[r, head].double()
            most = torch.stack([x.max() for x in own.split(PAGE_SIZE)])
            assert (most <= bounds[r, h, :pages] + 1e-2).all()
            # no page that was left out has a larger bound than one that is read
            left = [p for p in range(pages - 1) if p not in places]
            if left and seen > 1:
                assert bounds[r, h, left].max() <= bounds[r, h, places[:-1]].min()
            tokens = [t for p in places for t in range(p * PAGE_SIZE, min(n, (p + 1) * PAGE_SIZE))]
            weights = torch.softmax(own[tokens] * HEAD_DIM**-0.5, 0)
            wanted = weights @ v[table[r, :pages].long(), h].flatten(0, 1)[:n].double()[tokens]
            assert torch.allclose(out[r, head].double(), wanted, atol=1e-5 if device == "cpu" else 3e-2)


def test_the_control_is_other_attention() -> None:
    """Fewer pages are not what all of them give."""
    outs = []
    for keep in (3, 13):
        attend, (q, _, _, table, kv_len) = prepared(keep, "cpu", torch.float32)
        outs.append(attend(q, table, kv_len))
    few, all_pages = outs
    assert (few[0] - all_pages[0]).abs().max() > 0.01
    assert torch.equal(few[1:3], all_pages[1:3])


def test_the_example_runs() -> None:
    command = [sys.executable, EXAMPLES / "page_importance.py", "--requests", "2", "--kv-len", "700"]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "100 % of the pages" in ran.stdout
    assert "error 0.000" in ran.stdout
