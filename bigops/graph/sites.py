"""Where layers sit in a model, which may be swapped, and the swap.

`fuse_` and `compress_` build new layers beside the old ones and exchange them here at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bigops import timing
from bigops.graph import holders, save_pretrained
from bigops.graph.carry import adds_nothing, carry, lost_forward, swap_reason
from bigops.graph.looking import looking
from bigops.graph.record import class_name

_PLAIN: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding)


class Sites:
    """The modules of a model by path, with every path of a module that is reachable twice.

    A verb builds new layers beside the old ones, exchanges them by `swap` and then returns; it is
    decorated with `bigops.graph.atomic.atomic`, which brings the model back if anything is raised
    before it has returned.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
        self.model = model
        self._guarded = False
        self.modules: dict[str, nn.Module] = {}
        self.paths: dict[int, list[str]] = {}
        self.users: dict[int, list[str]] = {}  # of a parameter, by id
        for path, module in model.named_modules(remove_duplicate=False):
            self.modules[path] = module
            self.paths.setdefault(id(module), []).append(path)
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    name = f"{path}.{leaf}" if path else leaf
                    self.users.setdefault(id(parameter), []).append(name)
        held = holders.find(self.modules.values())
        self.held = {path: held[id(m)] for path, m in self.modules.items() if id(m) in held}

    def unique(self) -> Iterator[tuple[str, nn.Module]]:
        """Each module once, at its first path."""
        for path, module in self.modules.items():
            if self.paths[id(module)][0] == path:
                yield path, module

    def parent(self, path: str) -> nn.Module:
        """The module that holds the one at ``path``."""
        return self.modules[path.rpartition(".")[0]]

    def reason_to_leave(
        self,
        path: str,
        exact: tuple[type, ...],
        weight_goes: bool,
        keys_stay: bool = False,
        ties: bool = False,
    ) -> str | None:
        """Why the linear layer or the embedding at ``path`` cannot be swapped, or None.

        Args:
            path: of an `nn.Linear` or `nn.Embedding`, a subclass, or a layer of bigops.nn.
            exact: the types that may be swapped; with torch's own, the classes that add nothing to
                it, too.
            weight_goes: whether the new layer has no ``weight`` Parameter.
            keys_stay: whether its `state_dict` is that of the old one.
            ties: whether its weight may be another layer's, too, for which the caller sees
                (`tied`), and its bias, which the new layer keeps.
        """
        module = self.modules[path]
        if path == "":
            return "it is the model itself, which cannot be swapped in place; wrap it"
        parent = self.parent(path)
        attention = isinstance(parent, nn.MultiheadAttention)
        if attention and not getattr(parent, "calls_projections", False):
            return "MultiheadAttention uses its weight without calling it"
        if parametrize.is_parametrized(module):
            return "its parameters are parametrized"
        plain = any(to in exact and adds_nothing(type(module), to) for to in _PLAIN)
        if not plain and type(module) not in exact:
            what = "an embedding" if isinstance(module, nn.Embedding) else "a linear layer"
            return f"it is a {class_name(module)}, which may do more than {what}"
        others = [p for p in self.paths[id(module)] if p != path]
        if others:
            return f"the same module is also reachable as {', '.join(others)}"
        for leaf in ("weight", "u", "v", "gate_up_weight", "gate_up_bias", "bias"):
            value = getattr(module, leaf, None)
            if value is None or (leaf == "weight" and getattr(module, "computes_weight", None)):
                continue
            if module._parameters.get(leaf) is not value:
                return f"its {leaf} is no plain parameter"
            users = self.tied(path, leaf)
            if users and not (ties and leaf in ("weight", "bias")):
                return f"its {leaf} is shared with {', '.join(users)}"
        return swap_reason(module, weight_goes, keys_stay) or self.fixed(path)

    def tied(self, path: str, leaf: str = "weight") -> list[str]:
        """The other names of a Parameter of the layer at ``path``."""
        value = self.modules[path]._parameters.get(leaf)
        return [n for n in self.users.get(id(value), []) if n != f"{path}.{leaf}"]

    def fixed(self, path: str) -> str | None:
        """Why a module that takes the place of the one at ``path`` would not be all that is called.

        None where there is no reason.
        """
        held = self.held.get(path)
        if held is None or not held.fixed:
            return None
        return f"it is also held by {held.fixed[0]}, where a swap does not reach it"

    def swap(self, replacements: Mapping[str, nn.Module]) -> None:
        """Put each new module at its path and where it is held besides, with what was set on it.

        Raises:
            ValueError: something would be lost; the path and what it is.
        """
        for path, new in replacements.items():
            if reason := lost_forward(self.modules[path]) or self.fixed(path):
                raise ValueError(f"{path}: expected a module that can be swapped; {reason}")
            try:
                carry(self.modules[path], new)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        for path, new in replacements.items():
            self.put(path, new)

    def put(self, path: str, module: nn.Module) -> None:
        """Put a module at its path and where it is held besides."""
        if not self._guarded:
            save_pretrained.guard(self.model)
            self._guarded = True
        self.parent(path)._modules[path.rpartition(".")[2]] = module
        for place in self.held[path].places if path in self.held else ():
            place.put(module)


# --- running a model on example inputs -------------------------------------------------------


@contextlib.contextmanager
def evaluating(model: nn.Module, timed: bool = False) -> Iterator[None]:
    """`eval` mode inside, to run the model; afterwards all of it is as before (`looking`)."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        with looking(model, timed=timed):
            model.eval()
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positions and keywords: a mapping gives keywords, a tuple positions, all else is x."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return (example_inputs,), {}  # lists, too


def run_example(model: nn.Module, example_inputs: Any) -> Any:
    """Call the model on what `as_call` makes of the inputs."""
    args, kwargs = as_call(example_inputs)
    return model(*args, **kwargs)


def capture(
    model: nn.Module, modules: Mapping[str, nn.Module], example_inputs: Any
) -> dict[str, Tensor]:
    """The first input of each of ``modules`` while the model runs, by path; absent: not called."""
    seen: dict[str, Tensor] = {}
    handles = []

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if path not in seen and isinstance(x, Tensor):
                seen[path] = x.detach().clone()

        return hook

    try:
        for path, module in modules.items():
            handles.append(module.register_forward_pre_hook(watch(path), with_kwargs=True))
        with evaluating(model), torch.no_grad():
            run_example(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


# --- old against new -------------------------------------------------------------------------


class Contest(NamedTuple):
    """Median microseconds of both sides and old / new with its 95% interval."""

    us_before: float
    us_after: float
    speedup: timing.Ratio

    @property
    def lost(self) -> bool:
        """Whether the new side is slower by more than noise: the whole interval is below 1."""
        return self.speedup.high < 1

    def __str__(self) -> str:
        low, high = self.speedup.low, self.speedup.high
        return (
            f"measured {self.us_before:.0f} us before, {self.us_after:.0f} us after, "
            f"x{self.speedup.value:.2f} [{low:.2f}, {high:.2f}]"
        )


def contest(
    old: Callable[[Tensor], Tensor],
    new: Callable[[Tensor], Tensor],
    x: Tensor,
    training: bool,
    pairs: int = timing.MIN_PAIRS,
) -> Contest:
    """Time old against new on x, interleaved; forward and backward where ``training``.

    Gradients are taken for x and thrown away; no ``.grad`` is touched.
    """

    def side(call: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        if not training:
            return lambda: call(x)
        leaf = x.clone().requires_grad_()
        weights = [p for p in _parameters(call) if p.requires_grad]
        seed = torch.ones_like(call(leaf).detach())
        return lambda: torch.autograd.grad(call(leaf), [leaf, *weights], seed)

    sync = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    with torch.set_grad_enabled(training):
        samples = timing.interleave({"old": side(old), "new": side(new)}, pairs=pairs, sync=sync)
    return Contest(
        timing.median(samples["old"]) * 1e6,
        timing.median(samples["new"]) * 1e6,
        timing.speedup(samples["old"], samples["new"]),
    )


def _parameters(call: Callable[..., Any]) -> list[nn.Parameter]:
    return list(call.parameters()) if isinstance(call, nn.Module) else []
