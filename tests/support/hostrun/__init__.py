"""Compile CUDA C++ for the CPU (csrc/hostrun) and call it, here or under a sanitizer.

Libraries are built by g++ when first asked for and kept in build/hostrun under the hash of what
they were made of; nothing of it is shipped. A kernel is reached through an ``extern "C"`` function
of the source, whose arguments are pointers and whole numbers.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
CACHE = ROOT / "build" / "hostrun"
TORCH_TARGET = "0x020a000000000000"  # that of setup.py
HERE = Path(__file__).parent
CHILD = HERE / "child.py"
ROOMS = ("cuda", "hostrun", "common")
FLAGS = {
    "": ["-O1"],
    "canary": ["-O0"],  # for what runs once: compiled in half the time
    "asan": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O0", "-g1", "-fsanitize=thread", "-DHOSTRUN_THREADS"],
}
PRELOAD = {"asan": ("libasan.so", "libstdc++.so"), "tsan": ("libtsan.so",)}
# Every kernel is shown both ends of what the hardware may do with a copy, and several orders of
# threads: ascending, descending, shuffled.
SCHEDULES = [(seed, early) for seed in (0, 1, 7) for early in (False, True)]

EXPORTS = """
extern "C" void hostrun_set(int64_t seed, int64_t early) {
  hostrun::settings.seed = static_cast<unsigned>(seed);
  hostrun::settings.copies_land_early = early != 0;
}
extern "C" void hostrun_only(int64_t block) { hostrun::settings.only_block = block; }
extern "C" void hostrun_count(int64_t* counts) {
  counts[0] = hostrun::settings.copied.exchange(0);
  counts[1] = hostrun::settings.streamed.exchange(0);
}
extern "C" int64_t hostrun_stored() { return hostrun::settings.stored.exchange(0); }
"""

Fault = tuple[str, str, str]  # file of csrc or of the source, what stands there, what instead


def runtime(name: str) -> str:
    """Path of a run-time library of g++, or "" where it has none."""
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return os.path.realpath(found) if os.path.isabs(found) and Path(found).exists() else ""


def lacks(sanitize: str = "") -> str:
    """Why kernels cannot be run like this here, or ""."""
    if shutil.which("g++") is None:
        return "no g++ here"
    missing = [name for name in PRELOAD.get(sanitize, ()) if not runtime(name)]
    if missing:
        return f"g++ comes without {', '.join(missing)}"
    return "no setarch here" if sanitize == "tsan" and shutil.which("setarch") is None else ""


def read(source: Path) -> dict[str, str]:
    """The files that a source may include, and itself, by their place in a copy."""
    files = {
        f"{room}/{path.name}": path.read_text()
        for room in ROOMS
        for path in sorted((ROOT / "csrc" / room).iterdir())
        if path.suffix in (".h", ".cuh", ".cu", ".cpp")
    }
    return {**files, f"tests/{source.name}": source.read_text()}


def build(source: Path, sanitize: str = "", fault: Fault | None = None) -> Path:
    """The shared library of a .cu source; with ``fault``, of a copy that has it planted."""
    files = read(source)
    if fault is not None:
        name, old, new = fault
        (where,) = (file for file in files if file.endswith("/" + name))
        assert old in files[where], f"nothing to plant the fault on: {old!r}"
        files[where] = files[where].replace(old, new)
    mains = {"main.cpp": f'#include "tests/{source.name}"\n{EXPORTS}'}
    return _made(f"{source.stem}-{sanitize or 'plain'}", files, mains, FLAGS[sanitize], [])


def load_op(stem: str) -> Path:
    """An op of csrc/cuda, registration and all, for CPU tensors: build it, hand it to torch.

    Its schema is that of the op's file in bigops/ops; `schedule` sets how its threads run.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    main, op = f"{stem}.cu", f"{stem}.cpp"
    files = read(ROOT / "csrc" / "cuda" / main)
    mains = {"main.cpp": f'#include "cuda/{main}"\n{EXPORTS}', "op.cpp": f'#include "cuda/{op}"\n'}
    flags = ["-O1", "-DBIGOPS_HOSTRUN", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags += [f"-I{path}" for path in include_paths()]
    link = [*(f"-L{path}" for path in library_paths()), "-Wl,--no-as-needed", "-ltorch"]
    library = _made(f"{stem}-op-{torch.__version__}", files, mains, flags, [*link, "-ltorch_cpu"])
    torch.ops.load_library(str(library))
    return library


def _made(
    name: str, files: dict[str, str], mains: dict[str, str], flags: list[str], link: list[str]
) -> Path:
    """The library of ``mains``, which include ``files``; made where the cache has none."""
    flags = ["-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-fPIC", "-fno-gnu-unique", *flags]
    of = repr((sorted(files.items()), sorted(mains.items()), flags, link))
    digest = hashlib.sha256(of.encode()).hexdigest()[:16]
    out = CACHE / f"{name}-{digest}.so"
    if out.exists():
        return out
    folder = CACHE / f"{digest}-{os.getpid()}"
    for file, text in {**files, **mains}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)

    def compile_one(main: str) -> str:
        obj = str(folder / f"{main}.o")
        command = ["g++", *flags, f"-I{folder}", "-c", str(folder / main), "-o", obj]
        subprocess.run(command, check=True)
        return obj

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, mains))
    made = folder / "made.so"
    command = ["g++", *flags, "-shared", *objects, *link, "-lpthread", "-o", str(made)]
    subprocess.run(command, check=True)
    os.replace(made, out)  # several processes may build it: the last one wins
    shutil.rmtree(folder)
    return out


def schedule(library: Path, seed: int, early: bool) -> None:
    """How the threads of a loaded library run from now on, and when their copies land."""
    ctypes.CDLL(str(library)).hostrun_set(ctypes.c_int64(seed), ctypes.c_int64(early))


def counts(library: Path) -> list[int]:
    """[bytes read by cp.async, bytes read by streaming loads] since the last call."""
    found = torch.zeros(2, dtype=torch.int64)
    ctypes.CDLL(str(library)).hostrun_count(ctypes.c_void_p(found.data_ptr()))
    return [int(count) for count in found]


def stored(library: Path) -> int:
    """Bytes written by streaming stores since the last call."""
    function = ctypes.CDLL(str(library)).hostrun_stored
    function.restype = ctypes.c_int64
    return int(function())


def convert(args: tuple[Any, ...], keep: list[Any]) -> list[Any]:
    """Arguments as ctypes passes them; what they point to stays alive in ``keep``."""
    out: list[Any] = []
    for arg in args:
        if arg is None:
            out.append(ctypes.c_void_p(None))
        elif isinstance(arg, Tensor):
            assert arg.is_contiguous()
            keep.append(arg)
            out.append(ctypes.c_void_p(arg.data_ptr() if arg.numel() else None))
        else:
            out.append(ctypes.c_int64(int(arg)))
    return out


def call(library: Path, function: str, *args: Any, seed: int = 0, early: bool = False) -> list[int]:
    """Run a function in this process; tensors are written in place. Returns its `counts`."""
    schedule(library, seed, early)
    counts(library)
    keep: list[Any] = []
    getattr(ctypes.CDLL(str(library)), function)(*convert(args, keep))
    return counts(library)


def call_apart(
    library: Path,
    function: str,
    *args: Any,
    folder: Path,
    sanitize: str = "",
    seed: int = 0,
    early: bool = False,
) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, which a sanitizer or an abort may end.

    The child imports numpy and no torch; each tensor is an allocation of just its size there. Where
    it ends well the tensors are written in place.
    """
    case = folder / "case.npz"
    arrays = {
        f"a{i}": (
            arg.contiguous().view(-1).view(torch.uint8).numpy()
            if isinstance(arg, Tensor) and arg.numel()
            else np.array(-1 if arg is None or isinstance(arg, Tensor) else int(arg))
        )
        for i, arg in enumerate(args)
    }
    nothing = [isinstance(arg, Tensor) or arg is None for arg in args]
    np.savez(case, none=np.array(nothing), **arrays)  # type: ignore[arg-type]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        # CPython keeps memory to the end on purpose
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    }
    if sanitize:
        env["LD_PRELOAD"] = ":".join(runtime(name) for name in PRELOAD[sanitize])
    command = [sys.executable, str(CHILD), str(library), function, str(case), str(seed)]
    command += [str(int(early))]
    if sanitize == "tsan":
        command = ["setarch", "-R", *command]  # it cannot place its shadow at random addresses
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    if done.returncode == 0:
        with np.load(folder / "result.npz") as result:
            for i, arg in enumerate(args):
                if isinstance(arg, Tensor) and arg.numel():
                    arg.view(-1).view(torch.uint8).copy_(torch.from_numpy(result[f"a{i}"]))
    return done


def needs(sanitize: str = "") -> pytest.MarkDecorator:
    """Skip where kernels cannot be run like this."""
    return pytest.mark.skipif(bool(lacks(sanitize)), reason=lacks(sanitize))
