"""packed_linear: y = act(x W^T + bias) + residual with a dense W that lies as the kernels read it.

For inference: packing costs a pass over the weight, whose place the panels take. Reference, op
(schema, fake, autograd, vmap come from `bigops.ops.family`), dispatch, public function, in that
order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.backend import machine
from bigops.formats import checks
from bigops.ops import activation as act
from bigops.ops import family as _frozen
from bigops.ops.explain import Explanation, serves

__all__ = ["PackedWeight", "pack_weight", "packed_linear", "reference"]

PANEL = 64  # rows of W, columns of y
SERVED = (torch.float32, torch.bfloat16, torch.float16)


class PackedWeight(NamedTuple):
    """A dense weight [N, K] in panels of 64 rows, each of them word by word along K.

    A word is one number of a row, or in bfloat16 two neighbours. A panel is one stream from
    memory, and what a step needs of it lies side by side (the panels of BLIS: Van Zee and van de
    Geijn, ACM TOMS 41, 2015). Rows and columns that fill up the last panel and word are zero.
    """

    panels: Tensor  # [ceil(N / 64), K, 64, 1]; bfloat16: [.., ceil(K / 2), 64, 2]
    n: int
    k: int

    @property
    def shape(self) -> torch.Size:
        """[N, K] of the matrix."""
        return torch.Size([self.n, self.k])

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The weight as the op takes it: N as the rows that fill up the last panel."""
        return self.panels, -self.n % PANEL, self.k

    @property
    def nbytes(self) -> int:
        """Bytes of the panels."""
        return self.panels.nbytes

    def to_dense(self) -> Tensor:
        """The matrix [N, K], in the dtype it has."""
        return _unpack(self.panels, *self.arguments[1:])


def pack_weight(w: Tensor) -> PackedWeight:
    """Lay out a matrix for `packed_linear`.

    Args:
        w: ``[N, K]``, float32, bfloat16 or float16; copied.

    Raises:
        ValueError: w is no matrix.
        TypeError: w has another dtype.
    """
    checks.tensors(w=w)
    checks.dims("w", w, 2)
    checks.floating("w", w, SERVED)
    n, k = w.shape
    per = _per_word(w.dtype)
    filled = F.pad(w.detach(), (0, -k % per, 0, -n % PANEL))
    words = filled.view(filled.shape[0] // PANEL, PANEL, filled.shape[1] // per, per)
    return PackedWeight(words.transpose(1, 2).contiguous(), n, k)


def _per_word(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1


def _unpack(panels: Tensor, pad: int, k: int) -> Tensor:
    count, words, _, per = panels.shape
    rows = panels.transpose(1, 2).reshape(count * PANEL, words * per)
    return rows[: count * PANEL - pad, :k]


# --- reference -----------------------------------------------------------------------------


def reference(
    x: Tensor,
    panels: Tensor,
    pad: int,
    k: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The meaning of `packed_linear` in plain torch; the storage as in `PackedWeight`."""
    z = F.linear(x.float(), _unpack(panels, pad, k).float())
    if bias is not None:
        z = z + bias.float()
    y = act.apply(activation, z)
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)


def _dense(x: Tensor, panels: Tensor, pad: int, k: int) -> Tensor:
    return _unpack(panels, pad, k).float()


def check(
    x: Tensor,
    panels: Tensor,
    pad: int,
    k: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    checks.dims("panels", panels, 4)
    checks.floating("panels", panels, SERVED)
    if k < 0:
        raise ValueError(f"k: expected at least 0; got {k}")
    per = _per_word(panels.dtype)
    checks.shape("panels", panels, [panels.shape[0], -(-k // per), PANEL, per])
    n = panels.shape[0] * PANEL - pad
    if not (0 <= pad < PANEL and n >= 0):
        raise ValueError(
            f"pad: expected the rows that fill up the last panel of {PANEL}; got {pad}"
        )
    checks.device("panels", panels, x)
    _frozen.check_call(x, n, k, bias, residual, activation, SERVED)
    if panels.dtype != x.dtype:
        raise TypeError(f"panels: expected the dtype of x, {x.dtype}; got {panels.dtype}")


# --- op ------------------------------------------------------------------------------------


class _PackedLinear(_frozen.FrozenLinear):
    def rows(self, x: Tensor, *fixed: object) -> int:
        panels, pad = fixed[:2]
        assert isinstance(panels, Tensor)
        assert isinstance(pad, int)
        return panels.shape[0] * PANEL - pad


_op = _PackedLinear(
    "packed_linear",
    "Tensor panels, int pad, int k",
    reference=reference,
    dense=_dense,
    check=check,
    rounds=lambda *fixed: False,
)
reference_backward = _op.reference_backward


# --- dispatch ------------------------------------------------------------------------------


@serves("packed_linear")
def _explain(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    device: str | None = None,
) -> Explanation:
    checks.stored(weight, PackedWeight, "pack_weight")
    _op.check(x, *weight.arguments, bias, residual, activation)
    extension = machine.extension

    def choose() -> tuple[str, str]:
        return extension.choose_packed_linear(checks.short(x.dtype))  # type: ignore

    return _frozen.explain("packed_linear", x, device, choose if extension else None)


# --- public function -----------------------------------------------------------------------


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x @ W.T + bias) + residual`` with a packed dense W, for inference.

    Args:
        x: ``[.., K]`` in the weight's dtype, any strides.
        weight: `pack_weight` of a ``[N, K]`` matrix; it has no gradient, and follows no later
            change of that matrix.
        bias: ``[N]`` in x's dtype, or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.

    Returns:
        ``[.., N]`` in x's dtype; sums and epilogue are held in float32. Gradients for x, bias and
        residual come from a library's product with the unpacked weight. Under `torch.autocast` x,
        bias and residual are cast to the weight's dtype: it was packed for that one.

    Raises:
        ValueError: unknown or gated activation, shapes or devices that do not fit, or a weight
            that requires a gradient.
        TypeError: a dtype that is not served, or dtypes that differ.
    """
    checks.stored(weight, PackedWeight, "pack_weight")
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        dtype = weight.panels.dtype
        low = [t if t is None else t.to(dtype) for t in (bias, residual)]
        with torch.autocast(x.device.type, enabled=False):
            return _op.apply(x.to(dtype), *weight.arguments, *low, activation)
    return _op.apply(x, *weight.arguments, bias, residual, activation)
