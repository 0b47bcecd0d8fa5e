"""AdamW and SGD whose step is one kernel call per parameter group, over all its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bigops.ops.fused_adamw import step_adamw, step_sgd
from bigops.optim.fused_optimizer import Batch, FusedOptimizer, Shared, check_number

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AdamW(FusedOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), a drop-in for torch.optim.AdamW.

    ::

        optimizer = bigops.train.AdamW(model.parameters(), lr=1e-3)
        stepped = optimizer.step_checked(clip_norm=1.0)  # or MixedPrecision.step(optimizer, 1.0)

    Args:
        params: parameters or groups; float32, bfloat16, float16, float64, mixed freely, on the
            CPU or a GPU (`bigops.explain("fused_adamw", params)` names the kernel).
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW; lr may be a tensor of one
            element.
        amsgrad: not served.
        eight_bit: states in 8 bits with an absmax per 256 elements (Dettmers et al., arXiv
            2110.02861): 0.26 of the float32 bytes. Tensors below 4096 elements and of float64
            keep full states.
        stochastic_rounding: of bfloat16 parameters without masters, by Philox of ``seed``,
            parameter, step and element: the same bits at every thread count. False: to nearest,
            which loses updates below half a unit in the last place.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters as state "master",
            update that and write the parameter from it. Load the optimiser's state together with
            the model's: a parameter changed from outside is overwritten by its master.
        seed: of the stochastic rounding; it and the step counter are in ``state_dict``.

    Moments are float32 (float64 for float64 parameters), also of 16-bit parameters. Where states
    are float32 the ``state_dict`` loads into torch.optim.AdamW and back; with one in 8 bits
    torch's step raises.

    Raises:
        ValueError: an option out of range, amsgrad, or a sparse parameter.
        TypeError: a parameter's dtype that is not served, or a DTensor.
    """

    _SIGNED: ClassVar[dict[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    _WHOLE: ClassVar[tuple[str, ...]] = ("step", *_SIGNED)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
        }
        super().__init__(params, own, **shared)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        for i, beta in enumerate(group["betas"]):
            check_number(f"betas[{i}]", float(beta), 0, 1)
        check_number("eps", group["eps"], 0)
        check_number("weight_decay", group["weight_decay"], 0)
        if group["amsgrad"]:
            raise ValueError("amsgrad: expected False, torch.optim.AdamW has it; got True")
        if group.get("decoupled_weight_decay") is False and group["weight_decay"] != 0:
            raise ValueError("state_dict: expected one of AdamW; got Adam's, with coupled decay")

    def _prepare(self, group: dict[str, Any], param: Tensor) -> None:
        if "step" not in self.state[param]:
            self.state[param]["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        super()._prepare(group, param)

    def _update(self, group: dict[str, Any], batch: Batch, grad_factor: float) -> None:
        first, first_scales = batch.lists("exp_avg")
        second, second_scales = batch.lists("exp_avg_sq")
        step_adamw(  # the states are ours: the kernel's own checks do
            batch.params,
            batch.grads,
            first,
            second,
            [s["step"] for s in batch.states],
            first_scales,
            second_scales,
            batch.copies,
            float(group["lr"]),
            *map(float, group["betas"]),
            float(group["eps"]),
            float(group["weight_decay"]),
            group["maximize"],
            grad_factor,
            *batch.rounding,
        )


class SGD(FusedOptimizer):
    """Stochastic gradient descent with momentum, a drop-in for torch.optim.SGD.

    Args:
        params: as for `AdamW`.
        lr, momentum, dampening, weight_decay (coupled), nesterov, maximize: as in
            torch.optim.SGD; lr may be a tensor of one element.
        eight_bit, stochastic_rounding, master_weights, seed: as for `AdamW`; the state is the
            momentum buffer.

    Raises:
        ValueError: an option out of range, nesterov without momentum or with dampening, or a
            sparse parameter.
        TypeError: a parameter's dtype that is not served.
    """

    _SIGNED: ClassVar[dict[str, bool]] = {"momentum_buffer": True}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        own = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, own, **shared)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        check_number("momentum", group["momentum"], 0)
        check_number("weight_decay", group["weight_decay"], 0)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov: expected a momentum above 0 and no dampening; got momentum "
                f"{group['momentum']}, dampening {group['dampening']}"
            )

    def _names(self, group: dict[str, Any]) -> Iterable[str]:
        return self._SIGNED if group["momentum"] != 0 else ()

    def _prepare(self, group: dict[str, Any], param: Tensor) -> None:
        state = self.state[param]
        new = group["momentum"] != 0 and state.get("momentum_buffer") is None
        super()._prepare(group, param)
        if new:
            state["fresh"] = True

    def _update(self, group: dict[str, Any], batch: Batch, grad_factor: float) -> None:
        # A buffer that holds nothing yet becomes the gradient, without dampening.
        fresh = [bool(s.get("fresh")) for s in batch.states]
        for first_step, chosen in ((True, fresh), (False, [not f for f in fresh])):
            if any(chosen):
                part = batch.part(chosen)
                buffers: list[Tensor] = []
                scales: list[Tensor] = []
                if group["momentum"] != 0:
                    buffers, scales = part.lists("momentum_buffer")
                step_sgd(
                    part.params,
                    part.grads,
                    buffers,
                    scales,
                    part.copies,
                    float(group["lr"]),
                    float(group["momentum"]),
                    float(group["dampening"]),
                    float(group["weight_decay"]),
                    group["nesterov"],
                    first_step,
                    group["maximize"],
                    grad_factor,
                    *part.rounding,
                )
        for state in batch.states:
            state.pop("fresh", None)
