"""LinearOp: one linear op in the torch library, its schema made of its weight's format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from bigops import backend
from bigops.formats import checks
from bigops.formats.base import Format
from bigops.formats.quantize import QuantizedRows, Rows
from bigops.ops import activation as act
from bigops.ops import targets
from bigops.ops.choice import Choice, reference
from bigops.ops.family.call import Call
from bigops.ops.family.gradients import Backward, Gradients
from bigops.ops.family.nested import on_values
from bigops.ops.library import (
    cast,
    define,
    encoder,
    is_autocast_on,
    loop,
    register,
)
from bigops.ops.targets import Target

if TYPE_CHECKING:
    from bigops.ops.family.rows_op import RowsOp
    from bigops.ops.family.u8_op import U8Op

Product = Callable[[Call, Rows | None], Tensor]
Choose = Callable[[Call, Target], Choice]


def plain_product(call: Call, seen: Rows | None = None) -> Tensor:
    """x W^T in float32 by the dense weight."""
    return F.linear(call.x.float(), call.weight.to_dense(torch.float32))


def fields_of(schema: str) -> tuple[str, ...]:
    """Names of the arguments in a schema."""
    return tuple(part.split()[-1] for part in schema.split(",") if part)


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
        choose: ``choose(call, target)``: what serves a call there; by default the reference. Where
            the format names what a forward keeps, ``run(call, keep)`` gives y and that.
        backward: ``backward(grad, call, **kept, **needs)``, the gradients of a call on a GPU (named
            as in the schema of the backward op), or None where the reference makes them.
        product: ``product(call, seen) -> x W^T`` in float32 as the kernels see x, by the rows
            ``seen`` where given; by default that of the dense weight.
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
        self.u8: U8Op | None = None
        self.rows: RowsOp | None = None
        _SERVING[format] = self
        self.fields = fields_of(format.SCHEMA)
        self.arguments = ("x", *self.fields, "bias", "residual", "activation")
        self.kept = fields_of(format.KEPT)
        schema = f"(Tensor x, {format.SCHEMA}, Tensor? bias, Tensor? residual, str activation) -> "
        self.forward = define(f"{name}{schema}Tensor", self._serve)
        self.forward_kept = self.forward
        if self.kept:
            results = ", ".join(["Tensor"] * (1 + len(self.kept)))
            self.forward_kept = define(f"{name}_with_parts{schema}({results})", self._serve_kept)
        self._words = self.forward._overloadpacket.default
        self._encoded = encoder(self.forward)
        self.gradients = Gradients(self, backward)
        self._register(self.forward, self._fake, self._cuda, self.differentiable)
        if self.kept:
            self._register(
                self.forward_kept, self._fake_kept, self._cuda_kept, self._differentiable_kept
            )
        self.run = self._dispatcher()

    def _register(
        self,
        op: Any,
        fake: Callable[..., Any],
        cuda: Callable[..., Any],
        expression: Callable[..., Any],
    ) -> None:
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            found = self.fold(op, args, in_dims, info.batch_size)
            if isinstance(found, Tensor):
                return found, 0
            # what is not kept is an empty tensor, to which a fold gives no batch
            return found, tuple(None if t.dim() == 1 and not t.numel() else 0 for t in found)

        register(
            op,
            fake=fake,
            backward=self.gradients.raw_backward,
            setup=self.gradients.setup,
            vmap=vmap,
            cuda=cuda,
            expression=expression,
        )

    def keeps(self, code: int) -> bool:
        """Whether a forward with this activation has anything to keep for its gradients."""
        return len(self.kept) > 1 or (bool(self.kept) and code != act.NONE)

    def call(self, x: Tensor, *rest: Any) -> Call:
        """The arguments of the op in words as an object."""
        *fixed, bias, residual, activation = rest
        return Call(x, self.weight(x, *fixed), bias, residual, activation)

    def weight(self, x: Tensor, *fixed: Any) -> Format:
        """The weight of a call on x."""
        if x.dim() == 0 and self.format.K_OF_X:
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
        z = call.kept()["preact"] if self.kept else call.biased(self.product(call, None))
        return call.finish(z).to(call.x.dtype)

    def _plainly_kept(self, call: Call) -> tuple[Tensor, ...]:
        kept = call.kept()
        y = call.finish(kept["preact"])
        if call.activation == "none":  # nobody needs it, and it may be y itself
            kept["preact"] = call.x.new_empty(0)
        return y, *kept.values()

    def serve(self, call: Call) -> Tensor:
        """The op by its reference, which is said to have run."""
        return self._by_reference(call, self.name, self._plainly)  # type: ignore[no-any-return]

    def _by_reference(self, call: Call, name: str, plainly: Callable[[Call], Any]) -> Any:
        call.check()
        call.weight.check_structure()
        return self._by_torch(call, name, plainly)

    def _by_torch(self, call: Call, name: str, plainly: Callable[[Call], Any]) -> Any:
        backend.note(f"reference.{name}")
        if not is_autocast_on(call.x):
            return plainly(call)
        # inside an op it would round the products of a reference that holds float32
        with torch.autocast(call.x.device.type, enabled=False):
            return plainly(call)

    def _serve(self, *args: Any) -> Tensor:
        return self.serve(self.call(*args))

    def differentiable(self, *args: Any) -> Tensor:
        """The op, of its arguments in words, by torch's own, which torch differentiates forward."""
        self.gradients.refuse_tangents(*args)
        call = self.call(*args)
        call.check()

        def plainly(call: Call) -> Tensor:
            return call.finish(self.gradients.preact(call)).to(call.x.dtype)

        return self._by_torch(call, self.name, plainly)  # type: ignore[no-any-return]

    def _differentiable_kept(self, *args: Any) -> Any:
        call = self.call(*args)
        call.check()
        return self._by_torch(call, f"{self.name}_with_parts", self._plainly_kept)

    def _serve_kept(self, *args: Any) -> Any:
        return self._by_reference(self.call(*args), f"{self.name}_with_parts", self._plainly_kept)

    def _fake(self, *args: Any) -> Tensor:
        call = self.call(*args)
        call.check()
        return call.x.new_empty((*call.x.shape[:-1], call.n))

    def _fake_kept(self, *args: Any) -> tuple[Tensor, ...]:
        call = self.call(*args)
        sizes = call.weight.kept_sizes()
        x, lead = call.x, call.x.shape[:-1]
        kept = {name: x.new_empty((*lead, size)) for name, size in sizes.items()}
        if call.activation == "none":
            kept["preact"] = x.new_empty(0)
        return self._fake(*args), *kept.values()

    # kernels --------------------------------------------------------------------------------
    # The CPU kernels register themselves (csrc/cpu).

    def _cuda(self, *args: Any) -> Tensor:
        call = self.call(*args)
        run = self.choose(call, call.x.device).run
        if run is None:
            return self.serve(call)
        call.check()
        return run(call, False)[0] if self.kept else run(call)  # type: ignore[no-any-return]

    def _cuda_kept(self, *args: Any) -> Any:
        call = self.call(*args)
        run = self.choose(call, call.x.device).run
        if run is None:
            return self._serve_kept(*args)
        call.check()
        return tuple(call.x.new_empty(0) if t is None else t for t in run(call, True))

    def explain(
        self,
        x: Tensor | QuantizedRows,
        weight: Format,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str = "none",
        device: str | None = None,
        *,
        x_qparams: Tensor | None = None,
        y_qparams: Tensor | None = None,
    ) -> Choice:
        """What `choose` answers for a call, which is checked first; ``device`` as of a `Target`."""
        checks.stored(weight, self.format)
        if isinstance(x, QuantizedRows):
            target = targets.named(device, x.values)
            given = (weight, bias, residual, activation, (x_qparams, y_qparams), target)
            return self._of_rows().explain(x, *given)
        call = Call(x, weight, bias, residual, activation)
        target = targets.named(device, x)
        if self.by_itself(x, weight, x_qparams, y_qparams):
            call.check()
            return self.choose(call, target)
        assert self.u8 is not None
        return self.u8.explain(call, x_qparams, y_qparams, target)

    def on_rows(self, x: QuantizedRows, *given: Any) -> Tensor:
        """The op on quantised rows; ``given`` as `RowsOp.run` takes it."""
        return self._of_rows().run(x, *given)

    def _of_rows(self) -> RowsOp:
        if self.rows is None:
            raise TypeError(
                f"x: expected a torch.Tensor with a {self.format.__name__}; got QuantizedRows"
            )
        return self.rows

    def by_itself(
        self, x: Tensor, weight: Format, x_qparams: Tensor | None, y_qparams: Tensor | None
    ) -> bool:
        """Whether a call is this op's, not that of u8; raise ValueError for qparams without one."""
        given = x_qparams is not None or y_qparams is not None
        if self.u8 is None:
            if given:
                raise ValueError(
                    f"x_qparams, y_qparams: expected None with a {type(weight).__name__}"
                )
            return True
        return not given and getattr(x, "dtype", None) is not torch.uint8

    # vmap -----------------------------------------------------------------------------------

    def fold(
        self,
        op: Callable[..., Any],
        args: Sequence[Any],
        in_dims: Sequence[Any],
        batch: int,
        plainly: Callable[..., Any] | None = None,
    ) -> Any:
        """Rows are independent, so a batch of x and residual is more rows of one call.

        A batch of biases or weights has no kernel: plain weights take torch's batched products by
        the reference ``plainly``, where one is given; others are a call each.
        """

        def front(t: Tensor | None, dim: int | None) -> Tensor | None:
            if t is None:
                return None
            return t.unsqueeze(0).expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)

        x, *others, residual, activation = args
        x_dim, *other_dims, residual_dim, _ = in_dims
        if all(dim is None for dim in other_dims):
            return op(front(x, x_dim), *others, front(residual, residual_dim), activation)
        if self.format.PLAIN and plainly is not None:
            return torch.vmap(plainly, tuple(in_dims))(*args)
        return loop(op, args, in_dims, batch)

    # dispatch -------------------------------------------------------------------------------

    def _dispatcher(self) -> Callable[..., Tensor]:
        """What runs the op by the path that the caller's context needs.

        A closure has all that a call needs at hand: looked up anew it would cost a tenth more.
        """
        gradients, forward, words, encoded = (
            self.gradients,
            self.forward,
            self._words,
            self._encoded,
        )
        functorch, wanted, differentiable = (
            gradients.functorch,
            gradients.wanted,
            self.differentiable,
        )
        format, reads_k, codes = self.format, self.format.K_OF_X, act.CODES
        one_word = "str " not in self.format.SCHEMA
        below = torch._C._AutoDispatchBelowADInplaceOrView
        differ = checks.differ
        is_foreign = torch._C._has_torch_function_unary
        are_transforms_active = torch._C._are_functorch_transforms_active
        is_any_autocast_on = torch._C._is_any_autocast_enabled

        def call(
            x: Tensor,
            arguments: tuple[Any, ...],
            k: int,
            bias: Tensor | None = None,
            residual: Tensor | None = None,
            activation: str = "none",
        ) -> Tensor:
            try:
                # fx's proxies and subclasses; modes, as of a default device, change nothing
                foreign = False
                if type(x) is not Tensor:
                    foreign = is_foreign(x)
                    if foreign and not isinstance(x, Tensor):
                        return words(x, *arguments, bias, residual, activation)
                    if x.is_nested:
                        return on_values(call, x, arguments, k, bias, residual, activation)
                compiling = torch.compiler.is_compiling()
                if reads_k and (differ(x.shape[-1], k) if compiling else x.shape[-1] != k):
                    raise TypeError  # it is named below
                # the device of x takes 3 us where the call is recorded: it is asked for last
                if (compiling or is_any_autocast_on()) and is_autocast_on(x):
                    kind = x.device.type
                    dtype = format.autocast_dtype(*arguments) or torch.get_autocast_dtype(kind)
                    x, bias, residual = cast(dtype, x, bias, residual)
                    if format.PLAIN:  # storage keeps its own dtypes
                        arguments = cast(dtype, *arguments)
                if compiling:
                    return gradients.traced(x, *arguments, bias, residual, activation)
                if forward_ad._current_level >= 0:
                    return differentiable(x, *arguments, bias, residual, activation)
                if foreign:
                    return words(x, *arguments, bias, residual, activation)
                # Under functorch `requires_grad` of wrapped tensors says nothing: ask this first.
                if are_transforms_active():
                    return functorch(x, *arguments, bias, residual, activation)
                if one_word:
                    coded: Sequence[Any] = (x, *arguments, bias, residual, codes[activation])
                else:
                    coded = encoded((x, *arguments, bias, residual, activation))
                if torch.is_grad_enabled():
                    record = wanted(x, arguments, bias, residual, coded[-1])
                    if record is not None:
                        return record(*coded)
                elif torch.is_inference_mode_enabled():  # autograd is out of the way already
                    return forward(*coded)
                with below():
                    return forward(*coded)
            except (RuntimeError, AttributeError, TypeError, KeyError, IndexError):
                # The kernel checks its arguments; only a refused call pays for naming what is wrong
                act.check_name(activation, format.GATED)
                if type(x) is Tensor and x.is_nested:  # strided, which no other call asks for
                    return on_values(call, x, arguments, k, bias, residual, activation)
                if not torch.compiler.is_compiling():
                    checks.tensors(x=x, bias=bias, residual=residual)
                    Call(x, self.stored(k, arguments), bias, residual, activation).check()
                raise

        return call
