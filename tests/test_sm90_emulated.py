"""The sm90 kernel's own text, door, producers, consumers and merge, run by host threads against the oracle.

Instructions of the GPU are those of tests/emulate/csrc; what they cannot show is in emulate/cuda_on_host.h.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import checks
import emulated
import pytest
import test_skip
from cases import Case, make
from defined import ARGS, ARGS_CHECKED, CHECKED, inputs_of
from grid import EVERYTHING, LONG, MIXED, SHARED, SMALL

from fi_backend import Composable, Planner, jit
from fi_backend.plan import Tiles
from fi_backend.run import make_runner

Build = Callable[[jit.Spec, dict[str, str]], jit.Executor]

DECODE = Case((1, 4, 1), (1500, 700, 90), q_heads=8, kv_heads=2)
CASES = [
    SMALL,
    replace(SMALL, q_heads=6),  # a group of 3: queries come row by row
    replace(SMALL, page_size=8, layout="HND", table="csr"),
    replace(SMALL, page_size=1, table="token"),
    replace(SMALL, page_size=1, table="token", run=150),
    replace(SMALL, page_size=3, layout="padded", run=7),
    replace(SMALL, variant=EVERYTHING),
    replace(SMALL, variant="CAUSAL+SOFT_CAP+SINKS", soft_cap=0.5),
    replace(SMALL, variant="SOFT_CAP", soft_cap=50.0, head_dim=128),
    replace(SMALL, variant="CAUSAL+ALIBI", kv_lens=(600, 3, 5, 550, 0)),  # bases move
    replace(SMALL, variant="CAUSAL+TREE", q_lens=(7,) * 3, kv_lens=(7, 200, 66)),
    replace(SMALL, variant="DOCUMENT+PREFIX_LM+PACKED_MASK"),
    DECODE,
    replace(DECODE, page_size=1, table="token", run=300),
    replace(DECODE, head_dim=128),
    replace(SMALL, head_dim=128, layout="packed", variant="CAUSAL+SIGMOID"),
    replace(SMALL, head_dim=96),
    replace(SMALL, head_dim=192, head_dim_vo=128, variant="FULL"),
    replace(SMALL, head_dim=192, page_size=1, run=300),
    replace(SMALL, head_dim=144, head_dim_vo=128, variant="FULL"),  # short lines for V too
    replace(SMALL, head_dim=240, head_dim_vo=80, page_size=1, table="token", run=150),
    replace(SMALL, head_dim=256),
    replace(SMALL, variant="CAUSAL+ROPE"),
    replace(SMALL, variant="CAUSAL+QK_NORM+ROPE_24", head_dim=96, page_size=1, table="token", run=150),
    replace(DECODE, variant="CAUSAL+QK_NORM+ROPE_INTERLEAVED", head_dim=256),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    built: dict[str, jit.Executor] = {}

    def build(spec: jit.Spec, changes: dict[str, str]) -> jit.Executor:
        key = f"{spec} {changes}"
        if key not in built:
            folder = tmp_path_factory.mktemp("emulate")
            for source in (jit.csrc(), emulated.HERE / "csrc"):  # the second over the first
                shutil.copytree(source, folder, dirs_exist_ok=True)
            text = folder / "sm90" / "attention.cuh"
            for old, new in changes.items():
                assert old in text.read_text()
                text.write_text(text.read_text().replace(old, new))
            (folder / "fi_spec.h").write_text(spec.header())
            library = emulated.library(
                "attention.cpp", folder, folder, emulated.HERE, emulated.HERE / "include"
            )
            addresses = emulated.address(library.fi_attention), emulated.address(library.fi_error)
            built[key] = jit.Executor(*addresses)
            library.set_seed(zlib.crc32(key.encode()) % 1000)  # whatever tests ran before
        return built[key]

    return build


def planner_of(
    build: Build,
    inputs: Any,
    workers: int,
    changes: dict[str, str] | None = None,
    skip: bool = False,
    levels: bool = False,
) -> Planner:
    dims = inputs.kv.head_dim_qk, inputs.kv.head_dim_vo
    tiles = Tiles(*tuple(jit.core().plan_tiles(90, 90, *dims))[:3], workers, 90)
    skipping = {"causal": None, "window": None, "skip": inputs.variant} if skip else {}
    make_planner = checks.sharing_planner if levels else checks.planner_for
    planner = make_planner(inputs, tiles=tiles, **skipping)
    # the CPU's runner, with another executor
    planner.__dict__["_runner"] = runner = make_runner(checks.planner_for(inputs))
    spec = jit.Spec(90, "bf16", *dims, inputs.variant, tile_list=skip, levels=levels, debug=runner.debug)
    runner.executors[inputs.variant, inputs.q.dtype, levels] = build(spec, changes or {})
    return planner


def check(
    build: Build,
    inputs: Any,
    workers: int,
    changes: dict[str, str] | None = None,
    skip: bool = False,
    levels: bool = False,
) -> None:
    planner = planner_of(build, inputs, workers, changes, skip, levels)
    batch = Composable(inputs.batch) if levels else inputs.batch
    plan = planner.plan(batch, **(inputs.variant_args if skip else {}))
    if skip:
        test_skip.check_run(inputs, plan)
        return
    checks.poison(plan)
    checks.compare(inputs, *checks.run_inputs(plan, inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("workers", [3, 40])
def test_attention(build: Build, case: Case, workers: int) -> None:
    check(build, make(case), workers)


@pytest.mark.parametrize("case", [MIXED, LONG], ids=str)
def test_mixed_batches(build: Build, case: Case) -> None:
    check(build, make(case), 4)


TREES = [
    replace(SHARED, head_dim=128),
    replace(SHARED, page_size=1, table="token"),
    replace(SHARED, q_heads=6, variant="CAUSAL+WINDOW+ALIBI+SINKS", window=130),  # a group of 3
    replace(SHARED, head_dim=256),
]


@pytest.mark.parametrize("case", TREES, ids=str)
@pytest.mark.parametrize("workers", [2, 40])
def test_shared_prefixes(build: Build, case: Case, workers: int) -> None:
    check(build, make(case), workers, levels=True)


def test_follows_other_numbers_of_requests(build: Build) -> None:
    room = make(checks.ROOM)
    checks.check_follows(room, planner_of(build, room, 12, levels=True), 3, checks.bound)


@pytest.mark.parametrize("name", ARGS)
def test_defined_variants(build: Build, name: str) -> None:
    check(build, inputs_of(name, dtype="bf16"), 5)


@pytest.mark.parametrize("name", ARGS_CHECKED)
def test_an_index_out_of_range_is_named(build: Build, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_DEBUG", "1")
    inputs = inputs_of(name, **CHECKED)
    check(build, inputs, 5)
    inputs.variant_args["table"] = inputs.variant_args["table"][:3]
    with pytest.raises(IndexError, match="expected indices of 0 to 2 into table of length 3, got 3"):
        check(build, inputs, 5)


PAGES = ({}, {"page_size": 1, "run": 300})


@pytest.mark.parametrize("name", test_skip.SKIPS)
def test_plans_that_skip(build: Build, name: str) -> None:
    for workers, changes in zip((3, 40), PAGES, strict=True):
        check(build, test_skip.inputs_of(name, dtype="bf16", **changes), workers, skip=True)


def test_a_list_that_is_not_looked_at(build: Build) -> None:
    inputs = test_skip.inputs_of("strided", dtype="bf16")
    broken = {"kTileList ? task.token_of_tile(tile) + part.token : token + kTileKv": "token + kTileKv"}
    with pytest.raises(AssertionError):
        check(build, inputs, 3, broken, skip=True)


CONTROLS = {
    "a slot is never given back": {"      release(smem.v, tiles);\n      ++tiles;": "      ++tiles;"},
    "a slot is given back before it was read": {
        "      products_wait<0>(o);\n      release(smem.v, tiles);": "      release(smem.v, tiles);\n"
        "      products_wait<0>(o);"
    },
    "keys are not awaited": {"    ring.wait_full(n);\n": ""},
}


@pytest.mark.parametrize("control", CONTROLS)
def test_controls(build: Build, control: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check(build, make(DECODE), 3, CONTROLS[control])
