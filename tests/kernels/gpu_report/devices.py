"""The GPUs of the report, with the figures that decide how many programs one holds at a time."""

from __future__ import annotations

from typing import NamedTuple

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")

# Registers, warps, programs and shared memory of one multiprocessor; CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability". Each program also reserves 1024 bytes.
NVIDIA_LIMITS = {
    "sm_80": (65536, 64, 32, 167936),
    "sm_86": (65536, 48, 16, 102400),
    "sm_89": (65536, 48, 24, 102400),
    "sm_90": (65536, 64, 32, 233472),
    "sm_100": (65536, 64, 32, 233472),
    "sm_120": (65536, 48, 24, 102400),
}
RESERVED_SHARED = 1024

# CDNA3 and 4: 512 vector registers a lane (AGPRs included), 4 SIMDs of at most 8 waves a unit.
AMD_REGISTERS, AMD_SIMDS, AMD_WAVES = 512, 4, 8
AMD_SHARED = {"gfx942": 65536, "gfx950": 163840}  # bytes of LDS of a compute unit


class Occupancy(NamedTuple):
    """Programs that a multiprocessor holds at a time, and what allows no more."""

    programs: int
    limiter: str


def occupancy(arch: str, registers: int, shared: int, warps: int) -> Occupancy:
    """Of a kernel with so many registers a thread, bytes of shared memory and warps a program."""
    if arch in AMD_SHARED:
        allocated = -(-max(registers, 1) // 8) * 8
        waves = min(AMD_WAVES, AMD_REGISTERS // allocated) * AMD_SIMDS
        limits = {"registers": waves // warps, "shared": AMD_SHARED[arch] // max(shared, 1)}
    else:
        file, most_warps, most_programs, shared_total = NVIDIA_LIMITS[arch]
        per_warp = -(-max(registers, 1) * 32 // 256) * 256  # allocated 256 at a time
        limits = {
            "registers": file // 4 // per_warp * 4 // warps,  # each quarter has its own file
            "warps": most_warps // warps,
            "programs": most_programs,
            "shared": shared_total // (shared + RESERVED_SHARED),
        }
    limiter = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limiter], limiter)


def most_warps(arch: str) -> int:
    """Warps (waves) that a multiprocessor holds at a time."""
    return AMD_SIMDS * AMD_WAVES if arch in AMD_SHARED else NVIDIA_LIMITS[arch][1]


def most_shared(arch: str) -> int:
    """Bytes of shared memory that one program may have."""
    return AMD_SHARED.get(arch) or NVIDIA_LIMITS[arch][3] - RESERVED_SHARED
