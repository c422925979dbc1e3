"""The two commands, before they make anything: help, refusals, what a step of an environment is."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("environment")


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help() -> None:
    done = command("./demo", "--help")
    assert done.returncode == 0
    assert all(flag in done.stdout for flag in ("--prompt", "--engine", "--port"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "tgi"], "expected --engine vllm or sglang, got tgi"),
        (["--port", "70000"], "expected --port between 1 and 65535, got 70000"),
        (["--max-tokens", "0"], "expected --max-tokens of at least 1, got 0"),
    ],
)
def test_refusals(words: list[str], message: str) -> None:
    done = command("./demo", *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_no_compiler(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(environment.SetupError, match="expected no-such-compiler on PATH"):
        environment.check_machine()


def test_step_runs_again_when_its_file_changes(environment: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text("a")
    step = environment.Step("package", ["-e", "."], file)
    before = step.key()
    assert step.key() == before
    file.write_text("b")
    assert step.key() != before


def test_interrupted_setup_goes_on(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    env = environment.Environment("e", [environment.Step(name, [name]) for name in ("one", "two")])
    env.python.parent.mkdir(parents=True)
    env.python.touch()
    (env.folder / "steps.json").write_text("[]")
    ran: list[str] = []

    def pip(env: object, title: str, arguments: list[str]) -> None:
        if arguments == ["two"] and "two" not in ran:
            ran.append("two")
            raise environment.SetupError("cut off")
        ran.append(f"{arguments[0]} done")

    monkeypatch.setattr(environment, "_pip", pip)
    with pytest.raises(environment.SetupError):
        environment.make(env)
    assert environment.make(env) == env.python
    assert environment.make(env) == env.python
    assert ran == ["one done", "two", "two done"]


@pytest.mark.parametrize("left", ["no stamp", "no python"])
def test_a_half_made_environment_is_made_again(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: str
) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    env = environment.Environment("e", [environment.Step("one", ["one"])])
    env.python.parent.mkdir(parents=True)
    if left == "no stamp":  # interrupted before pip was there
        env.python.touch()
    else:
        (env.folder / "steps.json").write_text(f'["{env.steps[0].key()}"]')
    ran: list[list[str]] = []
    monkeypatch.setattr(environment, "_pip", lambda env, title, arguments: ran.append(arguments))
    assert environment.make(env) == env.python
    assert ran == [["one"]]
    assert command(str(env.python), "-m", "pip", "--version").returncode == 0


def test_a_gpu_without_nvcc(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    monkeypatch.setattr(environment, "_finds_nvcc", lambda: False)
    with pytest.raises(environment.SetupError, match="expected nvcc on PATH or under CUDA_HOME"):
        environment.check_machine()
