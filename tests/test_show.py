"""What `Plan.show` draws is what the buffers say, and `measure` times every item of it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import checks
import numpy as np
import pytest
from cases import make
from grid import LONG, MIXED
from hypothesis import given, settings
from plans import Setup, arrays, item_costs, setups, worker_loads

from fi_backend import Plan, Times, measure
from fi_backend.plan import cost_model
from fi_backend.show.__main__ import main
from fi_backend.show.schedule import Schedule

SPLIT = Setup((1, 20, 1), (1000, 300, 7), kv_heads=2, group=2, workers=7)


def bars(path: Path, panel: int) -> list[tuple[float, float, float, str]]:
    """x, y, width and tooltip of every item and merge in a panel."""
    svg = "{http://www.w3.org/2000/svg}"
    rects = ElementTree.parse(path).getroot().findall(f"{svg}g")[panel].findall(f"{svg}rect")
    return [
        (*(float(r.attrib[n]) for n in ("x", "y", "width")), r.findtext(f"{svg}title") or "") for r in rects
    ]


@given(setups(batch_invariant=None))
@settings(max_examples=60, deadline=None)
def test_loads_are_those_of_the_buffers(s: Setup) -> None:
    plan = s.planner().plan(s.batch())
    predicted = Schedule(plan).predicted()
    assert predicted.load.tolist() == worker_loads(s, arrays(plan), cost_model(s.room)).tolist()
    assert (predicted.end - predicted.begin).tolist() == item_costs(
        s, arrays(plan), cost_model(s.room)
    ).tolist()
    ends = [predicted.end[predicted.worker == w].max(initial=0) for w in range(s.workers)]
    assert ends == predicted.load.tolist()
    plan.show()


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_every_item_is_drawn_once(batch_invariant: bool, tmp_path: Path) -> None:
    s = replace(SPLIT, batch_invariant=batch_invariant)
    plan = s.planner().plan(s.batch())
    plan.show(tmp_path / "plan.svg")
    drawn = bars(tmp_path / "plan.svg", 0)
    asked = (
        r"request (\d+), KV head (\d+), rows (\d+) to \d+, keys (\d+) to (\d+), cost (\d+).*; worker (\d+)"
    )
    found = [[int(n) for n in re.search(asked, title).groups()] for *_, title in drawn]
    a = arrays(plan)
    workers = np.repeat(np.arange(s.workers), np.diff(a.worker_indptr))
    costs = item_costs(s, a, cost_model(s.room))
    assert found == np.column_stack([a.items[:, [0, 2, 1, 3, 4]], costs, workers]).tolist()
    assert len({y for _, y, _, _ in drawn}) == len(set(workers.tolist()))
    widths = np.array([width for _, _, width, _ in drawn]) + 0.3
    np.testing.assert_allclose(widths / costs, widths[0] / costs[0], rtol=0.01)


def test_text() -> None:
    s = Setup((1,), (1000,), workers=2)
    text = s.planner().plan(s.batch()).show()
    assert text.startswith("2 items of 1 row tiles, 2 partial states, 1 merges\n")
    assert "predicted, load of 2 workers in units of csrc/cost.h: mean 506.0, most 506.0" in text
    assert "decode: request 0, KV head 0, rows 0 to 1, keys 0 to 500, cost 506, partial state 0" in text


def test_an_empty_batch(tmp_path: Path) -> None:
    s = Setup((), (), workers=3)
    plan = s.planner().plan(s.batch())
    assert "3 idle" in plan.show(tmp_path / "plan.svg", Times(np.zeros((0, 2)), np.zeros((0, 2))))
    assert bars(tmp_path / "plan.svg", 0) == bars(tmp_path / "plan.svg", 1) == []


def test_what_show_refuses(tmp_path: Path) -> None:
    plan = SPLIT.planner().plan(SPLIT.batch())
    with pytest.raises(ValueError, match=r"a path ending in \.svg, got .*plan\.html"):
        plan.show(tmp_path / "plan.html")
    items, merges = len(arrays(plan).items), len(arrays(plan).merges)
    times = Times(np.zeros((items + 1, 2)), np.zeros((merges, 2)))
    with pytest.raises(ValueError, match=f"{items} items and {merges} merges, got {items + 1} and {merges}"):
        plan.show(times=times)


def check_times(plan: Plan, times: Times) -> None:
    """Every item and merge is timed, items of a worker follow each other, merges follow all items."""
    a = arrays(plan)
    assert times.items.shape == (len(a.items), 2) and times.merges.shape == (len(a.merges), 2)
    assert times.items[:, 0].min() == 0, "relative to the first begin"
    both = np.concatenate([times.items, times.merges])
    assert (both[:, 0] <= both[:, 1]).all() and both.max() < 60e9  # a time that nobody wrote is before boot
    for begin, end in zip(a.worker_indptr, a.worker_indptr[1:], strict=False):
        own = times.items[begin:end]
        assert (own[1:, 0] >= own[:-1, 1]).all()
    assert times.merges[:, 0].min(initial=2**62) >= times.items[:, 1].max()


def check_measured(device: str, batch_invariant: bool, path: Path) -> None:
    inputs = make(replace(LONG, variant="CAUSAL+WINDOW+SINKS", window=900), device)
    plan = checks.planner_for(inputs, 64, batch_invariant=batch_invariant).plan(inputs.batch)
    expected, _ = checks.run_inputs(plan, inputs)
    arguments: dict[str, Any] = {"variant": inputs.variant, **inputs.variant_args}
    out = expected.clone().fill_(float("nan"))
    times = measure(plan, inputs.q, inputs.kv, out=out, **arguments)
    check_times(plan, times)
    assert out[: inputs.tokens].equal(expected[: inputs.tokens]), "profiling computes the same"
    text = plan.show(path, times)
    assert f"measured on {plan.planner.device}, load of 64 workers in us" in text
    assert len(bars(path, 1)) == len(times.items) + len(times.merges)
    again, _ = checks.run_inputs(plan, inputs)
    assert again[: inputs.tokens].equal(expected[: inputs.tokens]), "run goes on without profiling"


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_measured_times(batch_invariant: bool, tmp_path: Path) -> None:
    check_measured("cpu", batch_invariant, tmp_path / "plan.svg")


@pytest.mark.gpu
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_measured_times_of_a_gpu(batch_invariant: bool, tmp_path: Path) -> None:
    check_measured("cuda", batch_invariant, tmp_path / "plan.svg")


def test_measure_refuses_what_run_refuses() -> None:
    inputs = make(MIXED)
    planner = checks.planner_for(inputs)
    plan = planner.plan(inputs.batch)
    with pytest.raises(ValueError, match="takes no arguments, got unknown argument window"):
        measure(plan, inputs.q, inputs.kv, window=3)
    planner.plan(make(MIXED).batch)
    with pytest.raises(ValueError, match="expected the last plan of its planner"):
        measure(plan, inputs.q, inputs.kv)


@pytest.mark.parametrize("measured", [False, True])
def test_command(measured: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.svg"
    words = (
        "--kv-lens 3x100,0,40 --q-lens 4x1,30 --q-heads 4 --kv-heads 2 --head-dim 64 --workers 5 --window 50"
    )
    assert main([*words.split(), "--out", str(out), *["--measure"] * measured]) == 0
    text = capsys.readouterr().out
    assert "load of 5 workers" in text and ("measured on" in text) == measured
    assert len(bars(out, 0)) >= 5 * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kv-lens 4096,x", "expected --kv-lens like 4096,100,128x1, got 'x' in '4096,x'"),
        ("--kv-lens 3x8 --q-lens 1", "as many --q-lens as --kv-lens, got 1 query and 3 key lengths"),
        ("--kv-lens 8 --sms 0", "expected --sms of at least 1, got 0"),
        ("--kv-lens 8 --arch 7.5", "compute capability 8.0 or newer, got 7.5"),
        ("--kv-lens 8 --workers 1024", "expected workers from 1 to 512, got 1024"),
        ("--kv-lens 8 --page-size 0", "expected --page-size of at least 1, got 0"),
        ("--kv-lens 8 --measure --sms 8", "expected no --sms with --measure"),
        ("--kv-lens 8 --out plan.html", "expected a path ending in .svg, got plan.html"),
    ],
)
def test_what_the_command_refuses(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err
