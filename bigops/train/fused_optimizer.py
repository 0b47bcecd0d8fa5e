"""What `bigops.train.AdamW` and `SGD` share: groups, states, masters, and the checked step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigops.ops import _optimizer_states as states
from bigops.ops import fused_grad_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIN_EIGHT_BIT = 4096
"""States of smaller tensors stay in 32 bits: they weigh nothing, and biases need the precision."""

_NONE = torch.empty(0)  # says that this parameter has none
# Dtypes of states, of parameters of float64 and of all others.
_KEPT = {True: (torch.float64,), False: (torch.float32, torch.uint8)}
_ZERO = {True: 127, False: 0}  # code of 0 in the signed and the unsigned map


class FusedOptimizer(Optimizer):
    """Base of the optimisers here; a subclass gives its options and its kernel call."""

    # State tensors of a parameter's shape -> whether the map of their codes is signed.
    _SIGNED: ClassVar[dict[str, bool]] = {}

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._check_options(defaults)
        super().__init__(params, defaults)

    # --- what the subclasses give ------------------------------------------------------------

    def _check_options(self, group: dict[str, Any]) -> None:
        raise AssertionError("each optimiser checks its own options")

    def _update(self, group: dict[str, Any], batch: Batch, grad_factor: float) -> None:
        raise AssertionError("each optimiser calls its own kernel")

    # --- groups ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises before anything is added.

        Raises:
            ValueError: an option out of range, or a sparse parameter.
            TypeError: a parameter's dtype that is not served.
        """
        params = param_group["params"]
        if not isinstance(params, Tensor):
            params = list(params)
            param_group = {**param_group, "params": params}
        self._check_options({**self.defaults, **param_group})
        for item in [params] if isinstance(params, Tensor) else params:
            tensor = item[1] if isinstance(item, tuple) else item  # named parameters
            if not isinstance(tensor, Tensor):
                continue  # torch's own message
            if tensor.layout != torch.strided:
                raise ValueError(f"params: expected dense parameters; got {tensor.layout}")
            if hasattr(tensor, "device_mesh"):
                raise TypeError("params: expected plain tensors; got a DTensor")
            if tensor.dtype not in DTYPES:
                names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
                raise TypeError(f"params: expected dtype {names}; got {tensor.dtype}")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    # --- the step ----------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, grad_factor: float = 1.0
    ) -> Any:
        """One step, as torch's optimisers do it: no look at inf or NaN.

        Args:
            closure: evaluates the model again and returns the loss.
            grad_factor: gradients are multiplied by it inside the kernel; they are left as they
                are.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a sparse gradient, or states that do not fit a parameter whose dtype or
                shape was changed; nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._gradients()  # this and _prepare raise before the first group is updated
        work: list[tuple[dict[str, Any], list[tuple[int, Tensor]]]] = []
        first_stream = 0
        for group in self.param_groups:
            by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
            for stream, param in enumerate(group["params"], first_stream):
                if param.grad is not None:
                    by_device.setdefault(param.device, []).append((stream, param))
            first_stream += len(group["params"])
            for items in by_device.values():
                for _, param in items:
                    self._prepare(group, param)
                work.append((group, items))
        for group, items in work:
            self._update(group, Batch(self, group, items), grad_factor)
        for group in self.param_groups:
            group["rounding_step"] += 1
        return loss

    @torch.no_grad()
    def step_checked(self, *, inv_scale: float = 1.0, clip_norm: float | None = None) -> bool:
        """Check, unscale, clip and step in two passes over memory.

        Args:
            inv_scale: the gradients are multiplied by it: one over the loss scale.
            clip_norm: largest Euclidean norm of all unscaled gradients together; None leaves them.

        Returns:
            False where a gradient held inf or NaN: nothing was changed then, no state was made.
            ``.grad`` keeps what it held in any case.

        Raises:
            ValueError: an argument out of range, or a sparse gradient; nothing was changed.
        """
        if not (inv_scale > 0 and math.isfinite(inv_scale)):
            raise ValueError(f"inv_scale: expected a finite number above 0; got {inv_scale}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm: expected a number above 0; got {clip_norm}")
        by_device: dict[torch.device, list[Tensor]] = {}
        for grad in self._gradients():
            by_device.setdefault(grad.device, []).append(grad)
        norm = math.hypot(*(float(fused_grad_norm(grads)) for grads in by_device.values()))
        if not math.isfinite(norm):
            return False
        factor = inv_scale
        if clip_norm is not None:  # torch.nn.utils.clip_grad_norm_ adds the same 1e-6
            factor *= min(1.0, clip_norm / (norm * inv_scale + 1e-6))
        self.step(grad_factor=factor)
        return True

    def _gradients(self) -> list[Tensor]:
        found = []
        for g, group in enumerate(self.param_groups):
            for p, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if param.grad.layout != torch.strided:
                    raise ValueError(
                        f"param_groups[{g}]['params'][{p}]: expected a dense gradient; got "
                        f"{param.grad.layout} (torch.optim.SparseAdam takes sparse ones)"
                    )
                found.append(param.grad)
        return found

    # --- states ------------------------------------------------------------------------------

    def _names(self, group: dict[str, Any]) -> Iterable[str]:
        return self._SIGNED

    def _prepare(self, group: dict[str, Any], param: Tensor) -> None:
        """Make the states that a parameter does not have yet."""
        state = self.state[param]
        sixteen = param.dtype in (torch.bfloat16, torch.float16)
        if "master" in state:
            _check_fits("master", state["master"], param, sixteen)
        elif group["master_weights"] and sixteen:
            state["master"] = param.detach().float()
        for name in self._names(group):
            held = state.get(name)
            if held is not None:
                kept = _KEPT[param.dtype == torch.float64]
                _check_fits(name, held, param, held.dtype in kept)
                continue
            if _coded(group, param):
                signed = self._SIGNED[name]
                state[name] = torch.full(
                    param.shape, _ZERO[signed], dtype=torch.uint8, device=param.device
                )
                state[f"{name}_scale"] = torch.zeros(
                    states.blocks_of(param.numel()), device=param.device
                )
            else:
                state[name] = torch.zeros_like(param, dtype=_wide(param))

    def state_bytes(self) -> int:
        """Bytes of all states that live now, masters included."""
        tensors = [t for s in self.state.values() for t in s.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of the same optimiser here or in torch.optim.

        Options that the file has win; states of another width than the group's option asks for are
        converted. Loading keeps float32 states of 16-bit parameters, where torch would round them.

        Raises:
            ValueError: groups of other sizes, states of other shapes, or amsgrad; nothing changed.
        """
        for group in state_dict["param_groups"]:
            self._check_options({**self.defaults, **group})
        saved = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        own = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        pairs = list(zip(saved, own, strict=False))
        for key, param in pairs:
            for name, value in state_dict["state"].get(key, {}).items():
                if value is None or (name not in self._SIGNED and name != "master"):
                    continue
                where = f"state_dict: {name} of parameter {key}: expected"
                if value.shape != param.shape:
                    raise ValueError(f"{where} shape {list(param.shape)}; got {list(value.shape)}")
                scales = state_dict["state"][key].get(f"{name}_scale")
                count = states.blocks_of(param.numel())
                if value.dtype == torch.uint8 and (scales is None or scales.shape != (count,)):
                    got = "none" if scales is None else f"shape {list(scales.shape)}"
                    raise ValueError(f"{where} scales of shape [{count}]; got {got}")
        super().load_state_dict(state_dict)
        groups = {param: group for group in self.param_groups for param in group["params"]}
        for key, param in pairs:
            if key in state_dict["state"]:
                loaded = dict(state_dict["state"][key])
                self.state[param] = self._fitted(groups[param], param, loaded)

    def _fitted(self, group: dict[str, Any], param: Tensor, loaded: dict[str, Any]) -> Any:
        """The states as this optimiser keeps them, in memory of their own."""
        fitted: dict[str, Any] = {}
        for name, value in loaded.items():
            if value is None:
                continue
            if name == "step":
                fitted[name] = torch.tensor(float(value), dtype=torch.float32)
            elif name == "master":
                fitted[name] = torch.empty_like(param, dtype=torch.float32).copy_(value)
            elif name in self._SIGNED:
                signed = self._SIGNED[name]
                scales = loaded.get(f"{name}_scale", torch.empty(0))
                coded = _coded(group, param)
                if coded and value.dtype == torch.uint8:
                    codes, new = value.contiguous().clone(), scales.clone()
                elif coded:
                    codes, new = states.encode(value.float(), signed)
                else:
                    if value.dtype == torch.uint8:
                        value = states.decode(value, scales, signed)
                    fitted[name] = torch.empty_like(param, dtype=_wide(param)).copy_(value)
                    continue
                fitted[name] = codes.to(param.device)
                fitted[f"{name}_scale"] = new.to(param.device)
            elif not name.endswith("_scale"):
                fitted[name] = value
        return fitted


class Batch:
    """The lists of one kernel call."""

    def __init__(
        self, optimizer: FusedOptimizer, group: dict[str, Any], items: list[tuple[int, Tensor]]
    ) -> None:
        self.states = [optimizer.state[param] for _, param in items]
        self.grads = [param.grad for _, param in items]
        self.params = [s.get("master", p) for s, (_, p) in zip(self.states, items, strict=True)]
        self.copies: list[Tensor] = []
        if any("master" in s for s in self.states):
            self.copies = [
                p if "master" in s else _NONE for s, (_, p) in zip(self.states, items, strict=True)
            ]
        rounds = group["stochastic_rounding"] and any(
            p.dtype == torch.bfloat16 for p in self.params
        )
        streams = [stream for stream, _ in items] if rounds else []
        self.rounding: tuple[list[int], int, int] = (
            streams, group["seed"], group["rounding_step"],
        )  # fmt: skip

    def lists(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """The states of a name and their scales ([] where none is in 8 bits)."""
        key = f"{name}_scale"
        scales = (
            [s.get(key, _NONE) for s in self.states] if any(key in s for s in self.states) else []
        )
        return [s[name] for s in self.states], scales

    def part(self, chosen: list[bool]) -> Batch:
        """The batch of those parameters alone."""
        if all(chosen):
            return self
        part = object.__new__(Batch)
        for name in ("states", "grads", "params", "copies"):
            setattr(part, name, list(itertools.compress(getattr(self, name), chosen)))
        streams, seed, step = self.rounding
        part.rounding = (list(itertools.compress(streams, chosen)), seed, step)
        return part


def _check_fits(name: str, held: Tensor, param: Tensor, dtype_fits: bool) -> None:
    if held.shape != param.shape or not dtype_fits:
        raise ValueError(
            f"params: expected what {name} was made for, {held.dtype} of shape "
            f"{list(held.shape)}; got a parameter of {param.dtype}, shape {list(param.shape)} (was "
            "the model changed after a step?)"
        )


def _wide(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _coded(group: dict[str, Any], param: Tensor) -> bool:
    return bool(
        group["eight_bit"] and param.numel() >= MIN_EIGHT_BIT and param.dtype != torch.float64
    )
