"""Which tile serves a product: a model, nothing is timed."""

import triton

LEAST, MOST = 16, 65536  # sizes below and above share a bucket


def bucket(m: int, n: int, k: int) -> str:
    """Name the shapes that share a config with [m, k] times [k, n].

    Each size is rounded up to a power of two from 16 to 65536: (60, 4000, 4096) is in
    "m64-n4096-k4096".
    """
    sizes = (min(max(LEAST, triton.next_power_of_2(size)), MOST) for size in (m, n, k))
    return "-".join(f"{name}{size}" for name, size in zip("mnk", sizes, strict=True))
