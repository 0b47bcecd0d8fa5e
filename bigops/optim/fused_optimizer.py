"""What `AdamW`, `Adam` and `SGD` share: groups, states, masters, and the checked step."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigops.nn.stored_parameter import StoredParameter
from bigops.ops.fused_adamw import states
from bigops.optim import placed
from bigops.optim import saved_states as saved
from bigops.optim.batch import Batch
from bigops.optim.grad_norm import norm_over_ranks
from bigops.optim.options import (
    RefusedError,
    check_flags,
    check_number,
    refuse_capture,
    unordered,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Dtypes of states, of parameters of float64 and of all others.
_KEPT = {True: (torch.float64,), False: (torch.float32, torch.uint8)}
_LARGEST = torch.finfo(torch.float32).max
_ZERO = {True: 127, False: 0}  # code of 0 in the signed and the unsigned map


class FusedOptimizer(Optimizer):
    """Base of the optimisers here; a subclass gives its options and its kernel call."""

    # State tensors of a parameter's shape -> whether the map of their codes is signed.
    _SIGNED: ClassVar[dict[str, bool]] = {}
    # What a saved state has all of, if any.
    _WHOLE: ClassVar[tuple[str, ...]] = ()
    # Whether gradients are used up while the backward pass makes them, see `step_in_backward`.
    in_backward = False

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        if isinstance(params, set | frozenset):
            raise unordered(params)
        defaults["rounding_step"] = 0
        self._check_options(defaults)
        super().__init__(params, defaults)

    # --- what the subclasses give ------------------------------------------------------------

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise for an option out of range or not served; the subclasses go on with their own."""
        check_number("lr", group["lr"], 0)
        check_number("weight_decay", group["weight_decay"], 0)
        check_flags(group)
        seed = group["seed"]
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected an integer of 64 bits; got {seed!r}")

    def _update(self, group: dict[str, Any], batch: Batch, grad_factor: float) -> None:
        raise AssertionError("each optimiser calls its own kernel")

    # --- groups ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises before anything is added.

        Raises:
            ValueError: an option out of range, or a sparse parameter.
            RefusedError: an option that is not served; a ValueError and a RuntimeError.
            TypeError: a parameter's dtype that is not served, or parameters in a set.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group: expected a dict; got {type(param_group).__name__}")
        params = param_group["params"]
        if isinstance(params, set | frozenset):
            raise unordered(params)
        if not isinstance(params, Tensor):
            params = param_group["params"] = list(params)  # a generator runs once
        self._check_options({**self.defaults, **param_group})
        for item in [params] if isinstance(params, Tensor) else params:
            tensor = item[1] if isinstance(item, tuple) else item  # named parameters
            if not isinstance(tensor, Tensor) or isinstance(tensor, StoredParameter):
                continue  # torch's own message; never trained
            if tensor.layout != torch.strided:
                raise ValueError(f"params: expected dense parameters; got {tensor.layout}")
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
            ValueError: a grad_factor past float32, or states that do not fit a parameter whose
                dtype or shape was changed; nothing was updated.
            RefusedError: a sparse gradient, AdamW in the capture of a CUDA graph, a parameter
                split between ranks in a way that 8-bit states or stochastic rounding do not serve,
                or a factor beside `step_in_backward`; likewise.
        """
        if not abs(grad_factor) <= _LARGEST:
            raise ValueError(
                f"grad_factor: expected a number that float32 holds; got {grad_factor}"
            )
        if self.in_backward and grad_factor != 1:
            raise RefusedError(
                "grad_factor: expected 1 beside step_in_backward, whose gradients are used up; got "
                f"{grad_factor}"
            )
        if "capturable" in self.defaults:
            refuse_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._gradients()  # this and _prepare raise before the first group is updated
        work: list[tuple[dict[str, Any], list[tuple[int, Tensor]]]] = []
        first_stream = 0
        for group in self.param_groups:
            # One kernel call for each device, and for each time that a group holds a parameter.
            calls: dict[tuple[torch.device, int], list[tuple[int, Tensor]]] = {}
            times: dict[int, int] = {}
            for stream, param in enumerate(group["params"], first_stream):
                if param.grad is not None:
                    times[id(param)] = time = times.get(id(param), -1) + 1
                    calls.setdefault((param.device, time), []).append((stream, param))
            first_stream += len(group["params"])
            for items in calls.values():
                for _, param in items:
                    self._prepare(group, param)
                work.append((group, items))
        batches = [(group, self._batch(group, items)) for group, items in work]
        for group, batch in batches:
            self._update(group, batch, grad_factor)
            batch.count_versions()
        for group in self.param_groups:
            group["rounding_step"] += 1
        return loss

    def _batch(self, group: dict[str, Any], items: list[tuple[int, Tensor]]) -> Batch:
        return Batch([self.state[param] for _, param in items], group, items)

    @torch.no_grad()
    def _step_one(self, group: dict[str, Any], stream: int, param: Tensor) -> None:
        """The part of `step` that is one parameter's, without counting the step."""
        self._prepare(group, param)
        batch = self._batch(group, [(stream, param)])
        self._update(group, batch, 1.0)
        batch.count_versions()

    @torch.no_grad()
    def step_checked(
        self,
        *,
        inv_scale: float = 1.0,
        clip_norm: float | None = None,
        process_group: Any = "all",
    ) -> bool:
        """Check, unscale, clip and step in two passes over memory.

        Args:
            inv_scale: the gradients are multiplied by it: one over the loss scale.
            clip_norm: largest Euclidean norm of all unscaled gradients together; None leaves them.
            process_group: the ranks that have to call it together, since they skip together, by one
                norm: as in `bigops.optim.grad_norm`.

        Returns:
            False where a gradient held inf or NaN, or may be past float32 once it is unscaled:
            nothing was changed then, no state was made. ``.grad`` keeps what it held in any case.

        Raises:
            ValueError: an argument out of range; nothing was changed.
            RefusedError: as `step` raises it, or an optimiser that steps in the backward pass;
                likewise.
        """
        if self.in_backward:
            raise RefusedError(
                "step_checked: expected an optimiser that steps after the backward pass: clipping "
                "by the norm of all gradients, and a step skipped for one of them, need them "
                "together; got one under step_in_backward"
            )
        if not 0 < inv_scale <= _LARGEST:
            raise ValueError(
                f"inv_scale: expected a number above 0 that float32 holds; got {inv_scale}"
            )
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm: expected a number above 0; got {clip_norm}")
        grads = self._gradients()
        norm = float(norm_over_ranks(grads, process_group=process_group)[0]) if grads else 0.0
        if not math.isfinite(norm * inv_scale):
            return False
        factor = inv_scale
        if clip_norm is not None:  # torch.nn.utils.clip_grad_norm_ adds the same 1e-6
            factor *= min(1.0, clip_norm / (norm * inv_scale + 1e-6))
        wide = all(grad.dtype == torch.float64 for grad in grads)
        if norm * factor > _LARGEST and not wide:
            return False
        self.step(grad_factor=factor)
        return True

    def _gradients(self) -> list[Tensor]:
        found = []
        for g, group in enumerate(self.param_groups):
            for p, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if param.grad.layout != torch.strided:
                    raise RefusedError(
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
        state, split = self.state[param], placed.is_split(param)
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
                if split:
                    placed.check_alike(name, held, param)
                continue
            if saved.coded(group, param):
                placed.check_blocks(param)
                part, leading = placed.local(param), states.leading_of(param.shape)
                codes = torch.full(
                    part.shape, _ZERO[self._SIGNED[name]], dtype=torch.uint8, device=part.device
                )
                scales = torch.zeros(
                    states.scales_shape(part.shape, leading),
                    dtype=torch.float32,
                    device=part.device,
                )
                state[name] = placed.wrap(codes, param, tuple(param.shape))
                state[f"{name}_scale"] = placed.wrap(
                    scales, param, states.scales_shape(param.shape)
                )
            else:
                state[name] = torch.zeros_like(param, dtype=saved.wide(param))

    @torch.no_grad()
    def make_states(self) -> None:
        """Make the states that the first step would make, of all parameters that are trained.

        torch.distributed.checkpoint asks an optimiser without states for its state_dict after a
        step with zeros for gradients, which counts as one. So make them before they are loaded.
        (SGD's dampening spares the first gradient; that this one is still to come is not saved.)

        Raises:
            RefusedError: as `step` raises it.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    self._prepare(group, param)

    def state_bytes(self) -> int:
        """Bytes of all states that live now on this rank, masters included."""
        held = [t for s in self.state.values() for t in s.values() if isinstance(t, Tensor)]
        tensors = map(placed.local, held)
        return sum(t.numel() * t.element_size() for t in tensors)

    # --- state_dict --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a moment in 8 bits is ``{"codes": uint8}``, with its ``_scale`` beside.

        Any tensor under the name of a moment torch.optim casts to the parameter's dtype, and would
        go on with codes for values; at a dict its step raises.
        """
        form = functools.partial(saved.with_codes_apart, self._SIGNED)
        try:
            self.register_state_dict_post_hook(form, prepend=True)
            return super().state_dict()
        finally:
            saved.unhook(self._optimizer_state_dict_post_hooks, form)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of the same optimiser here or in torch.optim.

        Options that the file has win; states of another width than the group's option asks for are
        converted. Loading keeps float32 states of 16-bit parameters, where torch would round them.
        Hooks act as in torch: what the last pre-hook gives is checked and loaded, and post-hooks
        find the new states.

        Raises:
            ValueError, TypeError: groups of other sizes, states of other shapes or kinds, an
                option out of range or not served (amsgrad, capturable, differentiable: with False
                in its place in the file's groups the rest is loaded). States and groups are then
                as before, as they are where a hook raised; only what a hook wrote into old tensors
                stays.
        """
        given: dict[Tensor, dict[str, Any]] = {}

        def take(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            pairs = self._check(state_dict)
            state = dict(state_dict["state"])
            given.update((param, state.pop(key)) for key, param in pairs if key in state)
            return {**state_dict, "state": state}  # torch would cast what it finds here

        def fit(_: Optimizer) -> None:
            for group in self.param_groups:
                for param in group["params"]:
                    if param in given:
                        self.state[param] = saved.fitted(group, param, given[param], self._SIGNED)

        def unhook() -> None:
            saved.unhook(self._optimizer_load_state_dict_pre_hooks, take)
            saved.unhook(self._optimizer_load_state_dict_post_hooks, fit)

        restore = saved.restorer(self)
        try:
            self.register_load_state_dict_pre_hook(take)
            self.register_load_state_dict_post_hook(fit, prepend=True)
            super().load_state_dict(state_dict)
            unhook()  # nothing after it: Ctrl-C there would find all loaded
        except BaseException:
            unhook()
            restore()
            raise

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise what `load_state_dict` would raise, and change nothing.

        Where load_state_dict pre-hooks are registered nothing is looked at: what they make of the
        state is known when they run.
        """
        if not self._optimizer_load_state_dict_pre_hooks:
            self._check(state_dict)

    def _check(self, state_dict: dict[str, Any]) -> list[tuple[Any, Tensor]]:
        """The state's keys and the parameters that they stand for."""
        if not {"state", "param_groups"} <= set(state_dict):
            got = sorted(map(str, state_dict))
            raise ValueError(f"state_dict: expected keys state and param_groups; got {got}")
        sizes, own = (
            [len(group["params"]) for group in groups]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        if sizes != own:
            raise ValueError(f"state_dict: expected parameter groups of sizes {own}; got {sizes}")
        for group in state_dict["param_groups"]:
            self._check_options({**self.defaults, **group})
        keys = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        pairs = list(zip(keys, params, strict=True))
        for key, param in pairs:
            held = state_dict["state"].get(key, {})
            saved.check(f"of parameter {key}", held, param, self._SIGNED, self._WHOLE)
        return pairs


def _check_fits(name: str, held: Tensor, param: Tensor, dtype_fits: bool) -> None:
    if held.shape != param.shape or not dtype_fits:
        raise ValueError(
            f"params: expected what {name} was made for, {held.dtype} of shape "
            f"{list(held.shape)}; got a parameter of {param.dtype}, shape {list(param.shape)} (was "
            "the model changed after a step?)"
        )
