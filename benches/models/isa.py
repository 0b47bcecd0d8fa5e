"""One instruction set for all sides: who is held by what, and what each one ran with.

oneDNN, inside torch and inside OpenVINO alike, obeys ``ONEDNN_MAX_CPU_ISA``; torch's own loops obey
``ATEN_CPU_CAPABILITY``, ours ``BIGOPS_ISA``. onnxruntime obeys nothing, but every library has to
ask Linux for AMX's tile registers before it may use them: refused there, all do without (its int8
product 512x1024x1024 on one thread: 1,560 GOP/s, refused 550).
Source: oneDNN's "CPU Dispatcher Control"; Linux's Documentation/arch/x86/xstate.rst.

Nothing heavy is imported here: the variables count only before torch is loaded.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path
from typing import Any

# ours -> oneDNN's, torch's, bigops'
LEVELS = {
    "avx2": ("AVX2", "avx2", "avx2"),
    "avx512": ("AVX512_CORE", "avx512", "avx512"),
    "avx512_vnni": ("AVX512_CORE_VNNI", "avx512", "avx512vnni"),
    "avx512_bf16": ("AVX512_CORE_BF16", "avx512", "avx512bf16"),
}
VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "BIGOPS_ISA")
_LOADED = ("torch", "openvino", "onnxruntime")

# From <linux/prctl.h>, <linux/filter.h>, <linux/seccomp.h>, <asm/prctl.h>.
_NO_NEW_PRIVS, _SECCOMP, _FILTER = 38, 22, 2
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_LOAD, _SKIP_UNLESS, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _NOT_PERMITTED = 0x7FFF0000, 0x00050000 | 1


def hold(level: str) -> None:
    """Hold this process and its children to an instruction set without AMX; there is no way back.

    Raises:
        ValueError: no such level, or a library that reads the variables is loaded already.
    """
    if level not in LEVELS:
        raise ValueError(f"isa: expected one of {', '.join(LEVELS)}; got {level!r}")
    early = [name for name in _LOADED if name in sys.modules]
    if early:
        raise ValueError(f"isa: expected to be set before {early[0]} is loaded, got it after")
    os.environ.update(zip(VARIABLES, LEVELS[level], strict=True))
    if "amx_tile" in flags():
        refuse_amx()


def held() -> str:
    """The level that this process is held to, or ""."""
    found = os.environ.get(VARIABLES[0], "")
    return next((ours for ours, (theirs, *_) in LEVELS.items() if theirs == found), "")


def flags() -> frozenset[str]:
    """The CPU's features as Linux names them; none where there is no /proc."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def best() -> str:
    """The highest level that this CPU has, ``amx`` above those of `LEVELS`."""
    has = flags()
    needs = {"amx": "amx_int8", "avx512_bf16": "avx512_bf16", "avx512_vnni": "avx512_vnni"}
    needs |= {"avx512": "avx512f", "avx2": "avx2"}
    return next((level for level, flag in needs.items() if flag in has), "unknown")


def onednn() -> str:
    """What oneDNN may use here at most."""
    return held() or best()


def onnxruntime() -> str:
    """What onnxruntime uses: the CPU's best, but AMX only where Linux grants it."""
    top = best()
    return "avx512_vnni" if top == "amx" and amx_refused() else top


def refuse_amx() -> bool:
    """Have Linux refuse AMX to this process and its children; True where it now does."""
    instructions = (
        (_LOAD, 0, 0, 0),  # the number of the system call
        (_SKIP_UNLESS, 0, 3, _ARCH_PRCTL),
        (_LOAD, 0, 0, 16),  # its first argument
        (_SKIP_UNLESS, 0, 1, _REQUEST_PERMISSION),
        (_RETURN, 0, 0, _NOT_PERMITTED),
        (_RETURN, 0, 0, _ALLOW),
    )
    code = b"".join(struct.pack("HBBI", *one) for one in instructions)
    text = ctypes.create_string_buffer(code)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = Program(len(instructions), ctypes.addressof(text))
    libc: Any = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)  # without it only root may filter
    libc.prctl(_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)
    return amx_refused()


def amx_refused() -> bool:
    """Whether Linux would refuse AMX; asking is harmless, granted it only allows its use."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) != 0)
