"""The torch library `bigops`: schemas are defined in Python, CPU kernels registered by csrc/."""

from __future__ import annotations

import functools
import re
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from bigops.ops import codes, forward_mode


class _Library(torch.library.Library):
    """A library whose ops drop no tangent: torch's autograd for custom ops looks for none."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        if dispatch_key != "Autograd":
            return super().impl(op_name, fn, dispatch_key, **options)

        def with_tangents(keyset: Any, *args: Any) -> Any:
            if forward_mode.is_active() and any(map(forward_mode.has_tangent, args)):
                return _in_forward_mode(op_name)(*args)
            # What comes out is no view to autograd, so that it may be written in place.
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return fn(keyset, *args)

        return super().impl(op_name, with_tangents, dispatch_key, **options)


LIB = _Library("bigops", "DEF")
_EXPRESSIONS: dict[str, Callable[..., Any]] = {}
Function = TypeVar("Function", bound=Callable[..., Any])


def define(schema: str, reference: Callable[..., Any] | None = None) -> torch._ops.OpOverload:
    """Define an op and serve it by its reference, if any, wherever no kernel is registered.

    Where the schema has words (``str activation``), what is returned is the overload ``code``, with
    an int in place of each (`codes`): that one has kernels, gradients and all else, and references
    are given the words all the same. The default overload, for direct callers, takes words and
    decomposes into it.

    `CompositeExplicitAutograd` is the weakest key: a kernel on "CPU" or "CUDA" goes before it.
    """
    tags = () if reference is None else (torch.Tag.pt2_compliant_tag,)
    name, arguments = schema.split("(", 1)
    LIB.define(schema, tags=tags)
    op: torch._ops.OpOverload = getattr(torch.ops.bigops, name).default
    if _words(op):
        LIB.define(f"{name}.code({re.sub(r'str (?=[a-z])', 'int ', arguments)}", tags=tags)
        op = op._overloadpacket.code
        for key in ("CompositeImplicitAutograd", "FuncTorchBatched"):  # the former leaves out vmap
            LIB.impl(name, _decomposition(op), key)
    if reference is not None:
        LIB.impl(_local(op), in_words(op, reference), "CompositeExplicitAutograd")
    return op


def arguments(op: torch._ops.OpOverload) -> Any:
    """A class of named tuples of the arguments of ``op``, by the names in its schema."""
    name = op._schema.name.removeprefix("bigops::")
    given = op._schema.arguments
    defaults = [a.default_value for a in given if a.has_default_value()]  # torch leaves them out
    return namedtuple(name, [a.name for a in given], defaults=defaults)  # type: ignore[misc]


def _local(op: torch._ops.OpOverload) -> str:
    return op.name().removeprefix("bigops::")


def _words(op: torch._ops.OpOverload) -> list[tuple[int, str]]:
    """Positions and names of the arguments that are words in the default overload."""
    arguments = op._overloadpacket.default._schema.arguments
    return [(i, a.name) for i, a in enumerate(arguments) if isinstance(a.type, torch.StringType)]


def _decomposition(op: torch._ops.OpOverload) -> Callable[..., Any]:
    words = _words(op)

    def decomposed(*args: Any) -> Any:
        coded = list(args)
        for at, argument in words:
            coded[at] = codes.code_of(argument, args[at])
        return op(*coded)

    return decomposed


def encoder(op: torch._ops.OpOverload) -> Callable[[Sequence[Any]], list[Any]]:
    """A function of the arguments of ``op`` in words that gives them in codes, for every call.

    It raises KeyError or TypeError for what is no word of its argument.
    """
    tables = [(at, codes.CODES[argument]) for at, argument in _words(op)]

    def encode(args: Sequence[Any]) -> list[Any]:
        coded = list(args)
        for at, table in tables:
            coded[at] = table[args[at]]
        return coded

    return encode


def in_words(op: torch._ops.OpOverload, function: Function) -> Function:
    """``function``, which takes the arguments of ``op`` in words, for a caller that has codes."""
    words = _words(op)
    if not words:
        return function

    @functools.wraps(function)
    def worded(*args: Any) -> Any:
        given = list(args)
        for at, argument in words:
            given[at] = codes.word_of(argument, args[at])
        return function(*given)

    return worded  # type: ignore[return-value]


def register(
    op: torch._ops.OpOverload,
    *,
    fake: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
    vmap: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    expression: Callable[..., Any] | None = None,
) -> None:
    """Give an op of `define` what `torch.library` calls these.

    The fake, the kernel for GPUs and ``expression``, the op by torch's own for forward mode, take
    words; backward, the setup of its context and the vmap rule take codes.
    """
    name = op.name()
    if expression is not None:
        _EXPRESSIONS[_local(op)] = in_words(op, expression)
    if fake is not None:
        torch.library.register_fake(name, in_words(op, fake), lib=LIB)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup, lib=LIB)
    if vmap is not None:
        torch.library.register_vmap(name, vmap, lib=LIB)
    if cuda is not None:
        LIB.impl(_local(op), in_words(op, cuda), "CUDA")


def _in_forward_mode(name: str) -> Callable[..., Any]:
    try:
        return _EXPRESSIONS[name]
    except KeyError:
        raise NotImplementedError(
            f"{name.partition('.')[0]}: forward mode is not implemented for this op"
        ) from None


def is_autocast_on(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of x; "meta" knows none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast(device_type: str, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast floating tensors to the active autocast dtype of ``device_type`` (float64 stays)."""
    return cast(torch.get_autocast_dtype(device_type), *tensors)


def cast(dtype: torch.dtype, *arguments: Any) -> tuple[Any, ...]:
    """Cast floating tensors to a dtype (float64 stays, and what is no tensor)."""
    return tuple(
        t
        if not isinstance(t, torch.Tensor)
        or t.dtype in (dtype, torch.float64)
        or not t.is_floating_point()
        else t.to(dtype)
        for t in arguments
    )


def pick(args: Sequence[Any], in_dims: Sequence[Any], i: int) -> list[Any]:
    """Item ``i`` of each argument that is batched, and the others as they are."""
    return [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)]


def loop(
    function: Callable[..., Any], args: Sequence[Any], in_dims: Sequence[Any], batch: int
) -> Any:
    """A vmap rule: the function on each item of the batch, results stacked at 0."""
    if batch == 0:  # the results of one item of zeros have the shapes, and none of them is taken
        args = tuple(
            a if dim is None else a.new_zeros([1, *a.shape[:dim], *a.shape[dim + 1 :]])
            for a, dim in zip(args, in_dims, strict=True)
        )
        in_dims = tuple(None if dim is None else 0 for dim in in_dims)
    outs = [function(*pick(args, in_dims, i)) for i in range(max(batch, 1))]
    if isinstance(outs[0], torch.Tensor):
        return torch.stack(outs)[:batch]
    return tuple(torch.stack(parts)[:batch] for parts in zip(*outs, strict=True))
