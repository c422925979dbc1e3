"""The vLLM adapter without an engine: what it refuses, when it plans, what it must never touch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from fi_backend.vllm import builder, impl, limits
from fi_backend.vllm.backend import FiAttentionBackend

import fi_backend
from fi_backend.serving import kernels, plans

pytestmark = pytest.mark.engine

LAYER: dict[str, Any] = {"num_heads": 4, "head_size": 64, "scale": 0.125, "num_kv_heads": 2}
BAD_LAYERS = [
    ({"kv_cache_dtype": "fp8_e4m3"}, "got fp8_e4m3"),
    ({"attn_type": "encoder_only"}, "got encoder_only"),
    ({"attn_type": "encoder_decoder"}, "got encoder_decoder"),
    ({"head_size": 512}, "got 512"),
    ({"num_heads": 5}, "got 5"),
    ({"scale": 0.0}, "got 0.0"),
    ({"scale": float("nan")}, "got nan"),
    ({"use_alibi_sqrt": True}, "use_alibi_sqrt"),
    ({"chunk_lookback": 0}, "chunk_lookback"),
    ({"something_new": torch.zeros(1)}, "something_new"),
]


def capacities(prefix_caching: bool = False, requests: int = 8) -> dict[str, Any]:
    """Parts of a configuration that sizes are read from."""
    scheduler = SimpleNamespace(max_num_seqs=requests, max_num_batched_tokens=64)
    compilation = SimpleNamespace(static_forward_context={}, max_cudagraph_capture_size=None)
    return {
        "model_config": SimpleNamespace(max_model_len=2048),
        "cache_config": SimpleNamespace(enable_prefix_caching=prefix_caching),
        "scheduler_config": scheduler,
        "compilation_config": compilation,
        "speculative_config": None,
    }


@pytest.fixture
def in_engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A layer can be made as vLLM makes it; no kernel is built. The engine's configuration."""
    engine = SimpleNamespace(
        device_config=SimpleNamespace(device="cpu"),
        additional_config={"others": 1},
        **capacities(),
    )
    engine.model_config.dtype = torch.float32
    monkeypatch.setattr(impl, "get_current_vllm_config", lambda: engine)
    monkeypatch.setattr(kernels, "start", lambda _: None)
    return engine


@pytest.mark.usefixtures("in_engine")
@pytest.mark.parametrize(("change", "reason"), BAD_LAYERS, ids=[r for _, r in BAD_LAYERS])
def test_a_layer_we_cannot_serve_is_refused_with_the_reason(change: dict[str, Any], reason: str) -> None:
    impl.FiAttentionImpl(**LAYER)
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        impl.FiAttentionImpl(**{**LAYER, **change})


@pytest.mark.usefixtures("in_engine")
def test_unset_extras_are_accepted() -> None:
    impl.FiAttentionImpl(**LAYER, use_alibi_sqrt=False, chunk_lookback=-1, x=None)


@pytest.mark.usefixtures("in_engine")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logits_soft_cap": 1e6}, "soft_cap"),
        ({"sliding_window": 0}, "window"),
        ({"alibi_slopes": [0.5, 0.25, 0.125]}, "alibi_slopes"),
        ({"sinks": torch.zeros(3)}, "sinks"),
    ],
)
def test_a_layer_argument_out_of_range_is_refused_when_the_layer_is_made(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        impl.FiAttentionImpl(**LAYER, **given)


def test_additional_config_names_a_variant(in_engine: SimpleNamespace) -> None:
    in_engine.additional_config["fi_variant"] = "nowhere.py:X"
    with pytest.raises(ValueError, match=r"of a file that exists, got 'nowhere\.py:X'"):
        impl.FiAttentionImpl(**LAYER)
    for given, message in (
        ({"fi_varaint": "own.py:X"}, "expected fi_variant in additional_config, got fi_varaint"),
        ({"fi_variant": 3}, "expected fi_variant to be FILE.py:NAME, got 3"),
    ):
        in_engine.additional_config = given
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            impl.FiAttentionImpl(**LAYER)


@pytest.mark.usefixtures("in_engine")
def test_sinks_are_read_when_the_weights_have_come() -> None:
    sinks = torch.zeros(4, dtype=torch.bfloat16)
    layer = impl.FiAttentionImpl(**LAYER, sinks=sinks)
    sinks.copy_(torch.arange(4))
    layer.process_weights_after_loading(torch.bfloat16)
    assert layer.attention._args["sinks"].tolist() == [0, 1, 2, 3]


class FullAttentionSpec(SimpleNamespace):
    """Named as vLLM's: the adapter takes specs by their exact class name."""


class SinkFullAttentionSpec(FullAttentionSpec):
    pass


def config(**changes: Any) -> Any:
    model = {"dtype": torch.float32, "is_mm_prefix_lm": False, "rswa_window": None}
    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    parts = {"model_config": model, "parallel_config": parallel, "cache_config": {}}
    for path, value in changes.items():
        part, name = path.split("__")
        parts[f"{part}_config"][name] = value
    return SimpleNamespace(**{k: SimpleNamespace(**v) for k, v in parts.items()})


def spec(kind: type = FullAttentionSpec, **changes: Any) -> Any:
    return kind(**{"head_size": 64, "head_size_v": 64, "dtype": torch.float32, **changes})


@pytest.mark.parametrize(
    ("engine", "cache", "reason"),
    [
        ({}, spec(SinkFullAttentionSpec), "got SinkFullAttentionSpec"),
        ({}, spec(head_size_v=128), "got 128"),
        ({}, spec(dtype=torch.float16), "got torch.float16"),
        ({}, spec(non_causal=True), "bidirectional"),
        ({}, spec(attention_chunk_size=8192), "chunked local"),
        ({"model__is_mm_prefix_lm": True}, spec(), "prefix LM"),
        ({"model__rswa_window": 64}, spec(), "reference sliding window"),
        ({"parallel__decode_context_parallel_size": 2}, spec(), "decode_context_parallel_size=2"),
        ({"cache__kv_sharing_fast_prefill": True}, spec(), "kv_sharing_fast_prefill"),
    ],
)
def test_an_engine_we_cannot_serve_is_refused_with_the_reason(
    engine: dict[str, Any], cache: Any, reason: str
) -> None:
    limits.check_engine(config(), spec(), [])
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        limits.check_engine(config(**engine), cache, [])


def test_batch_invariance_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="VLLM_BATCH_INVARIANT=1"):
        limits.check_engine(config(), spec(), [], batch_invariant=True)


def test_capabilities_the_selector_asks_for() -> None:
    assert FiAttentionBackend.get_name() == "CUSTOM"
    assert FiAttentionBackend.get_supported_kernel_block_sizes(object())[0].base == 16
    assert not any(
        ask()
        for ask in (
            FiAttentionBackend.is_mla,
            FiAttentionBackend.supports_non_causal,
            FiAttentionBackend.supports_batch_invariance,
            FiAttentionBackend.supports_dcp,
        )
    )
    assert FiAttentionBackend.supports_head_size(80)
    assert not FiAttentionBackend.supports_head_size(257)
    assert not FiAttentionBackend.supports_kv_cache_dtype("fp8")


# ---- one plan per step


def step(lengths: list[int], qo: list[int]) -> Any:
    """New views in every step, as both runners make them."""
    return SimpleNamespace(
        query_start_loc=torch.tensor(qo, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=qo[-1],
        max_query_len=1,
        max_seq_len=64,
    )


def batch(common: Any, pages: int) -> fi_backend.BlockSparse:
    table = torch.full((common.num_reqs, pages), pages, dtype=torch.int32)
    return fi_backend.BlockSparse.from_block_table(common.query_start_loc, common.seq_lens, table, 16)


@pytest.fixture
def shared() -> plans.SharedPlanner:
    planner = fi_backend.Planner(
        q_heads=4, kv_heads=2, head_dim=64, max_requests=8, max_tokens=64, device="cpu"
    )
    return plans.SharedPlanner(planner, ())


def metadata(shared: plans.SharedPlanner, name: int, common: Any, pages: int = 4) -> builder.FiMetadata:
    sizes = common.num_actual_tokens, common.max_query_len, common.max_seq_len
    made = shared.plan(name, batch(common, pages), *sizes)
    return builder.FiMetadata(made, shared, torch.zeros(0, dtype=torch.int64), common.num_actual_tokens)


def test_groups_of_one_step_share_a_plan_but_not_a_page_table(shared: plans.SharedPlanner) -> None:
    common = step([10, 20], [0, 1, 2])
    first, second = metadata(shared, 1, common, pages=4), metadata(shared, 2, common, pages=6)
    assert shared.step == 1
    assert first.plan_for_layer().batch.table.shape[1] == 4
    assert second.plan_for_layer().batch.table.shape[1] == 6


def test_a_builder_that_comes_again_plans_again(shared: plans.SharedPlanner) -> None:
    common = step([10, 20], [0, 1, 2])
    metadata(shared, 1, common)
    metadata(shared, 2, common)
    common.seq_lens.add_(1)  # the same tensor, written in place
    metadata(shared, 1, common)
    assert shared.step == 2
    metadata(shared, 2, common)
    assert shared.step == 2
    metadata(shared, 2, common)
    assert shared.step == 3


def test_new_lengths_are_never_served_an_old_plan(shared: plans.SharedPlanner) -> None:
    old = metadata(shared, 1, step([10, 20], [0, 1, 2]))
    metadata(shared, 2, step([11, 21], [0, 1, 2]))
    assert shared.step == 2
    with pytest.raises(RuntimeError, match="plan 1 was overwritten by plan 2"):
        old.plan_for_layer()


@pytest.mark.parametrize("causal", [False, torch.ones(2, dtype=torch.bool), {0: True}, None])
def test_a_mask_that_is_not_causal_is_refused(causal: Any) -> None:
    with pytest.raises(NotImplementedError, match="causal"):
        limits.check_mask(causal)


def test_micro_batches_of_two_groups_do_not_share_across() -> None:
    options = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "max_requests": 8, "max_tokens": 64}
    made = [
        [plans.share([layer], ("key",), **options, device="cpu") for _ in range(4)]
        for layer in ("a", "b")  # as vLLM makes them: all micro-batches of a group, then the next group
    ]
    assert len({id(shared) for shared in made[0]}) == 4
    assert made[0] == made[1]


def builders(engine: Any) -> tuple[builder.FiMetadataBuilder, builder.FiMetadataBuilder]:
    cache = spec(num_kv_heads=2, block_size=16)
    first, second = (
        builder.FiMetadataBuilder(cache, [name], engine, torch.device("cpu")) for name in ("first", "second")
    )
    return first, second


def engine_config(micro_batches: bool = False, **capacity: Any) -> Any:
    engine = config(parallel__use_ubatching=micro_batches)
    for name, part in capacities(**capacity).items():
        vars(engine).setdefault(name, SimpleNamespace())
        getattr(engine, name).__dict__.update(vars(part)) if part else setattr(engine, name, None)
    engine.model_config.get_num_attention_heads = lambda parallel: 4
    engine.additional_config = {}
    return engine


@pytest.mark.parametrize("micro_batches", [False, True])
def test_groups_with_micro_batches_do_not_share(micro_batches: bool) -> None:
    a, b = builders(engine_config(micro_batches))
    assert (a._shared is b._shared) == (not micro_batches)
    workspaces = {x._shared.planner.partial_o.data_ptr() for x in (a, b)}
    assert len(workspaces) == (2 if micro_batches else 1)


@pytest.mark.parametrize(("mode", "levels"), [("auto", 3), ("on", 3), ("off", 1)])
def test_groups_share_prefixes_or_a_planner(mode: str, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_PREFIX", mode)
    a, b = builders(engine_config(prefix_caching=True))
    assert a._shared.planner.levels == levels
    assert (a._shared is b._shared) == (mode == "off")


def test_without_prefix_caching_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_PREFIX", "on")
    with pytest.raises(ValueError, match="where the engine's prefix caching is off, got on"):
        builders(engine_config())


# ---- registration and hygiene


def test_registration_is_quiet_idempotent_and_light() -> None:
    code = (
        "import sys; from fi_backend.vllm.register import register; register(); register();"
        "import torch; assert not torch.cuda.is_initialized();"
        "assert 'fi_backend.vllm.backend' not in sys.modules and 'tvm_ffi' not in sys.modules;"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E;"
        "assert E.CUSTOM.get_path().startswith('fi_backend.'), E.CUSTOM.get_path();"
        "print(E.CPU_ATTN.get_path().startswith('fi_backend.'))"
    )
    for asked in ("0", "1"):
        environment = {**os.environ, "FI_BACKEND_CPU": asked}
        environment.pop("FI_BACKEND_ANNOUNCED", None)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == str(asked == "1")
        assert done.stderr.count("fi_backend: registered") == 1


def test_the_adapter_never_reads_the_device() -> None:
    folder = Path(str(builder.__file__)).parent
    for path in folder.glob("*.py"):
        found = re.findall(
            r"seq_lens_cpu|query_start_loc_cpu|\.cpu\(\)|\.item\(\)|\.tolist\(\)", path.read_text()
        )
        assert not found, f"{path.name}: {found}"
