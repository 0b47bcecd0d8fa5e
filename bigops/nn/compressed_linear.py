"""CompressedLinear: a linear layer whose weight is stored in one of the formats.

Recovery: the float ``weight`` Parameter is trained in the form it will be stored in. In `eval` with
gradients off the real kernel runs, on storage that is made of the weight anew in each call: the
numbers are those after `freeze`, whatever wrote the weight; the speed comes with `freeze`.

Frozen: only the compressed storage is left, in parameters that never train (`StoredParameter`).
`SparseLinear` can thaw it: the stored values then are an ordinary Parameter.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bigops.formats import quantize
from bigops.formats.base import Format
from bigops.nn import fields
from bigops.nn.computed_weight import ComputedLinear, is_dense
from bigops.nn.layer import layer_of
from bigops.nn.linear import check_size
from bigops.nn.stored_state import StoredMatrix
from bigops.ops import activation as act
from bigops.ops.choice import Choice
from bigops.ops.family import LinearOp, op_of
from bigops.ops.fused_linear import fused_linear

Self = TypeVar("Self", bound="CompressedLinear")


class CompressedLinear(StoredMatrix, ComputedLinear):
    """``act(x @ weight.T + bias) + residual`` with the weight stored in a format.

    An `nn.Linear` by type: ``weight`` is there in each state, of a frozen layer as a
    `ComputedWeight`, which says shape, dtype and device, dequantises for what needs its numbers,
    and refuses to be written.

    Recovery state: a float ``weight`` [N, K], rounded in the forward pass to what will be stored,
    with a straight-through gradient (arXiv 1308.3432). Frozen (`freeze`): the tensors of the
    format, each a `StoredParameter`.

    Args:
        format: a class of `bigops.formats`.
        in_features: K.
        out_features: N.
        bias: whether the layer has a bias [N].
        activation: none, relu, relu2, gelu, gelu_tanh, silu, sigmoid or tanh.
        form: what ``format.from_dense`` takes besides the matrix.

    Shapes: x [.., K] in a dtype that the format takes; residual [.., N] or None; result [.., N].

    Raises:
        ValueError: unknown activation, a size below 0, or a form that is not there.
        TypeError: a format that no op takes, or a form that is not its own.
    """

    FIELDS = fields.COMPRESSED | {"format": fields.TEXT, "form": fields.TABLE}
    in_features: int
    out_features: int
    activation: str
    activations: str  # what the product does with x
    x_qparams: Tensor | None  # [2], a buffer until frozen: of x, activations "static" only
    bias: Any  # [N] or None

    def __init__(
        self,
        format: type[Format],
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **form: Any,
    ) -> None:
        act.check_name(activation, gated=False)
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        op_of(format)
        nn.Module.__init__(self)  # the weight may be of another kind
        self._begin(format, form)
        self.activations = self.form.get("activations", "none")
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        for name, parameter in self._trainable(bias, device, dtype).items():
            self.register_parameter(name, parameter)
        # A scale of 0 says that nothing was seen yet; make_storage refuses it.
        static = self.activations == "static"
        self.register_buffer(
            "x_qparams", torch.zeros(2, dtype=torch.float32, device=device) if static else None
        )

    @classmethod
    def from_linear(
        cls, format: type[Format], linear: nn.Module, activation: str | None = None, **form: Any
    ) -> CompressedLinear:
        """A layer in recovery state that shares the Parameter objects of ``linear``.

        Args:
            format, form: as for the constructor.
            linear: an `nn.Linear` or a compressed layer that is not frozen.
            activation: None: that of ``linear``.

        Raises:
            TypeError: ``linear`` is no `nn.Linear` and no compressed layer.
            ValueError: ``linear`` is frozen.
        """
        return cls._beside(linear, activation, format=format, **form)

    @classmethod
    def _beside(cls: type[Self], linear: nn.Module, activation: str | None, **form: Any) -> Self:
        """A layer of this class that shares the Parameter objects of ``linear``."""
        source = check_source(linear)
        form["in_features"], form["out_features"] = source.in_features, source.out_features
        name = source.activation if activation is None else activation
        new = cls(**form, bias=False, activation=name, device="meta")
        new.weight, new.bias = source.weight, source.bias
        if new.x_qparams is not None:
            new.x_qparams = torch.zeros(2, dtype=torch.float32, device=source.weight.device)
        return new.train(linear.training)

    # --- what a subclass may say otherwise ---------------------------------------------------

    def _trainable(
        self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> dict[str, Any]:
        """The Parameters of the recovery state, initialised as `nn.Linear` is."""
        sizes = (self.in_features, self.out_features)
        source = nn.Linear(*sizes, bias, device=device, dtype=dtype)
        return {"weight": source.weight, "bias": source.bias}

    def make_storage(self) -> Format:
        """Convert the float weight to compressed storage (recovery state only)."""
        self.check_calibrated()
        qparams = {} if self.x_qparams is None else {"x_qparams": self.x_qparams}
        stored: Format = self.format.from_dense(self.weight, **self.form, **qparams)
        return stored

    def run(self, x: Tensor, arguments: tuple[Any, ...], residual: Tensor | None) -> Tensor:
        """Call the op with `Format.arguments` of the storage."""
        op, k = self.op, self.in_features
        if getattr(x, "dtype", None) is torch.uint8 and op.u8 is not None:
            qparams = (None,) * len(op.u8.qparams)
            return op.u8(x, arguments, k, qparams, self.bias, residual, self.activation)
        return op.run(x, arguments, k, self.bias, residual, self.activation)

    @property
    def op(self) -> LinearOp:
        """The op that serves the format."""
        return op_of(self.format)

    def explain(self, x: Tensor) -> Choice:
        """Which kernel serves the layer on x, of several products the last."""
        return self.op.explain(x, self.storage(), self.bias, activation=self.activation)

    # --- forward ----------------------------------------------------------------------------

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if getattr(x, "dtype", None) is torch.uint8 and (
            not self.frozen or wants_gradient(self.bias, residual)
        ):
            # u8 has no gradient: the floats that it stands for take its place.
            x = self._floating(x, residual)
        if self.frozen:
            return self.run(x, self._arguments(), residual)
        # Making storage asks for values, which a traced weight and one of torch.func do not have:
        # these take the float path, as proxies of torch.fx do.
        if not (
            self.training
            or torch.is_grad_enabled()
            or not isinstance(x, Tensor)
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
        ):
            return self.run(x, self._convert().arguments, residual)
        return self.run_trained(x, residual)

    def run_trained(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The differentiable forward pass of the recovery state."""
        return fused_linear(x, self.trained_weight(), self.bias, residual, self.activation)

    def _floating(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """What the u8 numbers x stand for, in the dtype of the result.

        `act_quant` finds the same numbers again; in bfloat16, where a float result of the layer
        before would be rounded as well, those beyond 128 steps from 0 move by one at most.
        """
        if self.x_qparams is None:
            raise TypeError(
                f"x: expected a floating dtype, since the layer has no x_qparams (its activations "
                f"are {self.activations!r}); got uint8"
            )
        if not self.frozen:
            self.check_calibrated()
        given = self.bias if self.bias is not None else residual
        return quantize.dequantize_u8(
            x, self.x_qparams, torch.float32 if given is None else given.dtype
        )

    # --- static qparams ---------------------------------------------------------------------

    def calibrate(self, x: Tensor) -> None:
        """Widen the static qparams of x so that they take in ``x`` [.., K].

        Zeros alone say nothing of a range: a layer that has seen no more is not calibrated.

        Raises:
            ValueError: the layer's activations are not "static", it is frozen, or ``x`` holds NaN
                or inf.
        """
        if self.x_qparams is None or self.frozen:
            state = "a frozen one" if self.frozen else f"activations {self.activations!r}"
            raise ValueError(f"calibrate: expected a trainable layer with 'static'; got {state}")
        if x.numel() == 0:
            return
        seen = x.detach().float()
        scale, zero = self.x_qparams.tolist()
        lo = min(float(seen.min()), -zero * scale)
        hi = max(float(seen.max()), (255 - zero) * scale)
        if lo != hi:
            self.x_qparams.copy_(quantize.static_qparams(lo, hi))

    def check_calibrated(self) -> None:
        """Raise ValueError where static qparams have seen no input."""
        if self.x_qparams is not None and not float(self.x_qparams[0]) > 0:
            raise ValueError(
                "x_qparams: expected a calibrated layer (calibrate(x), or data= of "
                "compress_); got one that has seen no input but zeros"
            )

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
        if self.activation != "none":
            text += f", activation={self.activation}"
        text += ", thawed" if self.thawed else ", frozen" if self.frozen else ""
        form = (f", {k}={v}" for k, v in self.form.items() if v is not None)
        return "".join([text, *form])

    def arguments(self) -> dict[str, Any]:
        """What `from_arguments` needs to make this layer again, as plain data."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "activation": self.activation,
            "frozen": self.frozen,
            **self._dtype_argument(),
            **self.form_arguments(),
        }


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors may be differentiated."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True  # wrapped tensors do not say
    given = [t for t in tensors if t is not None]
    if not all(isinstance(t, Tensor) for t in given):
        return True  # nor do proxies of torch.fx
    return torch.is_grad_enabled() and any(t.requires_grad for t in given)


class Source(NamedTuple):
    """What a compressed layer takes over from the layer it replaces."""

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    activation: str


def check_source(linear: nn.Module) -> Source:
    """What ``linear`` is made of; raise TypeError or ValueError where it has no float weight."""
    names = getattr(linear, "trained_names", ("weight",))
    if not (is_dense(linear) or isinstance(linear, CompressedLinear)) or "weight" not in names:
        raise TypeError(f"linear: expected a torch.nn.Linear; got {type(linear).__name__}")
    if isinstance(linear, CompressedLinear) and linear.frozen:
        state = "thawed" if linear.thawed else "frozen"
        raise ValueError(f"linear: expected a layer with a float weight; got a {state} one")
    activation = getattr(layer_of(linear), "activation", "none")
    layer: Any = linear
    return Source(layer.in_features, layer.out_features, layer.weight, layer.bias, activation)
