"""The launcher with the real model: an answer with our executor, and an endpoint that gives the same one."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

MODEL = Path(__file__).resolve().parents[2] / ".cache" / "models" / "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"
# an environment has one engine
ENGINE = next((name for name in ("vllm", "sglang") if importlib.util.find_spec(name)), "")
COMMAND = [sys.executable, "-m", "fi_backend.launch", "--engine", ENGINE]
PLUGINS = f"{ENGINE.upper()}_PLUGINS"
COMMAND += ["--model", str(MODEL), "--max-tokens", "12"]

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not ENGINE, reason="neither vLLM nor SGLang"),
    pytest.mark.skipif(not MODEL.exists(), reason=f"no model in {MODEL}: ./demo and ./test make it"),
]


def test_answer() -> None:
    done = subprocess.run([*COMMAND, "--prompt", QUESTION], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert " plans, executor " in done.stderr


def refusal(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_no_model_folder(tmp_path: Path) -> None:
    message = refusal("--model", str(tmp_path))
    assert message.strip() == f"launch: expected --model to be a folder with a config.json, got {tmp_path}"


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"expected --port to be free on 127.0.0.1, got {port}" in refusal("--port", str(port))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({PLUGINS: "other"}, f"expected {PLUGINS} to name fi_backend or to be unset, got 'other'"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler: no-such-compiler not found"),
        ({"FI_CACHE_DIR": "/proc/none"}, "cannot write the cache folder /proc/none"),
    ],
)
def test_surroundings_that_do_not_do(environment: dict[str, str], message: str) -> None:
    assert message in refusal(**environment)


def ask(port: int) -> dict[str, Any]:
    body = {"model": MODEL.name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body | {"temperature": 0}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def test_endpoint(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*COMMAND, "--port", str(port)], stdout=out, stderr=out, start_new_session=True
        )
    try:
        reply = None
        for _ in range(300):
            assert server.poll() is None, log.read_text()
            try:
                reply = ask(port)
                break
            except urllib.error.URLError:
                time.sleep(1)
        assert reply is not None, log.read_text()
        assert "Paris" in reply["choices"][0]["message"]["content"]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGINT)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
