"""A results file as tables of text, one for each suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from . import goals
from .rows import LATENCIES, OURS, Result, Row, grouped, serving_seconds

Cells = dict[str, str]  # column to text


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]


def tables(result: Result) -> list[Table]:
    card, by_suite = result["meta"]["card"], grouped(result["rows"], "suite")
    return [_table(suite, list(_lines(suite, rows, card))) for suite, rows in by_suite.items()]


def made(result: Result) -> str:
    """Card, versions, date and commit in one line."""
    m = result["meta"]
    words = [m["card"], f"driver {m['driver'] or 'none'}", f"torch {m['torch']}"]
    words += [f"{name} {m[key]}" for key, name in (("vllm", "vLLM"), ("sglang", "SGLang")) if key in m]
    return ", ".join([*words, m["date"], f"commit {m['commit'][:12]}"]) + "."


def _table(suite: str, lines: list[Cells]) -> Table:
    """Without the columns that no line fills."""
    whole_step = "streaming, time of a token of the whole model"
    title = {"serve": "", "plan": "plan, time on the host", "streaming": whole_step}.get(suite, suite)
    head = [column for column in (lines[0] if lines else ()) if any(line[column] for line in lines)]
    return Table(title, head, [[line[column] for column in head] for line in lines])


def _lines(suite: str, rows: list[Row], card: str) -> Iterator[Cells]:
    if suite == "serve":
        return _serving(rows)
    if suite == "jit":
        return _builds(rows)
    if suite in ("open loop", "shared prefixes"):
        return _latencies(rows)
    if suite == "decode rate":
        return _decode_rates(rows)
    return _kernels(rows, goals.CARD in card)


def _kernels(rows: list[Row], has_goals: bool) -> Iterator[Cells]:
    """Microseconds; the rate is the one that is nearer to its ceiling."""
    peers = [name for name in grouped(rows, "impl") if name not in OURS]
    all_pages = {row["case"]: row["us"] for row in rows if (row["suite"], row["impl"]) == ("sparse", "fi")}
    for case, of_case in grouped(rows, "case").items():
        found = {row["impl"]: row for row in of_case}
        ours = found.get("fi")
        if ours is None:
            continue
        us, timed, flat = ours["us"], "tb_s" in ours, found.get("fi_flat")
        whole = all_pages.get(case.rpartition("-")[0] + "-100")
        best = min((found[p]["us"] for p in peers if p in found), default=None)
        goal = goals.GOAL_US.get(case) if has_goals else None
        yield {
            "case": case,
            "ours, us": f"{us:.1f}",
            "p10 to p90": f"{ours['us_p10']:.1f} to {ours['us_p90']:.1f}" if "us_p10" in ours else "",
            "on the GPU, us": f"{ours['gpu_us']:.1f}" if "gpu_us" in ours else "",
            "list, us": f"{ours['list_us']:.1f}" if "list_us" in ours else "",
            "list and plan, us": f"{ours['list_and_plan_us']:.1f}" if "list_us" in ours else "",
            "plan, us": f"{ours['plan_us']:.1f}" if "plan_us" in ours else "",
            "single format, us": f"{flat['us']:.1f}" if flat else "",
            "its plan, us": f"{flat['plan_us']:.1f}" if flat else "",
            "ours / single format": f"{us / flat['us']:.2f}" if flat else "",
            "of all pages' time": f"{us / whole:.3f}" if whole else "",
            "rate": _rate(ours) if timed else "",
            "error": f"{ours['rel_err']:.1e}" if timed else "",
            **{f"{p.replace('_', ' ')}, us": f"{found[p]['us']:.1f}" if p in found else "" for p in peers},
            "ours / best peer": f"{us / best:.2f}" if best else "",
            "bound, us": f"{goals.bound_us(ours):.0f}" if has_goals and timed else "",
            "goal, us": f"{goal}, {'met' if us <= goal else 'missed'}" if goal else "",
        }


def _rate(row: Row) -> str:
    return f"{row['tb_s']:.2f} TB/s" if goals.memory_bound(row) else f"{row['tflop_s']:.0f} TFLOP/s"


def _builds(rows: list[Row]) -> Iterator[Cells]:
    for row in rows:
        yield {
            "case": row["case"],
            "seconds": f"{row['seconds']:.1f}",
            "libraries": str(row["libraries"]),
            "kB": f"{row['bytes'] / 1000:.0f}",
        }


def _latencies(rows: list[Row]) -> Iterator[Cells]:
    for row in rows:
        if "failed" not in row:
            yield {
                "case": row["case"],
                "backend": _named(row["impl"]),
                "decode, tokens/s": f"{row['decode_tokens_s']:.0f}" if "decode_tokens_s" in row else "",
                "saved, GB": f"{row['saved_gb']:.1f}" if row.get("saved_gb") else "",
                **{f"{name}, ms": f"{row[key]:.1f}" for name, key in LATENCIES.items()},
                "requests/s": f"{row['requests_s']:.1f}",
                "tokens/s": f"{row['tokens_s']:.0f}",
            }


def _named(impl: str) -> str:
    name, comma, how = impl.partition(",")
    return ("ours" if name in OURS else name) + comma + how


def _decode_rates(rows: list[Row]) -> Iterator[Cells]:
    """Of whole engines; the first is the example."""
    for of_case in grouped([row for row in rows if "failed" not in row], "case").values():
        for row in of_case:
            yield {
                "case": row["case"],
                "engine": "vLLM, ours" if row["impl"] in OURS else row["impl"],
                "tokens/s": f"{row['tokens_s']:.0f}",
                "step, ms": f"{row['step_ms']:.3f}",
                f"{of_case[0]['impl']} / it": f"{of_case[0]['tokens_s'] / row['tokens_s']:.2f}",
            }


def _serving(rows: list[Row]) -> Iterator[Cells]:
    """Seconds of ours and of its peers, and the ratio of our first column."""
    by_case = serving_seconds(rows)
    impls = grouped([row for row in rows if "seconds" in row], "impl")
    ours, *others = [name for name in OURS if name in impls]
    for case, found in by_case.items():
        if ours not in found:
            continue
        cells = {"case": case, "ours, s": f"{found[ours]:.2f}"}
        cells |= {f"ours, {n.partition('-')[2]}, s": f"{found[n]:.2f}" if n in found else "" for n in others}
        for p in (name for name in impls if name not in OURS):
            cells[f"{p}, s"] = f"{found[p]:.2f}" if p in found else ""
            cells[f"ours / {p}"] = f"{found[ours] / found[p]:.2f}" if p in found else ""
        yield cells
