"""Make Triton's interpreter right where it is wrong, and let it see what it cannot see by itself.

Seen in triton 3.8 and 3.9 under TRITON_INTERPRET=1, all without an error: bfloat16 is held as
uint16, so `tl.dot` and arithmetic on it work on bit patterns; float32 to bfloat16 truncates where
hardware rounds to nearest even; float8 casts differ from the hardware's. `apply()` repairs these.

It also adds two checks, which hold for every interpreted launch of this process:

- a load or store whose address lies outside all tensors given to the kernel raises IndexError;
- two programs of one launch that store to the same address raise RuntimeError.

Only `triton_interpreter.install` imports this file. `tests/kernels/test_triton_interpreter.py`
holds a canary for each repair and each check.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.support import triton_interpreter

_TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5: torch.float8_e5m2,
}
# cvt.rn.satfinite clamps to these
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e4b8: 240.0, tl.float8e5: 57344.0}
_INT = {8: torch.int8, 16: torch.int16, 32: torch.int32}

# Builder methods that compute on values; all others move bits and are right for bfloat16.
_ARITHMETIC = (
    ["create_f" + name for name in ("add", "sub", "mul", "div", "rem", "neg", "ma")]
    + ["create_" + name for name in ("minimumf", "minnumf", "maximumf", "maxnumf", "clampf")]
    + ["create_" + name for name in ("exp", "exp2", "log", "log2", "sin", "cos", "erf")]
    + ["create_" + name for name in ("sqrt", "rsqrt", "floor", "ceil")]
    + ["create_precise_divf", "create_approx_divf", "create_precise_sqrt"]
)
_COMPARE = [
    "create_fcmp" + order + name for order in "OU" for name in ("LT", "GT", "LE", "GE", "EQ", "NE")
]

_SINCE = {"create_approx_divf": "3.9"}  # methods that an earlier interpreter has no calls of

Builder = interpreter.InterpreterBuilder
Executor = interpreter.GridExecutor
Handle = interpreter.TensorHandle


class _Launch:
    """What one kernel launch may touch, and what it has stored so far."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        self.kernel = kernel
        self.extents = []
        for name, t in tensors.items():
            if t.numel():
                last = sum(
                    (size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)
                )
                end = t.data_ptr() + (last + 1) * t.element_size()
                self.extents.append((t.data_ptr(), end, name))
        self.stores: list[tuple[Any, np.ndarray]] = []

    def check(self, what: str, addresses: np.ndarray, size: int) -> None:
        if addresses.size == 0:
            return
        low, high = int(addresses.min()), int(addresses.max()) + size
        if any(start <= low and high <= end for start, end, _ in self.extents):
            return
        below = [extent for extent in self.extents if extent[0] <= low]
        start, end, name = max(below, default=(0, 0, "any tensor"))
        raise IndexError(
            f"{what} out of bounds: bytes {low - start}..{high - start} of {name}, "
            f"which has {end - start}"
        )

    def tensor_at(self, address: int) -> str:
        """Name of the argument that holds this address."""
        return next(name for start, end, name in self.extents if start <= address < end)

    def finish(self) -> None:
        if not self.stores:
            return
        addresses = np.concatenate([found for _, found in self.stores])
        owners = np.repeat(np.arange(len(self.stores)), [found.size for _, found in self.stores])
        order = np.argsort(addresses, kind="stable")
        addresses, owners = addresses[order], owners[order]
        for i in np.flatnonzero(addresses[1:] == addresses[:-1]):
            first, second = self.stores[owners[i]][0], self.stores[owners[i + 1]][0]
            if first != second:
                raise RuntimeError(f"race: programs {first} and {second} store to one address")


_launch: _Launch | None = None


class _Changes:
    """What is to take the place of parts of triton, collected first and then set all at once."""

    def __init__(self) -> None:
        self._new: dict[tuple[Any, str], Any] = {}

    def get(self, owner: Any, name: str) -> Any:
        """What stands there, or is to stand there."""
        found = self._new.get((owner, name), getattr(owner, name, None))
        if found is None:
            raise RuntimeError(f"triton {triton.__version__}: {owner.__name__} has no {name}")
        return found

    def set(self, owner: Any, name: str, value: Any) -> None:
        self.get(owner, name)  # what is replaced must be there: else nothing would call it
        self._new[owner, name] = value

    def make(self) -> None:
        for (owner, name), value in self._new.items():
            setattr(owner, name, value)


def _tensor(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    bits = np.ascontiguousarray(data).view(f"int{dtype.primitive_bitwidth}")
    return torch.from_numpy(bits.copy()).view(_TORCH[dtype])


def _round(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """Convert as hardware does: nearest even, float8 saturating; gives unsigned bit patterns."""
    values = _tensor(data, source).float()
    if target in _LARGEST:
        limit = _LARGEST[target]
        values = torch.where(values.isnan(), values, values.clamp(-limit, limit))
    bits = target.primitive_bitwidth
    rounded = values.to(_TORCH[target]).view(_INT[bits])
    return rounded.numpy().view(f"uint{bits}").reshape(np.shape(data))


def _is_bf16(value: object) -> bool:
    return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16


def _widen(value: Any) -> Any:
    if not _is_bf16(value):
        return value
    return Handle(_round(value.data, tl.bfloat16, tl.float32).view(np.float32), tl.float32)


def _narrow(value: Any) -> Any:
    return Handle(_round(value.data, tl.float32, tl.bfloat16), tl.bfloat16)


def _in_float32(original: Callable[..., Any], narrow: bool) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        if not any(map(_is_bf16, args)):
            return original(self, *args)
        result = original(self, *map(_widen, args))
        return _narrow(result) if narrow else result

    return method


def _order_of_terms(a: tuple[int, ...], b: tuple[int, ...]) -> np.ndarray:
    """An order of the K terms of a dot: the same for one kernel and tile, another for the next."""
    kernel = _launch.kernel if _launch is not None else ""
    seed = zlib.crc32(repr((triton_interpreter.dot_seed, kernel, a, b)).encode())
    return np.random.default_rng(seed).permutation(a[-1])


def _repair_numbers(changes: _Changes) -> None:
    convert = changes.get(interpreter, "_convert_float")

    def convert_float(data: Any, source: tl.dtype, target: tl.dtype, mode: Any) -> Any:
        nearest = mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if source in _TORCH and target in _TORCH and nearest:
            return _round(data, source, target)
        return convert(data, source, target, mode)

    cast = changes.get(Builder, "cast_impl")

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        have, want = source.dtype.scalar, target.scalar
        if have == want or not {have, want} & {tl.bfloat16, *_LARGEST}:
            return cast(self, source, target)
        if have in _TORCH and want in _TORCH:
            data = _round(source.data, have, want)
            return Handle(data.view(interpreter._get_np_dtype(want)), want)
        if have == tl.bfloat16:  # to an integer or float64
            return cast(self, _widen(source), target)
        return _narrow(cast(self, source, tl.float32))

    dot = changes.get(Builder, "create_dot")

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = _widen(a), _widen(b)
        if triton_interpreter.dot_seed is not None:
            order = _order_of_terms(a.data.shape, b.data.shape)
            a, b = Handle(a.data[..., order], a.dtype), Handle(b.data[..., order, :], b.dtype)
        return dot(self, a, b, *rest)

    changes.set(interpreter, "_convert_float", convert_float)
    changes.set(Builder, "cast_impl", cast_impl)
    changes.set(Builder, "create_dot", create_dot)
    for name in _ARITHMETIC + _COMPARE:
        if name in _SINCE and not triton.__version__.startswith(_SINCE[name]):
            continue
        method = _in_float32(changes.get(Builder, name), narrow=name in _ARITHMETIC)
        changes.set(Builder, name, method)


def _patch_once_per_launch(changes: _Changes) -> None:
    """Every call of a device function patches triton.language anew: most of a launch's time."""
    patch, call = changes.get(interpreter, "_patch_lang"), changes.get(Executor, "__call__")
    patched: set[tuple[bool, bool]] = set()

    def patch_lang(fn: Any) -> Any:
        values = list(fn.__globals__.values())
        seen = (any(v is tl for v in values), any(v is tl.core for v in values))
        if seen in patched:
            return interpreter._LangPatchScope()
        patched.add(seen)
        return patch(fn)

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(self, *args, **kwargs)
        finally:
            patched.clear()

    changes.set(interpreter, "_patch_lang", patch_lang)
    changes.set(Executor, "__call__", run)


def _add_checks(changes: _Changes) -> None:
    load = changes.get(Builder, "create_masked_load")
    store = changes.get(Builder, "create_masked_store")
    to_host, call = changes.get(Executor, "_init_args_hst"), changes.get(Executor, "__call__")

    def touched(pointers: Any, mask: Any) -> np.ndarray:
        return pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel()

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        if _launch is not None and triton_interpreter.checking:
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            addresses = touched(pointers, mask)
            _launch.check("load", addresses, size)
            for see in triton_interpreter.observers:
                see(_launch, "read", addresses, size)
        return load(self, pointers, mask, *rest, **named)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if _launch is not None and triton_interpreter.checking:
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            addresses = touched(pointers, mask)
            _launch.check("store", addresses, size)
            _launch.stores.append((self.grid_idx, addresses))
            for see in triton_interpreter.observers:
                see(_launch, "written", addresses, size)
        return store(self, pointers, value, mask, *rest)

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        global _launch
        on_host = to_host(self, args, kwargs)
        named = {**dict(zip(self.arg_names, on_host[0], strict=False)), **on_host[1]}
        given = {n: t for n, t in named.items() if isinstance(t, torch.Tensor)}
        tables = enumerate(triton_interpreter.behind_tables)
        behind = {f"tensor {i} of a table": t for i, t in tables}
        _launch = _Launch(self.fn.__name__, given | behind)
        return on_host

    restore = changes.get(Executor, "_restore_args_dev")

    def restore_args(self: Any, args: Any, on_host: Any, *rest: Any) -> None:
        # CPU tensors were not copied: writing them back onto themselves would only cost time, and
        # gigabytes for a sparse file that stands for a huge tensor.
        if any(isinstance(t, torch.Tensor) and t.device.type != "cpu" for t in args):
            restore(self, args, on_host, *rest)

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        global _launch
        try:
            call(self, *args, **kwargs)
            if _launch is not None:
                _launch.finish()
        finally:
            _launch = None

    changes.set(Builder, "create_masked_load", masked_load)
    changes.set(Builder, "create_masked_store", masked_store)
    changes.set(Executor, "_init_args_hst", init_args)
    changes.set(Executor, "_restore_args_dev", restore_args)
    changes.set(Executor, "__call__", run)


_applied = False


def apply() -> None:
    """Repair the interpreter of this process; further calls do nothing.

    Raises:
        RuntimeError: this triton lacks something that is to be replaced; nothing was.
    """
    global _applied
    if _applied:
        return
    changes = _Changes()
    _repair_numbers(changes)
    _patch_once_per_launch(changes)
    _add_checks(changes)
    changes.make()
    _applied = True
