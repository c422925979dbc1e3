"""The rows of a results file, sorted for tables and pictures."""

from __future__ import annotations

from typing import Any

OURS = ("CUSTOM", "fi", "fi_flat", "fi-page64")  # our rows, by the name an engine knows
Result = dict[str, Any]
Row = dict[str, Any]
Times = dict[str, dict[str, float]]  # case, implementation
LATENCIES = {
    f"{name} p{percent}": f"{name.lower()}_ms_p{percent}"
    for name in ("TTFT", "TPOT", "ITL")
    for percent in (50, 99)
}


def grouped(rows: list[Row], key: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def times(suite: str, rows: list[Row]) -> Times:
    """What is compared: seconds or latencies of whole engines, microseconds of kernels."""
    if suite == "serve":
        return serving_seconds(rows)
    if suite in ("open loop", "shared prefixes"):
        good = grouped([row for row in rows if "failed" not in row], "case")
        return {
            f"{case}: {name}": {row["impl"]: row[key] for row in of_case}
            for case, of_case in good.items()
            for name, key in LATENCIES.items()
        }
    return {
        case: {row["impl"]: row["us"] for row in of_case if "us" in row}
        for case, of_case in grouped(rows, "case").items()
    }


def serving_seconds(rows: list[Row]) -> Times:
    """Of each case.

    The first engine of a run also warms the machine for the others: its start is in the file, not here.
    A start of ours that builds all kernels stands beside the peer's warm one.
    """
    by_case: Times = {}
    for row in rows:
        if "seconds" not in row or row["case"] == "start-up, first":
            continue
        cases = [row["case"]]
        if row["case"] == "start-up, warm" and row["impl"] not in OURS:
            cases.append("start-up, cold")
        for case in cases:
            by_case.setdefault(case, {})[row["impl"]] = row["seconds"]
    if "start-up, cold" in by_case:
        by_case["start-up, our kernels built from nothing"] = by_case.pop("start-up, cold")
    return by_case
