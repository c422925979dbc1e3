"""Negative controls: each of these breaks one thing, and the comparison must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import checks
from cases import Inputs, make
from fi_backend import Plan
from grid import LONG

CASE = replace(LONG, variant="CAUSAL+WINDOW+SOFT_CAP+ALIBI+SINKS", window=1000)


def _swap_two_pages(inputs: Inputs, plan: Plan) -> None:
    pages = inputs.batch.table[0, :].clone()
    inputs.batch.table[0, 90], inputs.batch.table[0, 100] = pages[100], pages[90]


def _read_one_token_more(inputs: Inputs, plan: Plan) -> None:
    inputs.batch.kv_len[2] += 1


def _drop_an_item(inputs: Inputs, plan: Plan) -> None:
    plan.worker_indptr[-1] -= 1


def _shorten_an_item(inputs: Inputs, plan: Plan) -> None:
    plan.items[0, 4] -= 64


def _shuffle_rows(inputs: Inputs, plan: Plan) -> None:
    inputs.q.copy_(inputs.q.clone().roll(1, 1))


BREAKS: list[Callable[[Inputs, Plan], None]] = [
    _swap_two_pages,
    _read_one_token_more,
    _drop_an_item,
    _shorten_an_item,
    _shuffle_rows,
]


def _ask(breaks: Callable[[Inputs, Plan], None] | None, **changes: object) -> None:
    inputs, truth = make(CASE), make(CASE)
    plan = checks.planner_for(inputs, workers=8).plan(inputs.batch)
    checks.poison(plan)
    if breaks:
        breaks(inputs, plan)
    checks.compare(truth, *checks.run_inputs(plan, inputs, **changes))


def test_nothing_broken() -> None:
    _ask(None)


@pytest.mark.parametrize("breaks", BREAKS, ids=lambda f: f.__name__.strip("_"))
def test_broken_data_is_noticed(breaks: Callable[[Inputs, Plan], None]) -> None:
    with pytest.raises(AssertionError):
        _ask(breaks)


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 980},
        {"soft_cap": 3.3},
        {"scale": 0.13},
        {"sinks": torch.zeros(4)},
        {"alibi_slopes": torch.zeros(4)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_wrong_arguments_are_noticed(changes: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        _ask(None, **changes)
