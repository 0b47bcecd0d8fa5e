"""LinearOp: one linear op in the torch library, its schema made of its weight's format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.base import Format
from bigops.ops import activation as act
from bigops.ops import targets
from bigops.ops.choice import Choice, reference
from bigops.ops.family.call import Call
from bigops.ops.family.gradients import Backward, Gradients
from bigops.ops.library import cast, define, encoder, is_autocast_on, pick, register
from bigops.ops.targets import Target

if TYPE_CHECKING:
    from bigops.ops.family.grid_op import GridOp

Product = Callable[[Call, Tensor | None], Tensor]
Choose = Callable[[Call, Target], Choice]


def plain_product(call: Call, x_grid: Tensor | None = None) -> Tensor:
    """x W^T in float32 by the dense weight."""
    return F.linear(call.x.float(), call.weight.to_dense(torch.float32))


def fields_of(schema: str) -> tuple[str, ...]:
    """Names of the arguments in a schema."""
    return tuple(part.split()[-1] for part in schema.split(","))


_SERVING: dict[type[Format], LinearOp] = {}


def op_of(format: type[Format]) -> LinearOp:
    """The op whose weight is in a format.

    Raises:
        TypeError: no op takes it.
    """
    try:
        return _SERVING[format]
    except KeyError:
        raise TypeError(f"format: expected one that an op takes; got {format.__name__}") from None


def linear_ops() -> tuple[LinearOp, ...]:
    """All ops of the family."""
    return tuple(_SERVING.values())


class LinearOp:
    """Defines an op, and its backward op, in the library and applies it.

    Args:
        name: of the op.
        format: the format of its weight.
        choose: ``choose(call, target)``: what serves a call there; by default the reference.
        backward: ``backward(grad, call, **needs)``, the gradients of a call on a GPU (`needs` as
            `Gradients` names them), or None where the reference makes them.
        product: ``product(call, x_grid) -> x W^T`` in float32 as the kernels see x, on a grid where
            one is given; by default that of the dense weight.
    """

    def __init__(
        self,
        name: str,
        format: type[Format],
        product: Product = plain_product,
        choose: Choose | None = None,
        backward: Backward | None = None,
    ) -> None:
        self.name, self.format, self.product = name, format, product
        self.choose = choose or (lambda call, target: reference(name, "it has no kernels"))
        self.twin: GridOp | None = None
        _SERVING[format] = self
        self.fields = fields_of(format.SCHEMA)
        self.arguments = ("x", *self.fields, "bias", "residual", "activation")
        self.forward = define(
            f"{name}(Tensor x, {format.SCHEMA}, Tensor? bias, Tensor? residual, str activation) "
            "-> Tensor",
            self._serve,
        )
        self._words = self.forward._overloadpacket.default
        self._encoded = encoder(self.forward)
        self.gradients = Gradients(self, backward)
        register(
            self.forward,
            fake=self._fake,
            backward=self.gradients.raw_backward,
            setup=self.gradients.setup,
            vmap=self._vmap,
            cuda=self._cuda,
        )
        self._reads_k = "k" not in self.fields  # the kernels take K of x

    def call(self, x: Tensor, *rest: Any) -> Call:
        """The arguments of the op in words as an object."""
        *fixed, bias, residual, activation = rest
        return Call(x, self.weight(x, *fixed), bias, residual, activation)

    def weight(self, x: Tensor, *fixed: Any) -> Format:
        """The weight of a call on x."""
        if x.dim() == 0 and self._reads_k:
            raise ValueError("x: expected shape [.., K]; got []")
        return self.format.of(x.shape[-1] if x.dim() else 0, *fixed)

    def stored(self, k: int, arguments: tuple[Any, ...]) -> Format:
        """The weight of a refused call; raise TypeError for what is no tensor of it."""
        for name, given in zip(self.fields, arguments, strict=True):
            if name in self.format.TENSORS and not (given is None and name in self.format.OPTIONAL):
                checks.tensor(name, given)
        return self.format.of(k, *arguments)

    # reference, fake ------------------------------------------------------------------------

    def reference(
        self,
        x: Tensor,
        weight: Format,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        """The meaning of the op in plain torch."""
        return self._plainly(Call(x, weight, bias, residual, activation))

    def _plainly(self, call: Call) -> Tensor:
        return call.finish(self.product(call, None)).to(call.x.dtype)

    def serve(self, call: Call) -> Tensor:
        """The op by its reference, which is said to have run."""
        call.check()
        call.weight.check_structure()
        backend.note(f"reference.{self.name}")
        if not is_autocast_on(call.x):
            return self._plainly(call)
        # inside an op it would round the products of a reference that holds float32
        with torch.autocast(call.x.device.type, enabled=False):
            return self._plainly(call)

    def _serve(self, *args: Any) -> Tensor:
        return self.serve(self.call(*args))

    def _fake(self, *args: Any) -> Tensor:
        call = self.call(*args)
        call.check()
        return call.x.new_empty((*call.x.shape[:-1], call.weight.n))

    # kernels --------------------------------------------------------------------------------
    # The CPU kernels register themselves (csrc/cpu).

    def _cuda(self, *args: Any) -> Tensor:
        call = self.call(*args)
        run = self.choose(call, call.x.device).run
        if run is None:
            return self.serve(call)
        call.check()
        return run(call)  # type: ignore[no-any-return]

    def explain(
        self,
        x: Tensor,
        weight: Format,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str = "none",
        device: str | None = None,
        *,
        x_grid: Tensor | None = None,
        y_grid: Tensor | None = None,
    ) -> Choice:
        """What `choose` answers for a call, which is checked first; ``device`` as of a `Target`."""
        checks.stored(weight, self.format)
        call = Call(x, weight, bias, residual, activation)
        target = targets.named(device, x)
        if self.by_itself(x, weight, x_grid, y_grid):
            call.check()
            return self.choose(call, target)
        assert self.twin is not None
        return self.twin.explain(call, x_grid, y_grid, target)

    def by_itself(
        self, x: Tensor, weight: Format, x_grid: Tensor | None, y_grid: Tensor | None
    ) -> bool:
        """Whether a call is this op's, not its twin's; raise ValueError for grids without one."""
        given = x_grid is not None or y_grid is not None
        if self.twin is None:
            if given:
                raise ValueError(f"x_grid, y_grid: expected None with a {type(weight).__name__}")
            return True
        return not given and getattr(x, "dtype", None) is not torch.uint8

    # vmap -----------------------------------------------------------------------------------

    def fold(
        self, op: Callable[..., Tensor], args: Sequence[Any], in_dims: Sequence[Any], batch: int
    ) -> Tensor:
        """Rows are independent, so a batch of x and residual is more rows of one call.

        A batch of biases or weights is a call each: there is no kernel for many weights at once.
        """

        def front(t: Tensor | None, dim: int | None) -> Tensor | None:
            if t is None:
                return None
            return t.unsqueeze(0).expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)

        x, *others, residual, activation = args
        x_dim, *other_dims, residual_dim, _ = in_dims
        xs, residuals = front(x, x_dim), front(residual, residual_dim)
        assert xs is not None
        if all(dim is None for dim in other_dims):
            return op(xs, *others, residuals, activation)
        if batch == 0:
            *fixed, _ = others
            n = self.weight(x, *fixed).n
            return xs.new_empty((0, *xs.shape[1:-1], n))
        return torch.stack(
            [
                op(
                    xs[i],
                    *pick(others, other_dims, i),
                    None if residuals is None else residuals[i],
                    activation,
                )
                for i in range(batch)
            ]
        )

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return self.fold(self.forward, args, in_dims, info.batch_size), 0

    # dispatch -------------------------------------------------------------------------------

    def __call__(
        self,
        x: Tensor,
        arguments: tuple[Any, ...],
        k: int,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        """Run the op by the road that the caller's context needs.

        Args:
            arguments, k: `Format.arguments` and ``Format.k`` of the weight.
        """
        try:
            # fx's proxies and subclasses; modes, as that of a default device, change nothing
            foreign = type(x) is not Tensor and torch._C._has_torch_function_unary(x)
            if foreign and not isinstance(x, Tensor):
                return self._words(x, *arguments, bias, residual, activation)
            if self._reads_k and x.shape[-1] != k:
                raise TypeError  # it is named below
            kind = x.device.type
            if kind != "meta" and torch.is_autocast_enabled(kind):  # storage keeps its own dtypes
                dtype = self.format.autocast_dtype(*arguments) or torch.get_autocast_dtype(kind)
                x, bias, residual = cast(dtype, x, bias, residual)  # type: ignore[assignment]
            if foreign:
                return self._words(x, *arguments, bias, residual, activation)
            if torch.compiler.is_compiling():
                return self.gradients.traced(x, *arguments, bias, residual, activation)
            # Under functorch `requires_grad` of the wrapped tensors says nothing: ask this first.
            if torch._C._are_functorch_transforms_active():
                return self.gradients.functorch(x, *arguments, bias, residual, activation)
            coded = self._encoded((x, *arguments, bias, residual, activation))
            if torch.is_grad_enabled():
                if self.gradients.wanted(x, arguments, bias, residual):
                    return self.gradients.eager(*coded)
            elif torch.is_inference_mode_enabled():  # autograd is out of the way already
                return self.forward(*coded)
            with torch._C._AutoDispatchBelowAutograd():
                return self.forward(*coded)
        except (RuntimeError, AttributeError, TypeError, KeyError, IndexError):
            # The kernel checks its arguments; only a refused call pays for naming what is wrong.
            act.check_name(activation, gated=False)
            if not torch.compiler.is_compiling():
                checks.tensors(x=x, bias=bias, residual=residual)
                Call(x, self.stored(k, arguments), bias, residual, activation).check()
            raise
