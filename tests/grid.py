"""The lists of cases that every executor is tested on."""

from __future__ import annotations

from dataclasses import replace

from cases import Case

# decode, one key, a chunk, nothing at all, a whole prompt, a row without keys, more queries than keys
MIXED = Case((1, 1, 5, 0, 33, 1, 130, 9), (300, 1, 70, 40, 33, 0, 200, 4))
LONG = Case((1, 40, 1), (1700, 500, 17))  # split over many workers
# for slow tools: narrow and wide tiles, pieces and merges, padded requests
SMALL = Case((1, 3, 0, 70, 1), (200, 3, 5, 150, 0), q_heads=4, kv_heads=2)
# three levels, uneven; decode, verify rows and a chunk; one request shares nothing
SHARED = Case(
    (1, 1, 1, 4, 1, 70, 1, 1),
    (1100, 1120, 900, 950, 890, 1300, 1300, 90),
    q_heads=8,
    prefixes=((0, 7, 320), (0, 3, 768), (0, 2, 960), (4, 3, 768)),
)
EVERYTHING = "CAUSAL+WINDOW+SOFT_CAP+ALIBI+SINKS"

HEAD_DIMS = (
    (64, 64),
    (80, 80),
    (96, 96),
    (112, 112),
    (128, 128),
    (192, 192),
    (256, 256),
    (192, 128),
    (16, 240),
)
GROUPS = (1, 3, 4, 7, 8, 16, 32, 128)
PAGES = (
    (1, "NHD", "token"),
    (3, "HND", "csr"),
    (16, "packed", "block"),
    (64, "padded", "token64"),
    (256, "HND", "csr64"),
)
# pages one behind the other, also across requests and into the middle of a KV tile; many tiles have a break
RUNS = [
    replace(LONG, head_dim=d, head_dim_vo=vo, page_size=p, run=run, layout=layout, table=table)
    for d, vo, p, run, layout, table in (
        (64, 64, 1, 200, "NHD", "token"),
        (128, 128, 1, 300, "padded", "token64"),
        (128, 128, 4, 50, "NHD", "token"),
        (192, 128, 1, 10_000, "HND", "csr"),
        (256, 256, 12, 9, "NHD", "block"),
        (64, 64, 1, 200, "packed", "block"),
        (64, 64, 3, 70, "NHD", "token"),
    )
]
VARIANTS = (
    "FULL",
    "CAUSAL",
    "WINDOW",
    "CAUSAL+WINDOW",
    "CAUSAL+SOFT_CAP",
    "CAUSAL+ALIBI",
    "CAUSAL+SINKS",
    "FULL+ALIBI",
    "FULL+SINKS",
    "CAUSAL+WINDOW+SINKS",
    "CAUSAL+WINDOW+SOFT_CAP",
    EVERYTHING,
    "CAUSAL+SIGMOID",
    "WINDOW+SOFT_CAP+SIGMOID",
    "CAUSAL+ROPE",
    "CAUSAL+WINDOW+QK_NORM+ROPE_INTERLEAVED_24",
)

SHAPES = [
    *(replace(MIXED, head_dim=qk, head_dim_vo=vo, seed=qk) for qk, vo in HEAD_DIMS),
    *(replace(MIXED, q_heads=g * n, kv_heads=n, seed=g) for g in GROUPS for n in (1 if g == 128 else 2,)),
    *(replace(MIXED, page_size=p, layout=layout, table=table) for p, layout, table in PAGES),
    *(replace(LONG, page_size=p, layout=layout, table=table) for p, layout, table in PAGES),
    *RUNS,
    replace(LONG, dtype="f16"),
    replace(LONG, dtype="f16", head_dim=128, q_heads=32, kv_heads=8),
    replace(MIXED, q_lens=(), kv_lens=()),
    replace(MIXED, q_lens=(0, 0), kv_lens=(0, 7)),
    replace(MIXED, q_lens=(0, 3), kv_lens=(0, 0)),
]
# a prefix of nothing, of less than a KV tile, of several; the tree crosses a KV tile's edge
TREE = Case((6,) * 4, (6, 60, 68, 700), variant="CAUSAL+TREE")
TREES = [
    *(
        Case((n,) * 3, (n, n + 61, 300), q_heads=2 * g, variant="CAUSAL+TREE", seed=n, page_size=page)
        for n, g, page in ((2, 1, 1), (6, 4, 16), (16, 8, 1), (33, 4, 3), (64, 8, 16), (64, 1, 1))
    ),
    replace(TREE, head_dim=128, q_heads=8, layout="packed"),
    replace(TREE, q_lens=(64,) * 2, kv_lens=(64, 1700), head_dim=128, q_heads=8),
    *(
        replace(TREE, variant=v)
        for v in (
            "TREE",
            "CAUSAL+WINDOW+TREE",
            "CAUSAL+TREE+SOFT_CAP",
            "CAUSAL+WINDOW+TREE+SOFT_CAP+ALIBI+SINKS",
        )
    ),
    replace(TREE, variant="CAUSAL+WINDOW+TREE", window=3),
    replace(TREE, q_lens=(4, 2, 0, 9), tree_tokens=12, kv_lens=(12, 60, 68, 700)),  # the queries are its end
    replace(TREE, q_lens=(4, 70, 8, 9), tree_tokens=8, kv_lens=(12, 80, 68, 700)),  # some lie before it
]
# of the last chunk that a batch-invariant plan cuts, every other row sees nothing
PIECES = replace(TREE, tree="blind", q_lens=(8,) * 3, kv_lens=(8, 72, 2048 + 8))
MASKS = [
    replace(c, variant=v) for c in (MIXED, LONG) for v in ("CAUSAL+DOCUMENT", "PREFIX_LM", "PACKED_MASK")
]
FUNCTIONS = [
    *(replace(case, variant=v, seed=i) for i, v in enumerate(VARIANTS) for case in (MIXED, LONG)),
    *(replace(LONG, variant="CAUSAL+WINDOW", window=w) for w in (1, 64, 10_000)),
    *TREES,
    PIECES,
    *MASKS,
]
