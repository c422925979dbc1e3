"""The cases as values: what is measured, never how.

Lengths: constant, the mean for all; uniform, integers in [mean/2, mean]; zipf, Zipf(1.3) clipped at 200,
scaled to the mean, at least 16. All from numpy's default_rng(0): every implementation and run sees the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

WINDOW = 1024  # keys of windowed variants
PLOTTED = (64, 8192, 256)  # of the sweep: requests, prefix and own keys that stay while one of them changes
DOCUMENT, PREFIX = 1024, 2048  # tokens of masked ones: of a document; that all of a request see


@dataclass(frozen=True)
class Case:
    """Causal attention of q_lens[r] query tokens, the last ones of kv_lens[r] keys, for each request r.

    prefix: tokens, whole pages, that all requests share: their first keys; with groups only so many requests
    each, one group behind the other. pool: tokens of one cache, from
    which every request reads random pages; 0: pages of its own. in_order: pages of a request lie one behind
    the other, as an engine with an empty pool hands them out; otherwise anywhere. variant: a name;
    benchmarks/variants.py has its arguments. skip: planned by a list of what the variant sees. alone:
    measured without peers.
    """

    id: str
    suite: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    prefix: int = 0
    groups: tuple[int, ...] = ()
    pool: int = 0
    in_order: bool = False
    variant: str = "CAUSAL"
    skip: bool = False
    alone: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.q_lens)

    @property
    def bytes(self) -> int:
        """Least traffic in 16-bit elements: every key and value once, queries and outputs once."""
        groups = len(self.groups) or 1
        keys = self.pool or sum(self.kv_lens) - (len(self.kv_lens) - groups) * self.prefix
        kv = 2 * keys * self.kv_heads * self.head_dim
        return 2 * (kv + 2 * self.tokens * self.q_heads * self.head_dim)

    @property
    def flops(self) -> int:
        """Two products of head_dim for each visible (query, key) pair and query head."""
        lens = zip(self.q_lens, self.kv_lens, strict=True)
        pairs = sum(int(self._keys_of(np.arange(kv - q, kv), kv).sum()) for q, kv in lens)
        return 4 * pairs * self.q_heads * self.head_dim

    def _keys_of(self, position: np.ndarray, kv_len: int) -> np.ndarray:
        """How many a query token sees."""
        if self.variant == "FULL":
            return np.full_like(position, kv_len)
        if "DOCUMENTS" in self.variant:
            return position % DOCUMENT + 1
        if "PREFIX" in self.variant:
            return np.maximum(position + 1, min(PREFIX, kv_len))
        return np.minimum(position + 1, WINDOW if "WINDOW" in self.variant else kv_len)


def lengths(kind: str, requests: int, mean: int) -> tuple[int, ...]:
    rng = np.random.default_rng(0)
    if kind == "constant":
        return (mean,) * requests
    if kind == "uniform":
        return tuple(int(n) for n in rng.integers(mean // 2, mean + 1, requests))
    if kind == "zipf":
        raw = np.minimum(rng.zipf(1.3, requests), 200)
        return tuple(int(n) for n in np.maximum(16, raw * mean / raw.mean()))
    raise ValueError(f"expected lengths constant, uniform or zipf, got {kind}")


def _decode(id: str, requests: int, kind: str, mean: int, **shape: Any) -> Case:
    return Case(id, "decode", (1,) * requests, lengths(kind, requests, mean), **shape)


def _prefill(id: str, requests: int, kind: str, mean: int, **shape: Any) -> Case:
    n = lengths(kind, requests, mean)
    return Case(id, "prefill", n, n, **shape)


def _prefix(requests: int, prefix: int, suffix: int) -> Case:
    id = f"prefix-{requests}-{prefix}-{suffix}"
    return Case(id, "prefix", (1,) * requests, (prefix + suffix,) * requests, prefix=prefix)


def _groups(*groups: int, prefix: int, suffix: int) -> Case:
    case, name = _prefix(sum(groups), prefix, suffix), "+".join(map(str, groups))
    return replace(case, id=f"prefix-{name}-{prefix}-{suffix}", groups=groups)


def _sweep() -> Iterator[Case]:
    """Peers run those that a picture shows."""
    for prefix in (128, 512, 2048, 8192, 32768):
        for requests in (1, 4, 16, 64, 256):
            for suffix in (64, 256, 1024):
                case = _prefix(requests, prefix, suffix)
                same = [a == b for a, b in zip((requests, prefix, suffix), PLOTTED, strict=True)]
                alone = not (same[2] and any(same[:2]))
                yield replace(case, id=f"sweep-{requests}-{prefix}-{suffix}", suite="sweep", alone=alone)


def _shapes() -> Iterator[Case]:
    """A long decode and a long prefill with other head dims and groups than the default shape."""
    shapes = {
        **{f"d{dim}": {"head_dim": dim} for dim in (64, 96, 192, 256)},
        "mha": {"kv_heads": 32},
        "group8": {"q_heads": 64},
        "group16": {"q_heads": 64, "kv_heads": 4},
    }
    for name, shape in shapes.items():
        for case in (
            _decode(f"decode-64x4096-{name}", 64, "constant", 4096, **shape),
            _prefill(f"prefill-4x8192-{name}", 4, "constant", 8192, **shape),
        ):
            if case.id != "decode-64x4096-d64":  # the decode suite has it
                yield replace(case, suite="shapes")


def _variants() -> Iterator[Case]:
    """A long prefill, with built-in variants and the same as a user writes them; the paper's shapes."""
    causal = {
        "causal": "CAUSAL",
        "window": "CAUSAL+WINDOW",
        "soft-cap": "CAUSAL+SOFT_CAP",
        "alibi": "CAUSAL+ALIBI",
        "sigmoid": "CAUSAL+SIGMOID",
    }
    own = {f"own-{name}": variant.replace("+", "+OWN_") for name, variant in causal.items()}
    for name, variant in {**causal, **own, "own-causal": "OWN_CAUSAL"}.items():
        case = _prefill(f"variant-4x8192-{name}", 4, "constant", 8192, variant=variant)
        yield replace(case, suite="variants")
    masked = {"documents": "OWN_DOCUMENTS", "prefix": "OWN_PREFIX", "causal": "CAUSAL"}
    for name, variant in masked.items():  # "hidden": what a mask hides is loaded all the same
        case = _prefill(f"variant-4x8192-{name}-skip", 4, "constant", 8192, variant=variant, skip=True)
        yield replace(case, suite="variants")
        if variant != "CAUSAL":
            yield replace(case, suite="variants", id=f"variant-4x8192-{name}-hidden", skip=False)
    for n in (1024, 2048, 4096, 8192, 16384):
        for name, variant in causal.items():
            shape = {"q_heads": 16, "kv_heads": 16, "variant": variant}
            yield replace(_prefill(f"variant-16x{n}-{name}", 16, "constant", n, **shape), suite="variants")


def _rope() -> Iterator[Case]:
    """Decodes in a window that slides over keys not rotated yet (StreamingLLM), of Vicuna-13B's shape."""
    shape = {"q_heads": 40, "kv_heads": 40, "variant": "CAUSAL+ROPE"}
    for requests in (1, 8, 32):
        for window in (256, 1024, 4096):  # what the sinks' page and the window's hold
            yield replace(
                _decode(f"rope-{requests}x{window}", requests, "constant", window, **shape), suite="rope"
            )


def _sparse() -> Iterator[Case]:
    """Pages that were chosen, of long decodes and, for each block of 128 query tokens, of a long prefill.

    Of the larger ones even a tenth takes far longer than what each step costs whatever is kept.
    """
    for requests, kv_len, tokens in ((16, 32768, 8192), (32, 131072, 32768)):
        for percent in (100, 50, 25, 10):
            kept, of_block = (-(-n * percent // 1600) * 16 for n in (kv_len, tokens))  # whole pages
            yield _decode(f"sparse-decode-{requests}x{kv_len}-{percent}", requests, "constant", kept)
            count = tokens // 128
            blocks = Case("", "", (128,) * count, (of_block,) * count, pool=tokens, variant="FULL")
            yield replace(blocks, id=f"sparse-prefill-{count}x128-of-{tokens}-{percent}")


CASES = (
    _decode("decode-16x1024", 16, "constant", 1024),
    _decode("decode-16-uniform", 16, "uniform", 1024),
    _decode("decode-16-zipf", 16, "zipf", 1024),
    _decode("decode-64x4096", 64, "constant", 4096),
    _decode("decode-64-zipf", 64, "zipf", 4096),
    _decode("decode-256x2048", 256, "constant", 2048),
    _decode("decode-1x131072", 1, "constant", 131072),
    _decode("decode-1x8192", 1, "constant", 8192),
    _decode("decode-64x4096-page1", 64, "constant", 4096, page_size=1),
    _decode("decode-64-zipf-page1", 64, "zipf", 4096, page_size=1),
    _decode("decode-1x8192-page1-in-order", 1, "constant", 8192, page_size=1, in_order=True),
    _decode("decode-64x4096-page1-in-order", 64, "constant", 4096, page_size=1, in_order=True),
    _decode("decode-64x4096-d64", 64, "constant", 4096, head_dim=64),
    _prefill("prefill-16x1024", 16, "constant", 1024),
    _prefill("prefill-16-zipf", 16, "zipf", 1024),
    _prefill("prefill-4x8192", 4, "constant", 8192),
    _prefill("prefill-1x32768", 1, "constant", 32768),
    _prefill("prefill-4x8192-page1", 4, "constant", 8192, page_size=1),
    _prefill("prefill-4x8192-page1-in-order", 4, "constant", 8192, page_size=1, in_order=True),
    _prefix(16, 8192, 256),
    _prefix(64, 8192, 256),
    _prefix(64, 32768, 512),
    _prefix(256, 2048, 256),
    _prefix(128, 16384, 128),
    _groups(64, 64, 64, 64, prefix=8192, suffix=128),
    _groups(128, 32, 16, 8, 4, 2, 1, 1, prefix=4096, suffix=256),
    *_sweep(),
    *_shapes(),
    *_variants(),
    *_rope(),
    *(replace(case, suite="sparse") for case in _sparse()),
    Case("verify-64x4-4096", "mixed", (4,) * 64, (4096,) * 64),
    Case("chunk-512-over-32768", "mixed", (512,), (32768,)),
    Case("mixed-128dec-2chunk", "mixed", (1,) * 128 + (1024,) * 2, (4096,) * 130),
)
SUITES = (
    *("decode", "prefill", "mixed", "prefix", "sweep", "shapes"),
    *("variants", "rope", "streaming", "sparse", "layers", "plan"),
)


def of_suite(suite: str) -> list[Case]:
    """The plan suite plans the constant decode batches of three sizes; it runs no attention. The layers suite
    runs decodes as layers of a model, the streaming suite the windows of rope in a whole one."""
    if suite == "plan":
        planned = ("decode-16x1024", "decode-64x4096", "decode-256x2048")
        return [replace(c, id=f"plan-{len(c.q_lens)}", suite="plan") for c in CASES if c.id in planned]
    if suite == "layers":
        layers = ("decode-1x8192", "decode-1x8192-page1-in-order", "decode-16x1024", "decode-64x4096")
        return [replace(c, id=c.id.replace("decode", suite), suite=suite) for c in CASES if c.id in layers]
    if suite == "streaming":
        return [replace(c, id=c.id.replace("rope", suite), suite=suite) for c in of_suite("rope")]
    return [c for c in CASES if c.suite == suite]
