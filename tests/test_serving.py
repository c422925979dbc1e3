"""What adapters of serving engines share, without an engine."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, make
from checks import compare, planner_for

from fi_backend import BlockSparse, KVCache, Planner, jit, run, serving
from fi_backend.serving import announce, kernels, plans, refuse, saved, sharing
from fi_backend.serving.layer import AttentionLayer
from fi_backend.serving.shapes import Lengths, Planners
from fi_backend.serving.sharing import Sharing
from fi_backend.serving.tables import behind_encoder, windowed_pool
from fi_backend.serving.tree import words_of_branches, words_of_mask
from fi_backend.variants import parse

FOLDER = Path(str(serving.__file__)).parent
LAYER: dict[str, Any] = {
    "q_heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "scale": 0.125,
    "dtype": torch.float32,
    "device": "cpu",
}
PLANNER: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "max_requests": 8, "device": "cpu"}


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "start", lambda spec: None)


# ---- one layer


OWN = """
import torch
from fi_backend.variants import Argument, CAUSAL, define

SLOPED = define("SLOPED", Argument("slope", "tensor"), logits="x - slope[q_head] * (q_pos - kv_pos)")
SERVED = CAUSAL + SLOPED, {"slope": torch.tensor([0.1, 0.2, 0.3, 0.4])}
SHORT = SLOPED, {"slope": torch.tensor([0.1, 0.2])}
PER_REQUEST = define("PER_REQUEST", Argument("last", "tensor", per="request"), mask="kv_pos < last[request]")
NUMBER = 3
"""


def test_own_variant_joins_every_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_build: None
) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    monkeypatch.setenv("FI_VARIANT", f"{file}:SERVED")
    layer = AttentionLayer(**LAYER, window=7)
    assert layer.variant is parse("CAUSAL+WINDOW+SLOPED")
    inputs = make(Case((3, 1), (20, 9), q_heads=4, kv_heads=2, dtype="f32"))
    inputs.variant = layer.variant
    inputs.variant_args = {"window": 7, "slope": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    plan = planner_for(inputs).plan(inputs.batch)
    layer.run(plan, inputs.q, inputs.kv, inputs.out, lse=inputs.lse)
    compare(inputs, inputs.out, inputs.lse, layer.scale)
    with pytest.raises(ValueError, match=r"expected one variant of one's own, got x\.py:Y and FI_VARIANT="):
        AttentionLayer(**LAYER, own="x.py:Y")
    monkeypatch.delenv("FI_VARIANT")
    assert AttentionLayer(**LAYER, window=7).variant is parse("CAUSAL+WINDOW")
    assert AttentionLayer(**LAYER, own=f"{file}:SERVED").variant is parse("CAUSAL+SLOPED")


@pytest.mark.parametrize("name", ["STREAMING", "SIGMOID"])
def test_examples_can_be_served(name: str, no_build: None) -> None:
    file = Path(__file__).resolve().parent.parent / "examples" / "variants_to_serve.py"
    layer = AttentionLayer(**LAYER, own=f"{file}:{name}")
    assert layer.variant is parse(f"CAUSAL+{name}")
    inputs = make(Case((3, 1), (2000, 9), q_heads=4, kv_heads=2, dtype="f32"))
    inputs.variant = layer.variant
    inputs.variant_args = {"first": 4, "recent": 1020} if name == "STREAMING" else {"sigmoid_bias": -7.0}
    lse = inputs.lse if layer.variant.softmax else None
    layer.run(planner_for(inputs).plan(inputs.batch), inputs.q, inputs.kv, inputs.out, lse=lse)
    compare(inputs, inputs.out, inputs.lse, layer.scale)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":SLOPED", "variant CAUSAL+SLOPED needs argument slope"),
        (":SHORT", "expected slope contiguous float32 [4] (q heads), got torch.float32 [2]"),
        (":NUMBER", "expected NUMBER to be a variant or (variant, arguments), got 3"),
        (":NOTHING", "expected NOTHING to be a variant or (variant, arguments), got None"),
        (":PER_REQUEST", "expected arguments that do not change, got last"),
        ("", "expected a variant as FILE.py:NAME of a file that exists, got "),
        ("x:SLOPED", "expected a variant as FILE.py:NAME of a file that exists, got "),
    ],
)
def test_own_variants_that_do_not_fit(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_build: None
) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    monkeypatch.setenv("FI_VARIANT", f"{file}{name}")
    with pytest.raises(ValueError, match=re.escape(message)):
        AttentionLayer(**LAYER)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 512}, "expected head_size a multiple of 8 up to 256, got 512"),
        ({"head_dim": 72, "device": "cuda"}, "expected head_size a multiple of 16 up to 256, got 72"),
        ({"head_dim_vo": 20}, "expected V head_size a multiple of 8 up to 256, got 20"),
        ({"q_heads": 5}, "expected query heads a multiple of the 2 KV heads, got 5"),
        ({"scale": 0.0}, "got 0.0"),
        ({"scale": float("nan")}, "got nan"),
        ({"dtype": torch.float64}, "expected float16 or bfloat16, or float32, got torch.float64"),
        ({"dtype": torch.float32, "device": "cuda"}, "expected float16 or bfloat16, got torch.float32"),
        ({"sinks": torch.zeros(3)}, "expected sinks [4] (query heads), got [3]"),
        ({"tree": True, "causal": False}, "a tree of query tokens that is not causal"),
    ],
)
@pytest.mark.usefixtures("no_build")
def test_a_layer_that_no_executor_takes_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        AttentionLayer(**{**LAYER, **change})


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize(
    "change", [{"soft_cap": 1e6}, {"window": 0}, {"alibi_slopes": [0.5, 0.25, 0.125]}], ids=str
)
def test_a_value_that_the_kernels_refuse_ends_the_start(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"expected {next(iter(change))}"):
        AttentionLayer(**LAYER, **change)


def test_what_an_engine_asks_for_is_refused_with_its_reason() -> None:
    refuse.check_unknown({"a": None, "b": False, "c": -1})
    for value in (0, True, 0.5, torch.zeros(1)):
        with pytest.raises(NotImplementedError, match="layer argument new="):
            refuse.check_unknown({"new": value})
    refuse.refuse_if({"this": None, "that": 0})
    with pytest.raises(NotImplementedError, match="fi_backend: that; use another attention backend"):
        refuse.refuse_if({"this": None, "that": 1})
    with pytest.raises(NotImplementedError, match=r"dtype torch.bfloat16, got torch.float8_e4m3fn"):
        refuse.check_cache_dtype(torch.float8_e4m3fn, torch.bfloat16)


@pytest.mark.usefixtures("no_build")
def test_sinks_lie_where_they_were_and_show_until_they_are_loaded() -> None:
    layer = AttentionLayer(**LAYER, sinks=True)
    buffer = layer._args["sinks"]
    address = buffer.data_ptr()
    assert buffer.isnan().all()
    for weights in (torch.arange(4, dtype=torch.bfloat16), torch.ones(4)):
        layer.load_sinks(weights)
        assert layer._args["sinks"].data_ptr() == address
        assert torch.equal(layer._args["sinks"], weights.float())
    with pytest.raises(NotImplementedError, match=re.escape("got [5]")):
        layer.load_sinks(torch.zeros(5))
    with pytest.raises(ValueError, match="a layer made with sinks"):
        AttentionLayer(**LAYER).load_sinks(torch.zeros(4))


@pytest.mark.usefixtures("no_build")
def test_a_cache_is_viewed_again_only_when_it_is_another() -> None:
    layer, made = AttentionLayer(**LAYER), []

    def view(cache: torch.Tensor) -> KVCache:
        made.append(cache)
        return KVCache.packed(cache)

    first, second = torch.zeros(2, 2, 16, 128), torch.zeros(2, 2, 16, 128)
    assert layer.kv(view, first) is layer.kv(view, first)
    assert layer.kv(view, second).k.data_ptr() == second.data_ptr()
    assert [x is first for x in made] == [True, False]


@pytest.mark.parametrize(
    ("case", "layer"),
    [
        (
            Case((3, 1), (70, 90), dtype="f32", variant="CAUSAL+WINDOW+SOFT_CAP+SINKS"),
            {"window": 50, "soft_cap": 3.0, "sinks": True},
        ),
        (Case((1, 2), (33, 40), dtype="f32", variant="CAUSAL+ALIBI"), {"alibi_slopes": True}),
        (Case((5, 2), (5, 40), dtype="f32", head_dim_vo=32, variant="FULL"), {"causal": False}),
        (Case((4, 4), (30, 50), dtype="f32", variant="CAUSAL+TREE"), {"tree": True}),
    ],
    ids=lambda x: x.variant if isinstance(x, Case) else "",
)
def test_a_layer_computes_what_the_oracle_does(case: Case, layer: dict[str, Any]) -> None:
    inputs = make(case)
    args = inputs.variant_args
    layer |= {name: args[name] for name in ("alibi_slopes", "sinks") if name in layer}
    attention = AttentionLayer(**{**LAYER, "scale": 0.2, "head_dim_vo": case.head_dim_vo, **layer})
    assert attention.variant is parse(case.variant)
    kernels.load()
    assert str(jit.Spec(jit.CPU, "f32", 64, case.head_dim_vo or 64, attention.variant)) in kernels.loaded()
    per_call = {name: args[name] for name in ("tree_mask", "tree_tokens") if name in args}
    out, lse = torch.full_like(inputs.out, torch.nan), torch.full_like(inputs.lse, torch.nan)
    plan = planner_for(inputs).plan(inputs.batch)
    assert attention.run(plan, inputs.q, inputs.kv, out, lse=lse, **per_call) is out
    compare(inputs, out, lse, scale=0.2)


# ---- kernels


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Labels of what was built, by a module of kernels that knows of none yet."""
    made: list[str] = []
    specs: set[jit.Spec] = set()
    futures: dict[str, Future[Path]] = {}
    monkeypatch.setattr(kernels, "_specs", specs)
    monkeypatch.setattr(kernels, "_builds", futures)
    monkeypatch.setattr(jit, "build", lambda library: made.append(library.label) or Path())
    yield made
    for future in futures.values():
        future.exception()


def test_a_library_is_built_once_and_a_gpu_layer_asks_for_all_three_kinds(builds: list[str]) -> None:
    for dim in (64, 64, 128):
        kernels.start(jit.Spec(90, "bf16", dim, dim, parse("CAUSAL")))
    for future in kernels._builds.values():
        future.result()
    assert len(builds) == len(set(builds)) == 4
    assert "core" in builds
    assert sum("planner and append" in label for label in builds) == 1
    assert [x.split()[-2] for x in kernels.loaded()] == ["128x128", "64x64"]


def test_a_failed_build_is_said_by_load(builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(library: jit.Library) -> Path:
        raise jit.BuildError(f"cannot build {library.label}")

    monkeypatch.setattr(jit, "build", fail)
    kernels.start(jit.Spec(jit.CPU, "f32", 64, 64, parse("CAUSAL")))
    with pytest.raises(jit.BuildError, match="cannot build"):
        kernels.load()


# ---- planners (plans that cache groups share: tests/engine/test_vllm_adapter.py)


def test_planners_keep_partial_states_in_one_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_workspaces", {})
    small, same, large, later = (
        Planner(**{**PLANNER, "max_tokens": 16, "head_dim": dim, "workspace": plans.workspace})
        for dim in (64, 64, 128, 64)
    )
    assert small.partial_o.data_ptr() == same.partial_o.data_ptr()
    assert large.workspace_bytes > small.workspace_bytes
    assert large.partial_o.data_ptr() != small.partial_o.data_ptr(), "the old memory stays with its planners"
    assert later.partial_o.data_ptr() == large.partial_o.data_ptr()
    found = plans.workspace(torch.device("cpu"), 1)
    assert found.dtype == torch.uint8 and found.numel() == large.workspace_bytes


def test_groups_share_a_planner_unless_their_steps_overlap() -> None:
    options = {**PLANNER, "max_tokens": 64}
    for overlapping in (False, True):
        key = (f"overlapping {overlapping}",)
        a, b = (plans.share([name], key, overlapping=overlapping, **options) for name in "ab")
        assert (a is b) == (not overlapping)
        assert (a.planner.partial_o.data_ptr() == b.planner.partial_o.data_ptr()) == (not overlapping)
        assert plans.share(["a"], key, overlapping=overlapping, **options) is not a, "a is served already"
    other = plans.share(["c"], ("overlapping False",), **{**options, "max_tokens": 65})
    assert other.planner.max_tokens == 65


def test_plans_are_counted() -> None:
    before = plans.plans_written()
    plans.made()
    assert plans.plans_written() == before + 1


# ---- shared prefixes


def sharing_of(monkeypatch: pytest.MonkeyPatch, mode: str, **changes: Any) -> Sharing:
    monkeypatch.setenv("FI_PREFIX", mode)
    return Sharing(**{"requests": (8,), "tokens": 1, "max_kv_len": 1024, "never": {}, **changes})


def test_fi_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected FI_PREFIX=auto, off or on, got 'yes'"):
        sharing_of(monkeypatch, "yes")
    planner = {**PLANNER, "max_requests": 8}
    wanted = {"levels": 3, "max_shared_tokens": 16, "max_kv_len": 1024}
    assert sharing_of(monkeypatch, "", tokens=2).options(planner) == {**wanted, "share": "auto"}
    assert sharing_of(monkeypatch, "on", tokens=2).options(planner) == {**wanted, "share": "always"}
    off = sharing_of(monkeypatch, "off")
    assert off.options(planner) == {} and off.levels(planner) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"window": 64}, "layers have a window of 64"),
        ({"causal": False}, "layers are not causal"),
        ({"batch_invariant": True}, "plans are batch invariant"),
        ({"max_requests": 1025}, "a batch may have 1025 requests, more than 1024"),
        ({"q_heads": 32, "max_requests": 1024}, "partial states take 260 MiB, more than 256"),
        ({}, "the cache is off"),
    ],
)
def test_where_nothing_can_be_shared(
    change: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sharing._say.cache_clear()
    options = {"never": {"the cache is off": not change}, "tokens": 16 if "q_heads" in change else 1}
    planner = {**PLANNER, **change}
    auto = sharing_of(monkeypatch, "auto", **options)
    with caplog.at_level("INFO", "fi_backend"):
        assert auto.options(planner) == auto.options(planner) == {} and auto.levels(planner) == 1
    assert caplog.messages == [f"prefixes are not shared where {reason}"]
    with pytest.raises(ValueError, match=re.escape(f"expected FI_PREFIX=auto or off where {reason}, got on")):
        sharing_of(monkeypatch, "on", **options).options(planner)


def test_levels_fit_the_memory_for_partial_states(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = sharing_of(monkeypatch, "auto", tokens=8)
    assert [shared.levels({**PLANNER, "q_heads": h, "max_requests": 1024}) for h in (32, 48, 64)] == [
        3,
        2,
        1,
    ]


def test_a_variant_that_changes_keys_shares_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_build: None
) -> None:
    file = tmp_path / "own.py"
    file.write_text("from fi_backend.variants import define\nSCALED = define('SCALED', key='2 * x')\n")
    monkeypatch.setenv("FI_VARIANT", f"{file}:SCALED")
    assert sharing_of(monkeypatch, "auto").options(PLANNER) == {}


def step_of(kv_lens: list[int], q_lens: list[int], rows: list[list[int]], page_size: int) -> BlockSparse:
    """New lengths and a block table in every step, as engines make them."""
    qo_indptr = torch.tensor([0, *q_lens]).cumsum(0).int()
    table = torch.tensor(rows, dtype=torch.int32)
    return BlockSparse.from_block_table(qo_indptr, torch.tensor(kv_lens, dtype=torch.int32), table, page_size)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> plans.SharedPlanner:
    monkeypatch.setattr(saved, "_watched", type(saved._watched)())
    monkeypatch.setattr(saved, "_next_look", 0.0)
    monkeypatch.setattr(saved, "_reported", 0)
    layers = [AttentionLayer(**LAYER), AttentionLayer(**LAYER)]
    shared = sharing_of(monkeypatch, "on")
    options = {**PLANNER, "max_tokens": 64}
    return plans.share("ab", ("prefixes",), layers=layers, sharing=shared, **options)


# pages of 16: 40 of them are the same for the first two requests
PAGES = [[*range(40), *range(100, 110)], [*range(40), *range(200, 210)]]


def test_prefixes_of_a_step_are_read_once_and_padding_changes_nothing(group: plans.SharedPlanner) -> None:
    torch.manual_seed(0)
    cache = KVCache.separate(*torch.randn(2, 300, 16, 2, 64))
    q = torch.randn(8, 4, 64)
    single = Planner(**PLANNER, max_tokens=64)
    for kv_lens, q_lens, rows in (
        ([650, 700], [1, 1], PAGES),
        # padding of a captured batch: no tokens, over the null block or what a finished request left there
        ([650, 700, 0, 0], [1, 1, 0, 0], [*PAGES, [0] * 50, PAGES[0]]),
        # rows of padding that are run: one key each, all the same
        ([650, 700, 1, 1], [1, 1, 1, 1], [*PAGES, [0] * 50, [0] * 50]),
    ):
        batch = step_of(kv_lens, q_lens, rows, 16)
        plan = group.plan(0, batch, sum(q_lens))
        assert plan.planner.finder is not None
        prefixes, tokens, *_ = plan.planner.finder.header.tolist()
        assert (prefixes, tokens) == (1, 2)
        out, wanted = (run(p, q[: sum(q_lens)], cache) for p in (plan, single.plan(batch)))
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    tile = group.planner.tiles.kv
    # of both layers, two KV heads, K and V of 64 float32
    assert saved.total() == 3 * (640 // tile * tile) * 2 * 2 * (64 + 64) * 4


def test_what_is_saved_is_reported(
    group: plans.SharedPlanner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(saved.time, "monotonic", lambda: clock[0])

    def metric() -> float:
        counter = saved._counter()
        return 0.0 if counter is None else counter._value.get()

    before = metric()
    with caplog.at_level("INFO", "fi_backend"):
        for _ in range(3):
            group.plan(0, step_of([650, 700], [1, 1], PAGES, 16), 2)
        assert not caplog.messages, "less than an interval has passed since nothing was saved"
        clock[0] += saved.EVERY
        saved.look()
        saved.look()
        clock[0] += saved.EVERY
        saved.look()
    gigabytes = f"{saved.total() / 1e9:.3f}"
    assert caplog.messages == [f"shared prefixes saved {gigabytes} GB of keys and values so far"]
    if saved._counter() is not None:
        assert metric() - before == saved.total() > 0


def test_groups_that_share_prefixes_plan_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**PLANNER, "max_tokens": 64, "sharing": sharing_of(monkeypatch, "auto")}
    a, b = (plans.share([name], ("own planners",), **options) for name in "ab")
    assert a is not b and a.planner.levels == 3
    assert a.planner.partial_o.data_ptr() == b.planner.partial_o.data_ptr()


def test_planners_of_many_requests_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = sharing_of(monkeypatch, "auto", requests=(1, 2048))
    built: list[jit.Spec] = []
    monkeypatch.setattr(kernels, "start", built.append)
    layer = AttentionLayer(**LAYER, sharing=shared)
    assert sorted(spec.levels for spec in built) == [False, True]
    found = Planners(torch.device("cpu"), shared, batch_invariant=False, overlapping=False)
    key = layer.shape, "own"
    assert [found._get(key, n, n).levels for n in (2, 1024, 1025)] == [3, 3, 1]
    windowed = layer.shape._replace(window=64), "own"
    assert found._get(windowed, 2, 2).levels == 1


# ---- registration and hygiene


def test_registration_is_said_once_and_never_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FI_BACKEND_ANNOUNCED", "")

    def fail() -> str:
        raise ValueError("no such engine")

    for _ in range(2):
        announce.announce("Engine", lambda: "A and B")
    announce.announce("Engine", fail)
    assert capsys.readouterr().err.splitlines() == [
        "fi_backend: registered as Engine attention backend A and B",
        "fi_backend: not registered with Engine (ValueError: no such engine)",
    ]


def test_no_engine_is_imported() -> None:
    names = sorted(f"fi_backend.serving.{p.stem}" for p in FOLDER.glob("[a-z]*.py"))
    code = f"import sys, {', '.join(names)}; assert not {{'vllm', 'sglang'}} & {{*sys.modules}}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_device_is_never_read() -> None:
    for path in FOLDER.glob("*.py"):
        found = re.findall(r"\.cpu\(\)|\.item\(\)|\.tolist\(\)|synchronize", path.read_text())
        assert not found, f"{path.name}: {found}"


def test_an_old_engine_is_named() -> None:
    announce.require("torch", (2, 0))
    with pytest.raises(RuntimeError, match=r"expected torch 999\.0 or newer, got \d"):
        announce.require("torch", (999, 0))


def entries(batch: Any, request: int, first: int, last: int) -> list[int]:
    start = int(batch.starts[request]) * batch.start_stride
    flat = batch.table.flatten()
    return [int(flat[start + p * batch.entry_step]) for p in range(first, last)]


@pytest.mark.parametrize("page_size", [1, 4])
def test_windowed_pool_holds_the_pages_in_reach(page_size: int) -> None:
    slots = torch.arange(40, 120, dtype=torch.int32).view(2, 40)
    slot_map = torch.arange(120).flip(0) // page_size * page_size
    lengths = Lengths.ragged(torch.tensor([39, 9], dtype=torch.int32), torch.tensor([3, 1]), 3)
    batch = windowed_pool(lengths, slots, torch.tensor([1, 0]), page_size, 8, slot_map)
    assert batch.page_size == page_size and batch.table.numel() <= 2 * ((8 + 3) // page_size + 2)
    for request, (row, begin, end) in enumerate([(1, 39 - 3 - 7, 39), (0, 9 - 1 - 7, 9)]):
        pages = range(begin // page_size, -(-end // page_size))
        wanted = [int(slot_map[slots[row, p * page_size]]) for p in pages]
        assert entries(batch, request, pages.start, pages.stop) == wanted


def test_keys_behind_an_encoder() -> None:
    slots = torch.arange(80, dtype=torch.int32).view(2, 40)
    lengths, encoder = Lengths.uniform(torch.tensor([5, 7], dtype=torch.int32), 1), torch.tensor([11, 30])
    rows = torch.tensor([1, 0])
    own, cross = (behind_encoder(lengths, slots, rows, encoder, c) for c in (False, True))
    assert entries(own, 0, 0, 5) == list(range(51, 56)) and entries(own, 1, 0, 7) == list(range(30, 37))
    assert cross.kv_len.tolist() == [11, 30] and entries(cross, 0, 0, 11) == list(range(40, 51))


def test_words_of_trees() -> None:
    seq_lens = torch.tensor([2, 0])
    masks = [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0], [0, 1]]]
    flat = torch.tensor([bit for mask in masks for row in mask for bit in row], dtype=torch.bool)
    assert words_of_mask(flat, seq_lens, 2).tolist() == [1, 3, 1, 2]
    padded = words_of_mask(flat, torch.tensor([2, 0, 9]), 2)  # the last request lies past the mask's end
    assert padded[:4].tolist() == [1, 3, 1, 2]
    with pytest.raises(NotImplementedError, match="a tree of 1 to 64 draft tokens, got 65"):
        words_of_mask(flat, seq_lens, 65)
    words = words_of_branches(2, branches=2, slots=3, used=2, device=torch.device("cpu"))
    assert words.tolist() == 2 * [0, 0, 0, 0, 0b011, 0b011000]
