"""The example engine: every token is the best one by transformers, however requests share steps and pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import models

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import minimal_engine  # noqa: E402

LENGTHS = (1, 5, 16, 17, 90, 33, 130, 60)  # of prompts, in tokens; pages have 16
PAGES = 24
WRONG = 0.6  # below the best logit, beyond what rounding explains


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write("llama", tmp_path_factory.mktemp("models"))


def engine_of(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """Smaller than what it is asked: neither seats nor pages nor a step's chunk suffice for all prompts."""
    model = minimal_engine.Llama(folder, torch.device(device), dtype)
    return minimal_engine.Engine(model, pages=PAGES, max_requests=6, chunk=24)


def serve(engine: Any) -> list[Any]:
    """Half of the requests at first, the others one by one while those run."""
    asked = [(models.prompt(n, seed=n), 12 + 7 * (i % 4)) for i, n in enumerate(LENGTHS)]
    requests = [engine.add(*a) for a in asked[:4]]
    finished, most = [], 0
    while engine.waiting or engine.running:
        finished += engine.step()
        most = max(most, len(engine.running))
        if len(requests) < len(asked):
            requests.append(engine.add(*asked[len(requests)]))
    assert set(finished) == set(requests) and 4 <= most <= 6
    for request, (tokens, max_tokens) in zip(requests, asked, strict=True):
        answer = request.answer
        assert request.tokens[: len(tokens)] == tokens
        assert len(answer) == max_tokens or answer[-1] in engine.model.eos
        assert not engine.model.eos & set(answer[:-1])
    return requests


def gaps(folder: Path, dtype: torch.dtype, requests: list[Any]) -> torch.Tensor:
    """By how much transformers' best logit exceeds that of each token decoded, given all tokens before it.

    Zeros alone are the very tokens of its greedy search. In float32, of the weights as the engine has them.
    """
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(dtype).float().eval()
    found = []
    for request in requests:
        with torch.no_grad():
            logits = reference(torch.tensor([request.tokens])).logits[0, request.prompt_len - 1 : -1]
        chosen = logits.gather(1, torch.tensor(request.answer)[:, None])[:, 0]
        found.append(logits.max(1).values - chosen)
    return torch.cat(found)


# close: on a CPU, 16-bit rounding costs 0.016 (float16) and 0.18 at most, the broken caches below 1.5 and 10
@pytest.mark.parametrize(
    ("device", "dtype", "close"),
    [
        ("cpu", torch.float32, 1e-3),
        ("cpu", torch.bfloat16, WRONG),
        pytest.param("cuda", torch.float16, 0.1, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, WRONG, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_tokens_of_transformers(folder: Path, device: str, dtype: torch.dtype, close: float) -> None:
    engine = engine_of(folder, device, dtype)
    found = gaps(folder, dtype, serve(engine))
    assert found.max() <= close, (
        f"a token {found.max():.3g} below the best logit, at most {close} is rounding"
    )
    assert (found == 0).sum() >= 0.8 * len(found), f"{(found == 0).sum()} best tokens of {len(found)}"
    assert 0 < engine.decoded < len(found), "expected steps with and without prompts"
    assert sorted(engine.free_pages) == list(range(PAGES)) and sorted(engine.free_seats) == list(range(6))


def test_controls(folder: Path) -> None:
    """Pages that two requests own, and padding that writes a key: other tokens, by far."""
    engine = engine_of(folder, "cpu", torch.float32)
    engine.free_pages[PAGES // 2 :] = engine.free_pages[: PAGES // 2]
    assert gaps(folder, torch.float32, serve(engine)).max() > WRONG
    engine = engine_of(folder, "cpu", torch.float32)
    engine.decode._padding = (0, 0, 0)
    assert gaps(folder, torch.float32, serve(engine)).max() > WRONG


@pytest.mark.gpu
def test_a_step_waits_for_its_tokens_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(folder, "cuda", torch.float16)
    read = torch.Tensor.tolist

    def tolist(x: torch.Tensor) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(x)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    torch.cuda.set_sync_debug_mode("error")
    try:
        serve(engine)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("length", "max_tokens"), [(0, 8), (4, 0), (PAGES * 16 - 3, 4)])
def test_refuses(folder: Path, length: int, max_tokens: int) -> None:
    engine = engine_of(folder, "cpu", torch.float32)
    with pytest.raises(ValueError, match=f"at most 384 tokens, got {length} and {max_tokens}"):
        engine.add([5] * length, max_tokens)
    assert engine.step() == []


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_rate_beside_vllm(folder: Path, tmp_path: Path) -> None:
    """Both engines serve the batch, and the table has both. A CPU's figures mean nothing."""
    pytest.importorskip("vllm")
    words = "--backends CUSTOM --mode 0 --batch 4 --prompt 20 --tokens 6 --repeat 1 --minutes 4".split()
    command = [sys.executable, "-m", "benchmarks", "serve", "--engine", "vllm", "--minimal", *words]
    environment = {
        "FI_BACKEND_CPU": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    out = tmp_path / "rates.json"
    command += ["--model", str(folder), "--out", str(out)]
    done = subprocess.run(
        command, cwd=EXAMPLES.parent, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {row["impl"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == {"minimal engine", "CUSTOM"}, done.stderr
    for row in rows.values():
        assert row["case"] == "4 x 20 in, 6 out"
        assert row["tokens_s"] == pytest.approx(4000 / row["step_ms"], rel=0.01)


def test_command(folder: Path) -> None:
    """Answers two prompts, and decodes random tokens, with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:3])
    tokenizer.save(str(folder / "tokenizer.json"))

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        words = ("--model", str(folder), "--device", "cpu", "--max-tokens", "4", *words)
        script = [sys.executable, str(EXAMPLES / "minimal_engine.py")]
        return subprocess.run([*script, *words], capture_output=True, text=True, timeout=300)

    done = command("--prompt", "What is a {page}?", "--prompt", "Two")
    assert done.returncode == 0, done.stderr
    assert "> What is a {page}?\n" in done.stdout and "> Two\n" in done.stdout
    done = command("--bench", "3", "20")
    assert done.returncode == 0 and "12 tokens in" in done.stderr, done.stderr
    done = command("--prompt", "word " * 300)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "minimal_engine: expected a prompt"
    )
