"""The norm of all gradients of a step, one and the same on all ranks; it is their verdict as well.

Where an element of a gradient is inf or NaN on any rank, the norm is inf or NaN on all of them: who
skips by it skips with all others, and who clips by it clips by the same factor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bigops.ops import fused_grad_norm

ALL, NONE = "all", "none"
"""Instead of a process group: all ranks where torch.distributed runs, or this process alone."""


def ranks_of(process_group: Any) -> int:
    """How many ranks share a step.

    Raises:
        ValueError: neither "all", "none" nor a process group of this rank.
    """
    known = (
        process_group in (ALL, NONE) if isinstance(process_group, str) else _is_group(process_group)
    )
    if not known:
        raise ValueError(
            f"process_group: expected 'all', 'none' or a process group; got {process_group!r}"
        )
    if process_group == NONE or not _distributed():
        return 1
    size = torch.distributed.get_world_size(_group(process_group))
    if size < 1:
        raise ValueError("process_group: expected one that this rank is in; got another")
    return size


def norm_over_ranks(
    grads: Sequence[Tensor],
    *,
    process_group: Any = ALL,
    pipeline: Any = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Euclidean norm of all gradients together over all ranks, by at most one all-reduce.

    Each element counts once: a plain gradient is taken to be the same on all ranks (as
    DistributedDataParallel leaves it), a DTensor gives its own shard, replicas of it share the
    count. Meshes, placements, dtypes and devices may be mixed; what is `Partial` is summed first.
    Where plain gradients differ between ranks (``no_sync`` up to the step) the mean of their
    squares counts, so that all ranks still agree.

    Args:
        grads: at least one; plain tensors or DTensors, dense or sparse.
        process_group: the ranks that step together: "all" of torch.distributed (this process alone
            where it does not run), "none" (this process alone), or a process group.
        pipeline: process group of the stages of a pipeline, whose gradients are of different
            parameters: they add up. None: no stages.
        weight: float64, 0-dimensional: a number of this rank that travels along.

    Returns:
        Norm, and mean weight per rank where there is one; float64, 0-dimensional, on the device of
        the first gradient, equal bits on all ranks. The norm is inf or NaN exactly where an element
        on some rank is (or where its square leaves float64).

    Raises:
        ValueError: a DTensor of a mesh that is not all of process_group's ranks.
        TypeError: a dtype that is no floating one.
    """
    ranks = ranks_of(process_group)
    parts: dict[tuple[torch.device, int], list[Tensor]] = {}
    for grad in grads:
        local, shards = _shard_of(grad, ranks)
        parts.setdefault((local.device, shards), []).append(local)
    device = next(iter(parts))[0]
    norms = [
        (fused_grad_norm(part).to(device, non_blocking=True), shards)
        for (_, shards), part in parts.items()
    ]
    if weight is not None:
        weight = weight.to(device, non_blocking=True)
    if ranks == 1:
        return functools.reduce(torch.hypot, [norm for norm, _ in norms]), weight
    stages = 1 if pipeline is None else torch.distributed.get_world_size(pipeline)
    # An element in one of n shards lies on ranks / stages / n ranks.
    squares = torch.stack([norm.square() * (shards * stages / ranks) for norm, shards in norms])
    sums = [squares.sum()] if weight is None else [squares.sum(), weight / ranks]
    reduced = torch.stack(sums)
    torch.distributed.all_reduce(reduced, group=_group(process_group))
    return reduced[0].sqrt(), None if weight is None else reduced[1]


def own_parts(grads: Iterable[Tensor]) -> list[Tensor]:
    """The memory of gradients: a DTensor's shard, a sparse tensor's values, else itself."""
    return [
        grad._values() if grad.layout == torch.sparse_coo else _local(grad)  # type: ignore[operator]
        for grad in grads
    ]


def _shard_of(grad: Tensor, ranks: int) -> tuple[Tensor, int]:
    """This rank's part of a gradient, and how many parts there are."""
    shards = 1
    if type(grad) is not Tensor and hasattr(grad, "device_mesh"):
        grad = _without_partial(grad)
        mesh: Any = grad.device_mesh  # type: ignore[attr-defined]
        for dim, placement in enumerate(grad.placements):  # type: ignore[attr-defined]
            if not placement.is_replicate():  # Shard, or what fully_shard makes of two of them
                shards *= mesh.size(dim)
        root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
        if ranks not in (mesh.size(), root.size()):
            raise ValueError(
                f"process_group: expected the {mesh.size()} ranks of the gradients' device mesh "
                f"(or the {root.size()} of the mesh that it is a part of); got {ranks} ranks"
            )
        grad = _local(grad)
    if grad.layout != torch.strided:
        grad = grad.coalesce().values()
    return (torch.view_as_real(grad) if grad.is_complex() else grad), shards


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if hasattr(grad, "to_local") else grad


def _without_partial(grad: Any) -> Any:
    if not any(placement.is_partial() for placement in grad.placements):
        return grad
    from torch.distributed.tensor import Replicate

    return grad.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in grad.placements]
    )


def _group(process_group: Any) -> Any:
    return None if isinstance(process_group, str) else process_group


def _is_group(process_group: Any) -> bool:
    return torch.distributed.is_available() and isinstance(
        process_group, torch.distributed.ProcessGroup
    )


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
