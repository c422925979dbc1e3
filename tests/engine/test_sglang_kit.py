"""SGLang's own conformance kit for attention backends, with ours: eager steps, graph protocol, speculation.

On a CPU the graph protocol runs without a graph: same calls, same buffers. The kit's production draft runners
capture real graphs, so they need a GPU, as the split operator of the prefill graph does.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
import unittest
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn
from unittest.mock import MagicMock

import pytest
import torch

pytest.importorskip("sglang.test.kits.attention_unittest")

import sglang.test.kits.attention_unittest.attention_methods.dense_attention as dense
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins import load_plugins

from fi_backend.serving.plans import plans_written

NAME = "fi"
pytestmark = pytest.mark.engine


class Kernels:
    """Finds `sgl_kernel`: the kit imports every backend it knows, also those of GPU kernels alone."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "sgl_kernel" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return MagicMock(__path__=[], __spec__=spec, __version__="0")

    def exec_module(self, module: ModuleType) -> None:
        pass


with pytest.MonkeyPatch.context() as _patch:
    if importlib.util.find_spec("sgl_kernel") is None:
        # not before the dense kit: what it imports asks whether these kernels are there
        _patch.setattr(sys, "meta_path", [*sys.meta_path, Kernels()])
    decode, draft, draft_extend, verify, split_op = (
        importlib.import_module(f"sglang.test.kits.attention_unittest.runner_modes.{name}_runner")
        for name in (
            "cuda_graph_decode",
            "speculative_draft",
            "speculative_draft_extend",
            "speculative_target_verify",
            "split_op",
        )
    )

GPU = [
    pytest.param("cuda", dtype, marks=pytest.mark.gpu, id=f"cuda-{name}")
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16))
]
# a CUDA build of SGLang has no CPU path
CPU = [] if torch.cuda.is_available() else [pytest.param("cpu", torch.float32, id="cpu-fp32")]
anywhere = pytest.mark.parametrize(("device", "dtype"), CPU + GPU)
on_a_gpu = pytest.mark.parametrize(("device", "dtype"), GPU)
LAYOUTS = ["contiguous", "shuffled_pages", "interleaved_pages", "non_monotonic_extend"]
SIZES = {"head_dim": 64, "max_context_len": 64}


def case(name: str, mode: ForwardMode, prefixes: tuple[int, ...], new: int = 0, **options: Any) -> Any:
    given = {"num_heads": 4, "num_kv_heads": 2, "page_size": 16, **options}
    lens = (new,) * len(prefixes) if new else ()
    return dense.DenseAttentionCase(
        name=name, backend=NAME, forward_mode=mode, prefix_lens=prefixes, extend_lens=lens, **given
    )


WINDOWED_DECODE = case("swa_decode", ForwardMode.DECODE, (2, 3, 4, 5, 20), sliding_window_size=4)
CASES = [
    *dense.make_dense_cases(NAME),
    *dense.make_swa_no_prefix_input_config_cases(NAME),
    *dense.make_swa_prefix_input_config_cases(NAME),
    WINDOWED_DECODE,
]
DECODES = [c for c in CASES if c.forward_mode.is_decode() and c.batch_size <= 4]
# kinds of drafts -> branches they may have
KINDS = {"eagle": (1, 2), "ngram": (1, 2), "frozen_kv_mtp": (1, 2), "dflash": (1,)}
VERIFIED = [(kind, topk) for kind, widths in KINDS.items() for topk in widths]
VERIFY = [
    case(f"verify_page{page}_window{window}", ForwardMode.TARGET_VERIFY, (5, 16, 30), 3, page_size=page,
         sliding_window_size=window)
    for page, window in itertools.product((1, 16), (None, 8))
]  # fmt: skip
DRAFTS = [
    case(f"draft_page{page}_topk{topk}", ForwardMode.DECODE, (5, 16, 30), page_size=page)
    for page, topk in ((1, 1), (1, 2), (16, 1))
]
DRAFT_EXTENDS = [
    case(f"draft_extend_page{page}", ForwardMode.DRAFT_EXTEND_V2, (5, 16, 30), 3, page_size=page)
    for page in (1, 16)
]


def names(c: Any) -> str:
    return c.name


class Case(unittest.TestCase):
    """The kit would skip a backend that raises: here that is a failure."""

    def skipTest(self, reason: Any) -> NoReturn:
        pytest.fail(reason)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    load_plugins()
    with pytest.MonkeyPatch.context() as patch:
        known = dense._SWA_DECODE_EXTEND_WINDOW
        patch.setattr(dense, "_SWA_DECODE_EXTEND_WINDOW", known | {NAME})
        yield


@pytest.fixture
def run(device: str, dtype: torch.dtype) -> Callable[..., None]:
    def call(function: Callable[..., None], *args: Any, **options: Any) -> None:
        before = plans_written()
        function(Case(), *args, device=device, dtype=dtype, **SIZES, **options)
        assert plans_written() > before, "another backend ran"

    return call


@anywhere
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dense_case", CASES, ids=names)
def test_eager(run: Callable[..., None], dense_case: Any, layout: str) -> None:
    run(dense.run_dense_attention_case, dense_case, loc_layout=layout)


@anywhere
def test_a_window_that_is_one_key_shorter_is_noticed(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_SWA_DECODE_MIN_SEQ_LEN_WINDOW", frozenset({NAME}))
    with pytest.raises(AssertionError, match="not close"):
        run(dense.run_dense_attention_case, WINDOWED_DECODE)


@anywhere
@pytest.mark.parametrize("decode_case", DECODES, ids=names)
def test_decode_graph(run: Callable[..., None], decode_case: Any) -> None:
    run(decode.run_dense_cuda_graph_decode_case, decode_case)


@anywhere
@pytest.mark.parametrize(("kind", "topk"), VERIFIED)
@pytest.mark.parametrize("verify_case", VERIFY, ids=names)
def test_verify(run: Callable[..., None], verify_case: Any, kind: str, topk: int) -> None:
    run(verify.run_dense_spec_verify_case, verify_case, topk=topk, spec_kind=kind)


@anywhere
@pytest.mark.parametrize(("kind", "topk"), VERIFIED)
@pytest.mark.parametrize("verify_case", VERIFY, ids=names)
def test_verify_graph(
    run: Callable[..., None], verify_case: Any, kind: str, topk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the kit writes the prefix to contiguous slots, so the table must not be a shuffled one
    contiguous = functools.partial(dense.build_dense_attention_fixture, loc_layout="contiguous")
    monkeypatch.setattr(verify, "build_dense_attention_fixture", contiguous)
    run(verify.run_dense_spec_verify_cuda_graph_case, verify_case, topk=topk, spec_kind=kind)


@anywhere
@pytest.mark.parametrize("padding", ["small_real", "prod_fill"])
@pytest.mark.parametrize("extend_case", DRAFT_EXTENDS, ids=names)
def test_draft_extend_graph(run: Callable[..., None], extend_case: Any, padding: str) -> None:
    run(draft_extend.run_dense_draft_extend_v2_cuda_graph_case, extend_case, pad_style=padding)


@on_a_gpu
@pytest.mark.parametrize("extend_case", DRAFT_EXTENDS, ids=names)
def test_draft_extend_runner(run: Callable[..., None], extend_case: Any) -> None:
    run(draft_extend.run_dense_eagle_draft_extend_v2_cuda_graph_runner_case, extend_case)


@on_a_gpu
@pytest.mark.parametrize("draft_case", DRAFTS, ids=names)
def test_draft_runner(run: Callable[..., None], draft_case: Any) -> None:
    topk = int(draft_case.name[-1])
    run(draft.run_dense_eagle_draft_cuda_graph_runner_case, draft_case, topk=topk)


@on_a_gpu
@pytest.mark.parametrize("draft_case", DRAFTS[:1], ids=names)
def test_frozen_kv_draft_runner(run: Callable[..., None], draft_case: Any) -> None:
    run(draft.run_dense_frozen_kv_mtp_cuda_graph_runner_case, draft_case)


@on_a_gpu
@pytest.mark.parametrize("breakable", [False, True])
@pytest.mark.parametrize("extend_case", [c for c in CASES if not c.forward_mode.is_decode()], ids=names)
def test_split_operator(run: Callable[..., None], extend_case: Any, breakable: bool) -> None:
    run(split_op.run_dense_split_op_extend_case, extend_case, breakable=breakable)
