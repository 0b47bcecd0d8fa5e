"""The gradients of a linear op by every path: eager, raw, traced, torch.func, twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.formats.base import rows
from bigops.ops import activation as act
from bigops.ops import forward_mode, graph_node
from bigops.ops.family.call import Call
from bigops.ops.library import define, in_words, loop, register

if TYPE_CHECKING:
    from bigops.ops.family.linear_op import LinearOp

Backward = Callable[..., "tuple[Tensor, ...] | None"]


class Gradients:
    """The backward op of a `LinearOp`, and the ways that lead to it."""

    def __init__(self, op: LinearOp, backward: Backward | None) -> None:
        self.op, self._on_cuda = op, backward
        trained, tensors = op.format.TRAINED, op.format.TENSORS
        self.needs = tuple(f"need_{name}" for name in ("x", *trained, "bias"))
        # Of the bias only the pre-activation is made, where it is not kept.
        extra, kept = op.format.KEPT or "Tensor? bias", op.kept or ("bias",)
        self.arguments = ("grad", "x", *op.fields, *kept, "activation", *self.needs)
        results = ", ".join("Tensor" for _ in self.needs)
        self.backward = define(
            f"{op.name}_backward(Tensor grad, Tensor x, {op.format.SCHEMA}, {extra}, "
            f"str activation, {', '.join(f'bool {need}' for need in self.needs)}) -> ({results})",
            self._serve,
        )
        register(
            self.backward,
            fake=self._fake,
            backward=self._double,
            setup=self._setup_double,
            vmap=self._vmap,
            cuda=None if backward is None else self._cuda,
            expression=self._or_empty,
        )
        self._reference = in_words(self.backward, self.reference)
        self._call = in_words(op.forward, op.call)
        sizes = [name for name in op.fields if name not in tensors]
        self._saved = _picker(op.arguments, ("x", *tensors, "bias"))
        self._weight = _picker(op.arguments, tensors)
        self._bias_at = op.arguments.index("bias")
        self._sizes = _picker(op.arguments, sizes) if sizes else None
        self._saved_names = ("x", *tensors, "bias", *op.kept)
        self._saved_of = _picker((*op.arguments, "y", *op.kept), self._saved_names)
        self._twice = ("grad", "x", *tensors, *kept)
        places = list(enumerate(op.fields))
        self._frozen = [(at, name) for at, name in places if name in {*tensors} - {*trained}]
        self._trained = [at for at, name in places if name in trained]
        self.eager, self.eager_frozen, self.functorch = self._functions()

        def node(trains: bool, *args: Any) -> Tensor:
            if forward_mode.is_active():
                return op.differentiable(*args)
            if torch._C._are_functorch_transforms_active():
                return self.functorch(*args)
            *given, code = op._encoded(args)
            if trains and op.keeps(code):
                return op.forward_kept(*given, code)[0]  # type: ignore[no-any-return]
            return op.forward(*given, code)

        self.node = graph_node.add(op.name, node)

    # reference, fake ------------------------------------------------------------------------

    def call(
        self, grad: Tensor, x: Tensor, *rest: Any
    ) -> tuple[Call, dict[str, Tensor | None], dict[str, bool]]:
        """The arguments of the backward op in words: a call, what it kept, what is needed."""
        named = dict(zip(self.arguments, (grad, x, *rest), strict=True))
        weight = self.op.weight(x, *(named[field] for field in self.op.fields))
        call = Call(x, weight, named.get("bias"), None, named["activation"])
        kept = {name: named[name] for name in self.op.kept}
        return call, kept, {need: named[need] for need in self.needs}

    def reference(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        """The results of the backward op as a differentiable expression; None where not needed."""
        call, kept, need = self.call(grad, x, *rest)
        return self._expression(grad, call, kept or self._kept(call), need)

    def _kept(self, call: Call) -> dict[str, Tensor]:
        """What an expression for the gradients of a call starts from, itself differentiable."""
        if self.op.kept:
            return call.kept()
        return {} if call.activation == "none" else {"preact": self.preact(call)}

    def preact(self, call: Call) -> Tensor:
        """x W^T with the bias as a differentiable expression; rounding is straight through."""
        if self.op.kept:
            return call.kept()["preact"]
        wide = call._replace(x=call.x.float())
        z = call.biased(F.linear(wide.x, call.weight.to_dense(torch.float32)))
        if call.weight.rounds:
            seen = call.biased(self.op.product(wide, None))
            z = z + (seen - z).detach()
        return z

    def _expression(
        self, grad: Tensor, call: Call, kept: Mapping[str, Any], need: Mapping[str, bool]
    ) -> tuple[Tensor | None, ...]:
        gz = grad.to(call.dtype)
        if call.activation != "none":
            gz = act.epilogue_backward(call.activation, gz, kept["preact"])
        wanted = [name.removeprefix("need_") for name, asked in need.items() if asked]
        found = call.weight.backward(gz, call.x.to(call.dtype), wanted, kept)
        if "bias" in wanted:
            found["bias"] = rows(gz).sum(0)
        for name in {"x", "bias"} & {*wanted}:
            found[name] = found[name].to(call.x.dtype)
        return tuple(found.get(name.removeprefix("need_")) for name in need)

    def _serve(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        backend.note(f"reference.{self.op.name}_backward")
        with torch.autocast(x.device.type, enabled=False):
            return self._or_empty(grad, x, *rest)

    def _or_empty(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        found = self.reference(grad, x, *rest)
        return tuple(x.new_empty(0) if g is None else g for g in found)  # none is another's

    def _fake(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        call, _, need = self.call(grad, x, *rest)
        like = {**call.weight.tensors(), "x": x, "bias": x.new_empty(call.weight.n)}
        found = ((like[name.removeprefix("need_")], asked) for name, asked in need.items())
        return tuple(
            t.new_empty(t.shape) if asked and t is not None else x.new_empty(0)
            for t, asked in found
        )

    def _cuda(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        call, kept, need = self.call(grad, x, *rest)
        assert self._on_cuda is not None
        found = self._on_cuda(grad, call, **kept, **need)
        return self._serve(grad, x, *rest) if found is None else found

    # once -----------------------------------------------------------------------------------

    def wanted(
        self,
        x: Tensor,
        arguments: tuple[Any, ...],
        bias: Tensor | None,
        residual: Tensor | None,
        code: int,
    ) -> Callable[..., Tensor] | None:
        """What records a call, None where nothing learns.

        Raises:
            ValueError: a gradient is asked for storage that has none.
        """
        for at, name in self._frozen:
            t = arguments[at]
            if t is not None and t.requires_grad:
                self._refuse(name)
        for at in self._trained:
            t = arguments[at]
            if t is not None and t.requires_grad:
                return self.eager
        if x.requires_grad:
            return self.eager_frozen if code == act.NONE else self.eager
        if (bias is not None and bias.requires_grad) or (
            residual is not None and residual.requires_grad
        ):
            return self.eager_frozen
        return None

    def refuse_tangents(self, *args: Any) -> None:
        """Raise ValueError for a tangent of storage that has no gradient."""
        for at, name in self._frozen:
            if forward_mode.has_tangent(args[1 + at]):  # after x
                self._refuse(name)

    def _refuse(self, name: str) -> None:
        trained = self.op.format.TRAINED
        what = "is frozen storage; train the dense weight and convert it anew"
        if trained:
            what += f", or train its floating-point {', '.join(trained)}"
        raise ValueError(
            f"{name}: expected a tensor that needs no gradient (the weight of {self.op.name} "
            f"{what}); got one with requires_grad"
        )

    def save(self, ctx: Any, args: Sequence[Any], kept: Sequence[Tensor | None] = ()) -> None:
        """Save what the gradients need of the arguments of the op, in codes, and what it kept."""
        ctx.sizes, ctx.code = self._sizes(args) if self._sizes else (), args[-1]
        ctx.save_for_backward(*self._saved(args), *kept)

    def save_frozen(self, ctx: Any, args: Sequence[Any], kept: Sequence[Any] = ()) -> None:
        """`save` where no tensor of the weight learns, and not x before an activation.

        The gradient of x reads the weight alone, that of the bias the pre-activation: x is saved
        where that has to be made again.
        """
        needs = ctx.needs_input_grad  # of the raw op with an entry of torch.library's at the end
        need_x, need_bias = needs[0], needs[self._bias_at]
        x, code = args[0], args[-1]
        ctx.sizes, ctx.code, ctx.k = self._sizes(args) if self._sizes else (), code, x.shape[-1]
        active = need_bias and code != act.NONE
        if active and not any(t is not None for t in kept):
            # of an inference tensor, which autograd does not save, a copy
            _, *rest = args
            return self.save(ctx, (x.clone() if x.is_inference() else x, *rest), kept)
        _, *weight, bias = self._saved(args)
        if not (need_x or need_bias):
            weight = [None for _ in weight]
        if not active:
            bias, kept = None, [None for _ in kept]
        ctx.save_for_backward(None, *weight, bias, *kept)
        return None

    def setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """`torch.library`'s setup of the context of the raw op."""
        for at, name in self._frozen:
            if ctx.needs_input_grad[1 + at]:  # after x
                self._refuse(name)
        _, *kept = output if isinstance(output, tuple) else (output,)
        if kept:
            ctx.set_materialize_grads(False)
        need_x, *needs = ctx.needs_input_grad
        learns = any(needs[at] for at in self._trained) or (need_x and inputs[-1] != act.NONE)
        (self.save if learns else self.save_frozen)(ctx, inputs, kept)

    def raw_backward(self, ctx: Any, grad: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
        """Gradients of all inputs of the op: by the kernel, or as an expression."""
        op = self.op
        if any(g is not None for g in others):
            raise RuntimeError(
                f"{op.name}_with_parts: expected a gradient for y only; {' and '.join(op.kept)} "
                "are kept for the backward pass and have none"
            )
        asked = dict(zip(op.arguments, ctx.needs_input_grad, strict=True))
        for _, name in self._frozen:
            if asked[name]:
                self._refuse(name)
        need = {name: asked[name.removeprefix("need_")] for name in self.needs}
        made: Sequence[Tensor | None] = self._made(ctx, grad, need) if any(need.values()) else ()
        found = {
            name.removeprefix("need_"): gradient
            for (name, wanted), gradient in zip(need.items(), made, strict=False)
            if wanted
        }
        if asked["residual"]:
            found["residual"] = grad
        return tuple(found.get(name) for name in op.arguments)

    def _made(self, ctx: Any, grad: Tensor, need: dict[str, bool]) -> Sequence[Tensor | None]:
        op, saved = self.op, dict(zip(self._saved_names, ctx.saved_tensors, strict=False))
        sizes, code = ctx.sizes if self._sizes else (), ctx.code
        x, bias = saved["x"], saved["bias"]
        weight = (*(saved[name] for name in op.format.TENSORS), *sizes)
        dropped = x is None  # by `save_frozen`
        if dropped and torch.is_grad_enabled() and not need["need_x"]:
            return self._of_bias(grad, saved, act.NAMES[code])
        if x is None:
            x = grad.new_empty((*grad.shape[:-1], ctx.k))  # for its shape: no gradient reads it
        if torch.is_grad_enabled():  # create_graph: the expression is differentiable again
            call = self._call(x, *weight, bias, None, code)
            return self._expression(grad, call, {} if dropped else self._kept(call), need)
        kept: Sequence[Tensor | None] = (bias,)
        if op.kept and saved.get("preact") is not None:
            kept = [saved[name] for name in op.kept]
        elif dropped:
            kept = self._unread(x, op.weight(x, *weight).kept_sizes())
        elif op.keeps(code):  # the plain raw op keeps nothing
            _, *kept = op.forward_kept(x, *weight, bias, None, code)
        elif op.kept:
            kept = [None for _ in op.kept]
        return self.backward(grad, x, *weight, *kept, code, *need.values())  # type: ignore[no-any-return]

    def _unread(self, x: Tensor, sizes: Mapping[str, int]) -> Sequence[Tensor | None]:
        """What is kept, as the schema has it, where no gradient reads it."""
        made = {name: x.new_empty((*x.shape[:-1], size)) for name, size in sizes.items()}
        made.pop("preact", None)
        return [made.get(name) for name in self.op.kept or ("bias",)]

    def _of_bias(
        self, grad: Tensor, saved: Mapping[str, Any], activation: str
    ) -> Sequence[Tensor | None]:
        """The gradients where neither x nor the weight learns, differentiable again."""
        bias, z = saved["bias"], saved.get("preact")
        gz = grad if self.op.format.PLAIN else grad.float()
        if z is not None:
            if torch.is_grad_enabled():
                z = z + (bias - bias.detach())  # by which it may be differentiated
            gz = act.epilogue_backward(activation, gz, z)
        *none, _ = [None for _ in self.needs]
        return *none, rows(gz).sum(0).to(grad.dtype)

    # twice ----------------------------------------------------------------------------------

    def _setup_double(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.named = dict(zip(self.arguments, inputs, strict=True))
        ctx.save_for_backward(*(ctx.named.pop(name) for name in self._twice))

    def _double(self, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Vector-Jacobian product of the raw backward op, through its differentiable form."""
        named = {**ctx.named, **dict(zip(self._twice, ctx.saved_tensors, strict=True))}
        leaves = {
            name: named[name].detach().requires_grad_()
            for name in self._twice
            if named[name] is not None and self._differentiable(name, named[name])
        }
        named.update(leaves)
        with torch.enable_grad():
            outputs = self._reference(*(named[name] for name in self.arguments))
            pairs = [(o, v) for o, v in zip(outputs, grads, strict=True) if o is not None]
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                list(leaves.values()),
                [v for _, v in pairs],
                allow_unused=True,
            )
        by_name = dict(zip(leaves, found, strict=True))
        return tuple(by_name.get(name) for name in self.arguments)

    def _differentiable(self, name: str, t: Tensor) -> bool:
        if name in self.op.format.TENSORS:
            return name in self.op.format.TRAINED and t.is_floating_point()
        return True

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Per-example gradients: those of bias and values are one each, so each is its own call."""
        return loop(self.backward, args, in_dims, info.batch_size), (0,) * len(self.needs)

    # paths ----------------------------------------------------------------------------------

    def _functions(self) -> tuple[Callable[..., Tensor], ...]:
        """The eager Functions (ctx form, 10 microseconds a call) and the one for torch.func."""
        gradients, op = self, self.op
        saved_of, sizes, unkept = self._saved_of, self._sizes, (None,) * len(op.kept)
        weight, save_frozen, none = self._weight, self.save_frozen, act.NONE
        forward, forward_kept = op.forward, op.forward_kept
        keeps = [op.keeps(code) for code in range(len(act.NAMES))]
        # What comes out is no view to autograd, so that it may be written in place.
        below = torch._C._AutoDispatchBelowADInplaceOrView

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):  # type: ignore[no-untyped-def]
                # as `save` does: here each call counts, and a list is 0.4 us of 12
                code = ctx.code = args[-1]
                if sizes:
                    ctx.sizes = sizes(args)
                with below():
                    found = forward_kept(*args) if keeps[code] else (forward(*args), *unkept)
                ctx.save_for_backward(*saved_of(args + found))
                return found[0]

            @staticmethod
            def backward(ctx, grad):  # type: ignore[no-untyped-def]
                return gradients.raw_backward(ctx, grad)

        class EagerFrozen(Eager):
            @staticmethod
            def forward(ctx, *args):  # type: ignore[no-untyped-def]
                kept: Sequence[Tensor | None] = unkept
                with below():
                    if kept and args[-1] != none:
                        y, *kept = forward_kept(*args)
                    else:
                        y = forward(*args)
                if args[-1] == none and args[0].requires_grad:  # as `save_frozen` does
                    ctx.sizes, ctx.code = sizes(args) if sizes else (), none
                    ctx.k = args[0].shape[-1]
                    ctx.save_for_backward(None, *weight(args), None, *kept)
                else:
                    save_frozen(ctx, args, kept)
                return y

        class Functorch(torch.autograd.Function):
            # Each level lowers to the public path, so that levels nest (grad of vmap and back), and
            # takes words as that does.
            @staticmethod
            def forward(x, *rest):  # type: ignore[no-untyped-def]
                *arguments, bias, residual, activation = rest
                return op.run(x, tuple(arguments), x.shape[-1], bias, residual, activation)

            @staticmethod
            def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
                gradients.save(ctx, op._encoded(inputs))

            @staticmethod
            def backward(ctx, grad):  # type: ignore[no-untyped-def]
                with torch.enable_grad():
                    return gradients.raw_backward(ctx, grad)

            @staticmethod
            def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
                return op.fold(Functorch.forward, args, in_dims, info.batch_size, op._serve), 0

        return Eager.apply, EagerFrozen.apply, Functorch.apply

    def traced(self, *args: Any) -> Tensor:
        """The op in a graph that torch.compile or torch.export makes."""
        graph_node.allow(self.op.name)
        # whether it may be differentiated is known here; a graph is lowered with gradients on
        return self.node(torch.is_grad_enabled(), *args)  # type: ignore[no-any-return]


def _picker(
    names: Sequence[str], wanted: Sequence[str]
) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the values of ``wanted`` out of those of ``names``, as a tuple."""
    places = [names.index(name) for name in wanted]
    if len(places) > 1:
        return itemgetter(*places)
    (place,) = places
    return lambda values: (values[place],)
