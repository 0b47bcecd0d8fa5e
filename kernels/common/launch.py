"""What every launch of a Triton kernel shares: checks, the device, the options for its compiler."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from bigops.kernels.common.tiles import DTYPES, TileConfig

MAX_SIZE = 2**31 - 2**12  # tile indices are 32 bit and may overhang an edge by one tile


def check_size(name: str, t: Tensor) -> None:
    """Raise ValueError where a size of ``t`` is past `MAX_SIZE`."""
    if max(t.shape, default=0) > MAX_SIZE:
        raise ValueError(f"{name}: expected sizes up to {MAX_SIZE}; got {tuple(t.shape)}")


def check_dtype(name: str, t: Tensor) -> None:
    """Raise TypeError where the dtype of ``t`` is none of those that the kernels serve."""
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, DTYPES))}; got {t.dtype}")


def check_operands(x: Tensor, **others: Tensor | None) -> None:
    """Hold the tensors of a product with a compressed weight to those that the kernels serve.

    Args:
        x: [M, K].
        others: by name; those called bias, residual and gz have the dtype of x.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: differing devices, or a size past `MAX_SIZE`.
    """
    check_dtype("x", x)
    check_size("x", x)
    for name, t in others.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, that of x; got {t.device}")
        if name in ("bias", "residual", "gz") and t.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype}, that of x; got {t.dtype}")
        check_size(name, t)


def check_alike(**tensors: Tensor | None) -> None:
    """Hold the tensors of a dense product to those that the kernels serve.

    Raises:
        TypeError: unsupported dtypes, or dtypes and devices unlike those of the first.
        ValueError: a size past `MAX_SIZE`.
    """
    present = {name: t for name, t in tensors.items() if t is not None}
    name0, first = next(iter(present.items()))
    check_dtype(name0, first)
    for name, t in present.items():
        if t.dtype != first.dtype or t.device != first.device:
            raise TypeError(
                f"{name}: expected {first.dtype} on {first.device} like {name0}; "
                f"got {t.dtype} on {t.device}"
            )
        check_size(name, t)


def is_aligned(t: Tensor) -> bool:
    """Whether ``t`` is, as triton's launcher looks at it: then its words are wide."""
    wide = all(step == 1 or step % 16 == 0 for step in t.stride())
    return wide and 1 in t.stride() and t.data_ptr() % 16 == 0


def product_is_aligned(columns: int, *read: Tensor | None) -> bool:
    """Whether a product of so many columns that reads these is; see the head of tiles.py."""
    return columns % 16 == 0 and all(is_aligned(t) for t in read if t is not None)


def contiguous(t: Tensor | None) -> Tensor | None:
    """``t`` with the strides that a kernel does not ask for; None stays None."""
    return None if t is None else t.contiguous()


def strides(t: Tensor | None) -> tuple[int, ...]:
    """The strides of a matrix, zeros for one that is not there."""
    return (0, 0) if t is None else t.stride()


def is_wide(*reaches: int) -> bool:
    """Whether offsets within a tile may pass 31 bits: sums of two of these, block times stride."""
    return 2 * max(reaches) >= 2**31


def dot_precision(dtype: torch.dtype) -> str:
    """Name the precision of float32 products: "tf32" where torch's own may use it, else "ieee"."""
    if dtype == torch.float32 and torch.version.hip is None:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "ieee"


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` current: triton launches there, whichever device holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch_options(
    num_warps: int, num_stages: int | None = None, *, fp_fusion: bool = True
) -> dict[str, int]:
    """What a launch says to triton's compiler besides the kernel's own constants.

    Args:
        num_warps: of a program.
        num_stages: of the pipelined loop; None leaves triton's own, for kernels without products.
        fp_fusion: whether a*b + c becomes one fused multiply-add. So the kernels were compiled,
            read and run, but for those whose rounding must be torch's. It is said each time, since
            triton's default is not one: on until 3.8, a warning in 3.9, off from 3.10 on.
    """
    options: dict[str, int] = {"num_warps": num_warps, "enable_fp_fusion": fp_fusion}
    if num_stages is not None:
        options["num_stages"] = num_stages
    return options


def launch_product(
    kernel: Any, programs: int, config: TileConfig, x: Tensor, *arguments: object, **constants: Any
) -> None:
    """Launch a kernel of products on the device of ``x``, its first argument.

    Args:
        kernel: takes those constants of a tile that it names: BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
            PARTS.
        programs: how many.
        config: the tile.
        x, arguments: what it takes at run time, in its order.
        constants: what else it is compiled for.
    """
    tile = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PARTS": config.parts,
    }
    named = {name: value for name, value in tile.items() if name in kernel.arg_names}
    with on_device(x.device):
        kernel[(programs,)](
            x,
            *arguments,
            **named,
            **constants,
            **launch_options(config.num_warps, config.num_stages),
        )
