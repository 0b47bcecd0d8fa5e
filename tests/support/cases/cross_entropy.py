"""Random cases of linear_cross_entropy, their float64 truth and error scales.

The truth is torch's own `linear` and `cross_entropy`, independent of bigops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats.base import rows
from bigops.ops.linear_cross_entropy import linear_cross_entropy
from tests.support.tolerance import ACCUMULATION, C, check

Leaves = list[Tensor | None]  # x, weight, bias


class Checked:
    """A case with ``public``, ``leaves``, ``grad``, and checks of a loss and of gradients."""

    public: Callable[[], Callable[..., Tensor]]
    leaves: Callable[[], list[Tensor | None]]
    check_loss: Callable[..., None]
    check_gradients: Callable[..., None]
    grad: Tensor | None

    def check(self, what: str = "") -> None:
        """Loss without and with a graph, and all gradients, by the public function."""
        f, leaves = self.public(), self.leaves()
        with torch.no_grad():
            loss = f(*leaves)
        self.check_loss(loss, f"{what} without a graph")
        loss = f(*leaves)
        self.check_loss(loss, what)
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(loss, wanted, self.grad))
        self.check_gradients([None if t is None else next(found) for t in leaves], what)


@dataclass
class Case(Checked):
    """Inputs of one call: x [.., K], weight [V, K], target [..] or [.., V], and dL/dloss."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        per_token = self.options.get("reduction") == "none"
        shape = self.x.shape[:-1] if per_token else ()
        self.grad = (torch.rand(shape) + 0.5).to(ACCUMULATION[self.x.dtype])

    def leaves(self) -> Leaves:
        """Fresh copies of x, weight, bias that require gradients."""
        tensors = (self.x, self.weight, self.bias)
        return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]

    def public(self) -> Callable[..., Tensor]:
        """f(x, weight, bias) -> loss by the public function."""

        def f(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear_cross_entropy(x, weight, self.target, bias, **self.options)

        return f

    def raw(self) -> Callable[..., Tensor]:
        """The same by the raw op."""

        def f(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            args = (x, weight, self.target, bias, *self.raw_options())
            return torch.ops.bigops.linear_cross_entropy(*args)  # type: ignore[no-any-return]

        return f

    def raw_options(self) -> tuple[Any, ...]:
        """What the raw op takes after the bias: no teacher, and what one would be asked for."""
        class_weight, *options = self._options()
        return (class_weight, None, None, None, *options, 1.0, 0.0)

    def _options(self) -> tuple[Any, ...]:
        get = self.options.get
        return (
            get("class_weight"),
            get("reduction", "mean"),
            get("ignore_index", -100),
            get("label_smoothing", 0.0),
            get("z_loss", 0.0),
            get("softcap") or 0.0,
        )

    @property
    def soft(self) -> bool:
        """Whether the target is class probabilities."""
        return self.target.is_floating_point()

    def _flat_target(self) -> Tensor:
        return rows(self.target) if self.soft else self.target.reshape(-1)

    # truth ---------------------------------------------------------------------------------

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Leaves]:
        """(loss, gradients of x, weight, bias) by torch in ``dtype``, the loss in float32 at
        least, as under autocast."""
        class_weight, reduction, ignored, smoothing, z_loss, softcap = self._options()
        leaves = [
            None if t is None else t.detach().to(dtype).requires_grad_()
            for t in (self.x, self.weight, self.bias)
        ]
        x, weight, bias = leaves
        wide = ACCUMULATION[dtype]
        y = self._flat_target()
        if self.soft:
            y = y.to(wide)
        logits = F.linear(x, weight, bias).to(wide).reshape(len(y), self.weight.shape[0])  # type: ignore[arg-type]
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        class_weight = None if class_weight is None else class_weight.to(wide)
        if z_loss:
            own = torch.ones(len(logits), dtype=wide)
            if self.soft:
                own = (y if class_weight is None else y * class_weight).sum(1)
            elif class_weight is not None:
                own = class_weight[y.clamp(0, len(class_weight) - 1)]
            if not self.soft:
                own = own * (y != ignored)
            losses = F.cross_entropy(
                logits, y, class_weight, None, ignored, reduction="none", label_smoothing=smoothing
            )
            losses = losses + z_loss * own * logits.logsumexp(1) ** 2
            total = losses if reduction == "none" else losses.sum()
            loss = total / (len(y) if self.soft else own.sum()) if reduction == "mean" else total
        else:
            loss = F.cross_entropy(
                logits,
                y,
                class_weight,
                ignore_index=ignored,
                reduction=reduction,
                label_smoothing=smoothing,
            )
        if reduction == "none":
            loss = loss.view(self.x.shape[:-1])
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(loss, wanted, self.grad.to(wide)))
        return loss.detach(), [None if t is None else next(found) for t in leaves]

    def scales(self) -> tuple[Tensor, Leaves, Leaves]:
        """Error scales of the loss and of the gradients, and what stored logits and their stored
        gradient carry into the gradients; all in float64."""
        class_weight, reduction, ignored, smoothing, z_loss, softcap = self._options()
        x = self.x.double().reshape(self.x.shape[:-1].numel(), self.weight.shape[1])
        weight, y = self.weight.double(), self._flat_target()
        v = len(weight)
        bias = torch.zeros(v).double() if self.bias is None else self.bias.double()
        z = x @ weight.t() + bias
        sums = (
            (x.abs() @ weight.abs().t() + bias.abs()).amax(1, keepdim=True)
            + torch.tensor(v).log()
            + 1
        )
        t = softcap * torch.tanh(z / softcap) if softcap else z
        shares = torch.ones(v).double() if class_weight is None else class_weight.double()
        if self.soft:
            on_target = y.double() * shares
            own, kept = on_target.sum(1), torch.ones(len(y)).double()
            counted = kept
        else:
            kept = (y != ignored).double()
            own = counted = shares[y.clamp(0, v - 1)] * kept
            on_target = F.one_hot(y.clamp(0, v - 1), v) * own.unsqueeze(1)
        even = smoothing / v * kept
        factor = torch.ones_like(own)
        if reduction == "mean":
            factor = factor / counted.sum()
        factor = (factor * self.grad.double().reshape(-1)).unsqueeze(1)
        lse = t.logsumexp(1).abs()
        mass = (own + even * shares.sum() + 2 * z_loss * own * lse).unsqueeze(1)
        p = mass * torch.softmax(t, 1)
        slope = 1 + (2 * sums / softcap if softcap else 0)
        parts = (
            p * (1 + 2 * sums) * (1 + 2 * z_loss * sums) + even.unsqueeze(1) * shares + on_target
        )
        errors = factor * slope * parts
        biggest = z.abs().amax(1, keepdim=True)
        stored = (
            factor
            * slope
            * (p * (1 + 2 * biggest * (1 + z_loss * sums)) + on_target + even.unsqueeze(1) * shares)
        )
        wide = ACCUMULATION[self.x.dtype]
        tokens = 2 * mass * sums * (1 + z_loss * sums)
        if wide != self.x.dtype:  # 16-bit logits enter a loss that is held in 32 bits
            ratio = torch.finfo(self.x.dtype).eps / (C[wide] * torch.finfo(wide).eps)
            tokens = tokens + 2 * ratio * mass * biggest * (1 + z_loss * sums)
        if reduction == "none":
            loss = tokens.reshape(self.x.shape[:-1])
        else:
            loss = tokens.sum() / (counted.sum() if reduction == "mean" else 1)

        def carried(g: Tensor, power: int) -> Leaves:
            parts = g @ weight.abs() ** power, g.t() @ x.abs() ** power, g.sum(0)
            gx, gw, gb = (part ** (1 / power) for part in parts)
            return [gx.reshape(self.x.shape), gw, None if self.bias is None else gb]

        return loss, carried(errors, 1), carried(stored**2, 2)

    # checks --------------------------------------------------------------------------------

    def check_loss(self, loss: Tensor, what: str = "") -> None:
        check(
            loss,
            self.plain(torch.float64)[0],
            self.plain(self.x.dtype)[0],
            self.scales()[0],
            what=f"loss {what}",
        )

    def check_gradients(self, grads: Sequence[Tensor | None], what: str = "") -> None:
        """Gradients of x, weight and bias, in that order; None where there is no input."""
        truth, plain = self.plain(torch.float64)[1], self.plain(self.x.dtype)[1]
        _, scales, roundings = self.scales()
        for name, got, ref, base, scale, rounding in zip(
            ("x", "weight", "bias"), grads, truth, plain, scales, roundings, strict=True
        ):
            label = f"{what} gradient of {name}"
            if ref is None:
                assert got is None, f"{label}: came for an input that is not there"
                continue
            assert got is not None, f"{label}: None"
            assert base is not None
            assert scale is not None
            assert rounding is not None
            check(got, ref, base, scale, rounding=rounding, what=label)


def make(
    lead: int | Sequence[int],
    v: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    ignored: float = 0.2,
    probabilities: bool = False,
    **options: Any,
) -> Case:
    """A case with x of [*lead, K]; logits of order one, a share of the targets ignored.

    With ``probabilities`` the target is those of the classes, [*lead, V].
    """
    lead = [lead] if isinstance(lead, int) else list(lead)
    target = torch.randint(0, v, lead)
    target[torch.rand(lead) < ignored] = options.get("ignore_index", -100)
    if probabilities:
        target = torch.rand(*lead, v).softmax(-1)
    if options.get("class_weight") is True:
        options["class_weight"] = torch.rand(v).to(dtype)
    return Case(
        torch.randn(*lead, k).to(dtype),
        (torch.randn(v, k) / max(k, 1) ** 0.5).to(dtype),
        torch.randn(v).to(dtype) if bias else None,
        target,
        options,
    )


ALL: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum", "ignore_index": 1},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"class_weight": True, "label_smoothing": 0.3},
    "z_loss": {"z_loss": 0.05},
    "softcap": {"softcap": 2.0},
    "all": {"class_weight": True, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0},
    "all, none": {
        "class_weight": True,
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 3.0,
        "reduction": "none",
    },
}


SOFT: dict[str, dict[str, Any]] = {
    "probabilities": {"probabilities": True},
    "probabilities, all": {"probabilities": True, **ALL["all"]},
    "probabilities, all, none": {"probabilities": True, **ALL["all, none"]},
    "probabilities, sum": {"probabilities": True, "reduction": "sum", "label_smoothing": 0.2},
}
