"""LinearCrossEntropy: the classifier of a model and its loss in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigops.nn.computed_weight import is_dense
from bigops.nn.linear import check_size
from bigops.ops.fused_linear import fused_linear
from bigops.ops.linear_cross_entropy import CrossEntropyStats, linear_cross_entropy
from bigops.ops.linear_cross_entropy.check import check_options


class LinearCrossEntropy(nn.Linear):
    """`nn.Linear` and `nn.CrossEntropyLoss` by one `bigops.linear_cross_entropy` call.

    The logits of all tokens never exist at once. Parameters, initialisation and `state_dict` are
    those of `nn.Linear`, in both directions.

    Args:
        in_features: K, length of the last dimension of x.
        out_features: V, the number of classes.
        bias: whether the layer has a bias [V].
        device, dtype: of weight and bias, by default torch's.
        class_weight: [V] floating or None, kept as a buffer that is no part of the `state_dict`.
        ignore_index, reduction, label_smoothing, z_loss, softcap: as for
            `bigops.linear_cross_entropy`.

    Shapes: input [.., K], target [..] int64 or [.., V] class probabilities, result a number or
    [..]; weight [V, K], bias [V]. ``layer(input, target, return_stats=True)`` gives a
    `CrossEntropyStats`.

    Raises:
        TypeError: a size that is no integer.
        ValueError: an option that the op does not know, or a size below 0.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        check_options(reduction, ignore_index, label_smoothing, z_loss, softcap)
        if class_weight is not None and list(class_weight.shape) != [out_features]:
            raise ValueError(
                f"class_weight: expected shape [{out_features}]; got {list(class_weight.shape)}"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if class_weight is not None:
            class_weight = class_weight.detach().to(self.weight.device)
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, loss: nn.CrossEntropyLoss | None = None, **options: Any
    ) -> LinearCrossEntropy:
        """A layer that shares the Parameter objects of ``linear``, so optimisers go on working.

        Args:
            linear: an `nn.Linear`; it is not changed.
            loss: whose weight, ignore_index, reduction and label_smoothing are taken over.
            **options: of this class; they go before those of ``loss``.
        """
        if not is_dense(linear):
            raise TypeError(f"linear: expected a torch.nn.Linear; got {type(linear).__name__}")
        if loss is not None:
            if not isinstance(loss, nn.CrossEntropyLoss):
                raise TypeError(
                    f"loss: expected a torch.nn.CrossEntropyLoss; got {type(loss).__name__}"
                )
            options = {
                "class_weight": loss.weight,
                "ignore_index": loss.ignore_index,
                "reduction": loss.reduction,
                "label_smoothing": loss.label_smoothing,
                **options,
            }
        class_weight = options.pop("class_weight", None)
        # On "meta" nothing is allocated and no random number is drawn.
        size = linear.in_features, linear.out_features, linear.bias is not None
        new = cls(*size, class_weight=class_weight, **options, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        if class_weight is not None:
            new.class_weight = class_weight.detach().to(linear.weight.device)
        return new.train(linear.training)

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, return_stats: bool = False
    ) -> Tensor | CrossEntropyStats:
        return linear_cross_entropy(  # type: ignore[call-overload, no-any-return]
            input,
            self.weight,
            target,
            self.bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            class_weight=self.class_weight,
            return_stats=return_stats,
        )

    def logits(self, x: Tensor) -> Tensor:
        """The logits [.., V] themselves, soft cap included, for prediction."""
        logits = fused_linear(x, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def extra_repr(self) -> str:
        defaults = {
            "ignore_index": -100,
            "reduction": "mean",
            "label_smoothing": 0.0,
            "z_loss": 0.0,
            "softcap": None,
        }
        shown = [
            f"{name}={getattr(self, name)}"
            for name, default in defaults.items()
            if getattr(self, name) != default
        ]
        if self.class_weight is not None:
            shown.append("class_weight=given")
        return ", ".join([super().extra_repr(), *shown])
