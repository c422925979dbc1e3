"""Machine code of the common kernels, no GPU needed: tensor cores and asynchronous copies in, spills out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from fi_backend import jit
from fi_backend.jit import toolchain
from fi_backend.jit.__main__ import COMMON
from fi_backend.variants import parse

ARCHES = (80, 90)
LARGEST = ("bf16", 64, 64, "CAUSAL+WINDOW+SOFT_CAP+ALIBI+SINKS")
TREE = ("bf16", 128, 128, "CAUSAL+TREE")  # what speculation asks for
SIGMOID = ("bf16", 128, 128, "CAUSAL+SIGMOID")  # without softmax
ROPE = ("bf16", 128, 128, "CAUSAL+ROPE")
SQUARE = [("bf16", d, d, "CAUSAL") for d in (64, 128, 256)]
SPECS = [
    jit.Spec(arch, dtype, qk, vo, parse(variant), *flags)
    for arch in ARCHES
    for *flags, wanted in (  # batch_invariant, profile, tile_list, levels
        (False, False, False, False, [*COMMON, LARGEST, TREE, SIGMOID, ROPE]),
        (True, False, False, False, SQUARE),
        (False, True, False, False, [("bf16", 128, 128, "CAUSAL")]),
        (False, False, True, False, [TREE]),
        (False, False, False, True, SQUARE),
    )
    for dtype, qk, vo, variant in wanted
]


def nvcc_missing() -> str:
    try:
        toolchain.nvcc()
    except toolchain.BuildError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(nvcc_missing()), reason=f"kernels not compiled: {nvcc_missing()}")


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    jit.build_all([jit.library(spec) for spec in SPECS])


def cuobjdump(option: str, library: Path) -> str:
    # the pip wheels put both tools here; cuobjdump looks for nvdisasm on PATH
    wheel = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
    path = f"{wheel}:/usr/local/bin:/usr/bin:/bin"
    tool = shutil.which("cuobjdump", path=path) or shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump: pip install --no-deps nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    done = subprocess.run([tool, option, str(library)], capture_output=True, text=True, env={"PATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


def local_accesses(sass: str) -> list[str]:
    return re.findall(r"\b(?:LDL|STL)\b\S*", sass)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_spills(spec: jit.Spec) -> None:
    log = (jit.build(jit.library(spec)) / "build.log").read_text()
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) >= 2, f"expected ptxas to report the attention and the merge kernel, got:\n{log}"
    assert all(frame == ("0", "0", "0") for frame in frames), log
    assert not re.search(r"\bC75\d\d\b", log), f"wgmma serialized or setmaxnreg ignored:\n{log}"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_instructions(spec: jit.Spec) -> None:
    sass = cuobjdump("-sass", jit.build(jit.library(spec)) / "lib.so")
    product = r"HGMMA\.\d+x\d+x16" if spec.room == 90 else r"HMMA\.16816"
    assert f"arch = sm_{spec.arch}" in sass
    assert re.search(product + r"\.F32" + (r"\.BF16 " if spec.dtype == "bf16" else " "), sass), "no product"
    assert ("UTMALDG" in sass) == (spec.room == 90), "TMA loads, in sm90's room alone"
    assert re.search(r"LDGSTS\.E\S*\.128", sass), "no 16-byte asynchronous copy"
    assert not local_accesses(sass), "local memory in use"
    assert ("SR_GLOBALTIMER" in sass) == spec.profile, "clocks are read in profiling builds alone"
