"""Launches of the optimiser kernels: groups tensors by dtype, writes the table of addresses.

One launch serves all tensors of the same dtypes. A tensor of other strides than its gradient and
states is worked on as a contiguous copy and written back.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common.launch import launch_options, on_device
from bigops.kernels.common.tiles import device_arch, pointwise_config
from bigops.kernels.fused_adamw.kernels import (
    BLOCK,
    ROW,
    adamw_step,
    norm_of_sums,
    sgd_step,
    square_sums,
)

TILES = 8  # tiles of one program: 16384 elements, as in the chunks of the CPU kernels (coded: 8192)
NORM_WIDTH = 1024
TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 15  # of the table, see kernels.py

Lists = Sequence[Tensor]
Maps = tuple[Tensor, Tensor, Tensor, Tensor]
"""Values and buckets of the signed map, then of the unsigned one; see states.py."""


class Step(NamedTuple):
    """What a step takes of every tensor; a list is empty where it is not used."""

    params: Lists
    grads: Lists
    first: Lists
    second: Lists
    first_scales: Lists
    second_scales: Lists
    copies: Lists
    streams: Sequence[int]
    seed: int
    rounding_step: int
    places: Sequence[tuple[int, int, int] | None]

    def copy(self, i: int) -> Tensor | None:
        return self.copies[i] if len(self.copies) and self.copies[i].numel() else None

    def coded(self, i: int) -> bool:
        return len(self.first) > 0 and self.first[i].dtype == torch.uint8

    def row(self, i: int) -> int:
        """Elements of a row of coded states: the dimensions past those of the scales."""
        leading = self.first_scales[i].ndim - 1
        return math.prod(self.params[i].shape[leading:])


class _Group(NamedTuple):
    """The tensors of one launch: their places in the lists, their columns of the table."""

    indices: list[int]
    columns: list[list[int]]


def blocks_of(arch: str, coded: bool = False) -> tuple[int, int]:
    """(blocks of 256 that a program takes at a time, warps) on ``arch``: 8 elements a thread.

    With 16 some steps spill (sgd of float32 on sm_80 and sm_86, norms of float64 on sm_86, 8-bit
    states on gfx942: see tests/kernels/gpu_report); ``coded`` states take half as many blocks
    besides, for the scalar registers of gfx942.
    """
    tile = pointwise_config(arch)
    blocks = max(1, tile.block_m * tile.block_n // BLOCK.value)
    return (max(1, blocks // 2), tile.num_warps) if coded else (blocks, 2 * tile.num_warps)


# --- checks ----------------------------------------------------------------------------------


def _expect(name: str, t: Tensor, param: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if t.device != param.device or t.dtype not in dtypes:
        allowed = ", ".join(map(str, dtypes))
        raise TypeError(
            f"{name}: expected {allowed} on {param.device}; got {t.dtype} on {t.device}"
        )
    if t.shape != param.shape:
        raise ValueError(
            f"{name}: expected the parameter's shape {tuple(param.shape)}; got {tuple(t.shape)}"
        )


def _check_count(name: str, given: Sequence[object], count: int, optional: bool) -> None:
    if len(given) != count and not (optional and len(given) == 0):
        raise ValueError(f"{name}: expected {count} tensors as params has; got {len(given)}")


def _check_codes(name: str, codes: Tensor, scale: Tensor) -> None:
    leading = scale.ndim - 1
    row = math.prod(codes.shape[leading:])
    wanted = (*codes.shape[:leading], triton.cdiv(row, BLOCK.value))
    fits = 0 <= leading <= codes.ndim and scale.shape == wanted and scale.dtype == torch.float32
    if not fits or scale.device != codes.device:
        raise ValueError(
            f"scales of {name}: expected float32 {wanted} on {codes.device}; got "
            f"{scale.dtype} {tuple(scale.shape)} on {scale.device}"
        )
    if not (codes.is_contiguous() and scale.is_contiguous()):
        raise ValueError(f"{name}: expected contiguous codes and scales; got another layout")


def _check(step: Step, two_states: bool) -> None:
    """All of all lists, before the first tensor is changed: a kernel trusts its addresses."""
    count = len(step.params)
    _check_count("grads", step.grads, count, False)
    _check_count("copies", step.copies, count, True)
    _check_count("streams", step.streams, count, True)
    states = [("first states", step.first, step.first_scales)]
    if two_states:
        states.append(("second states", step.second, step.second_scales))
    for name, given, scales in states:
        _check_count(name, given, count, not two_states)
        _check_count(f"scales of {name}", scales, count, True)
    for i, param in enumerate(step.params):
        _expect(f"params[{i}]", param, param, _FLOATS)
        if param.device != step.params[0].device:
            raise ValueError(f"params[{i}]: expected one device; got {param.device}")
        _expect(f"grads[{i}]", step.grads[i], param, _FLOATS)
        copy = step.copy(i)
        if copy is not None:
            _expect(f"copies[{i}]", copy, param, _FLOATS[1:])
        for name, given, scales in states:
            if len(given) == 0:
                continue
            kind = torch.uint8 if step.coded(i) else torch.float32
            _expect(f"{name}[{i}]", given[i], param, (kind,))
            if kind == torch.uint8:
                _check_count(f"scales of {name}", scales, count, False)
                _check_codes(f"{name}[{i}]", given[i], scales[i])


# --- layout ----------------------------------------------------------------------------------


def _in_memory_order(t: Tensor) -> list[int]:
    return sorted(range(t.dim()), key=lambda d: t.stride(d), reverse=True)


class _Layout:
    """Gives tensors as stretches of memory in which one index means the same element in all."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._kept: list[Tensor] = []

    def addresses(
        self, mutated: Sequence[Tensor | None], grad: Tensor, by_index: bool
    ) -> list[int]:
        """Addresses of grad and of what is mutated, 0 for None; copies where strides differ."""
        present = [t for t in (grad, *mutated) if t is not None]
        direct = all(t.is_contiguous() for t in present)
        if not direct and not by_index:
            order = _in_memory_order(grad)
            direct = all(t.permute(order).is_contiguous() for t in present)
        if direct:
            return [0 if t is None else t.data_ptr() for t in (grad, *mutated)]
        self._kept.append(grad.contiguous())
        found = [self._kept[-1].data_ptr()]
        for t in mutated:
            if t is not None and not t.is_contiguous():
                self._pairs.append((t, t.contiguous()))
                t = self._pairs[-1][1]
            found.append(0 if t is None else t.data_ptr())
        return found

    def write_back(self) -> None:
        for to, copy in self._pairs:
            to.copy_(copy)


def _aligned(addresses: Sequence[int]) -> bool:
    return all(address % 16 == 0 for address in addresses)


def _table(group: _Group, device: torch.device, blocks: int) -> tuple[Tensor, int, int]:
    """(table [15, tensors] on the device, number of programs, halvings that find a tensor)."""
    programs = 0
    for column in group.columns:
        column[0] = programs
        numel, row = column[1], column[ROW.value]
        programs += triton.cdiv(numel // row * triton.cdiv(row, BLOCK.value), TILES * blocks)
    table = torch.tensor(group.columns, dtype=torch.int64, device="cpu").t().contiguous()
    depth = (len(group.columns) - 1).bit_length()
    return table.to(device), programs, depth


class _Key(NamedTuple):
    """What the tensors of a launch share."""

    param: torch.dtype
    grad: torch.dtype
    copy: torch.dtype | None
    coded: bool
    stochastic: bool
    rows: bool  # which begin blocks anew
    parts: bool  # random bits that do not begin with a block
    aligned: bool


def _groups(step: Step, two_states: bool, layout: _Layout) -> dict[_Key, _Group]:
    groups: dict[_Key, _Group] = {}
    for i, param in enumerate(step.params):
        if param.numel() == 0:
            continue
        coded, copy = step.coded(i), step.copy(i)
        stochastic = len(step.streams) > 0 and param.dtype == torch.bfloat16
        first = step.first[i] if len(step.first) else None
        second = step.second[i] if two_states else None
        grad, at, first_at, second_at, copy_at = layout.addresses(
            (param, first, second, copy), step.grads[i], coded or stochastic
        )
        scale = step.first_scales[i].data_ptr() if coded else 0
        second_scale = step.second_scales[i].data_ptr() if coded and two_states else 0
        random = [0, 0]
        place = 0, param.numel(), param.numel()
        if stochastic:
            low = step.streams[i] & 0xFFFFFFFF
            random = [_signed(step.rounding_step << 32 | low), _signed(step.seed)]
            place = step.places[i] or place
        row = step.row(i) if coded else param.numel()
        if row % BLOCK.value == 0:
            row = param.numel()  # its blocks are those of the rows
        rows = row < param.numel()
        addresses = (at, grad, first_at, second_at, copy_at, row if rows else 0)
        column = [0, param.numel(), at, grad, first_at, second_at, scale, second_scale, copy_at]
        key = _Key(
            param.dtype,
            step.grads[i].dtype,
            None if copy is None else copy.dtype,
            coded,
            stochastic,
            rows,
            stochastic and (rows or place[0] % BLOCK.value > 0 or place[1] < param.numel()),
            _aligned(addresses),
        )
        group = groups.setdefault(key, _Group([], []))
        group.indices.append(i)
        group.columns.append([*column, *random, row, *place])
    return groups


def _signed(word: int) -> int:
    """64 bits as int64 holds them."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


# --- launches --------------------------------------------------------------------------------


def _launch(
    kernel: Any,
    step: Step,
    two_states: bool,
    maps: Sequence[Tensor | None],
    sizes: Tensor | None,
    scalars: Sequence[float],
    **constants: Any,
) -> None:
    """One step of all tensors, a launch for each group of them.

    Args:
        kernel: `adamw_step` or `sgd_step`.
        step, two_states: as of `_check`.
        maps: what ``kernel`` takes where states are codes.
        sizes: float32 [2, tensors] that it takes after the table.
        scalars: what it takes after ``depth``.
        constants: its own.
    """
    device = step.params[0].device
    layout = _Layout()
    with on_device(device):
        for key, group in _groups(step, two_states, layout).items():
            blocks, warps = blocks_of(device_arch(device), key.coded)
            table, programs, depth = _table(group, device, blocks)
            own = () if sizes is None else (sizes[:, group.indices].contiguous().to(device),)
            kernel[(programs,)](
                table,
                *own,
                *(maps if key.coded else [None] * len(maps)),
                len(group.indices),
                depth,
                *scalars,
                PARAM=TYPES[key.param],
                GRAD=TYPES[key.grad],
                COPY=None if key.copy is None else TYPES[key.copy],
                CODED=key.coded,
                STOCHASTIC=key.stochastic,
                ROWS=key.rows,
                PARTS=key.parts,
                ALIGNED=key.aligned,
                BLOCKS=blocks,
                TILES=TILES,
                **constants,
                **launch_options(warps),
            )
        layout.write_back()


def adamw(
    step: Step,
    steps: Lists,
    maps: Maps | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    factor: float,
    decoupled: bool,
) -> None:
    """One AdamW step in place; ``factor`` multiplies the gradients, negative to maximize.

    Args:
        step: parameters of float32, bfloat16 or float16; states of float32, or codes with scales.
        steps: float32 of one element each, on any device; incremented.
        maps: needed where states are codes.
        lr, beta1, beta2, eps, weight_decay, decoupled: as of the op.

    Raises:
        TypeError, ValueError: what does not fit, before anything is changed.
    """
    _check(step, True)
    _check_count("steps", steps, len(step.params), False)
    if not step.params:
        return
    torch._foreach_add_(list(steps), 1)
    n = torch.cat([t.reshape(1) for t in steps]).double()
    sizes = torch.stack([lr / (1 - beta1**n), (1 - beta2**n).rsqrt()]).float()
    keep, decay = (1 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    scalars = (factor, keep, 1 - beta1, beta2, 1 - beta2, eps, decay)
    _launch(adamw_step, step, True, maps or (None,) * 4, sizes, scalars, DECAY=decay != 0)


def sgd(
    step: Step,
    maps: Maps | None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first_step: bool,
    factor: float,
) -> None:
    """One SGD step in place, likewise; ``step.first`` holds the momentum buffers."""
    _check(step, False)
    if not step.params:
        return
    if momentum != 0:
        _check_count("momentum_buffers", step.first, len(step.params), False)
    else:
        step = step._replace(first=())
    signed_values, signed_buckets, *_ = maps or (None,) * 4
    _launch(
        sgd_step,
        step,
        False,
        (signed_values, signed_buckets),
        None,
        (factor, lr, momentum, 1 - dampening, weight_decay),
        MOMENTUM=momentum != 0,
        DECAY=weight_decay != 0,
        NESTEROV=nesterov,
        FIRST_STEP=first_step,
    )


def norm(grads: Lists) -> Tensor:
    """Euclidean norm of all gradients together, float64 0-dimensional, on their device.

    Args:
        grads: at least one; float32, bfloat16, float16 or float64 of one device, any strides.

    Raises:
        TypeError: another dtype or device.
    """
    device = grads[0].device
    groups: dict[tuple[torch.dtype, bool], _Group] = {}
    kept = []
    for i, grad in enumerate(grads):
        if grad.dtype not in TYPES or grad.device != device:
            raise TypeError(
                f"grads[{i}]: expected a floating dtype on {device}; got {grad.dtype} on "
                f"{grad.device}"
            )
        if grad.numel() == 0:
            continue
        dense = grad.permute(_in_memory_order(grad)).is_contiguous()
        kept.append(grad if dense else grad.contiguous())
        address = kept[-1].data_ptr()
        group = groups.setdefault((grad.dtype, _aligned([address])), _Group([], []))
        group.indices.append(i)
        column = [0] * _ROWS
        column[1], column[3], column[ROW.value] = grad.numel(), address, grad.numel()
        group.columns.append(column)
    blocks, warps = blocks_of(device_arch(device))
    tables = {key: _table(group, device, blocks) for key, group in groups.items()}
    total = sum(programs for _, programs, _ in tables.values())
    partial = torch.empty((total,), dtype=torch.float64, device=device)
    result = torch.empty((), dtype=torch.float64, device=device)
    first = 0
    with on_device(device):
        for (dtype, aligned), (table, programs, depth) in tables.items():
            square_sums[(programs,)](
                table,
                partial[first : first + programs],
                table.shape[1],
                depth,
                GRAD=TYPES[dtype],
                ALIGNED=aligned,
                BLOCKS=blocks,
                TILES=TILES,
                **launch_options(warps),
            )
            first += programs
        norm_of_sums[(1,)](partial, result, total, WIDTH=NORM_WIDTH, **launch_options(warps))
    return result
