"""Negative controls: each of these breaks one thing, and the comparison must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import checks
import pytest
import torch
from cases import Case, Inputs, make
from grid import LONG, MIXED, TREE

from fi_backend import Plan

EVERYTHING = replace(LONG, variant="CAUSAL+WINDOW+SOFT_CAP+ALIBI+SINKS", window=1000)
FLAT = replace(LONG, variant="CAUSAL+WINDOW+SINKS", window=1000)  # no key is too faint to be missed


def _read_a_page_twice(inputs: Inputs, plan: Plan) -> None:
    inputs.batch.table[0, 90] = inputs.batch.table[0, 100]


def _read_one_token_more(inputs: Inputs, plan: Plan) -> None:
    inputs.batch.kv_len[2] += 1


def _drop_an_item(inputs: Inputs, plan: Plan) -> None:
    plan.worker_indptr[-1] -= 1


def _shorten_an_item(inputs: Inputs, plan: Plan) -> None:
    plan.items[0, 4] -= 64


def _shuffle_rows(inputs: Inputs, plan: Plan) -> None:
    inputs.q.copy_(inputs.q.clone().roll(1, 1))


BREAKS: list[Callable[[Inputs, Plan], None]] = [
    _read_a_page_twice,
    _read_one_token_more,
    _drop_an_item,
    _shorten_an_item,
    _shuffle_rows,
]


def _ask(case: Case, breaks: Callable[[Inputs, Plan], None] | None, **changes: object) -> None:
    inputs, truth = make(case), make(case)
    plan = checks.planner_for(inputs, workers=8).plan(inputs.batch)
    checks.poison(plan)
    if breaks:
        breaks(inputs, plan)
    checks.compare(truth, *checks.run_inputs(plan, inputs, **changes))


@pytest.mark.parametrize("case", [EVERYTHING, FLAT], ids=str)
def test_nothing_broken(case: Case) -> None:
    _ask(case, None)


@pytest.mark.parametrize("breaks", BREAKS, ids=lambda f: f.__name__.strip("_"))
def test_broken_data_is_noticed(breaks: Callable[[Inputs, Plan], None]) -> None:
    with pytest.raises(AssertionError):
        _ask(FLAT, breaks)


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
        _ask(EVERYTHING, None, **changes)


@pytest.mark.parametrize("token", [1, 11, 23])
def test_one_wrong_bit_of_a_tree_is_noticed(token: int) -> None:
    case = replace(TREE, kv_lens=(6, 60, 68, 200))
    words = make(case).variant_args["tree_mask"]
    _ask(case, None, tree_mask=words.clone())
    words[token] ^= 1 << token % 6
    with pytest.raises(AssertionError):
        _ask(case, None, tree_mask=words)


@pytest.mark.parametrize("variant", ["CAUSAL+DOCUMENT", "PREFIX_LM", "PACKED_MASK"])
def test_one_wrong_number_of_a_mask_is_noticed(variant: str) -> None:
    """Of the request that decodes over 200 keys: one key's document, one key of the prefix, one key's bit."""
    case = replace(MIXED, variant=variant)
    for name, x in make(case).variant_args.items():
        if name == "mask_indptr":
            continue
        _ask(case, None, **{name: x.clone()})
        if name == "packed_mask":
            x[make(case).variant_args["mask_indptr"][6] + 20] ^= 1
        elif name == "document_ids":
            x[6, 129 + 60] -= 1
        else:
            x[6] += 1
        with pytest.raises(AssertionError):
            _ask(case, None, **{name: x})


def test_a_neighbours_tree_is_noticed() -> None:
    words = make(TREE).variant_args["tree_mask"]
    with pytest.raises(AssertionError):
        _ask(TREE, None, tree_mask=words.roll(6))
