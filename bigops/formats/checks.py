"""Argument checks shared by the ops: each error names the argument, the expected and the given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHORT = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
    torch.int8: "s8",
    torch.uint8: "u8",
}


def short(dtype: torch.dtype) -> str:
    """Name of a dtype as kernels carry it: f32, bf16, f16, f64, s8, u8."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def tensors(**arguments: object) -> None:
    """Raise TypeError for an argument that is no tensor, or a nested one.

    None is no tensor where x and weight stand.
    """
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and (value is not None or name in ("x", "weight")):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(value).__name__}")
        if isinstance(value, Tensor) and value.is_nested:
            raise TypeError(f"{name}: expected a dense tensor; got a nested one ({value.layout})")


def tensor(name: str, value: object) -> None:
    """Raise TypeError for what is no tensor, None included."""
    if not isinstance(value, Tensor):
        got = "None" if value is None else type(value).__name__
        raise TypeError(f"{name}: expected a torch.Tensor; got {got}")


def stored(weight: object, *forms: type) -> None:
    """Raise TypeError unless the weight is in one of the formats."""
    if not isinstance(weight, forms):
        names = " or ".join(form.__name__ for form in forms)
        raise TypeError(f"weight: expected a {names}; got {type(weight).__name__}")


def floating(name: str, t: Tensor, allowed: Sequence[torch.dtype] = FLOATING) -> None:
    """Raise TypeError unless t has one of the allowed dtypes."""
    if t.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name}: expected dtype {names}; got {short_name(t.dtype)}")


def short_name(dtype: torch.dtype) -> str:
    """Name of a dtype without the `torch.` prefix."""
    return str(dtype).removeprefix("torch.")


def matrix(name: str, t: Tensor) -> None:
    """Raise ValueError unless t has two dimensions."""
    if t.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions [N, K]; got shape {list(t.shape)}")


def dims(name: str, t: Tensor, expected: int) -> None:
    """Raise ValueError unless t has the expected number of dimensions."""
    if t.ndim != expected:  # of a spec of DTensor too
        raise ValueError(f"{name}: expected {expected} dimensions; got shape {list(t.shape)}")


def differ(a: int, b: int) -> bool:
    """Whether two sizes differ.

    While a graph is traced: whether they are known to. What only the run knows its kernel checks.
    """
    if torch.compiler.is_compiling() or isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(a != b)
    return a != b


def shape(name: str, t: Tensor, expected: Sequence[int]) -> None:
    """Raise ValueError unless t has exactly the expected shape (see `differ`)."""
    if len(t.shape) != len(expected) or any(map(differ, t.shape, expected)):
        raise ValueError(f"{name}: expected shape {list(expected)}; got {list(t.shape)}")


def dtype(name: str, t: Tensor, expected: torch.dtype) -> None:
    """Raise TypeError unless t has the expected dtype."""
    if t.dtype != expected:
        raise TypeError(f"{name}: expected dtype {short_name(expected)}; got {short_name(t.dtype)}")


def device(name: str, t: Tensor, x: Tensor, of: str = "x") -> None:
    """Raise ValueError unless t lives where x does, which errors name ``of``."""
    if t.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, that of {of}; got {t.device}")


def like(name: str, t: Tensor, x: Tensor, of: str = "x") -> None:
    """Raise unless t has x's dtype (TypeError) and device (ValueError)."""
    if t.dtype != x.dtype:
        expected, got = short_name(x.dtype), short_name(t.dtype)
        raise TypeError(f"{name}: expected dtype {expected}, that of {of}; got {got}")
    device(name, t, x, of)


def beside_int8(name: str, row: Tensor | None, values: Tensor, of: torch.dtype, n: int) -> None:
    """Raise unless ``row`` is a tensor [n] of dtype ``of`` with int8 values, None with others."""
    if (row is None) == (values.dtype == torch.int8):
        raise TypeError(
            f"{name}: expected a tensor with int8 values and None with others; got "
            f"{'None' if row is None else 'a tensor'} with {short_name(values.dtype)}"
        )
    if row is not None:
        dtype(name, row, of)
        shape(name, row, [n])
