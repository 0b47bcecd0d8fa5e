"""One string that sets the precision of a training run, on CPU and GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigops.optim.grad_norm import norm_over_ranks, ranks_of
from bigops.optim.in_backward import scaled_loss
from bigops.train import stepping
from bigops.train.loss_scale import LARGEST, LEAST_SCALE, LossScale

_DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "tf32": None,
    "bf16-mixed": torch.bfloat16,
    "fp16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "fp8-mixed": torch.bfloat16,
}
PRECISIONS = tuple(_DTYPES)
_SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


@dataclass(frozen=True, eq=False)
class StepResult:
    """What became of a step; true where it was taken.

    The fields are 0-dimensional tensors on the device of the gradients, and stay as they are:
    reading one (``bool(result)``, ``float(result.norm)``) waits for a GPU, keeping it does not.
    """

    stepped: Tensor
    """bool: False where gradients held inf or NaN; weights and states are then as before."""
    norm: Tensor | None
    """float64: of all gradients over all ranks, unscaled, before clipping; None: nobody asked."""
    scale: Tensor
    """float32: the loss scale of the next backward pass; 1 outside ``"fp16-mixed"``."""
    skips: Tensor
    """int64: steps that were skipped so far."""

    def __bool__(self) -> bool:
        return bool(self.stepped)


class MixedPrecision:
    """Autocast, loss scaling and clipping behind four calls; the loop stays the caller's.

    ::

        precision = MixedPrecision("fp16-mixed", device="cuda")
        for x, y in batches:
            with precision.autocast():
                loss = loss_fn(model(x), y)
            optimizer.zero_grad()
            precision.backward(loss)
            if precision.step(optimizer, clip_norm=1.0):
                schedule.step()  # what counts steps moves only with those that were taken
                ema.update_parameters(model)

    Accumulation over microbatches of unequal size, the gradient being that of the mean over all
    tokens of all microbatches and ranks::

        optimizer.zero_grad()
        for x, y in microbatches:
            with precision.autocast():
                loss = F.cross_entropy(model(x), y, reduction="sum")
            precision.backward(loss, weight=(y != -100).sum())
        precision.step(optimizer)

    A sum has gradients as many times larger: in ``"fp16-mixed"`` give an ``init_scale`` of about
    2**16 over the tokens of a microbatch, or the first steps are skipped while it falls to that.

    Several losses are several ``backward`` calls; several optimisers of one backward pass step in
    one call, ``step([a, b])``, by one verdict, one norm and one change of the scale. Losses with a
    step each (a GAN's) are ``backward``, ``step``, ``backward``, ``step``.

    ============== =========================================== ========================
    precision      products in                                 weights
    ============== =========================================== ========================
    ``fp32``       their own dtype (also a float64 model's)    as they are
    ``tf32``       TF32 where the device has it, in the        float32
                   contexts and backward passes of this object
    ``bf16-mixed`` bfloat16, by autocast                       float32
    ``fp16-mixed`` float16, by autocast, with a loss scale     float32, or with masters
    ``bf16-true``  bfloat16, no autocast                       bfloat16, rounded
                                                               stochastically or with masters
    ``fp8-mixed``  bfloat16, by autocast; `bigops.nn.Fp8Linear` float32
                   trains its weight as float8 stores it
    ============== =========================================== ========================

    In ``"bf16-true"`` the model is cast by ``model.to(precision.dtype)``, and so are its inputs;
    the optimiser is `bigops.train.AdamW` or `SGD`, others would lose what is below half a unit in
    the last place of a weight.

    ``"fp16-mixed"`` scales the loss so that small gradients survive fp16's narrow range (method:
    Micikevicius et al., Mixed Precision Training, 2018): a step whose gradients hold inf or NaN is
    skipped and the scale multiplied by ``backoff_factor``, down to 2**-14 or to a lower
    ``init_scale``; ``growth_interval`` good steps multiply it by ``growth_factor``, as long as
    float32 holds it. A run whose gradients stay NaN goes on skipping.

    All ranks skip together and clip by the same norm, also where gradients are DTensors of several
    meshes, or were not reduced (``no_sync`` up to the step): see `bigops.optim.grad_norm`. So where
    torch.distributed runs all of ``process_group`` call ``step`` together.

    Args:
        precision: one of `PRECISIONS`.
        device: ``"cpu"`` or ``"cuda"`` (with or without an index; ROCm is ``"cuda"`` too).
        init_scale, growth_factor, backoff_factor, growth_interval: of the loss scale; unused
            outside ``"fp16-mixed"``.
        process_group: the ranks that step together: ``"all"``, ``"none"`` (this process alone), or
            a process group of torch.distributed.
        pipeline: process group of the stages of a pipeline, whose gradients' norms add up.

    Raises:
        ValueError: unknown precision, device or process_group, or a scale setting out of range.
        RuntimeError: ``device`` is a GPU that is not there, or lacks bfloat16 or float8 where the
            precision needs it; ``"fp8-mixed"`` on a CPU.
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
        process_group: Any = "all",
        pipeline: Any = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}"
            )
        if not 1 / LARGEST <= init_scale <= LARGEST:
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
        ranks_of(process_group)
        self.precision = precision
        self.device = _device(device)
        self.dtype = _DTYPES[precision]
        """What products are in, where that is not the model's own dtype."""
        _check_served(precision, self.device)
        self._ranks = {"process_group": process_group, "pipeline": pipeline}
        self._scaled = precision == "fp16-mixed"
        self._scale = LossScale(
            init_scale if self._scaled else 1.0,
            self.device,
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            growth_interval=growth_interval,
            least=min(LEAST_SCALE, init_scale),
            dynamic=self._scaled,
        )
        self._is = {
            flag: torch.full((), flag, dtype=torch.bool, device=self.device)
            for flag in (True, False)
        }
        self._skips = torch.zeros((), dtype=torch.int64, device=self.device)
        self._has_backward = False
        self._weight: Tensor | float | None = None  # of the backward passes since the last step

    def __repr__(self) -> str:
        return f"MixedPrecision({self.precision!r}, device={str(self.device)!r})"

    @property
    def scale(self) -> float:
        """Current loss scale; 1.0 unless the precision is ``"fp16-mixed"``. Waits for a GPU."""
        return float(self._scale.value)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for the forward pass and the loss; does nothing for ``"fp32"``, ``"bf16-true"``.

        For ``"tf32"`` it sets torch's float32 matmul precision, and puts back what it was.
        """
        if self.precision == "tf32":
            return _tf32()
        if self.dtype is None or self.precision == "bf16-true":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor, weight: Tensor | float | None = None) -> None:
        """Run the backward pass of a scalar loss, scaled where the precision asks for it.

        May be called several times before ``step``: gradients then add up.

        Args:
            loss: one element.
            weight: with it the loss is a sum, of so many tokens (or rows): ``step`` divides the
                gradients by the sum of the weights of all backward passes since the last step, and
                over all ranks, where gradients are averaged over ranks, as DistributedDataParallel
                and fully_shard do. A number or a tensor of one element, which stays on its device;
                on each backward between two steps, or on none. 0 is a microbatch of padding. Steps
                with weights look for inf and NaN in every precision; one whose weights are all 0 is
                skipped.

        Raises:
            TypeError: the loss is no tensor.
            ValueError: a loss that is not scalar, or a weight that is below 0, not finite, or given
                now but not before; nothing was computed.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss: expected a tensor; got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"loss: expected a scalar; got shape {tuple(loss.shape)}")
        if self._has_backward and (weight is None) != (self._weight is None):
            raise ValueError(
                "weight: expected on each backward() since the last step or on none; got both"
            )
        if weight is not None:
            weight = _weight(weight)
        changed = self._scaled or weight is not None  # the step multiplies the gradients
        with _tf32() if self.precision == "tf32" else nullcontext(), scaled_loss(changed):
            (self._scale.scaled(loss) if self._scaled else loss).backward()
        self._has_backward = True
        if weight is not None:
            self._weight = weight if self._weight is None else self._weight + weight

    def discard(self) -> None:
        """Forget the backward passes since the last step; goes with ``optimizer.zero_grad()``."""
        self._has_backward = False
        self._weight = None

    def step(
        self, optimizers: Optimizer | Sequence[Optimizer], clip_norm: float | None = None
    ) -> StepResult:
        """Unscale the gradients, clip them and step, all optimisers or none.

        With `bigops.train.AdamW` and `SGD` that takes two passes over memory and leaves ``.grad``
        as it was; with torch's optimisers ``.grad`` is unscaled and clipped in place. On a GPU
        nobody waits for the verdict where the optimisers are torch's fused ones (from their second
        step on); else it is read once.

        Args:
            optimizers: one, or all of this backward pass that are to step.
            clip_norm: largest Euclidean norm of all gradients together, those of all optimisers and
                ranks; ``math.inf`` looks for inf and NaN and clips nothing; None leaves them.

        Returns:
            A `StepResult`, true where the step was taken. It was not where gradients held inf or
            NaN: looked at in ``"fp16-mixed"``, and in the other precisions where ``clip_norm`` or a
            ``weight`` is given. Weights and optimiser states are then as before, on all ranks.

        Raises:
            RuntimeError: no ``backward`` of this object since the last step, or an optimiser
                without gradients.
            ValueError: clip_norm not above 0, an optimiser without parameters of its own, or
                parameters of a dtype that this precision does not train. Nothing was changed.
        """
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm: expected a number above 0; got {clip_norm}")
        every = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
        if not self._has_backward:
            # Also refuses a second optimiser: the first call may have changed the scale that the
            # second one's gradients still carry.
            raise RuntimeError(
                "step: expected a call of backward() since the last step; several optimizers per "
                "backward step in one call, step([a, b])"
            )
        params = stepping.parameters_of(every)
        stepping.check_dtypes(every, self.precision)
        weight = self._weight
        if not self._scaled and clip_norm is None and weight is None:
            self.discard()
            for optimizer in every:
                optimizer.step()
            return self._result(self._is[True], None)
        grads = [p.grad for p in params if p.grad is not None]
        device = grads[0].device
        if weight is not None and not isinstance(weight, Tensor):  # torch.tensor would wait
            weight = torch.full((), weight, dtype=torch.float64, device=device)
        found, weight = norm_over_ranks(grads, weight=weight, **self._ranks)
        self.discard()
        inverse = self._scale.inverse(device) if self._scaled else None
        verdict = stepping.judge(
            found, inverse, weight, clip_norm, wide=all(g.dtype == torch.float64 for g in grads)
        )
        stepping.take(every, params, verdict)
        if self._scaled:
            self._scale.update(verdict.good)
        stepped = verdict.stepped
        if isinstance(stepped, Tensor):
            self._skips = self._skips + (~stepped).to(self._skips.device, non_blocking=True)
        elif not stepped:
            self._skips = self._skips + 1
        norm = verdict.norm
        if not isinstance(norm, Tensor):
            norm = torch.full((), norm, dtype=torch.float64, device=device)
        return self._result(stepped if isinstance(stepped, Tensor) else self._is[stepped], norm)

    def _result(self, stepped: Tensor, norm: Tensor | None) -> StepResult:
        scale = self._scale.value
        return StepResult(stepped, norm, scale.clone() if self._scaled else scale, self._skips)

    def state_dict(self) -> dict[str, Any]:
        """Precision, scale, growth counter, skips: with it a resumed run continues bitwise."""
        scaler: dict[str, Any] = {}
        if self._scaled:  # the keys of torch.amp.GradScaler
            scaler = {
                "scale": self.scale,
                "growth_factor": self._scale.growth_factor,
                "backoff_factor": self._scale.backoff_factor,
                "growth_interval": self._scale.growth_interval,
                "_growth_tracker": int(self._scale.good_steps),
            }
        return {"precision": self.precision, "scaler": scaler, "skips": int(self._skips)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a ``state_dict`` of an object of the same precision.

        A scale that had fallen below the least one is raised to it.

        Raises:
            ValueError: see `check_state_dict`; nothing has changed then.
        """
        self.check_state_dict(state)
        scaler = state["scaler"]
        if scaler:
            for name in ("growth_factor", "backoff_factor", "growth_interval"):
                setattr(self._scale, name, scaler[name])
            self._scale.set(scaler["scale"], scaler["_growth_tracker"])
        self._skips = torch.full_like(self._skips, state.get("skips", 0))
        self.discard()

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise what `load_state_dict` would raise, and change nothing.

        Raises:
            ValueError: it was saved with another precision, or is not such a dict.
        """
        if set(state) - {"skips"} != {"precision", "scaler"}:  # older ones have no skips
            raise ValueError(f"state: expected keys precision and scaler; got {sorted(state)}")
        if state["precision"] != self.precision:
            raise ValueError(
                f"state: expected precision {self.precision}; got {state['precision']}"
            )
        scaler = state["scaler"]
        keys = _SCALER_KEYS if self._scaled else set()
        if set(scaler) != keys:
            raise ValueError(
                f"state: expected a scaler with keys {sorted(keys)}; got {sorted(scaler)}"
            )
        if keys and not 0 <= scaler["scale"] <= LARGEST:
            raise ValueError(f"state: expected a finite scale; got {scaler['scale']}")
        for name, count in (
            ("skips", state.get("skips", 0)),
            ("_growth_tracker", scaler.get("_growth_tracker", 0)),
        ):
            if not isinstance(count, int) or count < 0:
                raise ValueError(f"state: expected {name} to be a count; got {count!r}")


def _weight(weight: Tensor | float) -> Tensor | float:
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(f"weight: expected one element; got shape {tuple(weight.shape)}")
        return weight.detach().to(torch.float64).reshape(())
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight: expected a finite number from 0 on; got {weight}")
    return float(weight)


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check_served(precision: str, device: torch.device) -> None:
    if precision == "fp8-mixed":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            name = "a CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
            raise RuntimeError(
                "precision: 'fp8-mixed' needs a GPU with float8 products (compute capability 8.9 "
                f"on); got {name}"
            )
        return
    on_gpu = device.type == "cuda"
    if on_gpu and precision.startswith("bf16") and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(f"precision: {precision!r} needs bfloat16, which {name} lacks")


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
