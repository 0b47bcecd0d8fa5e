"""ComputedLinear: an `nn.Linear` whose `.weight` may stand for tensors of another kind.

Hosts ask for `nn.Linear` by type and read `.weight.dtype`, resize heads by it, or compute with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from bigops import backend


class ComputedTensor(Tensor):
    """A tensor that stands for what makes it: shape, dtype and device are there without it.

    What needs its numbers makes them, each time anew and differentiable where the layer trains what
    they are made of; `bigops.backend.record` counts that as ``reference.<layer>.<part>``. Whatever
    would write raises RuntimeError, to a view of it too: what is written would be lost.

    Args:
        make: gives the tensor.
        like: a tensor on "meta" with its shape, strides and dtype.
        device, requires_grad: those of the tensor.
        of: the name of the layer, for errors.
        why: what the layer keeps in place of the tensor, and what to do to write it.
    """

    part: ClassVar[str]
    """What it is of its layer."""
    make: Callable[[], Tensor]
    like: Tensor
    of: str
    why: str

    def __new__(
        cls,
        make: Callable[[], Tensor],
        like: Tensor,
        device: torch.device,
        requires_grad: bool,
        of: str,
        why: str,
    ) -> Any:
        new: Any = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            like.stride(),
            dtype=like.dtype,
            device=device,
            requires_grad=requires_grad,
        )
        new.make, new.like, new.of, new.why = make, like, of, why
        return new

    def numbers(self) -> Tensor:
        """What it stands for, by the parameters as they are now."""
        backend.note(f"reference.{self.of}.{self.part}")
        return self.make()

    def _refuse(self, how: str) -> None:
        raise RuntimeError(
            f"{self.of}.{self.part}: expected to be read only; got {how}, which would be lost: "
            f"{self.why}"
        )

    def _view(self, make: Callable[[], Tensor], like: Tensor, grad: bool) -> Any:
        return type(self)(make, like, self.device, grad, self.of, self.why)

    def _without_gradient(self) -> Any:
        return self._view(lambda: self.make().detach(), self.like, False)

    def _views(self, view: Callable[[Tensor], Any]) -> Any:
        """What ``view`` gives of the tensor, made where it is read; None where that is no view."""
        memory = self.like.untyped_storage()._cdata
        found = view(self.like)
        parts = found if isinstance(found, tuple | list) else [found]
        if any(part.untyped_storage()._cdata != memory for part in parts):
            return None
        if found is parts:
            return tuple(
                self._view(lambda i=i: view(self.make())[i], part, self.requires_grad)  # type: ignore[misc]
                for i, part in enumerate(parts)
            )
        return self._view(lambda: view(self.make()), found, self.requires_grad)

    def __repr__(self) -> str:  # type: ignore[override]
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"{type(self).__name__}(of {self.of}, {list(self.shape)}, {self.dtype}{grad})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.numbers().detach(), memo)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first, *rest = args or (None,)
        if isinstance(first, cls):
            if func in DESCRIBING:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func in _DETACHING:
                return first._without_gradient()
            asked = (*rest, *kwargs.values())
            if func is Tensor.requires_grad_ and asked and not any(asked):
                return first
            if getattr(func, "__name__", "") in _VIEWING or func in _TRANSPOSING:
                tensors = [t for t in tree_leaves((rest, kwargs)) if isinstance(t, Tensor)]
                views = None if tensors else first._views(lambda t: func(t, *rest, **kwargs))
                if views is not None:
                    return views
        for written in _written(func, args, kwargs):
            if isinstance(written, cls):
                written._refuse(_name_of(func))
        made: dict[int, Tensor] = {}  # one call may read it twice

        def numbers(computed: ComputedTensor) -> Tensor:
            if id(computed) not in made:
                made[id(computed)] = computed.numbers()
            return made[id(computed)]

        args, kwargs = tree_map_only(cls, numbers, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Only what was called with __torch_function__ off comes here, below autograd.
        for written in _written(func, args, kwargs or {}):
            if isinstance(written, cls):
                written._refuse(_name_of(func))
        if func is torch.ops.aten.detach.default:
            return args[0]._without_gradient()
        args, kwargs = tree_map_only(cls, cls.numbers, (args, kwargs or {}))
        return func(*args, **kwargs)


class ComputedWeight(ComputedTensor):
    """The matrix [N, K] of a layer that keeps it in another form."""

    part = "weight"


def _property(name: str) -> Any:
    return getattr(Tensor, name).__get__


# What a Tensor says of itself without its numbers.
DESCRIBING = {
    *map(
        _property,
        (
            *("shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize"),
            *("requires_grad", "is_leaf", "grad", "grad_fn", "is_cpu", "is_cuda", "is_meta"),
            *("is_sparse", "is_quantized", "is_nested", "is_xpu", "is_mps", "is_mkldnn"),
            *("_version", "output_nr", "_backward_hooks", "retains_grad"),
        ),
    ),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride),
    *(Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous),
    *(Tensor.storage_offset, Tensor.get_device, Tensor.is_inference, Tensor.is_signed),
    *(Tensor.__len__, Tensor.__hash__, Tensor._is_view),
    *(torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference),
}
_DETACHING = {_property("data"), Tensor.detach, torch.detach}
_TRANSPOSING = set(map(_property, ("T", "mT", "H", "mH")))
# Functions and methods that may give a view, by name.
_VIEWING = {
    *("__getitem__", "as_strided", "chunk", "diagonal", "expand", "expand_as", "flatten"),
    *("movedim", "moveaxis", "narrow", "permute", "ravel", "reshape", "select", "split"),
    *("squeeze", "swapaxes", "swapdims", "t", "tensor_split", "transpose", "unbind", "unflatten"),
    *("unfold", "unsqueeze", "unsafe_chunk", "unsafe_split", "view", "__iter__"),
}
# In place without the underscore that names what writes.
_WRITING = {Tensor.__setitem__, *(getattr(Tensor, n).__set__ for n in ("data", "grad"))}
_WRITING |= {Tensor.requires_grad.__set__}  # type: ignore[attr-defined]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a call writes: its first argument or those of a list, and ``out``."""
    if isinstance(func, torch._ops.OpOverload):
        arguments = func._schema.arguments
        given = {**kwargs, **{a.name: t for a, t in zip(arguments, args, strict=False)}}
        return tree_leaves([given.get(a.name) for a in arguments if a.is_write])
    found = tree_leaves(kwargs.get("out"))
    name = getattr(func, "__name__", "")
    inplace = name.endswith("_") and not name.endswith("__")
    inplace |= name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    if inplace or func in _WRITING:
        # torch.nn.init hands all of them over by name
        found += tree_leaves(args[0] if args else kwargs)
    return found


def _name_of(func: Any) -> str:
    """The function as a user wrote it."""
    name = getattr(func, "__name__", str(func))
    if name == "__set__":
        return f"an assignment to {getattr(getattr(func, '__self__', None), '__name__', 'it')}"
    return f"{name}()"


class ComputesWeight(nn.Module):
    """A layer of torch's by type that may have no Parameter `weight` in use.

    Where `computes_weight` says so, `weight` is a `ComputedWeight` of `make_weight`, and no
    attribute of that name can be set.
    """

    @property
    def computes_weight(self) -> str | None:
        """What is kept in place of a weight, and what to do to write it; None: a Parameter."""
        raise NotImplementedError

    @property
    def matrix_sizes(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        raise NotImplementedError

    def make_weight(self) -> Tensor:
        """The matrix [N, K] that the layer stands for, differentiable for what is trained."""
        raise NotImplementedError

    def _weight_like(self) -> tuple[torch.dtype, torch.device, bool]:
        """dtype, device and requires_grad of what `make_weight` would give."""
        raise NotImplementedError

    def computed_weight(self) -> Tensor:
        """What `weight` is where `computes_weight` says so."""
        # A graph drops what it does not use, and torch.func's tensors say too little.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.make_weight()
        dtype, device, grad = self._weight_like()
        like = torch.empty(self.matrix_sizes, dtype=dtype, device="meta")
        why = self.computes_weight or ""
        return ComputedWeight(self.make_weight, like, device, grad, type(self).__name__, why)

    def __getattr__(self, name: str) -> Any:
        # a Parameter is no attribute by itself: nn.Module finds each of them here
        if name == "weight" and "_parameters" in self.__dict__ and self.computes_weight:
            return self.computed_weight()
        return super().__getattr__(name)

    def _check_settable(self, name: str) -> None:
        if name == "weight" and "_parameters" in self.__dict__ and (why := self.computes_weight):
            # as an attribute it would be there, and no call would read it
            raise AttributeError(f"{type(self).__name__}.weight: {why}")

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_settable(name)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._check_settable(name)
        super().register_parameter(name, param)


class ComputedLinear(ComputesWeight, nn.Linear):
    """An `nn.Linear` by type that may have no Parameter `weight` in use.

    `is_dense` tells these layers from other linear ones.
    """

    @property
    def matrix_sizes(self) -> tuple[int, int]:
        return self.out_features, self.in_features


def is_dense(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether ``module`` is an `nn.Linear` whose `weight` is the matrix it multiplies by."""
    return isinstance(module, nn.Linear) and not isinstance(module, ComputedLinear)
