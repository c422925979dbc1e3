"""The cache of compiled libraries: one build per key, whoever asks; clear words when there is no compiler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fi_backend import jit
from fi_backend.jit import models
from fi_backend.jit.__main__ import main
from fi_backend.variants import ALIBI, CAUSAL, SINKS, SOFT_CAP, TREE, WINDOW

SPEC = jit.Spec(0, "f32", 8, 8, CAUSAL)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FI_CACHE_DIR", str(tmp_path))
    return tmp_path


def _built(log: str) -> int:
    return sum(line.startswith("built") for line in log.splitlines())


def test_header_holds_configuration_only() -> None:
    text = jit.Spec(90, "bf16", 192, 128, CAUSAL + WINDOW + SOFT_CAP + ALIBI).header()
    assert "#define FI_ARCH 90" in text and "#define FI_ELEMENT_BF16 1" in text
    assert "kHeadDimQk = 192, kHeadDimVo = 128" in text
    assert (
        "alignas(8) int32_t window; alignas(8) float soft_cap; alignas(8) const float* alibi_slopes; }"
        in text
    )
    assert "fi::Compose<fi::Causal, fi::Window, fi::SoftCap, fi::Alibi>" in text
    text = jit.Spec(80, "f16", 64, 64, CAUSAL + TREE).header()
    assert "alignas(8) const int64_t* tree_mask; alignas(8) int32_t tree_tokens; }" in text
    assert "fi::Compose<fi::Causal, fi::Tree>" in text


def test_batch_invariant_builds_are_their_own() -> None:
    normal, invariant = (jit.Spec(0, "f32", 8, 8, CAUSAL, batch_invariant=b) for b in (False, True))
    assert "kBatchInvariant = false" in normal.header() and "kBatchInvariant = true" in invariant.header()
    assert jit.library(normal).name + "-invariant" == jit.library(invariant).name


def test_profiling_builds_are_their_own() -> None:
    normal, profile = (jit.Spec(0, "f32", 8, 8, CAUSAL, profile=p) for p in (False, True))
    assert "kProfile = false" in normal.header() and "kProfile = true" in profile.header()
    assert jit.library(normal).name + "-profile" == jit.library(profile).name


def test_debug_builds_are_their_own() -> None:
    normal, debug = (jit.Spec(0, "f32", 8, 8, CAUSAL + TREE, debug=d) for d in (False, True))
    assert "kDebug = false" in normal.header() and "fi::Checked" not in normal.header()
    assert "kDebug = true" in debug.header() and "fi::Checked<int64_t> tree_mask" in debug.header()
    assert jit.library(normal).name + "-debug" == jit.library(debug).name


def test_builds_for_tile_lists_are_their_own() -> None:
    normal, listed = (jit.Spec(0, "f32", 8, 8, CAUSAL, tile_list=t) for t in (False, True))
    assert "kTileList = false" in normal.header() and "kTileList = true" in listed.header()
    assert jit.library(normal).name + "-listed" == jit.library(listed).name
    assert jit.tile_lister_library(0, CAUSAL).name == "cpu-tiles-causal"


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: jit.Spec(75, "f16", 64, 64, CAUSAL), "compute capability 8.0 or newer, got 7.5"),
        (
            lambda: jit.Spec(80, "bf16", 72, 72, CAUSAL),
            "head_dim to be a multiple of 16 from 16 to 256, got 72",
        ),
        (
            lambda: jit.Spec(80, "bf16", 64, 320, CAUSAL),
            "head_dim_vo to be a multiple of 16 from 16 to 256, got 320",
        ),
        (lambda: jit.Spec(80, "f32", 64, 64, CAUSAL), "expected dtype bf16 or f16 on sm80, got f32"),
        (lambda: jit.arch_of(torch.device("meta")), "expected a cpu or cuda device, got meta"),
    ],
)
def test_specs_that_no_executor_takes(make_it, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()


def test_second_build_is_a_lookup(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fi_backend")
    first = jit.build(jit.library(SPEC))
    assert jit.build(jit.library(SPEC)) == first
    assert _built("\n".join(r.getMessage() for r in caplog.records)) == 1
    assert {p.name for p in first.iterdir()} >= {"lib.so", "fi_spec.h", "build.log"}
    assert not list(cache.glob("*.tmp-*"))


def test_key_depends_on_what_goes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    key = jit.library(SPEC).key()
    assert jit.library(SPEC).key() == key
    assert jit.library(jit.Spec(0, "f32", 8, 8, CAUSAL + SINKS)).key() != key
    monkeypatch.setattr(jit.toolchain, "host_version", lambda: "another compiler")
    assert jit.library(SPEC).key() != key


def _builder(cache: Path) -> subprocess.Popen[str]:
    spec = "jit.Spec(0, 'f32', 8, 8, variants.CAUSAL)"
    code = f"from fi_backend import jit, variants; jit.build(jit.library({spec}))"
    env = os.environ | {"FI_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)


def test_many_processes_build_once(cache: Path) -> None:
    logs = [p.communicate(timeout=120)[1] for p in [_builder(cache) for _ in range(3)]]
    assert sum("fi_backend: built" in log for log in logs) == 1, logs
    assert len(list(cache.glob("cpu-*"))) == 1


def test_killed_builder_wedges_nobody(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow-g++"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] || exec sleep 60\nexec g++ "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    builder = _builder(cache)
    deadline = time.monotonic() + 60
    while not list(cache.glob("*.tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    builder.send_signal(signal.SIGKILL)
    builder.communicate()
    assert list(cache.glob("*.tmp-*")), "expected the remains of the killed builder"
    slow.write_text('#!/bin/sh\nexec g++ "$@"\n')
    jit.build(jit.library(SPEC))
    assert not list(cache.glob("*.tmp-*"))


def test_no_host_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        jit.BuildError, match=r"^no C\+\+ compiler: no-such-compiler not found; install g\+\+ or"
    ):
        jit.build(jit.library(SPEC))


def test_no_cuda_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(
        jit.BuildError, match=r"^no CUDA compiler: nvcc is neither under CUDA_HOME nor on PATH"
    ):
        jit.library(jit.Spec(80, "bf16", 64, 64, CAUSAL))


def test_compiler_errors_are_shown(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-g++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\necho "it does not like this"; exit 3\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(
        jit.BuildError, match=r"(?s)cannot build cpu attention f32 8x8 CAUSAL: .*it does not like this"
    ):
        jit.build(jit.library(SPEC))
    assert not list(cache.glob("cpu-*"))


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_CACHE_DIR", "/proc/nowhere")
    with pytest.raises(
        jit.BuildError, match=r"cannot write the cache folder /proc/nowhere \(set FI_CACHE_DIR\)"
    ):
        jit.build(jit.library(SPEC))


def test_library_that_cannot_be_loaded(cache: Path) -> None:
    folder = jit.build(jit.library(SPEC))
    (folder / "lib.so").write_bytes(b"not a library")
    jit.executor.cache_clear()
    with pytest.raises(
        jit.BuildError, match=rf"^cannot load cpu attention .*; remove {folder} and it is built"
    ):
        jit.executor(SPEC)
    (folder / "lib.so").unlink()  # the rest of the folder stays
    assert jit.executor(SPEC).attention
    jit.executor.cache_clear()


GEMMA2 = {
    "model_type": "gemma2",
    "head_dim": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "dtype": "bfloat16",
}
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "torch_dtype": "float16"}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (LLAMA, ["sm90 attention f16 128x128 CAUSAL"]),
        (
            GEMMA2,
            [
                "sm90 attention bf16 256x256 CAUSAL+SOFT_CAP",
                "sm90 attention bf16 256x256 CAUSAL+WINDOW+SOFT_CAP",
            ],
        ),
        (LLAMA | {"sliding_window": 100, "use_sliding_window": False}, ["sm90 attention f16 128x128 CAUSAL"]),
        (LLAMA | {"sliding_window": 100}, ["sm90 attention f16 128x128 CAUSAL+WINDOW"]),
        (
            {
                "model_type": "gpt_oss",
                "head_dim": 64,
                "sliding_window": 128,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            ["sm90 attention bf16 64x64 CAUSAL+SINKS", "sm90 attention bf16 64x64 CAUSAL+WINDOW+SINKS"],
        ),
        ({"model_type": "bloom", "n_embd": 1024, "n_head": 16}, ["sm90 attention bf16 64x64 CAUSAL+ALIBI"]),
        ({"text_config": LLAMA | {"head_dim": 96}}, ["sm90 attention f16 96x96 CAUSAL"]),
    ],
)
def test_specs_of_a_model(config: dict, wanted: list[str]) -> None:
    assert [str(s) for s in models.specs(config, 90)] == wanted


def test_warmup(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"head_dim": 8}))
    monkeypatch.setattr(jit, "_core_library", lambda: jit.library(SPEC))  # core takes ten seconds
    assert main(["warmup", "--model", str(tmp_path), "--device", "cpu"]) == 0
    assert "cpu attention f16 8x8 CAUSAL" in capsys.readouterr().out
    assert len(list(cache.glob("cpu-f16-8x8-causal-*"))) == 2, "with levels and without"
    monkeypatch.setenv("FI_PREFIX", "off")
    assert main(["warmup", "--model", str(tmp_path), "--device", "cpu"]) == 0
    assert "levels" not in capsys.readouterr().out
    own = tmp_path / "own.py"
    own.write_text('from fi_backend.variants import define\nWARM = define("WARM", logits="2 * x")\n')
    monkeypatch.setenv("FI_VARIANT", f"{own}:WARM")
    assert main(["warmup", "--model", str(tmp_path), "--device", "cpu"]) == 0
    assert "cpu attention f16 8x8 CAUSAL+WARM" in capsys.readouterr().out


def test_warmup_for_plans_that_skip(cache: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"head_dim": 8}))
    monkeypatch.setattr(jit, "_core_library", lambda: jit.library(SPEC))  # core takes ten seconds
    command = ["warmup", "--model", str(tmp_path), "--device", "cpu", "--skip"]
    assert main([*command, "CAUSAL"]) == 0
    assert "cpu attention f16 8x8 CAUSAL tile list\n" in capsys.readouterr().out
    assert (
        len(list(cache.glob("cpu-f16-8x8-causal-listed-*")))
        == len(list(cache.glob("cpu-tiles-causal-*")))
        == 1
    )
    assert main([*command, "CAUSAL+WINDOW"]) == 2
    assert "expected --skip of what a layer has all of, CAUSAL, got CAUSAL+WINDOW" in capsys.readouterr().err


def test_warmup_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def _has_nvcc() -> bool:
    try:
        return bool(jit.toolchain.nvcc())
    except jit.BuildError:
        return False


@pytest.mark.skipif(not _has_nvcc(), reason="no nvcc")
def test_compile_reports_registers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--arch", "9.0a", "--head-dim", "64", "--fail-on-spill"]) == 0
    out = capsys.readouterr().out
    assert "attention_kernel" in out and "append_kernel" in out and "0 kernels spill registers" in out


def test_compile_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--arch", "seven"]) == 2
    assert "expected a compute capability like 8.0 or 9.0a, got 'seven'" in capsys.readouterr().err
    assert main(["compile", "--arch", "7.5"]) == 2


def _explained(capsys: pytest.CaptureFixture[str], options: str) -> dict[str, str]:
    assert main(["explain", *options.split()]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    return {line[2:9].strip() or "and": line[11:] for line in lines}


TMA = "TMA; cp.async for tiles with tokens that are no keys or before all windows"
RUNS = "TMA where half a tile's tokens lie one behind the other in the cache; cp.async for others"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("", "sm90|every condition of sm90 holds|q_wide 128, q_narrow 64, kv 128"),
        ("--head-dim 256", "sm90|every condition of sm90 holds|q_wide 128, q_narrow 64, kv 64"),
        ("--head-dim-vo 192", "sm80|head_dim_vo 192 exceeds head_dim 128|q_wide 64, q_narrow 16, kv 64"),
        ("--head-dim 96", "sm90|every condition of sm90 holds|q_wide 128, q_narrow 64, kv 160"),
        (
            "--head-dim 48",
            "sm80|head_dim_vo 48 is not among (64, 80, 96, 112, 128, 192, 256)"
            "|q_wide 128, q_narrow 16, kv 64",
        ),
        (
            "--batch-invariant",
            "sm80|batch invariant builds are sm80's|q_wide 128, q_narrow 16, kv 64",
        ),
        ("--arch 8.6", "sm80|arch is sm86, not sm90|q_wide 128, q_narrow 16, kv 64"),
        ("--arch cpu --dtype f32 --head-dim 8", "cpu|the CPU has one executor|q_wide 64, q_narrow 16, kv 64"),
    ],
)
def test_explain(options: str, wanted: str, capsys) -> None:
    said = _explained(capsys, options)
    assert [said[key] for key in ("room", "reason", "tiles")] == wanted.split("|")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--arch cpu", "read in place"),
        ("--arch 8.0 --page-size 16", "cp.async"),
        ("--page-size 8", TMA),
        ("--page-size 256", TMA),
        ("--page-size 1", f"{RUNS}; page size 1 is not a power of two from 8 up"),
        ("--page-size 24", f"{RUNS}; page size 24 is not a power of two from 8 up"),
        ("", f"page sizes that are powers of two from 8 up: {TMA}"),
    ],
)
def test_explain_loads(options: str, wanted: str, capsys) -> None:
    said = _explained(capsys, options)
    assert said["K and V"] == wanted
    assert said.get("and") == (None if options else f"other page sizes: {RUNS}")


def test_explain_says_whether_it_is_built(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = SimpleNamespace(plan_tiles=lambda *_: range(5))  # the real one takes ten seconds
    monkeypatch.setattr(jit, "core", lambda: core)
    options = "--arch cpu --dtype f32 --head-dim 8"
    folder = jit.library(SPEC).folder()
    assert folder.parent == cache
    assert _explained(capsys, options)["library"] == f"{folder} (not built)"
    assert jit.build(jit.library(SPEC)) == folder
    assert _explained(capsys, options)["library"] == f"{folder} (built)"


def test_explain_without_nvcc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nvcc_version() -> str:
        raise jit.BuildError("no CUDA compiler")

    monkeypatch.setattr(jit.toolchain, "nvcc_version", nvcc_version)
    assert _explained(capsys, "")["library"] == "not known on this machine: no CUDA compiler"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--page-size 0", "expected --page-size of at least 1, got 0"),
        ("--head-dim 72", "expected head_dim to be a multiple of 16 from 16 to 256, got 72"),
        ("--head-dim-vo 0", "expected head_dim_vo to be a multiple of 16 from 16 to 256, got 0"),
        ("--dtype f32", "expected dtype bf16 or f16 on sm90, got f32"),
        ("--arch 7.5", "expected a GPU of compute capability 8.0 or newer, got 7.5"),
    ],
)
def test_explain_refuses(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_variants_survive_pickle() -> None:
    import pickle

    variant = CAUSAL + WINDOW + SINKS
    assert pickle.loads(pickle.dumps(variant)) is variant
