"""AdamW, Adam and SGD whose step is one kernel call per parameter group, over all its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigops.ops.fused_adamw import step_adamw, step_sgd
from bigops.optim.fused_optimizer import Batch, FusedOptimizer
from bigops.optim.options import RefusedError, check_number, check_tensors


class Adam(FusedOptimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980), a drop-in for torch.optim.Adam.

    Args:
        weight_decay: added to the gradient times the parameter; with decoupled_weight_decay the
            parameter shrinks by ``lr * weight_decay`` instead, as in `AdamW`.
        Others: as for `AdamW`, and raised for as there.
    """

    _SIGNED: ClassVar[dict[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    _WHOLE: ClassVar[tuple[str, ...]] = ("step", *_SIGNED)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        eight_bit: bool = False,
        stochastic_rounding: bool = True,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "eight_bit": eight_bit,
            "stochastic_rounding": stochastic_rounding,
            "master_weights": master_weights,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        try:
            betas = tuple(group["betas"])
        except TypeError:
            raise TypeError(f"betas: expected two numbers; got {group['betas']!r}") from None
        if len(betas) != 2 or isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError(f"betas: expected two numbers or two tensors; got {betas}")
        for i, beta in enumerate(betas):
            check_number(f"betas[{i}]", beta, 0, 1)
        check_number("eps", group["eps"], 0)
        check_tensors(group, ("lr", "betas"))
        if group["amsgrad"]:
            raise RefusedError("amsgrad: expected False, torch.optim has it; got True")

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
            group["decoupled_weight_decay"],
            group["maximize"],
            grad_factor,
            *batch.rounding,
        )


class AdamW(Adam):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), a drop-in for torch.optim.AdamW.

    ::

        optimizer = bigops.train.AdamW(model.parameters(), lr=1e-3)
        stepped = optimizer.step_checked(clip_norm=1.0)  # or MixedPrecision.step(optimizer, 1.0)

    Args:
        params: parameters, pairs of name and parameter, or groups of them, in an order that is
            the same in each run: no set. float32, bfloat16, float16, float64, mixed freely, on the
            CPU or a GPU (`bigops.explain("fused_adamw", params)` names the kernel).
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW; each a number or a tensor
            of one element, which is read at every step.
        foreach, fused: ways of computing, kept in ``param_groups`` for whoever reads them there;
            the kernel is the same. At most one may be True; foreach with tensors is refused, as
            torch does.
        amsgrad, capturable, differentiable: refused where True.
        eight_bit: states in 8 bits with an absmax for 256 elements of a row, or for a shorter row
            (Dettmers et al., arXiv 2110.02861): 0.26 of the float32 bytes, 0.27 at rows of 64,
            0.31 at 16. Full states are kept of fewer than 4096 elements, rows of fewer than 16,
            float64, and of a DTensor of one dimension.
        stochastic_rounding: of bfloat16 parameters without masters, by Philox of ``seed``,
            parameter, step and element of the whole parameter: the same bits at every thread count
            and on every mesh. False: to nearest, which loses updates below half a unit in the last
            place.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters as state "master",
            update that and write the parameter from it. Load the optimiser's state together with
            the model's: a parameter changed from outside is overwritten by its master.
        seed: of the stochastic rounding; it and the step counter are in ``state_dict``.

    Parameters may be DTensors (FSDP2, tensor parallel): states are DTensors of their placements,
    which torch.distributed.checkpoint saves and splits anew, to the same bits.

    Moments are float32 (float64 for float64 parameters), also of 16-bit parameters. Where states
    are float32 the ``state_dict`` loads into torch.optim.AdamW and back; with one in 8 bits
    torch's step raises.

    Raises:
        ValueError: an option out of range, or a sparse parameter.
        RefusedError: an option that is refused; it is a ValueError and a RuntimeError, since
            torch.optim raises either.
        TypeError: an option that is no number, a parameter's dtype that is not served (complex
            ones too), or parameters in a set.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        eight_bit: bool = False,
        stochastic_rounding: bool = True,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            eight_bit=eight_bit,
            stochastic_rounding=stochastic_rounding,
            master_weights=master_weights,
            seed=seed,
        )

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        if group.get("decoupled_weight_decay") is False and group["weight_decay"] != 0:
            raise ValueError(
                "decoupled_weight_decay: expected True, as AdamW has it; got False, Adam's"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # Adam's without decay is AdamW's, as torch takes it
            group["decoupled_weight_decay"] = True


class SGD(FusedOptimizer):
    """Stochastic gradient descent with momentum, a drop-in for torch.optim.SGD.

    Args:
        params: as for `AdamW`.
        lr, momentum, dampening, weight_decay (coupled), nesterov, maximize: as in
            torch.optim.SGD; each number may be a tensor of one element.
        foreach, fused, differentiable: as for `AdamW`; foreach may stand beside tensors.
        eight_bit, stochastic_rounding, master_weights, seed: as for `AdamW`; the state is the
            momentum buffer.

    Raises:
        ValueError: an option out of range, nesterov without momentum or with dampening, or a
            sparse parameter.
        RefusedError, TypeError: as `AdamW` raises them.
    """

    _SIGNED: ClassVar[dict[str, bool]] = {"momentum_buffer": True}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        eight_bit: bool = False,
        stochastic_rounding: bool = True,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "eight_bit": eight_bit,
            "stochastic_rounding": stochastic_rounding,
            "master_weights": master_weights,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        check_number("momentum", group["momentum"], 0)
        check_number("dampening", group["dampening"], -math.inf)
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
