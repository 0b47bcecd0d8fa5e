"""Where the bodies of the GPU suite run: on a GPU, or small ones in the interpreter.

`pytest -m gpu` runs them on "cuda". The slow suite runs the same bodies on the CPU, the ops routed
to their Triton kernels in the interpreter, so that no slip of the pen awaits the first GPU. Why a
test cannot run here is said in this file alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import bigops
from bigops.formats import Format
from bigops.ops import targets
from bigops.ops.library import in_words
from bigops.ops.linear_cross_entropy import triton as _triton_loss
from tests.support import triton_interpreter

# op -> module of bigops.ops and what serves it on a GPU
PATHS = {
    "fused_linear": ("fused_linear", "op._cuda"),
    "fused_linear_with_parts": ("fused_linear", "op._cuda_kept"),
    "fused_linear_backward": ("fused_linear", "op.gradients._cuda"),
    "low_rank_linear": ("low_rank_linear", "op._cuda"),
    "low_rank_linear_with_parts": ("low_rank_linear", "op._cuda_kept"),
    "low_rank_linear_backward": ("low_rank_linear", "op.gradients._cuda"),
    "quantized_linear": ("quantized_linear", "op._cuda"),
    "sparse_linear": ("sparse_linear", "op._cuda"),
    "sparse_linear_backward": ("sparse_linear", "op.gradients._cuda"),
}


@dataclass(frozen=True)
class Place:
    """A device, and whether it is a real one."""

    device: torch.device
    real: bool

    def size(self, large: int, small: int) -> int:
        """``large`` on a GPU, ``small`` in the interpreter."""
        return large if self.real else small

    def put(self, item: Any) -> Any:
        """Tensors, and tuples and lists of them, moved there; the rest as it is."""
        if isinstance(item, Tensor):
            return item.detach().to(self.device).requires_grad_(item.requires_grad)
        if isinstance(item, Format):
            return item.map(self.put)
        return type(item)(map(self.put, item)) if isinstance(item, (tuple, list)) else item

    def chosen(self, op: str, *args: Any, **options: Any) -> str:
        """The kernel that dispatch takes for these arguments here: CUDA C++ where it is built."""
        target = "cuda" if self.real else "sm_90"
        return bigops.explain(op, *args, **options, device=target).kernel

    def reachable(self, tensors: Sequence[Tensor]) -> Any:
        """The interpreter's bounds check knows tensors behind a table of addresses."""
        return triton_interpreter.reachable([] if self.real else tensors)


def why_no_gpu(*, devices: int = 1, memory: int = 0, cuda: bool = False) -> str:
    """The reason why a test that needs these cannot run here, or ""."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.cuda.device_count() < devices:
        return f"needs {devices} GPUs; torch sees {torch.cuda.device_count()}"
    if cuda and torch.version.cuda is None:
        return "needs CUDA; this torch is built for ROCm"
    if memory and (free := torch.cuda.mem_get_info()[0]) < memory:
        return f"needs {memory >> 30} GiB of free GPU memory; {free >> 30} are there"
    return targets.why_not(torch.float32, "cuda", "fused_linear")


@pytest.fixture
def gpu() -> Callable[..., None]:
    """Skip, with the reason, unless a GPU with what is asked for is here."""

    def need(**what: Any) -> None:
        if why := why_no_gpu(**what):
            pytest.skip(why)

    return need


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("interpreter", marks=pytest.mark.slow),
    ]
)
def place(
    request: pytest.FixtureRequest,
    gpu: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> Iterator[Place]:
    """The GPU; or the CPU with every op served as on a GPU."""
    if request.param == "cuda":
        gpu()
        yield Place(torch.device("cuda", torch.cuda.current_device()), True)
        return
    triton_interpreter.install()
    library = torch.library.Library("bigops", "IMPL")
    for op, (stem, name) in PATHS.items():
        packet = getattr(torch.ops.bigops, op)
        kernel = packet.code if "code" in packet.overloads() else packet.default
        path = in_words(kernel, attrgetter(name)(sys.modules[f"bigops.ops.{stem}"]))
        library.impl(kernel.name().removeprefix("bigops::"), path, "CPU", allow_override=True)
    adamw = sys.modules["bigops.ops.fused_adamw"]
    loss = sys.modules["bigops.ops.linear_cross_entropy.schema"]
    monkeypatch.setattr(adamw, "step_adamw", adamw.choose.adamw)
    monkeypatch.setattr(adamw, "step_sgd", adamw.choose.sgd)
    monkeypatch.setattr(adamw, "norm_op", adamw.choose.norm)
    monkeypatch.setattr(loss, "chunk_op", _triton_loss.serve_chunk)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield Place(torch.device("cpu"), False)
    finally:
        torch.set_num_threads(threads)
        library._destroy()
