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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "hostrun"
CHILD = Path(__file__).parent / "hostrun_child.py"
ROOMS = ("cuda", "hostrun", "common")
FLAGS = {
    "": ["-O1"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread", "-DHOSTRUN_THREADS"],
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
extern "C" void hostrun_count(int64_t* counts) {
  counts[0] = hostrun::settings.copied.exchange(0);
  counts[1] = hostrun::settings.streamed.exchange(0);
}
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


def build(source: Path, sanitize: str = "", fault: Fault | None = None) -> Path:
    """The shared library of a .cu source; with ``fault``, of a copy that has it planted."""
    files = {
        f"{room}/{path.name}": path.read_text()
        for room in ROOMS
        for path in sorted((ROOT / "csrc" / room).iterdir())
        if path.suffix in (".h", ".cuh", ".cu")
    }
    files[f"tests/{source.name}"] = source.read_text()
    if fault is not None:
        name, old, new = fault
        (where,) = (f for f in files if f.endswith("/" + name))
        assert old in files[where], f"nothing to plant the fault on: {old!r}"
        files[where] = files[where].replace(old, new)
        if source.parent == ROOT / "csrc" / "cuda":
            files[f"tests/{source.name}"] = files.get(f"cuda/{source.name}", "")
    flags = ["-std=c++17", "-Wall", "-Wno-unknown-pragmas", *FLAGS[sanitize]]
    made_of = hashlib.sha256(repr((sorted(files.items()), flags, EXPORTS)).encode()).hexdigest()
    out = CACHE / f"{source.stem}-{sanitize or 'plain'}-{made_of[:16]}.so"
    if out.exists():
        return out
    folder = CACHE / f"{made_of[:16]}-{os.getpid()}"
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    main = folder / "main.cpp"
    main.write_text(f'#include "tests/{source.name}"\n{EXPORTS}')
    made = folder / "made.so"
    command = ["g++", *flags, "-shared", "-fPIC", f"-I{folder}", str(main), "-o", str(made)]
    subprocess.run([*command, "-lpthread"], check=True)
    os.replace(made, out)  # several processes may build it: the last one wins
    shutil.rmtree(folder)
    return out


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
    """Run a function in this process; tensors are written in place.

    Returns:
        [bytes read by cp.async, bytes read by the loads of ptx.cuh].
    """
    loaded = ctypes.CDLL(str(library))
    counts = torch.zeros(2, dtype=torch.int64)
    loaded.hostrun_set(ctypes.c_int64(seed), ctypes.c_int64(early))
    keep: list[Any] = []
    getattr(loaded, function)(*convert(args, keep))
    loaded.hostrun_count(ctypes.c_void_p(counts.data_ptr()))
    return [int(count) for count in counts]


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
