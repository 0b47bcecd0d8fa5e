"""What each operator does with scaled channels, for `bigops.graph.channels`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bigops.ops import codes

if TYPE_CHECKING:
    from bigops.graph.channels import Channels

aten = torch.ops.aten


class Channel(NamedTuple):
    """A dimension of a Parameter: multiplied by s where a product reads by it, else divided."""

    parameter: int  # id
    dim: int


class Value(NamedTuple):
    """What is known of a tensor."""

    made: str  # the operator that made it
    channel: Channel | None = None  # by which its last dimension is scaled
    inside: tuple[nn.Module, ...] = ()  # modules that ran when its channels were made
    matrix: tuple[int, bool] | None = None  # id of the Parameter it is; whether transposed


# Views: the last dimension stays where they leave its length and its stride.
VIEWS = {
    aten.alias,
    aten.detach,
    aten.expand,
    aten.permute,
    aten.select,
    aten.slice,
    aten.split,
    aten.split_with_sizes,
    aten.squeeze,
    aten.t,
    aten.transpose,
    aten.unbind,
    aten.unsqueeze,
    aten.view,
    aten._unsafe_view,
}
# f(x / s) = f(x) / s for s > 0, number by number.
IN_PLACE = {aten.leaky_relu_, aten.relu_}
HOMOGENEOUS = {
    aten.abs,
    aten.clone,
    aten.leaky_relu,
    aten.neg,
    aten.relu,
    aten._to_copy,
    *IN_PLACE,
}
# Take shape and dtype of what they are given, and no number.
BLIND = {
    aten.empty_like,
    aten.full_like,
    aten.new_empty,
    aten.new_full,
    aten.new_ones,
    aten.new_zeros,
    aten.ones_like,
    aten.zeros_like,
}


@dataclass
class Call:
    """One operator as it was called."""

    func: Any
    args: InitVar[tuple[Any, ...]]
    kwargs: InitVar[dict[str, Any]]
    given: list[Tensor]
    values: dict[int, Value | None]  # of what was given, by id, before the call
    made: list[Tensor]
    of: dict[str, Any] = field(init=False)  # arguments by name

    def __post_init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = (argument.name for argument in self.func._schema.arguments)
        self.of = {**dict(zip(names, args, strict=False)), **kwargs}

    @property
    def name(self) -> str:
        return str(self.func.overloadpacket)

    def value(self, t: Any) -> Value | None:
        """What is known of an argument."""
        return self.values.get(id(t)) if isinstance(t, Tensor) else None

    def channel(self, t: Any) -> Channel | None:
        """By what the last dimension of an argument is scaled."""
        value = self.value(t)
        return None if value is None else value.channel

    def matrix(self, t: Any) -> tuple[int, bool] | None:
        """Which Parameter an argument is, and whether transposed."""
        value = self.value(t)
        return None if value is None else value.matrix


def follow(seen: Channels, call: Call) -> None:
    """Take down what becomes of the channels of what an operator was given."""
    packet, done = call.func.overloadpacket, False
    if packet in BLIND:
        return
    writes = call.func._schema.is_mutable and packet not in IN_PLACE
    if not writes and (packet in VIEWS or packet in HOMOGENEOUS):
        done = _pass(seen, call, packet in VIEWS)
    elif not writes and (rule := RULES.get(call.name)) is not None:
        done = rule(seen, call)
    if not done:
        _read(seen, call, call.given)


def _read(seen: Channels, call: Call, tensors: list[Tensor]) -> None:
    """No scale gets through what is done with some of the arguments, nor is any in what is made."""
    for t in tensors:
        value = call.value(t)
        if value is not None:
            seen.fix(value.channel, f"{call.name} reads it, too")
            if value.matrix is not None:
                seen.fix_parameter(value.matrix[0], f"{call.name} reads it, too")
    for t in call.made:
        seen.set(t, Value(call.name))


def _pass(seen: Channels, call: Call, view: bool) -> bool:
    """Views and functions of single numbers: what is made is scaled as what was given."""
    if len(call.given) != 1:
        return False
    (source,) = call.given
    value = call.value(source)
    if value is None:
        return True
    if value.matrix is not None:
        return _pass_matrix(seen, call, value)
    if value.channel is not None and not all(_same_last(source, t, view) for t in call.made):
        return False
    for t in call.made:
        seen.set(t, value)
    return True


def _same_last(source: Tensor, t: Tensor, view: bool) -> bool:
    """Whether the last dimension is the one of the source, channel by channel."""
    if not (t.dim() and t.shape[-1] == source.shape[-1] > 1 and t.is_floating_point()):
        return False
    return not view or (t.stride(-1) == source.stride(-1) and t.dtype == source.dtype)


# Whether these turn a matrix.
_TURNS: dict[Any, Callable[[dict[str, Any]], bool]] = {
    aten.permute: lambda of: bool(of["dims"][0] % 2),
    aten.t: lambda of: True,
    aten.transpose: lambda of: bool((of["dim0"] - of["dim1"]) % 2),
}


def _pass_matrix(seen: Channels, call: Call, value: Value) -> bool:
    """A matrix of parameters that is transposed, cast or copied, and no more."""
    assert value.matrix is not None
    parameter, transposed = value.matrix
    packet, t = call.func.overloadpacket, call.made[0]
    if packet in _TURNS:
        turned = _TURNS[packet](call.of)
        seen.set(t, value._replace(matrix=(parameter, transposed ^ turned)))
        return True
    if packet in (aten.alias, aten.clone, aten.detach, aten._to_copy) and t.is_floating_point():
        seen.set(t, value)
        return True
    return False


def _multiply(seen: Channels, call: Call) -> bool:
    """With one factor scaled so is the product, in its last dimension."""
    scaled = [t for t in call.given if call.channel(t) is not None]
    loose = [t for t in scaled if not seen.is_fixed(call.channel(t))]  # type: ignore[arg-type]
    (source,) = (loose or scaled) if len(loose or scaled) == 1 else (None,)
    (t,) = call.made
    if source is None or any(call.matrix(o) for o in call.given):
        return False
    if not (t.dim() and t.shape[-1] == source.shape[-1] > 1):
        return False
    value = call.value(source)
    assert value is not None
    seen.set(t, value)
    return True


def _divide(seen: Channels, call: Call) -> bool:
    rounded, by = call.of.get("rounding_mode"), call.channel(call.of["other"])
    return rounded is None and by is None and _multiply(seen, call)


def _add(seen: Channels, call: Call) -> bool:
    """With both summands scaled, in all of their channels, so is the sum."""
    (t,) = call.made
    channels = [call.channel(s) for s in call.given if s.dim() and s.shape[-1] == t.shape[-1] > 1]
    if len(channels) != 2 or None in channels:
        return False
    one, other = channels
    seen.join(one, other)  # type: ignore[arg-type]
    value = call.value(call.given[0])
    assert value is not None
    seen.set(t, value)
    return True


def _normalise(seen: Channels, call: Call) -> bool:
    """Scaled as its weight is, and its bias with it."""
    weight, bias = call.of.get("weight"), call.of.get("bias")
    channel, beside = call.channel(weight), call.channel(bias)
    if len(call.of["normalized_shape"]) != 1 or channel is None:
        return False
    if bias is not None:
        if beside is None:
            return False
        seen.join(channel, beside)
    _read(seen, call, [t for t in call.given if t is not weight and t is not bias])
    seen.set(call.made[0], Value(call.name, channel=channel, inside=seen.inside()))
    return True


def _product(
    seen: Channels, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, over: int
) -> bool:
    """x times a Parameter, summed over a dimension of ``weight``, plus bias.

    The Parameter is read by that dimension, and makes the channels of the product by the other one.
    """
    matrix = call.matrix(weight)
    if matrix is None or call.matrix(x) is not None:
        return False
    (parameter, transposed), value = matrix, call.value(x)
    columns = Channel(parameter, over ^ transposed)
    rows = Channel(parameter, 1 - columns.dim)
    seen.use(columns, reads=True)
    seen.use(rows, reads=False)
    if value is None or value.channel is None:
        made = "it comes from outside" if value is None else f"{value.made} makes it"
        seen.fix(columns, f"it is of no norm or linear layer: {made}")
    else:
        seen.join(value.channel, columns)
    if bias is not None:
        beside = call.channel(bias) if bias.shape[-1] == call.made[0].shape[-1] else None
        _read(seen, call, [] if beside is not None else [bias])
        if beside is None:
            seen.fix(rows, f"{call.name} adds to it")
        else:
            seen.join(rows, beside)
    if not seen.is_fixed(columns):
        seen.read(parameter, x)
    seen.set(call.made[0], Value(call.name, channel=rows, inside=seen.inside()))
    return True


def _addmm(seen: Channels, call: Call) -> bool:
    of = call.of
    plain = of.get("beta", 1) == of.get("alpha", 1) == 1
    return plain and _product(seen, call, of["mat1"], of["mat2"], of["self"], over=0)


def _mm(seen: Channels, call: Call) -> bool:
    return _product(seen, call, call.of["self"], call.of["mat2"], None, over=0)


def _linear(seen: Channels, call: Call) -> bool:
    of = call.of
    return _product(seen, call, of["input"], of["weight"], of.get("bias"), over=1)


def _fused_linear(seen: Channels, call: Call) -> bool:
    of = call.of
    word, residual = of["activation"], of.get("residual")
    word = word if isinstance(word, str) else codes.word_of("activation", word)
    if not _product(seen, call, of["x"], of["weight"], of.get("bias"), over=1):
        return False
    made = seen.value(call.made[0])
    if made is not None and (residual is not None or word not in ("none", "relu")):
        what = "a residual" if word in ("none", "relu") else word
        seen.fix(made.channel, f"{what} is in {call.name}")
        _read(seen, call, [] if residual is None else [residual])
    return True


RULES = {
    "aten.add": _add,
    "aten.addmm": _addmm,
    "aten.div": _divide,
    "aten.linear": _linear,
    "aten.mm": _mm,
    "aten.mul": _multiply,
    "aten.native_layer_norm": _normalise,
    "aten._fused_rms_norm": _normalise,
    "aten.sub": _add,
    "bigops.fused_linear": _fused_linear,
}
