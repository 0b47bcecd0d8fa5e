"""All or nothing: a verb that is interrupted at any line leaves the model as it was."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn, overrides
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils import _python_dispatch as dispatch

P = ParamSpec("P")
R = TypeVar("R")


class Before:
    """All that hangs on the modules of some models, as it is now; `restore` brings it back.

    Kept are, by reference and without a copy of any tensor: the attributes of each module, among
    them its mode, children, Parameters, buffers and hooks in their order; what lies in plain lists,
    dictionaries, sets and tuples among them, in objects of a class that comes from where a class of
    the model comes from, and in modules that are held there without being registered; and
    ``requires_grad`` and the tensor (``data``) of each Parameter. Not kept are the values in
    tensors. While this lives, so does every tensor that the models held. Of a lazy module
    (`nn.LazyLinear`), whose first call is its last step of construction, only what it holds is
    kept.
    """

    def __init__(self, *models: nn.Module, layers: bool = True) -> None:
        """
        Args:
            models: what is kept.
            layers: whether that goes for the attributes of the layers of `bigops.nn`, too. A run of
                these leaves no trace but their packs.
        """
        self._kept: list[tuple[Any, Any]] = []  # containers and copies of them
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self.data: list[tuple[nn.Parameter, Tensor]] = []
        # Ctrl-C pressed where torch.no_grad() ends would leave gradients off for all that follows
        self._gradients = torch.is_grad_enabled()
        # so of a mode that watches over the model while it runs, or of torch.device("meta")
        self._depths = [(stack, pop, len(stack())) for stack, pop in MODES.items()]
        self.modules: list[nn.Module] = []  # the registered ones come first
        self._seen: set[int] = set()
        self.homes = homes(*models)
        for model in models:
            for module in model.modules():
                self._hold(module)
        self._keep(self._attributes(self.modules, layers), layers)

    def _attributes(self, modules: list[nn.Module], layers: bool) -> list[Any]:
        kept = (m for m in modules if not isinstance(m, LazyModuleMixin))
        return [vars(module) for module in kept if layers or not is_ours(module)]

    def _hold(self, module: nn.Module) -> None:
        """Keep what is registered in one module."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self.modules.append(module)
        for held in (module._modules, module._parameters, module._buffers):
            if isinstance(held, dict):  # not of a ScriptModule
                self._kept.append((held, dict(held)))
                self._seen.add(id(held))
        own = list(module.parameters(recurse=False))
        self._flags += [(p, p.requires_grad) for p in own]
        # Not those of a lazy module, which its first call makes, nor those of another tensor type.
        plain = (p for p in own if type(p) is nn.Parameter)
        self.data += [(p, p.data) for p in plain if type(p.data) is Tensor]

    def _keep(self, pending: list[Any], layers: bool) -> None:
        """Keep what lies in plain containers, objects and modules, and in those in them."""
        while pending:  # a structure may be deeper than Python calls may be
            value = pending.pop()
            if isinstance(value, LEAVES) or id(value) in self._seen:
                continue
            if isinstance(value, nn.Module):
                new = [module for module in value.modules() if id(module) not in self._seen]
                for module in new:
                    self._hold(module)
                pending += self._attributes(new, layers)
            elif type(value) in CONTAINERS:
                self._seen.add(id(value))
                self._kept.append((value, value.copy()))
                pending += value.values() if isinstance(value, dict) else value
            elif isinstance(value, tuple):
                pending += value
            elif is_of(value, self.homes):
                pending.append(vars(value))

    def restore(self) -> None:
        """Put all of it back; interrupted it may begin anew."""
        torch.set_grad_enabled(self._gradients)
        for stack, pop, depth in self._depths:
            while len(stack()) > depth:
                try:
                    stack()[-1].__exit__(None, None, None)
                except IndexError:  # that was interrupted: only the stack has the mode still
                    pop()
        for now, then in self._kept:
            _put_back(now, then)
        for parameter, data in self.data:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag


# The stacks of modes that torch keeps for a thread, and what takes the last off.
MODES: dict[Callable[[], list[Any]], Callable[[], Any]] = {
    dispatch._get_current_dispatch_mode_stack: dispatch._pop_mode,
    overrides._get_current_function_mode_stack: overrides._pop_mode,
}
CONTAINERS: tuple[type, ...] = (dict, list, set, OrderedDict, defaultdict, deque)


LEAVES = (bool, int, float, complex, str, bytes, Tensor, type(None), type)  # hold nothing of this


def homes(*models: nn.Module) -> set[str]:
    """The packages that the classes of some models come from, but for torch and this one."""
    classes = {cls for model in models for m in model.modules() for cls in type(m).__mro__}
    tops = {cls.__module__.partition(".")[0] for cls in classes}
    return (tops - {"torch", "bigops", "builtins"}) | {"__main__", "types"}


def is_of(value: Any, packages: set[str]) -> bool:
    """Whether a value is an object with attributes, of a class from one of some packages.

    Objects of others, such as queues and threads, are more than their attributes.
    """
    top = type(value).__module__.partition(".")[0]
    return top in packages and isinstance(getattr(value, "__dict__", None), dict)


def _put_back(now: Any, then: Any) -> None:
    """Give a container what its copy holds, in its order: that of Parameters is optimisers'."""
    if isinstance(now, list | deque):
        now.clear()
        now.extend(then)
    elif isinstance(now, dict) and list(now) == list(then):
        now.update(then)  # at no time without a key that another thread may look for
    else:
        now.clear()
        now.update(then)


def atomic(verb: Callable[P, R]) -> Callable[P, R]:
    """Make a verb leave its argument ``model`` as it was, unless it returns.

    The decorator goes on the public function, outermost: then any exception, Ctrl-C between two
    lines included, is followed by `Before.restore`, and nothing runs between the last line of the
    verb and its return. The verb itself makes what is new beside the old and exchanges it at the
    end, by `Sites.swap` or in the modules themselves; it needs no handler of its own. A verb whose
    ``model`` is optional is left alone where there is none.
    """
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def whole(*args: P.args, **kwargs: P.kwargs) -> R:
        model = signature.bind(*args, **kwargs).arguments.get("model")
        if not isinstance(model, nn.Module):
            return verb(*args, **kwargs)  # there is none, or the verb says what is wrong
        before = Before(model)
        try:
            return verb(*args, **kwargs)
        except BaseException:
            while True:
                try:
                    before.restore()
                    break
                except KeyboardInterrupt:  # pressed again, the call of restore included
                    continue
            raise

    return whole


def is_ours(module: nn.Module) -> bool:
    """Whether a module is a layer of this package."""
    return type(module).__module__.startswith("bigops.nn")
