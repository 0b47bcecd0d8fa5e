"""What was set on a layer and goes with it in a swap: attributes, buffers, children, hooks."""

from __future__ import annotations

import dis
import functools
import inspect
from collections import OrderedDict
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from bigops.graph.transposed import is_transposed
from bigops.nn import LAYERS, LoRALinear
from bigops.nn.layer import layer_of

# Hooks of calls, and what torch keeps beside them under the same numbers.
_CALLS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_BESIDE = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)
_STATES = {
    "_state_dict_hooks": "state_dict hook",
    "_state_dict_pre_hooks": "state_dict pre-hook",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "load_state_dict post-hook",
}
_HOOKS = {**_CALLS, **_STATES}
_REGISTERED = ("_parameters", "_buffers", "_modules")


def hook_reason(module: nn.Module) -> str | None:
    """Why a new module of the same class would do without what hangs on this one, or None."""
    for attribute, words in _HOOKS.items():
        if getattr(module, attribute, None):
            return f"it has a {words}, which a swap would lose"
    return _replaced(module)


def lost_reason(module: nn.Module) -> str | None:
    """The same, of anything that was set on it: for the parts of a block that is made anew."""
    names = ", ".join(extras(module).names)
    return hook_reason(module) or (f"it has {names}, which a swap would lose" if names else None)


def swap_reason(module: nn.Module, weight_goes: bool, keys_stay: bool) -> str | None:
    """Why a swap would change what hangs on a layer, although `carry` takes it along, or None.

    Args:
        weight_goes: whether the new layer has no ``weight`` Parameter.
        keys_stay: whether its `state_dict` is that of the old one.
    """
    if reason := _replaced(module):
        return reason
    for name in extras(module).names:
        if name in _taken():
            return f"its {name} was set on the instance, a name that the new layer needs"
    for attribute, words in _STATES.items():
        if getattr(module, attribute, None) and not keys_stay:
            return f"it has a {words}, and the new layer has another state_dict"
    if module._backward_hooks and not module._is_full_backward_hook:
        return "it has a backward hook of the kind that sees one operator (register_backward_hook)"
    for attribute, words in _CALLS.items():
        if weight_goes and not all(map(_is_apart, getattr(module, attribute).values())):
            return f"it has a {words}, which may read the weight of the layer that it is given"
    return None


def lost_forward(module: nn.Module) -> str | None:
    """Why a layer does something else than its class says, or None."""
    return "its forward was replaced on the instance" if "forward" in vars(module) else None


def _replaced(module: nn.Module) -> str | None:
    if reason := lost_forward(module):
        return reason
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "it was compiled by itself (module.compile())"
    return None


def _is_apart(hook: Any) -> bool:
    """Whether a hook is a function of Python that never reads its first argument, the layer."""
    bound = isinstance(hook, MethodType)
    function = hook.__func__ if bound else hook
    if not isinstance(function, FunctionType):
        return False
    code = function.__code__
    given = [*code.co_varnames[: code.co_argcount]][bound:]
    if not given and code.co_flags & inspect.CO_VARARGS:
        given = [code.co_varnames[code.co_argcount + code.co_kwonlyargcount]]
    loads = (i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD"))
    read = {name for of in loads for name in (of if isinstance(of, tuple) else (of,))}
    return bool(given) and read.isdisjoint({given[0], "locals", "vars", "eval"})


# --- what was set ------------------------------------------------------------------------------


class Extras(NamedTuple):
    """What a module holds and a new one of its class does not, by name."""

    attributes: dict[str, Any]
    registered: dict[str, dict[str, Any]]  # Parameters, buffers and children

    @property
    def names(self) -> list[str]:
        return [*self.attributes, *(name for of in self.registered.values() for name in of)]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors among them that a `state_dict` may hold."""
        holder = nn.Module()
        for which, of in self.registered.items():
            getattr(holder, which).update(of)
        return sum(t.nbytes for t in (*holder.parameters(), *holder.buffers()))


def extras(module: nn.Module) -> Extras:
    """What was set on a module of torch or of this package."""
    fresh = _fresh(module)
    if fresh is None:
        return Extras({}, {})
    known, cls = set(vars(fresh)), type(module)
    if layer_of(module) is not None:  # which may set some of its own later
        known |= _declared(cls)  # type: ignore[arg-type]
    return Extras(
        {name: value for name, value in vars(module).items() if name not in known},
        {
            which: {
                name: value
                for name, value in getattr(module, which).items()
                if name not in getattr(fresh, which) and name not in known
            }
            for which in _REGISTERED
        },
    )


def _fresh(module: nn.Module) -> nn.Module | None:
    """A module as its constructor makes it, on "meta"; None of a class of somebody else."""
    layer = layer_of(module)
    if layer is not None:
        return type(layer).from_arguments(layer.arguments())
    if isinstance(module, nn.Linear):
        return nn.Linear(1, 1, device="meta")
    if isinstance(module, nn.Embedding):
        return nn.Embedding(1, 1, device="meta")
    if isinstance(module, nn.MultiheadAttention):
        return nn.MultiheadAttention(1, 1, device="meta")
    if is_transposed(module):
        with torch.device("meta"):
            return type(module)(1, 1)
    if type(module).__module__.startswith("torch.nn."):
        try:
            return type(module)()
        except TypeError:
            return None
    return None


@functools.cache
def _declared(cls: type) -> set[str]:
    """Names that a class has or says that its instances have."""
    said = (vars(c).get("__annotations__", {}) for c in cls.__mro__)
    return {*dir(cls), *(name for of in said for name in of)}


@functools.cache
def _taken() -> set[str]:
    """Names of the layers that verbs make, whose meaning no attribute of a user has."""
    return set().union(*(_declared(cls) for cls in (*LAYERS, LoRALinear)))


# --- carrying ----------------------------------------------------------------------------------


def carry(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` what was set on ``old``, which stays as it is; nothing is copied.

    The tables of hooks are the same objects, for the handle that a caller holds points at them.

    Raises:
        ValueError: ``new`` has something of that name.
    """
    own = vars(new)
    for name in (*_HOOKS, *_BESIDE):
        if name in vars(old):
            own[name] = vars(old)[name]
    hooks: dict[int, Any] = old._load_state_dict_pre_hooks
    for number, hook in hooks.items():
        if getattr(hook, "with_module", False):  # it points at the module weakly
            hooks[number] = type(hook)(hook.hook, new)
    found = extras(old)
    for name in found.names:
        if name in own or any(name in getattr(new, which) for which in _REGISTERED):
            raise ValueError(f"{name}: expected a name that the new layer has not; got it")
    own.update(found.attributes)
    for which, of in found.registered.items():
        getattr(new, which).update(of)
    hidden = old._non_persistent_buffers_set & found.registered.get("_buffers", {}).keys()
    new._non_persistent_buffers_set.update(hidden)


def without_hooks(module: nn.Module) -> nn.Module:
    """A twin to be timed, of the same tensors: the hooks of a user do not see these calls."""
    twin = module.__new__(type(module))
    vars(twin).update(vars(module), **{name: OrderedDict() for name in _HOOKS})
    return twin


def adds_nothing(cls: type, to: type[nn.Module]) -> bool:
    """Whether instances of a class do what those of ``to`` do and have nothing to call besides.

    Such a class defines an ``__init__`` and how it is printed, at most: no forward, no attribute
    access, no state, and no method or constant that somebody might ask it for.
    """
    if not issubclass(cls, to):
        return False
    own = [c for c in cls.__mro__ if c not in to.__mro__]
    return all(name in _HARMLESS for c in own for name in vars(c))


_HARMLESS = {
    "__init__",
    "__repr__",
    "extra_repr",
    *("__module__", "__qualname__", "__doc__", "__annotations__", "__annotate__", "__dict__"),
    *("__weakref__", "__firstlineno__", "__static_attributes__", "__annotations_cache__"),
    *("__annotate_func__", "__orig_bases__", "__parameters__", "__classdictcell__"),
}
