"""The kernel benchmarks on the CPU executor, small: figures mean nothing, the path is the same."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    builds,
    curves,
    engine_process,
    goals,
    open_loop,
    peers,
    report,
    serve,
    streaming,
    suites,
    turns,
)
from benchmarks.cases import CASES, SUITES, Case, lengths, of_suite
from benchmarks.data import make, relative_error
from benchmarks.implementations import Unsupported, fi
from benchmarks.measure import PLAN_RUNS, host_us
from benchmarks.shared_prefixes import CASES as SHARED
from benchmarks.shared_prefixes import decode_phase, serve_cases
from benchmarks.suites import measure
from fi_backend import jit

META = {"card": "cpu", "driver": "", "torch": torch.__version__, "commit": "0" * 40, "date": "2026-01-01"}
SMALL = Case("small", "mixed", (1, 1, 20), (40, 17, 33), q_heads=4, kv_heads=2, head_dim=64)


def test_case_names_are_unique() -> None:
    assert len({c.id for c in CASES}) == len(CASES)
    assert all(of_suite(suite) for suite in SUITES)


def test_lengths() -> None:
    assert lengths("zipf", 16, 1024)[:4] == (459, 16, 3169, 3169)
    assert all(512 <= n <= 1024 for n in lengths("uniform", 64, 1024))
    with pytest.raises(ValueError, match="got normal"):
        lengths("normal", 1, 1)


def test_every_case_fits_one_card() -> None:
    """Caches, queries and outputs; the flushed buffer and workspaces come on top."""
    assert max(c.bytes for c in CASES) < 40e9
    model = 2 * streaming.LAYERS * 5120 * (4 * 5120 + 3 * 13824)
    assert model + 1.5 * max(c.bytes for c in of_suite("streaming")) < 40e9  # rotated keys as well
    shapes = {(c.head_dim, c.q_heads // c.kv_heads) for c in of_suite("shapes")}
    assert shapes == {(64, 4), (96, 4), (192, 4), (256, 4), (128, 1), (128, 8), (128, 16)}


def test_least_work() -> None:
    decode = next(c for c in CASES if c.id == "decode-64x4096")
    prefill = next(c for c in CASES if c.id == "prefill-16x1024")
    assert decode.bytes == pytest.approx(1.0748e9, rel=1e-3)
    assert prefill.flops == pytest.approx(1.3757e11, rel=1e-3)


def test_chosen_pages() -> None:
    case = next(c for c in of_suite("sparse") if c.pool)
    case = replace(case, q_lens=(16,) * 4, kv_lens=(208,) * 4, q_heads=4, kv_heads=2, pool=1024)
    data = make(case, torch.device("cpu"))
    assert len(data.k) == 64
    assert [len(set(row.tolist())) for row in data.block_table] == [13] * 4
    assert not torch.equal(data.block_table[0], data.block_table[1])
    assert measure(case, "fi", torch.device("cpu"))["rel_err"] < 5e-3


def test_measure_and_report(tmp_path: Path) -> None:
    row = measure(SMALL, "fi", torch.device("cpu"))
    assert 0 < row["us_p10"] <= row["us"] <= row["us_p90"]
    assert row["rel_err"] < 5e-3
    rows = [row, row | {"impl": "fa3", "us": 2 * row["us"]}]
    result = {"meta": META, "rows": rows}
    text = report.markdown(result)
    assert "| small |" in text
    assert "| 0.50 |" in text
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- kernel figures: begin -->\nold\n<!-- kernel figures: end -->\nafter\n")
    report.replace_blocks(page, result)
    filled = f"before\n<!-- kernel figures: begin -->\n{text}\n<!-- kernel figures: end -->\nafter\n"
    assert page.read_text() == filled
    page.write_text(f"{filled}<!-- rope figures: begin -->\n<!-- rope figures: end -->\n")
    rope = [row | {"suite": "rope"} for row in rows]
    report.replace_blocks(page, {"meta": META, "rows": [*rows, *rope]})
    of_rope = report.markdown({"meta": META, "rows": rope})
    assert page.read_text() == (
        f"{filled}<!-- rope figures: begin -->\n{of_rope}\n<!-- rope figures: end -->\n"
    )
    serving = [
        {"suite": "serve", "impl": "FLASH_ATTN", "case": "start-up, warm", "seconds": 20.0},
        {"suite": "serve", "impl": "CUSTOM", "case": "start-up, cold", "seconds": 25.0},
    ]
    text = report.markdown({"meta": META | {"vllm": "0.26.0"}, "rows": serving})
    assert "| start-up, our kernels built from nothing | 25.00 | 20.00 | 1.25 |" in text
    sglang = [
        {"suite": "serve", "impl": impl, "case": "a case", "seconds": seconds}
        for impl, seconds in (("fi", 2.0), ("fa3", 4.0), ("fi-page64", 1.0))
    ]
    text = report.markdown({"meta": META | {"sglang": "0.5.16"}, "rows": sglang})
    assert "| case | ours, s | ours, page64, s | fa3, s | ours / fa3 |" in text
    assert "| a case | 2.00 | 1.00 | 4.00 | 0.50 |" in text
    with pytest.raises(ValueError, match="serving figures: begin"):
        report.replace_blocks(page, {"meta": META, "rows": serving})


def test_pages_kept_beside_the_time_they_take() -> None:
    rows = [
        {"suite": "sparse", "impl": "fi", "case": f"{case}-{percent}", "us": us}
        for case, percent, us in (("a", 100, 40.0), ("a", 10, 5.0), ("b", 100, 9.0))
    ]
    text = report.markdown({"meta": META, "rows": rows})
    assert "| case | ours, us | of all pages' time |" in text
    assert "| a-10 | 5.0 | 0.125 |" in text


def test_a_shared_prefix() -> None:
    case = Case("small", "prefix", (1, 1), (40, 50), q_heads=4, kv_heads=2, head_dim=64, prefix=32)
    data = make(case, torch.device("cpu"))
    assert torch.equal(data.block_table[0, :2], data.block_table[1, :2])
    assert len(data.k) == 2 + 1 + 2
    indptr, indices = data.csr(2)
    assert indptr.tolist() == [0, 1, 3]
    assert sorted([*indices.tolist(), *data.block_table[0, :2].tolist()]) == list(range(5))
    assert case.bytes == 2 * (2 * (32 + 8 + 18) * 2 * 64 + 2 * 2 * 4 * 64)
    assert relative_error(data, fi(data).run()) < 5e-3
    assert peers.PEERS.keys() >= {"vllm_fa3_cascade", "flashinfer_cascade"}
    with pytest.raises(Unsupported, match="no prefix"):
        peers.PEERS["vllm_fa3_cascade"](make(SMALL, torch.device("cpu")))


def test_a_token_of_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last layer's attention, of keys that the step wrote, whoever rotates them."""
    monkeypatch.setattr(streaming, "LAYERS", 2)
    monkeypatch.setattr(streaming, "VOCABULARY", 64)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    case = replace(of_suite("streaming")[0], q_lens=(1,) * 3, kv_lens=(40, 64, 90))
    case = replace(case, q_heads=4, kv_heads=4, head_dim=64)
    for name in ("fi", "separate"):
        row = measure(case, name, torch.device("cpu"))
        assert row["layers"] == 2 and row["rel_err"] < 1e-2
    data = make(case, torch.device("cpu"))
    before = data.k.clone()
    out = streaming.decode_step(data, fi)()
    written = (data.k != before).any(-1).any(-1).nonzero().tolist()
    assert sorted(written) == sorted(
        [int(data.block_table[r, n // 16]), n % 16] for r, n in enumerate((39, 63, 89))
    )
    data.k = before
    assert relative_error(data, out) > 1e-2  # 0.03 and more, as weights fall
    with pytest.raises(Unsupported, match="decodes with rotation"):
        measure(replace(case, variant="CAUSAL"), "separate", torch.device("cpu"))


@pytest.mark.parametrize("case", [c for c in of_suite("variants") if "4x8192" in c.id], ids=lambda c: c.id)
def test_what_a_user_writes_is_the_same(case: Case) -> None:
    small = replace(case, q_lens=(1, 30), kv_lens=(40, 1100), q_heads=4, kv_heads=2, head_dim=64)
    data = make(small, torch.device("cpu"))
    out = fi(data).run()
    assert relative_error(data, out) < 5e-3
    data.case = replace(small, variant="CAUSAL")
    assert (relative_error(data, out) > 5e-3) == (case.variant not in ("CAUSAL", "OWN_CAUSAL"))
    if "WINDOW" in case.variant:
        assert small.flops == 4 * 4 * 64 * (40 + sum(min(n, 1024) for n in range(1071, 1101)))
    if "DOCUMENTS" in case.variant:
        assert small.flops == 4 * 4 * 64 * (40 + sum(range(47, 77)))
    if "PREFIX" in case.variant:
        assert small.flops == 4 * 4 * 64 * (40 + 30 * 1100)


def test_a_plan_is_timed_on_the_host_many_times() -> None:
    calls: list[int] = []
    spread = host_us(lambda: calls.append(0), torch.device("cpu"))
    assert len(calls) == PLAN_RUNS
    assert 0 < spread.us_p10 <= spread.us <= spread.us_p90


def test_a_spec_is_compiled_from_nothing() -> None:
    row = next(builds.rows(jit.CPU))
    assert (row["case"], row["libraries"]) == ("jit-spec-cpu", 1)
    assert row["seconds"] > 0.1
    assert row["bytes"] > 10_000


def test_a_goal_is_met_or_missed() -> None:
    """Bounds are those of the goals' own source: bytes and operations at the card's rates."""
    bounds = {"decode-16x1024": 22, "decode-256x2048": 696, "prefill-4x8192": 2968, "prefix-64-8192-256": 33}
    for case in (c for c in CASES if c.id in bounds):
        rates = {"tb_s": case.bytes / 1e6 / 4000, "tflop_s": case.flops / 1e6 / 4000}
        row = {"suite": case.suite, "case": case.id, "impl": "fi", "us": 4000.0, "rel_err": 0.0, **rates}
        assert goals.bound_us(row) == pytest.approx(bounds[case.id], abs=1)
        for us, verdict in ((4000.0, "missed"), (1.0, "met")):
            result = {"meta": META | {"card": "NVIDIA H100 80GB"}, "rows": [row | {"us": us}]}
            assert f"| {goals.GOAL_US[case.id]}, {verdict} |" in report.markdown(result)
        assert "goal" not in report.markdown({"meta": META, "rows": [row]})
    assert goals.GOAL_US.keys() <= {c.id for suite in SUITES for c in of_suite(suite)}


def test_a_page_shows_every_case(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ("kernels-h100.json", "serve-h100.json", "serve-open-loop-h100.json", "serve-sglang-h100.json")
    files = [engine_process.ROOT / "benchmarks" / "results" / name for name in names]
    command = [sys.executable, "-m", "benchmarks.report", *files, "--page", tmp_path / "page.html"]
    subprocess.run(command, cwd=engine_process.ROOT, check=True)
    page = (tmp_path / "page.html").read_text()
    rows = json.loads(files[0].read_text())["rows"]
    assert {row["case"] for row in rows} <= set(re.findall(r"<td>([^<]*)</td>", page))
    pictures = re.findall('src="data:image/png;base64,([^"]*)"', page)
    assert len(pictures) == 5  # serving files have no roofline
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    assert "http" not in page


def test_tables_and_pictures_of_formats_are_current(tmp_path: Path) -> None:
    """Pictures by what they say they show: matplotlib's versions draw differently."""
    pytest.importorskip("matplotlib")
    docs = engine_process.ROOT / "docs"
    page = tmp_path / "formats.md"
    page.write_text((docs / "formats.md").read_text())
    results = engine_process.ROOT / "benchmarks" / "results"
    for file in (*results.glob("prefix*.json"), *results.glob("*shared-prefixes*.json")):
        report.replace_blocks(page, json.loads(file.read_text()))
    assert page.read_text() == (docs / "formats.md").read_text()

    def shown(picture: Path) -> str:
        found = re.search("<dc:description>(.*)</dc:description>", picture.read_text())
        assert found is not None
        return found[1]

    for name in curves.FILES:
        assert shown(tmp_path / name) == shown(docs / name)


def test_curves_show_what_peers_ran_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(case: Case, name: str, device: torch.device) -> dict[str, object]:
        return {"suite": case.suite, "impl": name, "case": case.id, "us": float(case.bytes)}

    monkeypatch.setattr(suites, "measure", measured)
    rows = list(suites.rows([], of_suite("sweep"), ["flashinfer_cascade"], torch.device("cpu")))
    drawn = [curves.points(rows, of_file.along) for of_file in curves.FILES.values()]
    assert [list(found["fi"]) for found in drawn] == [[128, 512, 2048, 8192, 32768], [1, 4, 16, 64, 256]]
    assert all(found["fi"] == found["flashinfer_cascade"] for found in drawn)
    assert sum(row["impl"] == "flashinfer_cascade" for row in rows) == 9  # one is in both


def test_an_engine_process_is_heard_at_once_and_limited() -> None:
    code = "import time, benchmarks.engine_process as p; print('noise'); p.tell(a=1); time.sleep({})"
    for sleep, seconds, ended in ((0, 60, 0), (60, 8, -9)):
        heard: list[dict[str, int]] = []
        found = engine_process.run([sys.executable, "-c", code.format(sleep)], seconds, heard.append, {})
        assert (heard, found) == ([{"a": 1}], ended)


def test_engines_take_turns(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from benchmarks import turns, engine_process as p\n"
        "gate = Path(sys.argv[-1]); p.tell(name=gate.name); turns.wait_for_turn(gate)\n"
        "left = turns.deadline(gate) - time.monotonic(); p.tell(name=gate.name, in_time=10 < left <= 20)"
    )
    heard: list[dict[str, object]] = []
    failed: list[str] = []

    def contender(name: str) -> turns.Contender:
        gate = tmp_path / name
        command = [sys.executable, "-c", code, str(gate)]
        return turns.Contender(
            name, engine_process.EngineProcess(command, heard.append, {}), gate, failed.append
        )

    engines = [contender(name) for name in "ab"]
    while len(heard) < 2:  # both have started, neither goes on
        time.sleep(0.05)
    late, soon = time.monotonic() + 60, time.monotonic() + 5
    turns.take_turns(engines[::-1], late, 10, lambda left, n: 30)
    assert heard[2:] == [{"name": "b", "in_time": True}, {"name": "a", "in_time": True}]
    assert failed == []
    turns.take_turns([contender("c")], soon, 10)
    gone = contender("d")
    gone.process.stop()
    turns.take_turns([gone], late, 10)
    assert failed == ["no time left", "exit code -9"]


def test_an_engine_is_the_same_command_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], Callable[[dict[str, object]], None]]] = []
    monkeypatch.setattr(sys, "argv", ["benchmarks", "serve", "--engine", "vllm", "--case", "x"])
    monkeypatch.setattr(
        serve, "EngineProcess", lambda command, receive, *_: started.append((command, receive))
    )
    parent = serve.Parent(serve.Report(None, {}), "serve", 0.0, tmp_path)
    engine = parent.contender("CUSTOM", tmp_path / "model", "--port", "1", run="cold run")
    command, receive = started[0]
    own = ["--port", "1", "--child", "CUSTOM", "--model", f"{tmp_path}/model", "--gate", str(engine.gate)]
    assert command == [sys.executable, "-m", "benchmarks", *sys.argv[1:], *own]
    assert engine.problem(0) == "exit code 0", "nothing was heard"
    receive({"warm": True})
    receive({"case": "a case", "seconds": 1.0})
    assert [engine.problem(0), engine.problem(-9)] == ["", "exit code -9"]
    engine.fail("late")
    assert [(r["impl"], r["case"]) for r in parent.report.rows] == [
        ("CUSTOM", "a case"),
        ("CUSTOM", "cold run"),
    ]


def test_every_case_is_timed_before_one_is_repeated() -> None:
    served: list[int] = []

    def generate(requests: serve.Requests, seed: int) -> float:
        served.append(seed)
        return 2.0 if seed else 3.0

    names = list(serve.CASES)[:2]
    serve.time_cases(generate, names, 2, time.monotonic() + 60)
    assert served == [0, 0, 100, 100]
    heard: list[dict[str, object]] = []
    code = f"from benchmarks import serve; serve.time_cases(lambda *_: 3.0, {names}, 2, {{}})"
    for deadline in ("0", "1e9"):
        engine_process.run([sys.executable, "-c", code.format(deadline)], 60, heard.append, {})
    assert [row.get("failed") for row in heard[:2]] == ["no time left"] * 2
    assert [row["all_seconds"] for row in heard[2:]] == [[3.0], [3.0], [3.0, 3.0], [3.0, 3.0]]


def test_a_later_figure_replaces_the_earlier(tmp_path: Path) -> None:
    result, case = serve.Report(tmp_path / "r.json", {}), next(iter(serve.CASES))
    for seconds in (3.0, 2.0):
        result.add("fi", case, seconds=seconds)
        result.add("fi", "buffers", plan_bytes=1)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row.get("seconds") for row in rows] == [2.0, None, None]


def test_latencies_of_an_open_loop() -> None:
    """1000 requests a second apart, first output after i ms, three more 10 ms apart, five tokens."""
    served = [
        open_loop.Served(float(i), [i + 1e-3 * i + 0.01 * k for k in range(4)], tokens=5) for i in range(1000)
    ]
    found = open_loop.figures(served)
    assert found["ttft_ms_p50"] == pytest.approx(499.5)
    assert found["ttft_ms_p99"] == pytest.approx(989.01)
    assert found["tpot_ms_p50"] == found["tpot_ms_p99"] == pytest.approx(7.5)
    assert found["itl_ms_p50"] == found["itl_ms_p99"] == pytest.approx(10)
    assert found["requests_s"] == pytest.approx(1000 / (999 + 0.999 + 0.03), abs=0.01)
    rows = [{"suite": "open loop", "case": "1 requests/s", "impl": name, **found} for name in ("X", "CUSTOM")]
    result = {"meta": META | {"vllm": "0.26.0"}, "rows": rows}
    assert "| 1 requests/s | ours | 499.5 | 989.0 | 7.5 | 7.5 | 10.0 | 10.0 | 1.0 |" in report.markdown(
        result
    )
    assert list(report.blocks(result, "<!-- open loop figures: begin -->")) == ["open loop"]


def test_requests_arrive_on_time_whatever_is_being_served() -> None:
    at = open_loop.arrivals(5000, 50)
    assert at == open_loop.arrivals(5000, 50) == sorted(at)
    assert at[-1] == pytest.approx(100, rel=0.05)
    started: list[float] = []

    async def send(number: int) -> AsyncIterator[int]:
        started.append(time.perf_counter() - begin)
        for _ in range(3):
            await asyncio.sleep(0.2)
            yield 2

    begin = time.perf_counter()
    served = asyncio.run(open_loop.drive(send, [0.0, 0.1, 0.3]))
    assert all(t > due - 0.01 for t, due in zip(started, [0.0, 0.1, 0.3], strict=True))
    assert started[2] < started[0] + 0.6  # the first was not done
    assert [s.tokens for s in served] == [6, 6, 6]
    assert all(s.times[0] - s.arrival > 0.19 for s in served)


@pytest.mark.parametrize("option", ["--open-loop", "--minimal"])
def test_options_of_vllm(option: str) -> None:
    command = [sys.executable, "-m", "benchmarks", "serve", "--engine", "sglang", option]
    done = subprocess.run(command, cwd=engine_process.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"expected --engine vllm with {option}, got sglang" in done.stderr


def test_decode_rates_beside_the_example() -> None:
    rows = [
        {"suite": "decode rate", "case": "a case", "impl": impl, "tokens_s": rate, "step_ms": 64e3 / rate}
        for impl, rate in (("minimal engine", 32000.0), ("FLASH_ATTN", 16000.0), ("CUSTOM", 20000.0))
    ]
    text = report.markdown({"meta": META | {"vllm": "0.26.0"}, "rows": rows})
    assert "| a case | FLASH_ATTN | 16000 | 4.000 | 2.00 |" in text
    assert "| a case | vLLM, ours | 20000 | 3.200 | 1.60 |" in text


def alike(prompts: list[list[int]]) -> dict[tuple[int, ...], list[list[int]]]:
    """By their first 16 tokens: vLLM finds prompts in its cache by such blocks."""
    found: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt in prompts:
        found.setdefault(tuple(prompt[:16]), []).append(prompt)
    return found


def test_prompts_share_what_a_case_says_and_nothing_else() -> None:
    begins: set[tuple[int, ...]] = set()
    for number, case in enumerate(SHARED.values(), 1):
        ids, wanted = case.requests(1000 * number, divisor=1)
        assert len(ids) == len(wanted) == len(case.prefixes) * case.each
        assert case.shuffled or len(ids) <= serve.MAX_REQUESTS
        lengths = [n + case.suffix for n in case.prefixes for _ in range(case.each)]
        assert sorted(map(len, ids)) == sorted(lengths) if case.shuffled else list(map(len, ids)) == lengths
        for prompts in alike(ids).values():
            n = len(prompts[0]) - case.suffix
            assert len(prompts) == case.each and all(prompt[:n] == prompts[0][:n] for prompt in prompts)
        if case.suffix:
            assert len({tuple(prompt[-case.suffix :]) for prompt in ids}) == len(ids)
        new = set(alike(ids))
        assert len(new) == len(case.prefixes) and not new & begins
        begins |= new


def test_the_decode_phase_begins_with_the_last_first_token() -> None:
    outputs = [(0, 1.0, 1), (0, 2.0, 1), (1, 3.0, 1), (0, 4.0, 2), (1, 5.0, 1)]
    assert decode_phase(outputs) == {"decode_tokens_s": 1.5, "decode_s": 2.0}


def test_figures_of_prompts_that_begin_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """Of an engine that says of each prompt that a GB was saved."""
    served: list[str] = []

    def sender(ids: list[list[int]], outputs: list[int], name: str) -> open_loop.Send:
        async def send(number: int) -> AsyncIterator[int]:
            served.append(name)
            for _ in range(outputs[number] - lost):
                await asyncio.sleep(0)
                yield 1

        return send

    async def saved() -> int:
        return 10**9 * len(served)

    lost, case = 0, "8 prompts of 8192, n = 16, 128 out"
    asyncio.run(serve_cases(sender, saved, [case], divisor=32))
    row = json.loads(capsys.readouterr().out.removeprefix("FOUND "))
    assert row["case"] == case and row["saved_gb"] == 128 and row["decode_tokens_s"] > 0
    assert served == ["warm"] * 32 + ["1"] * 128
    result = {"meta": META | {"sglang": "0.5.16"}, "rows": []}
    names = {"fa3": "fa3", "fi": "ours", "fi, FI_PREFIX=off": "ours, FI_PREFIX=off"}
    result["rows"] = [row | {"suite": "shared prefixes", "impl": impl} for impl in names]
    text = report.markdown(result)
    assert all(f"| {case} | {name} |" in text for name in names.values())
    assert list(report.blocks(result, "")) == ["sglang shared prefixes"]
    lost = 2
    with pytest.raises(RuntimeError, match="expected 2 tokens, got 0"):
        asyncio.run(serve_cases(sender, saved, [case], divisor=32))


def test_peers() -> None:
    assert peers.names("flashinfer_fa2,fa3,fa3") == ["flashinfer_fa2", "fa3", "vllm_fa3_cascade"]
    assert peers.names("") == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in CASES if c.suite != "plan"], ids=lambda c: c.id)
def test_what_is_measured_is_right(case: Case) -> None:
    """The very inputs of the figures, against float64 on random rows."""
    data = make(case, torch.device("cuda"))
    assert relative_error(data, fi(data).run()) < 4e-3
