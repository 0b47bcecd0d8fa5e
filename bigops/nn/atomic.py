"""All or nothing: a verb that is interrupted at any line leaves the model as it was."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


class Before:
    """What a verb may exchange in a model, as it is now; `restore` brings it back.

    Kept are, by reference and without a copy of any tensor: each module's children, Parameters and
    buffers in their order, the mode of each module, ``requires_grad`` of each Parameter, and all
    attributes of the layers of `bigops.nn`; hooks that came since are taken off. Not kept are the
    values in tensors: a verb makes new tensors and exchanges them. While this lives, so does every
    tensor that the model held.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        dicts = [d for m in modules for d in (m._modules, m._parameters, m._buffers)]
        self._dicts: list[tuple[dict[str, Any], dict[str, Any]]] = [(d, dict(d)) for d in dicts]
        self._dicts += [(vars(m), dict(vars(m))) for m in modules if is_ours(m)]
        hooks = [
            h for m in modules for h in (m._forward_pre_hooks, m._forward_pre_hooks_with_kwargs)
        ]
        self._hooks: list[tuple[dict[int, Any], set[int]]] = [(h, set(h)) for h in hooks]
        self._modes = [(m, m.training) for m in modules]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]

    def restore(self) -> None:
        """Put all of it back; Ctrl-C pressed meanwhile begins it anew."""
        while True:
            try:
                for there, then in self._dicts:
                    there.clear()  # and filled again: the order of Parameters is that of optimisers
                    there.update(then)
                for hooks, before in self._hooks:
                    for key in set(hooks) - before:
                        del hooks[key]
                for module, mode in self._modes:
                    module.training = mode
                for parameter, flag in self._flags:
                    parameter.requires_grad = flag
                return
            except KeyboardInterrupt:
                continue


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
            before.restore()
            raise

    return whole


def is_ours(module: nn.Module) -> bool:
    """Whether a module is a layer of this package."""
    return type(module).__module__.startswith("bigops.nn")
