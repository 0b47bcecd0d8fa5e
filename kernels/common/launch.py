"""What every launch of a Triton kernel shares: the device, and the options of its compilation."""

import contextlib

import torch


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
