"""One string that sets the precision of a training run, on CPU and GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigops.optim.fused_optimizer import FusedOptimizer

PRECISIONS = ("fp32", "bf16-mixed", "fp16-mixed")
LEAST_SCALE = 2.0**-14
"""What the loss scale falls to at most: float16's smallest normal number. The backward pass starts
with the scale itself, so that a smaller one would lose bits of every gradient."""

_LARGEST = torch.finfo(torch.float32).max  # the scale is a float32
_SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


class MixedPrecision:
    """Autocast, loss scaling and clipping behind four calls; the loop stays the caller's.

    ::

        precision = MixedPrecision("fp16-mixed", device="cuda")
        for x, y in batches:
            with precision.autocast():
                loss = loss_fn(model(x), y)
            optimizer.zero_grad()
            precision.backward(loss)
            stepped = precision.step(optimizer, clip_norm=1.0)

    Weights and optimiser states keep their dtype (float32 as a rule); autocast casts what the ops
    compute with. ``"fp16-mixed"`` scales the loss so that small gradients survive fp16's narrow
    range, by torch.amp.GradScaler (method: Micikevicius et al., Mixed Precision Training, 2018):
    a step whose gradients hold inf or NaN is skipped and the scale multiplied by
    ``backoff_factor``, down to 2**-14 or to a lower ``init_scale``; ``growth_interval`` good steps
    multiply it by ``growth_factor``, as long as float32 holds it. A run whose gradients stay NaN
    goes on skipping.

    Under DistributedDataParallel all ranks skip together: the all-reduce carries an inf or NaN of
    one rank into the gradients of all. Gradients that are not reduced (``no_sync`` up to the step)
    carry no such agreement.

    Args:
        precision: ``"fp32"`` (no autocast; also right for a float64 model), ``"bf16-mixed"`` or
            ``"fp16-mixed"``.
        device: ``"cpu"`` or ``"cuda"`` (with or without an index; ROCm is ``"cuda"`` too).
        init_scale, growth_factor, backoff_factor, growth_interval: of the loss scale; unused
            outside ``"fp16-mixed"``.

    Raises:
        ValueError: unknown precision or device, or a scale setting out of range.
        RuntimeError: ``device`` is a GPU that is not there, or lacks bfloat16 for
            ``"bf16-mixed"``.
    """

    def __init__(
        self,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
        *,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}"
            )
        if not 1 / _LARGEST <= init_scale <= _LARGEST:
            raise ValueError(
                f"init_scale: expected a finite number above 0; got {init_scale}, which float32 "
                "does not hold, or not one over it"
            )
        if not 1 < growth_factor < math.inf:
            raise ValueError(f"growth_factor: expected a number above 1; got {growth_factor}")
        if not 0 < backoff_factor < 1:
            raise ValueError(f"backoff_factor: expected between 0 and 1; got {backoff_factor}")
        if growth_interval < 1:
            raise ValueError(f"growth_interval: expected at least 1; got {growth_interval}")
        self.precision = precision
        self.device = _device(device)
        self.dtype: torch.dtype | None = {
            "fp32": None,
            "bf16-mixed": torch.bfloat16,
            "fp16-mixed": torch.float16,
        }[precision]
        on_gpu = self.device.type == "cuda"
        if on_gpu and self.dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(self.device)
            raise RuntimeError(f"precision: 'bf16-mixed' needs bfloat16, which {name} lacks")
        self._scaler = torch.amp.GradScaler(
            self.device.type,
            init_scale=init_scale,
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            growth_interval=growth_interval,
            enabled=precision == "fp16-mixed",
        )
        self._least = min(LEAST_SCALE, init_scale)
        self._has_backward = False

    def __repr__(self) -> str:
        return f"MixedPrecision({self.precision!r}, device={str(self.device)!r})"

    @property
    def scale(self) -> float:
        """Current loss scale; 1.0 unless the precision is ``"fp16-mixed"``."""
        return self._scaler.get_scale()

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for the forward pass and the loss; does nothing for ``"fp32"``."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a scalar loss, scaled where the precision asks for it.

        May be called several times before ``step``: gradients then add up.
        """
        if loss.numel() != 1:
            raise ValueError(f"loss: expected a scalar; got shape {tuple(loss.shape)}")
        self._scaler.scale(loss).backward()
        self._has_backward = True

    def step(self, optimizer: Optimizer, clip_norm: float | None = None) -> bool:
        """Unscale the gradients, clip them and step.

        With `bigops.train.AdamW` and `SGD` that takes two passes over memory and leaves ``.grad``
        as it was; with torch's optimisers ``.grad`` is unscaled and clipped in place.

        Args:
            optimizer: the one optimiser of this backward pass.
            clip_norm: largest Euclidean norm of all gradients together; None leaves them.

        Returns:
            False when the step was skipped: weights and optimiser states are as before. That is
            the case for inf or NaN in the gradients in ``"fp16-mixed"``, and in the other
            precisions where ``clip_norm`` is given (a clipped inf would be NaN in every weight).

        Raises:
            RuntimeError: no ``backward`` of this object since the last step, or no gradients.
        """
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm: expected a number above 0; got {clip_norm}")
        if not self._has_backward:
            # Also refuses a second optimiser: the first call may have changed the scale that the
            # second one's gradients still carry.
            raise RuntimeError(
                "step: expected a call of backward() since the last step; one optimizer per "
                "backward (put all parameters into one, in groups)"
            )
        grads = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if not grads:
            raise RuntimeError("step: expected gradients, no parameter of the optimizer has one")
        if isinstance(optimizer, FusedOptimizer):
            stepped = self._fused_step(optimizer, clip_norm)
            self._has_backward = False
            return stepped
        self._has_backward = False
        self._scaler.unscale_(optimizer)
        if clip_norm is not None:
            norm = _norm([p.grad for p in grads])
            if not self._scaler.is_enabled() and not bool(torch.isfinite(norm)):
                return False
            torch.nn.utils.clip_grads_with_norm_(grads, clip_norm, norm)
        # The scale shrinks exactly when inf or NaN was found. The return value of
        # GradScaler.step does not tell: optimisers return None from a step that happened.
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        after = self._scaler.get_scale()
        if after < self._least:  # torch's own would go on to 0, and 0 * inf into every weight
            self._scaler.update(self._least)
        return after >= before

    def _fused_step(self, optimizer: FusedOptimizer, clip_norm: float | None) -> bool:
        if not self._scaler.is_enabled():
            if clip_norm is None:
                optimizer.step()
                return True
            return optimizer.step_checked(clip_norm=clip_norm)
        scaler = self._scaler
        stepped = optimizer.step_checked(inv_scale=1 / scaler.get_scale(), clip_norm=clip_norm)
        # What GradScaler.update does: it takes no verdict from outside, its state does.
        state = scaler.state_dict()
        if not stepped:
            state["scale"] = max(state["scale"] * scaler.get_backoff_factor(), self._least)
            state["_growth_tracker"] = 0
        else:
            state["_growth_tracker"] += 1
            if state["_growth_tracker"] == scaler.get_growth_interval():
                grown = state["scale"] * scaler.get_growth_factor()
                if grown <= _LARGEST:
                    state["scale"] = grown
                state["_growth_tracker"] = 0
        scaler.load_state_dict(state)
        return stepped

    def state_dict(self) -> dict[str, Any]:
        """Precision, scale and growth counter: with it a resumed run continues bitwise."""
        return {"precision": self.precision, "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a ``state_dict`` of an object of the same precision.

        A scale that had fallen below the least one is raised to it.

        Raises:
            ValueError: see `check_state_dict`; nothing has changed then.
        """
        self.check_state_dict(state)
        scaler = dict(state["scaler"])
        if scaler:
            scaler["scale"] = max(scaler["scale"], self._least)
        self._scaler.load_state_dict(scaler)
        self._has_backward = False

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise what `load_state_dict` would raise, and change nothing.

        Raises:
            ValueError: it was saved with another precision, or is not such a dict.
        """
        if set(state) != {"precision", "scaler"}:
            raise ValueError(f"state: expected keys precision and scaler; got {sorted(state)}")
        if state["precision"] != self.precision:
            raise ValueError(
                f"state: expected precision {self.precision}; got {state['precision']}"
            )
        scaler = state["scaler"]
        keys = _SCALER_KEYS if self._scaler.is_enabled() else set()
        if set(scaler) != keys:
            raise ValueError(
                f"state: expected a scaler with keys {sorted(keys)}; got {sorted(scaler)}"
            )
        if keys and not 0 <= scaler["scale"] <= _LARGEST:
            raise ValueError(f"state: expected a finite scale; got {scaler['scale']}")


def _norm(grads: list[Tensor | None]) -> Tensor:
    """Norm of all gradients together; in float64 where float32 cannot hold their squares."""
    given = [grad for grad in grads if grad is not None]
    norm = torch.nn.utils.get_total_norm(given)
    if bool(torch.isfinite(norm)):
        return norm
    return torch.nn.utils.get_total_norm([grad.double() for grad in given])


def _device(device: str | torch.device) -> torch.device:
    try:
        result = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected 'cpu' or 'cuda'; got {device!r}") from None
    if result.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda'; got {device!r}")
    if result.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (result.index or 0) >= count:
            raise RuntimeError(f"device: {device!r} asked for, this torch sees {count} GPUs")
    return result
