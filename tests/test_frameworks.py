"""Arrays of other frameworks: NumPy on the CPU executor, CuPy and JAX on a GPU. Read and written in place."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checks
import numpy as np
import pytest
import torch
from cases import TABLES, Case, Inputs, make

from fi_backend import BlockSparse, KVCache, Plan, append, arrays, eager, run
from fi_backend.run import make_runner
from fi_backend.variants import CAUSAL

CASE = Case((1, 3, 2), (40, 0, 17), page_size=8, layout="HND", dtype="f16", variant="CAUSAL+WINDOW+SINKS")


@dataclass
class Framework:
    device: str
    dtype: str
    to: Callable[[torch.Tensor], Any]  # an array over the same memory
    address: Callable[[Any], int]
    mutable: bool = True


def _numpy() -> Framework:
    return Framework("cpu", "f16", lambda x: x.numpy(), lambda x: x.ctypes.data)


def _cupy() -> Framework:
    cupy = pytest.importorskip("cupy")
    return Framework("cuda", "f16", cupy.from_dlpack, lambda x: x.data.ptr)


def _jax() -> Framework:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other tests need memory too
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX without a GPU")

    def to(x: torch.Tensor) -> Any:  # dense and aligned, as JAX wants it
        return jax.numpy.from_dlpack(x.clone(memory_format=torch.contiguous_format))

    return Framework("cuda", "bf16", to, lambda x: x.unsafe_buffer_pointer(), mutable=False)


_MAKERS = {"numpy": _numpy, "cupy": _cupy, "jax": _jax}


@pytest.fixture(
    params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu), pytest.param("jax", marks=pytest.mark.gpu)]
)
def framework(request: pytest.FixtureRequest) -> Framework:
    return _MAKERS[request.param]()


def _batch(
    case: Case, batch: BlockSparse, to: Callable[[torch.Tensor], Any]
) -> tuple[BlockSparse, list[Any]]:
    given = [to(x) for x in (batch.qo_indptr, batch.kv_len, batch.table, batch.starts) if x is not None]
    qo_indptr, kv_len, table, *starts = given
    if case.table == "block":
        found = BlockSparse.from_block_table(qo_indptr, kv_len, table, case.page_size)
    elif case.table.startswith("token"):
        found = BlockSparse.from_token_table(qo_indptr, kv_len, table, *starts, case.page_size)
    else:
        found = BlockSparse.from_csr(qo_indptr, kv_len, *starts, table, case.page_size)
    return found, given


def _plan(inputs: Inputs) -> Plan:
    return checks.planner_for(inputs).plan(inputs.batch)


def _seen(plan: Plan) -> list[int]:
    """Addresses of q, k, v, out and lse, each time the core is called."""
    runner, seen = make_runner(plan.planner), []
    call = runner.call

    def spy(*args: Any) -> None:
        seen[:] = [x.data_ptr() for x in args[3:8] if x is not None]
        call(*args)

    runner.call = spy
    return seen


@pytest.mark.parametrize("table", TABLES)
def test_attention(framework: Framework, table: str) -> None:
    inputs = make(replace(CASE, dtype=framework.dtype, table=table, extra_tokens=0), framework.device)
    to, address = framework.to, framework.address
    truth = make(inputs.case, framework.device)
    q, cache = to(inputs.q), [to(x.transpose(1, 2)) for x in (inputs.kv.k, inputs.kv.v)]
    inputs.kv = KVCache.separate(*cache, layout="HND")
    inputs.batch, given = _batch(inputs.case, inputs.batch, to)
    args = inputs.variant_args | {"sinks": to(inputs.variant_args["sinks"])}
    plan = _plan(inputs)
    seen = _seen(plan)

    batch = inputs.batch
    held = [batch.qo_indptr, batch.kv_len, batch.table, batch.starts, inputs.kv.k, inputs.kv.v]
    assert [x.data_ptr() for x in held if x is not None] == [address(x) for x in (*given, *cache)]
    lse = inputs.lse if not framework.mutable else to(inputs.lse)
    result = run(plan, q, inputs.kv, variant=inputs.variant, lse=lse, **args)
    assert type(result) is type(q) and result.dtype == q.dtype
    wanted = [address(x) for x in (q, *cache, result)] + [inputs.lse.data_ptr()]
    assert seen == wanted, "something was copied"
    checks.compare(truth, torch.from_dlpack(result), inputs.lse)

    if framework.mutable:
        out = to(inputs.out)
        assert run(plan, q, inputs.kv, out, variant=inputs.variant, **args) is out
        assert seen == [address(x) for x in (q, *cache, out)]
        checks.compare(truth, torch.from_dlpack(out), inputs.lse)


def test_a_copy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = arrays.tensor
    monkeypatch.setattr(
        arrays,
        "tensor",
        lambda expected, x: x if isinstance(x, torch.Tensor) else shared(expected, x).clone(),
    )
    with pytest.raises(AssertionError):
        test_attention(_numpy(), "block")
    with pytest.raises(AssertionError):
        test_append(_numpy())


def test_append(framework: Framework) -> None:
    kv = make(replace(CASE, dtype=framework.dtype), framework.device).kv
    to, slots = framework.to, torch.tensor([9, -1, 3], device=framework.device)
    new = torch.randn(2, 3, kv.kv_heads, kv.head_dim_qk, device=framework.device).to(kv.dtype)
    if not framework.mutable:
        with pytest.raises(ValueError, match="expected a cache that can be written, got one of read-only"):
            append(KVCache(to(kv.k), to(kv.v)), *map(to, new), slots)
        append(kv, *map(to, new), slots)  # a cache of torch's
    else:
        cache = to(kv.k), to(kv.v)
        append(KVCache(*cache), *map(to, new), to(slots))
        kv = KVCache(*map(torch.from_dlpack, cache))
    for side, x in zip((kv.k, kv.v), new, strict=True):
        assert torch.equal(side[1, 1], x[0]) and torch.equal(side[0, 3], x[2])
        assert side[0, :3].isnan().all() and side[0, 4:].isnan().all(), "append wrote something else"


def test_numpy_packed_and_slots() -> None:
    memory = np.zeros((4, 2, 8, 32), np.float32)
    packed = KVCache.packed(memory)
    assert packed.k.data_ptr() == memory.ctypes.data and packed.v.data_ptr() == memory.ctypes.data + 64
    flat = np.zeros((35, 2, 16), np.float32)
    slots = KVCache.slots(flat, flat, 8)
    assert slots.num_pages == 4 and slots.k.data_ptr() == flat.ctypes.data
    append(packed, np.ones((1, 2, 16), np.float32), np.ones((1, 2, 16), np.float32), np.array([9]))
    assert memory[1, :, 1].all() and np.count_nonzero(memory) == 64


def test_read_only_numpy_arrays_are_inputs_alone() -> None:
    inputs = make(replace(CASE, extra_tokens=0))
    truth = make(inputs.case)

    def frozen(x: torch.Tensor) -> np.ndarray:
        array = x.numpy().view()
        array.flags.writeable = False
        return array

    k, v = frozen(inputs.kv.k), frozen(inputs.kv.v)
    inputs.kv = KVCache(k, v)
    inputs.batch, _ = _batch(inputs.case, inputs.batch, frozen)
    plan, q = _plan(inputs), frozen(inputs.q)
    out, lse = inputs.out.numpy(), inputs.lse.numpy()
    settings = {"variant": inputs.variant, **inputs.variant_args}
    run(plan, q, inputs.kv, out, lse=lse, **settings)
    checks.compare(truth, torch.from_dlpack(out), torch.from_dlpack(lse))
    out.fill(7)
    for refused in ({"out": frozen(inputs.out)}, {"out": out, "lse": frozen(inputs.lse)}):
        name = "lse" if "lse" in refused else "out"
        with pytest.raises(ValueError, match=f"expected {name} to be writable, got a read-only ndarray"):
            run(plan, q, inputs.kv, **refused, **settings)
    assert (out == 7).all(), "something was written"
    new, slots = np.zeros((1, 2, 64), np.float16), np.zeros(1, np.int64)
    caches = [
        inputs.kv,
        KVCache.separate(k, v.copy()),
        KVCache.separate(k, v, layout="HND"),
        KVCache.packed(k),
        KVCache.slots(k[0], v[0], 2),
    ]
    for kv in caches:
        with pytest.raises(ValueError, match="expected a cache that can be written, got one of read-only"):
            append(kv, new, new, slots)
    fresh = make(CASE).kv  # and with a cache that can be written, read-only keys are as good as others
    append(fresh, frozen(torch.from_dlpack(new)), new, slots)
    assert (fresh.k[0, 0] == 0).all()


class _Immutable:
    """As JAX's arrays are."""

    __module__ = "jaxlib._jax"

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()

    def __dlpack__(self, **settings: Any) -> Any:
        return self.x.__dlpack__(**settings)

    def __array_namespace__(self) -> Any:
        class Namespace:
            from_dlpack = _Immutable

        return Namespace


def test_immutable_arrays() -> None:
    inputs = make(replace(CASE, extra_tokens=0))
    settings = {"variant": inputs.variant, **inputs.variant_args}
    plan, kv = _plan(inputs), KVCache(_Immutable(inputs.kv.k), _Immutable(inputs.kv.v))
    result = run(plan, _Immutable(inputs.q), kv, lse=inputs.lse, **settings)
    assert isinstance(result, _Immutable)
    checks.compare(inputs, result.x, inputs.lse)
    with pytest.raises(ValueError, match="expected out to be writable, got a JAX array, which is immutable"):
        run(plan, inputs.q, kv, _Immutable(inputs.out), **settings)
    with pytest.raises(ValueError, match="expected lse to be writable, got a JAX array, which is immutable"):
        run(plan, inputs.q, kv, lse=_Immutable(inputs.lse), **settings)
    assert inputs.out.isnan().all(), "something was written"


_Q = np.zeros((6, 4, 64), np.float16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": _Q[::-1]}, ValueError, r"expected q with strides of 0 or more, got \[-512, 128, 2\] bytes"),
        (
            {"q": _Q.astype(">f2")},
            TypeError,
            "expected q as an array that DLPack can share, got ndarray of >f2",
        ),
        (
            {"q": _Q.astype(np.float64)},
            TypeError,
            "expected q of bfloat16, float16 or float32, got torch.float64",
        ),
        ({"q": _Q.astype(np.float32)}, TypeError, "expected k of dtype float32, got float16"),
        ({"q": _Q.repeat(2, 2)[..., ::2]}, ValueError, "expected q with a contiguous last dim.*got stride 2"),
        ({"q": _Q[0]}, ValueError, r"expected q \[tokens, q_heads, head_dim\], got shape \[4, 64\]"),
        ({"out": _Q[:5]}, ValueError, r"expected out of shape \[6, 4, 64\], got \[5, 4, 64\]"),
        ({"out": _Q.tolist()}, TypeError, "expected out to be a tensor, got list"),
        ({"lse": np.zeros((6, 4))}, TypeError, "expected lse of dtype float32, got float64"),
        ({"sinks": np.zeros(3, np.float32)}, ValueError, r"expected sinks contiguous float32 \[4\]"),
        ({"sinks": 1.0}, TypeError, "expected sinks to be a tensor, got float"),
    ],
    ids=lambda x: x[:30] if isinstance(x, str) else "",
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = make(replace(CASE, q_lens=(1, 3, 2), extra_tokens=0, variant="CAUSAL+SINKS"))
    given = {"q": inputs.q.numpy(), "sinks": inputs.variant_args["sinks"].numpy()} | changes
    with pytest.raises(error, match=message):
        run(_plan(inputs), kv=inputs.kv, variant=inputs.variant, **given)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: KVCache(_Q[None].astype(np.float64), _Q[None]),
            TypeError,
            "expected k of bfloat16.*float64",
        ),
        (lambda: KVCache(_Q[None], [1]), TypeError, "expected v to be a tensor, got list"),
        (
            lambda: KVCache.packed(_Q[None, ..., ::-1]),
            ValueError,
            "expected packed cache with strides of 0 or",
        ),
        (
            lambda: BlockSparse.from_block_table(np.arange(2), np.ones(1, np.int32), np.ones((1, 1)), 16),
            TypeError,
            "expected qo_indptr of torch.int32, got torch.int64",
        ),
    ],
)
def test_refusals_of_formats(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # faster
    names: dict[str, Any] = {}
    page = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "README.md", "exec"), names)
    assert names["out"].shape == names["out_np"].shape == (6, 32, 128)
    for plan, q, kv, out in [
        (names["plan"], names["q"], KVCache(names["k"], names["v"]), names["out"]),
        (names["plan_np"], names["q"].cpu().half(), names["kv_np"], None),
    ]:
        wanted, _ = eager.attention(q, kv, plan.batch, CAUSAL, {}, 128**-0.5)
        found = names["layer"](plan, q, kv).view(6, 32, 128)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2)
        assert out is None or torch.equal(found, out)


SPIN = r'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n); }'


@pytest.mark.gpu
def test_cupy_streams() -> None:
    """A q that is late on CuPy's stream is waited for; so is an out that is late on torch's."""
    cupy = pytest.importorskip("cupy")
    inputs = make(replace(CASE, extra_tokens=0), "cuda")
    settings = {"variant": inputs.variant, **inputs.variant_args}
    plan, kv = _plan(inputs), KVCache(cupy.from_dlpack(inputs.kv.k), cupy.from_dlpack(inputs.kv.v))
    wanted = run(plan, inputs.q, inputs.kv, **settings)
    q = cupy.from_dlpack(inputs.q.contiguous())
    late, again = (cupy.full(q.shape, float("nan"), q.dtype) for _ in range(2))
    spin = cupy.RawKernel(SPIN, "spin")
    spin((1,), (1,), (cupy.int64(1),))  # both loaded: that would wait for a kernel that runs
    torch.cuda._sleep(1)
    late[...] = late
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True) as side:
        spin((1,), (1,), (cupy.int64(800_000_000),))  # near half a second
        late[...] = q
        out = run(plan, late, kv, **settings)
        torch.cuda._sleep(800_000_000)
        assert run(plan, late, kv, again, **settings) is again
        assert len(arrays._queued) == 2, "what CuPy may give away was not kept"
        copies = out.copy(), again.copy()
        side.synchronize()
    for copy in copies:
        assert torch.equal(torch.from_dlpack(copy), wanted)
    torch.cuda.synchronize()
    arrays.hold(wanted.device)
    assert len(arrays._queued) <= 1, "what nobody needs any more was kept"


@pytest.mark.gpu
def test_jax_streams() -> None:
    """What JAX computes right before, and right after, without anybody waiting in between."""
    to = _jax().to
    import jax.numpy as jnp

    inputs = make(replace(CASE, dtype="bf16", extra_tokens=0), "cuda")
    settings = {"variant": inputs.variant, **inputs.variant_args}
    plan = _plan(inputs)
    wanted = run(plan, inputs.q, inputs.kv, **settings)
    q, outs = to(inputs.q), []
    for _ in range(20):
        busy = jnp.zeros((2048, 2048), jnp.bfloat16)
        for _ in range(10):
            busy = busy @ busy
        late = q + busy[0, 0]
        torch.cuda._sleep(1_000_000)
        out = run(plan, late, inputs.kv, **settings)
        del late
        outs.append(out + busy[0, 0])
    for out in outs:
        assert torch.equal(torch.from_dlpack(out), wanted)


@pytest.mark.gpu
def test_numpy_arrays_on_a_gpu_are_refused() -> None:
    inputs = make(CASE, "cuda")
    plan, args = _plan(inputs), inputs.variant_args
    with pytest.raises(ValueError, match="expected q on cuda:0, got cpu"):
        run(plan, inputs.q.cpu().numpy(), inputs.kv, variant=inputs.variant, **args)
    args["sinks"] = args["sinks"].cpu().numpy()
    with pytest.raises(ValueError, match="expected sinks on cuda:0, got cpu"):
        run(plan, inputs.q, inputs.kv, variant=inputs.variant, **args)
