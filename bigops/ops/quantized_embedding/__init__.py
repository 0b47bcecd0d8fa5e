"""quantized_embedding: rows of an int8 or int4 weight by their numbers, dequantised.

It reads the storage of `quantized_linear` as that lies, so that an embedding and the head that it
is tied to have one between them: of what quantises activations (row sums, qparams) it needs
nothing. There is no gradient: numbers have none, and the weight is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.base import FLOATS
from bigops.formats.quantized import TILE, QuantizedWeight
from bigops.ops import targets
from bigops.ops.choice import Choice, on_cpu, reference
from bigops.ops.explain import serves
from bigops.ops.library import arguments, define, loop, register
from bigops.ops.targets import Target

__all__ = ["quantized_embedding"]

NAME = "quantized_embedding"
_IDS = (torch.int64, torch.int32)


def _serve(*args: Any) -> Tensor:
    """The reference: the rows are taken as they are stored, then dequantised."""
    given = Given(*args)
    backend.note(f"reference.{NAME}")
    weight = _weight(given)
    ids = given.ids.reshape(-1).long()
    inside = ((ids >= 0) & (ids < weight.n)).all()
    if ids.device.type != "cpu":  # without waiting for the device
        torch._assert_async(inside, f"ids: expected rows of the weight, 0 to {weight.n - 1}")
    elif not bool(inside):
        raise IndexError(_outside(ids, weight.n))
    # [M, lines, 4] of the tiles; M rows of one tile each by themselves
    words = weight.values.transpose(1, 2)[ids // TILE, ids % TILE]
    zero = weight.zero_point
    alone = weight.replace(
        # each row as the first of a tile of its own
        values=torch.nn.functional.pad(words.unsqueeze(2), (0, 0, 0, TILE - 1)),
        scale=_first_lanes(weight.scale[:, ids]),
        zero_point=None if zero is None else _first_lanes(zero[:, ids]),
        n=ids.numel() * TILE,
    )
    rows = alone.to_dense()[::TILE]
    return rows.to(given.dtype).reshape(*given.ids.shape, weight.k)


def _first_lanes(of_rows: Tensor) -> Tensor:
    """[groups, M] as [groups, M * TILE], 0 in the lanes between."""
    return torch.nn.functional.pad(of_rows.unsqueeze(2), (0, TILE - 1)).flatten(1)


def _outside(ids: Tensor, n: int) -> str:
    bad = ids[(ids < 0) | (ids >= n)][0]
    return f"ids: expected rows of the weight, 0 to {n - 1}; got {int(bad)}"


def _weight(given: Any) -> QuantizedWeight:
    return QuantizedWeight.of(
        0,
        given.values,
        given.scale,
        given.zero_point,
        None,
        None,
        given.pad,
        given.k,
        given.bits,
        given.group,
        "none",
    )


def _fake(*args: Any) -> Tensor:
    given = Given(*args)
    _check(given.ids, given.dtype)
    _weight(given).check()
    return given.ids.new_empty((*given.ids.shape, given.k), dtype=given.dtype)  # type: ignore[no-any-return]


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    ids, *others = in_dims
    if not any(isinstance(dim, int) for dim in others):
        return op(*args), ids  # each number by itself, wherever it stands
    return loop(op, args, in_dims, info.batch_size), 0


op = define(
    f"{NAME}(Tensor ids, Tensor values, Tensor scale, Tensor? zero_point, int pad, int k, "
    "int bits, int group, ScalarType dtype) -> Tensor",
    _serve,
)
Given: Any = arguments(op)
register(op, fake=_fake, vmap=_vmap)


def choose(bits: int, dtype: torch.dtype, target: Target) -> Choice:
    """The kernel that serves a call; csrc/cpu/quantized_embedding.cpp registers itself."""
    if not targets.is_cpu(target):
        return reference(NAME, f"{NAME} has no GPU kernel; plain torch serves")
    given = (bits, checks.short(dtype))
    return on_cpu(NAME, lambda extension: extension.choose_quantized_embedding(*given))


@serves(NAME)
def explain(
    ids: Tensor,
    weight: QuantizedWeight,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | None = None,
) -> Choice:
    """Which kernel serves a call of `quantized_embedding`."""
    checks.stored(weight, QuantizedWeight)
    _check(ids, dtype)
    return choose(weight.bits, dtype, targets.named(device, ids))


def _check(ids: Tensor, dtype: torch.dtype) -> None:
    checks.tensor("ids", ids)
    if ids.dtype not in _IDS:
        raise TypeError(f"ids: expected dtype int64 or int32; got {checks.short_name(ids.dtype)}")
    if dtype not in FLOATS:
        names = ", ".join(map(checks.short_name, FLOATS))
        raise TypeError(f"dtype: expected {names}; got {dtype}")


def quantized_embedding(
    ids: Tensor, weight: QuantizedWeight, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``weight[ids]``: rows of an int8 or int4 weight, ``scale * (q - zero_point)``.

    Args:
        ids: int64 or int32 ``[..]``, each from 0 to N - 1.
        weight: `QuantizedWeight` of a ``[N, K]`` matrix, whatever it does with activations: the
            weight of a `quantized_linear` serves here as it is.
        dtype: of the result: float32, bfloat16 or float16. The product with the scale is rounded
            to float32 first.

    Returns:
        ``[.., K]``, without a gradient.

    Raises:
        IndexError: an id that names no row, where the ids are on the CPU (RuntimeError in a
            compiled graph; on a GPU an assertion of the device, as torch's own).
        TypeError: ids or ``dtype`` of another dtype, or no `QuantizedWeight`.
        ValueError: ids on another device than the weight.
    """
    checks.stored(weight, QuantizedWeight)
    return run(ids, weight.arguments, dtype)


def run(ids: Tensor, stored: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """The same with `QuantizedWeight.arguments` in place of the weight."""
    values, scale, zero_point, _, _, pad, k, bits, group, _ = stored
    if not isinstance(ids, Tensor) and torch._C._has_torch_function_unary(ids):  # fx's proxies
        return op(ids, values, scale, zero_point, pad, k, bits, group, dtype)  # type: ignore[no-any-return]
    _check(ids, dtype)
    if ids.device != values.device:
        raise ValueError(
            f"ids: expected device {values.device}, that of the weight; got {ids.device}"
        )
    try:
        return op(ids, values, scale, zero_point, pad, k, bits, group, dtype)  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "ids: expected rows" in str(error):  # torch's stable ABI has one kind of error alone
            said = str(error).partition("\n")[0]
            raise IndexError(said[said.index("ids:") :]) from None
        raise
