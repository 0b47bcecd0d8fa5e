"""Runs one function of a host-run library: library, function, case.npz, seed, copies land early.

Started by hostrun, under a sanitizer or where an abort is expected; imports no torch.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np


def main(library: str, function: str, case: str, seed: str, early: str) -> None:
    with np.load(case) as stored:
        pointers = stored["none"]
        arrays = [stored[f"a{i}"] for i in range(len(pointers))]
    loaded = ctypes.CDLL(library)
    loaded.hostrun_set(ctypes.c_int64(int(seed)), ctypes.c_int64(int(early)))
    args: list[object] = []
    for array, pointer in zip(arrays, pointers, strict=True):
        if not pointer:
            args.append(ctypes.c_int64(int(array)))
        else:
            args.append(ctypes.c_void_p(array.ctypes.data if array.ndim else None))
    getattr(loaded, function)(*args)
    np.savez(Path(case).with_name("result.npz"), **{f"a{i}": a for i, a in enumerate(arrays)})


if __name__ == "__main__":
    main(*sys.argv[1:])
