"""Builds and loads the three kinds of shared library: core, executor of a Spec, smxx.

A library is a folder of the cache, published by one rename and named by the hash of all that went into it.
Many processes may ask for the same one: a file lock lets one compile and the others wait; the lock dies with
its process, so a crashed builder wedges nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import env
from ..variants import ELEMENTS, Argument, Variant, with_places
from . import toolchain
from .toolchain import BuildError, log

CPU = 0  # the arch and the room of the CPU executor
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_ELEMENTS = {"bf16": "FI_ELEMENT_BF16", "f16": "FI_ELEMENT_F16", "f32": "FI_ELEMENT_F32"}
_C_TYPES = {"float": "float", "int": "int32_t"}


def csrc() -> Path:
    here = Path(__file__).resolve().parent.parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / "params.h").exists():
            return folder
    raise BuildError(f"expected the C++ sources in {here / 'csrc'}, found none: reinstall fi_backend")


@dataclass(frozen=True)
class Spec:
    """One executor build. arch: 0 for the CPU, else 80, 86, ...; dtype: "bf16", "f16", "f32" (CPU only).

    batch_invariant: for plans of a batch invariant planner, and for no others. profile: writes down when each
    item and merge begins and ends; for `measure`. tile_list: for plans that skip, and for no others. levels:
    for plans of a planner with more than one level, and for no others. debug: finds tensor arguments indexed
    out of range; takes them as `debug.Arguments` has them.
    """

    arch: int
    dtype: str
    head_dim_qk: int
    head_dim_vo: int
    variant: Variant
    batch_invariant: bool = False
    profile: bool = False
    tile_list: bool = False
    levels: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        check_head_dims(self.arch, self.head_dim_qk, self.head_dim_vo)
        if self.arch != CPU:
            check_gpu_arch(self.arch)
        wanted = ("bf16", "f16", "f32") if self.arch == CPU else ("bf16", "f16")
        if self.dtype not in wanted:
            raise ValueError(
                f"expected dtype {' or '.join(wanted)} on {arch_name(self.arch)}, got {self.dtype}"
            )

    @property
    def room(self) -> int:
        return room_of(self.arch, self.head_dim_qk, self.head_dim_vo, self.batch_invariant)

    def __str__(self) -> str:
        dims = f"{self.head_dim_qk}x{self.head_dim_vo}"
        more = " batch invariant" * self.batch_invariant + " profile" * self.profile
        more += " tile list" * self.tile_list + " levels" * self.levels + " debug" * self.debug
        return f"{arch_name(self.arch)} attention {self.dtype} {dims} {self.variant}{more}"

    def header(self) -> str:
        """The text of fi_spec.h: configuration only."""
        return (
            f"// {self}\n#pragma once\n#define FI_ARCH {self.arch}\n#define FI_ROOM {self.room}\n"
            f"#define {_ELEMENTS[self.dtype]} 1\n{_variant_text(self.variant, self.debug)}"
            f"namespace fi::spec {{\n"
            f"constexpr int kHeadDimQk = {self.head_dim_qk}, kHeadDimVo = {self.head_dim_vo};\n"
            f"constexpr bool kBatchInvariant = {str(self.batch_invariant).lower()};\n"
            f"constexpr bool kProfile = {str(self.profile).lower()};\n"
            f"constexpr bool kTileList = {str(self.tile_list).lower()};\n"
            f"constexpr bool kLevels = {str(self.levels).lower()};\n}}\n"
        )


def _c_type(arg: Argument, debug: bool) -> str:
    if arg.kind != "tensor":
        return _C_TYPES[arg.kind]
    element = ELEMENTS[arg.dtype]
    data = f"fi::Checked<{element}>" if debug else f"const {element}*"
    return f"fi::PerKey<{data}>" if arg.per_key else data


def _variant_text(variant: Variant, debug: bool = False) -> str:
    """fi::spec::Args and fi::spec::Variant."""
    members = "".join(f" alignas(8) {_c_type(a, debug)} {a.name};" for a in variant.args)
    features = ", ".join(f.functor for f in variant.features)
    texts = "".join(f.text for f in variant.features)
    defined = f'#include "expression.h"\nnamespace fi::user {{\n{texts}}}\n' if texts else ""
    return (
        f'#include "arguments.h"\n#include "transforms.h"\n{defined}namespace fi::spec {{\n'
        f"struct Args {{ static constexpr bool kDebug = {str(debug).lower()};{members} }};\n"
        f"using Variant = fi::Compose<{features}>;\n}}\n"
    )


_SM90_DIMS_VO = (64, 80, 96, 112, 128, 192, 256)  # widths of products in csrc/sm90/wgmma.cuh


def choose_room(
    arch: int, head_dim_qk: int, head_dim_vo: int, batch_invariant: bool
) -> tuple[int, list[str]]:
    """Which executor serves these: the folder of csrc, 0 (cpu), 80 or 90; and what keeps them from sm90's."""
    if arch == CPU:
        return CPU, ["the CPU has one executor"]
    conditions = (
        (arch == 90, f"arch is {arch_name(arch)}, not sm90"),
        (head_dim_vo in _SM90_DIMS_VO, f"head_dim_vo {head_dim_vo} is not among {_SM90_DIMS_VO}"),
        (head_dim_vo <= head_dim_qk, f"head_dim_vo {head_dim_vo} exceeds head_dim {head_dim_qk}"),
        (not batch_invariant, "batch invariant builds are sm80's"),
    )
    failed = [reason for holds, reason in conditions if not holds]
    return 80 if failed else 90, failed


def room_of(arch: int, head_dim_qk: int, head_dim_vo: int, batch_invariant: bool) -> int:
    """The room alone. The planner's tiles follow it."""
    return choose_room(arch, head_dim_qk, head_dim_vo, batch_invariant)[0]


def arch_name(arch: int) -> str:
    return "cpu" if arch == CPU else f"sm{arch}"


def check_head_dims(arch: int, head_dim_qk: int, head_dim_vo: int) -> None:
    step = 8 if arch == CPU else 16
    for name, value in (("head_dim", head_dim_qk), ("head_dim_vo", head_dim_vo)):
        if not (0 < value <= 256 and value % step == 0):
            raise ValueError(f"expected {name} to be a multiple of {step} from {step} to 256, got {value}")


def parse_arch(text: str) -> int:
    """ "9.0" or "9.0a" -> 90."""
    found = re.fullmatch(r"(\d+)\.(\d)a?", text.strip())
    if not found:
        raise ValueError(f"expected a compute capability like 8.0 or 9.0a, got {text!r}")
    return int(found[1]) * 10 + int(found[2])


def check_gpu_arch(arch: int) -> None:
    if arch < 80:
        raise ValueError(f"expected a GPU of compute capability 8.0 or newer, got {arch // 10}.{arch % 10}")


@functools.cache
def arch_of(device: torch.device) -> int:
    """0 for a CPU device, else capability as 80, 90, ... Raises ValueError for a GPU older than 8.0."""
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise ValueError(f"expected a cpu or cuda device, got {device}")
    major, minor = torch.cuda.get_device_capability(device)
    check_gpu_arch(major * 10 + minor)
    return major * 10 + minor


Commands = list[list[str]]  # compiler calls that run side by side


@dataclass(frozen=True)
class Library:
    """What to compile. folders: parts of csrc whose text goes into the key. steps(folder): in turn."""

    label: str
    name: str
    folders: tuple[str, ...]
    identity: tuple[str, ...]  # compiler and flags, without paths that differ between machines
    header: str
    steps: Callable[[Path], list[Commands]]

    def key(self) -> str:
        digest = hashlib.sha256()
        root = csrc()
        files = sorted(root.glob("*.h"))
        for folder in self.folders:
            files += sorted(
                p for p in (root / folder).rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")
            )
        for part in (
            *self.identity,
            self.header,
            *(f"{p.relative_to(root)}\n{p.read_text()}" for p in files),
        ):
            digest.update(part.encode() + b"\0")
        return digest.hexdigest()[:20]

    def folder(self) -> Path:
        """Where the cache keeps it, built or not."""
        return env.cache_dir() / f"{self.name}-{self.key()}"


@functools.cache
def _core_library() -> Library:
    import tvm_ffi

    flags = ["-O2", "-std=c++17", "-fPIC", "-Wall", "-fno-gnu-unique"]
    libdir = str(Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent)
    tvm_includes = (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())

    def steps(folder: Path) -> list[Commands]:
        sources = sorted((csrc() / "core").glob("*.cpp"))
        objects = [str(folder / f"{p.stem}.o") for p in sources]
        compiler = [env.host_compiler(), *flags, *(f"-I{p}" for p in (csrc(), *tvm_includes)), "-c"]
        compiling = [[*compiler, str(p), "-o", o] for p, o in zip(sources, objects, strict=True)]
        libs = [f"-L{libdir}", "-ltvm_ffi", "-ldl"]
        linking = [env.host_compiler(), "-shared", *objects, *libs, "-o", str(folder / "lib.so")]
        return [compiling, [linking]]

    identity = (toolchain.host_version(), f"tvm_ffi {tvm_ffi.__version__}", *flags)
    return Library("core", "core", ("core",), identity, "", steps)


def _cpu_library(label: str, name: str, source: str, header: str) -> Library:
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-fPIC", "-Wall"]
    flags += ["-fopenmp", "-fno-gnu-unique"]
    gomp = toolchain.openmp_runtime()

    def steps(folder: Path) -> list[Commands]:
        cxx, obj, file = env.host_compiler(), str(folder / "source.o"), str(csrc() / "cpu" / source)
        return [
            [[cxx, *flags, f"-I{csrc()}", f"-I{folder}", "-c", file, "-o", obj]],
            [[cxx, "-shared", "-Wl,-Bsymbolic", obj, gomp, "-o", str(folder / "lib.so")]],
        ]

    identity = (toolchain.host_version(), toolchain.cpu_features(), os.path.basename(gomp), *flags)
    return Library(label, name, ("cpu",), identity, header, steps)


def _nvcc_steps(
    sources: list[str], arch: int, *more: str
) -> tuple[tuple[str, ...], Callable[[Path], list[Commands]]]:
    # 90a: wgmma and TMA exist only in the architecture-specific set
    number = "90a" if arch == 90 else str(arch)
    flags = ["-O3", "-std=c++17", f"-gencode=arch=compute_{number},code=sm_{number}", "-lineinfo"]
    flags += ["-Xcompiler=-fPIC,-fno-gnu-unique", "-Xlinker=-Bsymbolic", "-shared", "-Xptxas=-v", *more]

    def steps(folder: Path) -> list[Commands]:
        files, out = [str(csrc() / s) for s in sources], str(folder / "lib.so")
        return [[[toolchain.nvcc(), *flags, f"-I{csrc()}", f"-I{folder}", *files, "-o", out]]]

    return (toolchain.nvcc_version(), *flags), steps


def _gpu_library(spec: Spec) -> Library:
    # a product and a sum fused here and not there, or in one of two unrolled rows, would show in the bits
    more = ["--fmad=false"] if spec.batch_invariant else []
    identity, steps = _nvcc_steps([f"sm{spec.room}/attention.cu"], spec.arch, *more)
    return Library(str(spec), _file_name(spec), (f"sm{spec.room}", "smxx"), identity, spec.header(), steps)


def _smxx_library(arch: int) -> Library:
    check_gpu_arch(arch)
    identity, steps = _nvcc_steps(["smxx/plan.cu", "smxx/prefix.cu", "smxx/append.cu"], arch)
    label = f"{arch_name(arch)} planner and append"
    return Library(label, f"{arch_name(arch)}-smxx", ("smxx",), identity, "", steps)


def _file_name(spec: Spec) -> str:
    dims = f"{spec.head_dim_qk}x{spec.head_dim_vo}"
    more = "-invariant" * spec.batch_invariant + "-profile" * spec.profile
    more += "-listed" * spec.tile_list + "-levels" * spec.levels + "-debug" * spec.debug
    return f"{arch_name(spec.arch)}-{spec.dtype}-{dims}-{spec.variant}{more}".replace("+", "_").lower()


def library(spec: Spec) -> Library:
    if spec.arch == CPU:
        return _cpu_library(str(spec), _file_name(spec), "attention.cpp", spec.header())
    return _gpu_library(spec)


def tile_lister_library(arch: int, variant: Variant) -> Library:
    label, name = f"{arch_name(arch)} tile lister {variant}", f"{arch_name(arch)}-tiles-{variant}"
    header, name = f"// {label}\n#pragma once\n{_variant_text(variant)}", name.replace("+", "_").lower()
    if arch == CPU:
        return _cpu_library(label, name, "tile_list.cpp", header)
    identity, steps = _nvcc_steps(["smxx/tile_list.cu"], arch)
    return Library(label, name, ("smxx",), identity, header, steps)


@contextlib.contextmanager
def _locked(path: Path, label: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log().info("waiting for another process that builds %s", label)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, and so does the death of this process


def build(lib: Library) -> Path:
    """Folder with lib.so and build.log, compiled now if the cache lacks it. Raises BuildError."""
    cache = env.cache_dir()
    target = lib.folder()
    if (target / "lib.so").exists():
        return target
    try:
        with _locked(cache / "locks" / f"{target.name}.lock", lib.label):
            if not (target / "lib.so").exists():
                # only the holder of the lock builds this name: what lies there is of a crashed builder
                for stale in cache.glob(f"{target.name}.tmp-*"):
                    shutil.rmtree(stale, ignore_errors=True)
                shutil.rmtree(
                    target, ignore_errors=True
                )  # a folder without its library would be in the way of the rename
                _compile_into(lib, target)
    except OSError as error:
        raise BuildError(f"cannot write the cache folder {cache} (set FI_CACHE_DIR): {error}") from error
    return target


def _compile_into(lib: Library, target: Path) -> None:
    log().info("building %s ...", lib.label)
    start = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
    try:
        if lib.header:
            (folder / "fi_spec.h").write_text(lib.header)
        output = ""
        for commands in lib.steps(folder):
            try:
                with ThreadPoolExecutor(len(commands)) as pool:
                    output += "".join(pool.map(lambda c: toolchain.call(c, lib.label), commands))
            except BuildError as error:
                raise BuildError(with_places(str(error))) from None
        (folder / "build.log").write_text(output)
        for part in folder.glob("*.o"):
            part.unlink()
        os.chmod(folder, 0o755)  # mkdtemp makes it private; a shared cache is read by others
        os.rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    log().info("built %s in %.1f s", lib.label, time.perf_counter() - start)


def build_all(libs: Iterable[Library], jobs: int | None = None) -> list[Path]:
    """Builds several at once, one compiler process per CPU."""
    libs = list(libs)
    if not libs:
        return []
    jobs = jobs or min(len(libs), os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(build, libs))


@functools.cache
def core() -> Any:
    """The tvm-ffi module of csrc/core."""
    import tvm_ffi

    return _loaded(_core_library(), tvm_ffi.load_module)


def _loaded(lib: Library, load: Callable[[str], Any]) -> Any:
    folder = build(lib)
    try:
        return load(str(folder / "lib.so"))
    except (OSError, RuntimeError, AttributeError) as error:
        raise BuildError(
            f"cannot load {lib.label}: {str(error).splitlines()[0]}; remove {folder} and it is built again"
        ) from error


def _addresses(lib: Library, *symbols: str) -> list[int]:
    def load(path: str) -> list[int]:
        library = ctypes.CDLL(path)
        return [ctypes.cast(getattr(library, s), ctypes.c_void_p).value or 0 for s in symbols]

    addresses: list[int] = _loaded(lib, load)
    return addresses


@dataclass(frozen=True)
class Executor:
    """Addresses of the C functions fi_attention and fi_error."""

    attention: int
    error: int


@dataclass(frozen=True)
class Smxx:
    """Addresses of the C functions fi_plan, fi_find_prefixes, fi_append and fi_error."""

    plan: int
    find_prefixes: int
    append: int
    error: int


@dataclass(frozen=True)
class TileLister:
    """Addresses of the C functions fi_tile_list and fi_error."""

    tile_list: int
    error: int


@functools.cache
def executor(spec: Spec) -> Executor:
    """Builds on first use. Raises BuildError, and ValueError for a spec that no executor takes."""
    return Executor(*_addresses(library(spec), "fi_attention", "fi_error"))


@functools.cache
def tile_lister(arch: int, variant: Variant) -> TileLister:
    """What writes down which KV tiles the variant sees. Builds on first use, or BuildError."""
    return TileLister(*_addresses(tile_lister_library(arch, variant), "fi_tile_list", "fi_error"))


@functools.cache
def smxx(arch: int) -> Smxx:
    """Planner, prefix finder and append for a GPU of this arch (80, 90, ...). Builds on first use, or
    BuildError."""
    symbols = ("fi_plan", "fi_find_prefixes", "fi_append", "fi_error")
    return Smxx(*_addresses(_smxx_library(arch), *symbols))


def needed(specs: Iterable[Spec], skip: Variant | None = None) -> list[Library]:
    """Everything these specs load at run time: core, smxx of their GPUs, the executors.

    skip: what planners skip by; then its tile listers too.
    """
    specs = list(dict.fromkeys(specs))
    arches = sorted({s.arch for s in specs})
    listers = [] if skip is None else [tile_lister_library(a, skip) for a in arches]
    planners = [_smxx_library(a) for a in arches if a != CPU]
    return [_core_library(), *planners, *listers, *(library(s) for s in specs)]
