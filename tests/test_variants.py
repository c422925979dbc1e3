"""Variants of one's own: from an expression or from text, against the oracle with their eager form."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import checks
import pytest
import torch
from defined import (
    ARGS,
    ARGS_CHECKED,
    CHECKED,
    DOCUMENTS,
    PREFIX,
    ROOT_OF_DISTANCE,
    SHARES,
    STRIPES,
    inputs_of,
)

import fi_backend
from fi_backend import Planner, check, eager, jit, variants
from fi_backend.expressions import Name, translate
from fi_backend.variants import ALIBI, CAUSAL, Argument, define, parse


@pytest.mark.parametrize("name", ARGS)
def test_eager_forms_stay_on_the_device(name: str) -> None:
    """meta stands for a GPU: it, too, refuses to meet a tensor of the CPU."""
    inputs = inputs_of(name, "meta")
    case = (inputs.q[:5], inputs.kv.k[0], inputs.kv.v[0], inputs.variant, inputs.variant_args)
    out, _ = eager.attend(*case, 0.1, torch.float64, request=1)
    assert out.device.type == "meta"


@pytest.mark.parametrize("name", ARGS)
def test_defined_variants_on_the_cpu(name: str) -> None:
    inputs = inputs_of(name)
    for workers in (None, 5):
        plan = checks.planner_for(inputs, workers).plan(inputs.batch)
        checks.poison(plan)
        out, lse = checks.run_inputs(plan, inputs)
        checks.compare(inputs, out, lse)
    if "gates" in inputs.variant_args:
        inputs.variant_args["gates"] = inputs.variant_args["gates"] + 0.1
    others = {"rate": 0.4, "cap": 3.0, "power": 0.6, "length": 50, "temperature": torch.full((200,), 3.0)}
    inputs.variant_args |= {k: v for k, v in others.items() if k in inputs.variant_args}
    with pytest.raises(AssertionError, match="error"):  # the control: other arguments are other attention
        checks.compare(inputs, out, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", ARGS)
def test_defined_variants_on_the_gpu(name: str, head_dim: int, dtype: str) -> None:
    inputs = inputs_of(name, "cuda", dtype=dtype, head_dim=head_dim)
    plan = checks.planner_for(inputs).plan(inputs.batch)
    checks.poison(plan)
    checks.compare(inputs, *checks.run_inputs(plan, inputs))


@pytest.mark.parametrize("arch", [80, 90])
def test_defined_variants_compile_for_gpus(arch: int) -> None:
    try:
        jit.toolchain.nvcc()
    except jit.BuildError as error:
        pytest.skip(str(error))
    name = {80: "PREFIX+PAGES+BENT", 90: "CAUSAL+STRIPES+ROOT_OF_DISTANCE+SHARES"}[arch]
    masks = "CAUSAL+DOCUMENT+PACKED_MASK"
    specs = [jit.Spec(arch, "bf16", 128, 128, parse(x)) for x in (name, masks)]
    if arch == 90:
        specs.append(jit.Spec(arch, "bf16", 64, 64, parse("DOCUMENT+LOOK_UP"), debug=True))
    for folder in jit.build_all([jit.library(spec) for spec in specs]):
        log = (folder / "build.log").read_text()
        assert not re.search(r"\bC75\d\d\b", log), f"wgmma serialized:\n{log}"


@pytest.mark.parametrize(
    "text",
    [
        "n // 3",
        "n % 3",
        "n // -2 + n % -2",
        "-n * 2 - 1",
        "x / 4 + n",
        "x if n > 0 else n",
        "abs(n) - abs(x)",
        "max(n, 1) * min(x, 0.5)",
        "0 <= n < 5",
        "not (n == 3 or x != 0.25) and True",
        "(n > 0) & (x > 0) | (n < -3)",
    ],
)
def test_eager_form_is_python(text: str) -> None:
    part, _ = translate(text, {"x": Name("float", "x"), "n": Name("int", "n")}, "test")
    for x in (-3.5, 0.0, 0.25, 7.0):
        for n in (-7, -1, 0, 3, 12):
            wanted = eval(text, {"x": x, "n": n, "abs": abs, "min": min, "max": max})
            scope = {"x": torch.tensor(x, dtype=torch.float64), "n": torch.tensor(n)}
            assert torch.as_tensor(part.eager(scope)).item() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"mask": "kv_pos <="}, "expected an expression, got 'kv_pos <='"),
        ({"mask": "kv_pos <= position"}, "expected one of q_pos, .*request, kv_pos, .*got 'position'"),
        ({"mask": "kv_pos - q_pos"}, "expected mask to be a condition, got 'kv_pos - q_pos'"),
        ({"mask": "x > 0"}, "expected one of .*, got 'x'"),
        ({"mask": "per_head[q_head] > 0"}, r"expected no per_head here, got 'per_head\[q_head\]'"),
        ({"logits": "x > 0"}, "expected logits to be a number, got 'x > 0'"),
        ({"logits": "x ** 2"}, r"expected \+ - \* / // or %, got 'x \*\* 2'"),
        ({"logits": "x // 2"}, "expected integers around // and %, got 'x // 2'"),
        ({"logits": "sin(x)"}, r"expected abs, exp, .*, tanh, sigmoid of one number, .*got 'sin\(x\)'"),
        ({"logits": "x + per_head"}, r"expected per_head\[q_head\], got 'per_head'"),
        ({"logits": "x + per_head[kv_pos]"}, r"expected per_head\[q_head\], got 'per_head\[kv_pos\]'"),
        ({"mask": "flags"}, r"expected flags\[kv_pos\] or flags\[q_pos\], got 'flags'"),
        ({"mask": "flags[0]"}, r"expected a number, a name, .*got 'flags\[0\]'"),
        ({"mask": "flags[kv_pos] + 1 > 1"}, r"expected a number, got 'flags\[kv_pos\]'"),
        (
            {"keys": ("words[kv_pos]", "q_pos")},
            r"expected words per head, request, token, key, dim, got per word",
        ),
        ({"logits": "x + (q_pos > 3)"}, r"expected a number, got 'q_pos > 3'"),
        ({"logits": "x if q_pos else 1"}, "expected a condition, got 'q_pos'"),
        ({"logits": "x + 99999999999"}, "expected a finite number"),
        ({"logits": "x.abs()"}, "expected a number, a name, arithmetic"),
        ({"weights": "q_pos == 3"}, "expected weights to be a number, got 'q_pos == 3'"),
        ({"keys": "q_pos"}, "expected two expressions where there is no text, got 'q_pos'"),
        ({"keys": ("0", "q_pos + 0.5")}, r"expected keys to be integers, got \('0', 'q_pos \+ 0.5'\)"),
        ({"keys": ("kv_pos", "q_pos")}, "expected one of q_pos, .*kv_len, request, .*got 'kv_pos'"),
        ({}, "expected one of mask, keys, logits, weights, or some of query, .*, got none"),
        ({"mask": "True", "logits": "x"}, "expected one of mask, .* got mask and logits"),
        ({"query": "x", "logits": "x"}, "expected one of mask, .* got logits and query"),
        ({"query": "x + kv_pos"}, "expected one of q_pos, .*got 'kv_pos'"),
        ({"key": "x * per_head[q_head]"}, r"expected no per_head here, got 'per_head\[q_head\]'"),
        (
            {"logits": "x", "text": "..."},
            "expected mask, logits, weights, query, .* in torch beside text, got logits='x'",
        ),
    ],
)
def test_what_is_refused(wanted: dict[str, Any], message: str) -> None:
    flags = Argument("flags", "tensor", dtype=torch.bool, per="key")
    more = [Argument("words", "tensor", per="word")] if "words" in str(wanted) else []
    with pytest.raises(ValueError, match=message):
        define("REFUSED", Argument("per_head", "tensor"), flags, *more, **wanted)
    with pytest.raises(ValueError, match="expected a variant made of"):
        parse("REFUSED")


@pytest.mark.parametrize("name", ARGS)
def test_check(name: str) -> None:
    assert 0 < check(parse(name), cases=3, device="cpu", **ARGS[name]) < 1e-5


def test_check_of_plans_that_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    document = torch.tensor([100, 64, 1, 90, 7], dtype=torch.int32)
    given: dict[str, Any] = {"skip": DOCUMENTS, "cases": 3, "device": "cpu", "document": document}
    variant = CAUSAL + ALIBI + DOCUMENTS
    assert 0 < check(variant, alibi_slopes=torch.rand(4), **given) < 1e-5
    with pytest.raises(ValueError, match="expected a variant with all of DOCUMENTS"):
        check(CAUSAL, **given)
    list_tiles = Planner.list_tiles

    def a_tile_less(planner: Planner, *rest: Any) -> None:
        list_tiles(planner, *rest)
        planner.list_counts.clamp_(max=1)

    monkeypatch.setattr(Planner, "list_tiles", a_tile_less)
    with pytest.raises(AssertionError, match=r"variant DOCUMENTS, .*: out: expected"):
        check(DOCUMENTS, **given)


def test_check_names_the_first_difference() -> None:
    wrong = define(
        "WRONG",
        text="""
        template <class A>
        FI_HD static auto logits(const A&, const Row& r) {
          return [wrong = r.q_head == 2 && r.q_pos == 30](float x, int32_t) { return wrong ? 2.f * x : x; };
        }
        """,
        logits=lambda x, q_pos, kv_pos, **_: x,
    )
    with pytest.raises(
        AssertionError, match=r"variant WRONG, .*: out: expected .* at request \d, q_pos 30, q_head 2"
    ):
        check(wrong, device="cpu", cases=40)


def test_names() -> None:
    for name in ("CAUSAL", "lower", "", "A B"):
        with pytest.raises(ValueError, match="expected a name of capitals"):
            define(name, mask="True")
    assert (
        define(
            "STRIPES",
            *STRIPES.args,
            mask="(q_pos - kv_pos) // block % 3 != 1 if kv_pos >= 4 else not (q_pos == 7)",
        )
        is STRIPES
    )
    with pytest.raises(ValueError, match="variant STRIPES: expected a new name"):
        define("STRIPES", mask="True")
    assert parse("stripes+causal") is variants.CAUSAL + STRIPES


def test_keys_out_of_range_are_not_read() -> None:
    inputs = inputs_of("PAGES", kv_lens=(200, 183, 5, 150, 190))
    back, q_lens, kv_lens = inputs.variant_args["back"], inputs.case.q_lens, inputs.case.kv_lens
    for i, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        unseen = max((kv_len - q_len) // 60 * 60 - int(back[i]), 0) // 16  # pages before all rows' keys
        for page in eager.pages_of(inputs.batch, i)[:unseen]:
            inputs.kv.k[page] = inputs.kv.v[page] = torch.nan
    plan = checks.planner_for(inputs).plan(inputs.batch)
    out, _ = checks.run_inputs(plan, inputs)
    assert inputs.kv.k.isnan().any() and not out[: inputs.tokens].isnan().any()


def test_transforms_of_text() -> None:
    """Several functions in one text; a sum over the vector; elements of other lanes."""
    mirrored = define(
        "MIRRORED",
        text="""
        template <class A, class X>
        FI_HD static auto query(const A&, X x, const Row& r) {
          const float mean = x.sum([=](Dim d) { return x[d]; }) / X::kDim;
          return mapped(x, [=](Dim d) { return x[Dim{0, X::kDim - 1 - d}] - mean * r.q_head; });
        }
        template <class A, class X>
        FI_HD static auto key(const A&, X x, const Key& k) {
          return mapped(x, [=](Dim d) { return x[Dim{0, X::kDim - 1 - d}] + 0.01f * k.kv_head; });
        }
        """,
        query=lambda x, q_pos, **_: (
            x.flip(-1) - x.mean(-1, keepdim=True) * torch.arange(len(x))[:, None, None]
        ),
        key=lambda x, kv_pos, **_: x.flip(-1) + 0.01 * torch.arange(len(x))[:, None, None],
    )
    check(mirrored, cases=3, device="cpu")


def test_keys_that_go_down_are_named() -> None:
    backwards = define("BACKWARDS", keys=("0", "100 - q_pos"))
    with pytest.raises(
        ValueError, match="variant BACKWARDS: expected keys that do not go down as q_pos goes up"
    ):
        check(backwards, device="cpu", cases=3)


def test_one_function_of_weights_and_no_lse_of_it() -> None:
    for other in (SHARES, variants.SINKS):
        with pytest.raises(ValueError, match="expected at most one sink or function of weights"):
            variants.SIGMOID + other
    inputs = inputs_of("STRIPES+SHARES")
    plan = checks.planner_for(inputs).plan(inputs.batch)
    with pytest.raises(ValueError, match=r"expected no lse with STRIPES\+SHARES, which has no softmax"):
        checks.run_inputs(plan, inputs, lse=inputs.lse)


def test_other_processes_know_a_pickled_variant() -> None:
    variant = variants.CAUSAL + PREFIX + SHARES
    code = "import pickle, sys; print(repr(pickle.loads(sys.stdin.buffer.read()).features))"
    ran = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(variant), capture_output=True, check=True
    )
    assert all(text in ran.stdout.decode() for text in ("PREFIX : Feature", "SHARES : Feature"))
    assert pickle.loads(pickle.dumps(variant)) is variant
    with pytest.raises((AttributeError, pickle.PicklingError)):  # its torch form has no name to be found by
        pickle.dumps(ROOT_OF_DISTANCE)


def test_too_few_requests_are_refused() -> None:
    inputs = inputs_of("PREFIX+BENT")
    inputs.variant_args["prefix"] = inputs.variant_args["prefix"][:4]
    plan = checks.planner_for(inputs).plan(inputs.batch)
    with pytest.raises(ValueError, match=r"expected prefix of at least 5 requests .* got 4"):
        checks.run_inputs(plan, inputs)


@pytest.mark.parametrize("name", ARGS_CHECKED)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_index_out_of_range_is_named(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_DEBUG", "1")
    inputs = inputs_of(name, device, **CHECKED)
    plan = checks.planner_for(inputs).plan(inputs.batch)
    checks.compare(inputs, *checks.run_inputs(plan, inputs))
    table = inputs.variant_args["table"]
    message = f"variant {re.escape(name)}: expected indices of 0 to 2 into table of length 3, got 3"
    with pytest.raises(IndexError, match=message):
        checks.run_inputs(plan, inputs, table=table[:3])
    runner, ran = plan.planner.__dict__["_runner"], []
    call = runner.call
    runner.call = lambda storage, kernel, *rest: (ran.append(kernel), call(storage, kernel, *rest))
    checks.compare(inputs, *checks.run_inputs(plan, inputs))  # it does not stick
    assert ran == [runner.executors[inputs.variant, inputs.q.dtype, False].attention]
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            checks.run_inputs(plan, inputs, table=table[:3])
    monkeypatch.delenv("FI_DEBUG")
    plan = checks.planner_for(inputs).plan(inputs.batch)
    checks.compare(inputs, *checks.run_inputs(plan, inputs, table=table[:3]))  # the fourth lies behind it


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_too_few_positions_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_DEBUG", "1" if device == "cuda" else "0")
    inputs = inputs_of("SEGMENT+IMPORTANCE", device, dtype="bf16")
    plan = checks.planner_for(inputs).plan(inputs.batch)
    with pytest.raises(ValueError, match=r"expected importance of at least 200 positions .* got 199"):
        checks.run_inputs(plan, inputs, importance=inputs.variant_args["importance"][:, :199].contiguous())


def test_compiler_points_at_the_users_line() -> None:
    broken = define(
        "BROKEN",
        text="""
        template <class A>
        FI_HD static auto logits(const A&, const Row& r) {
          return [more = r.no_such_member](float x, int32_t) { return x + more; };
        }
        """,
        logits=lambda x, q_pos, kv_pos, **_: x,
    )
    lines = Path(__file__).read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if "r.no_such_member]" in text and "next" not in text)
    with pytest.raises(jit.BuildError, match=rf"{re.escape(__file__)}:{line}:.*error"):
        jit.build(jit.library(jit.Spec(jit.CPU, "f32", 64, 64, broken)))


def test_documentation_runs() -> None:
    ran = []

    def compared(plan: Any, q: torch.Tensor, kv: Any, *, variant: Any, **args: Any) -> torch.Tensor:
        out = fi_backend.run(plan, q, kv, variant=variant, **args)
        wanted, _ = eager.attention(q, kv, plan.batch, variant, args, 64**-0.5)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
        ran.append(variant.name)
        return out

    page = (Path(__file__).resolve().parent.parent / "docs" / "variants.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "docs/variants.md", "exec"), names)
        if "run" in names:
            names["run"] = compared
    assert len(ran) == 7 and "PREFIX+DECAY" in ran and "ROTATING" in ran
