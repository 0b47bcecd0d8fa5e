"""The gradients of a linear op by every road: eager, raw, traced, torch.func, twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.ops import activation as act
from bigops.ops.family.call import Call
from bigops.ops.library import define, in_words, loop, register

if TYPE_CHECKING:
    from bigops.ops.family.linear_op import LinearOp

Backward = Callable[..., "tuple[Tensor, ...] | None"]


class Gradients:
    """The backward op of a `LinearOp`, and the ways that lead to it."""

    def __init__(self, op: LinearOp, backward: Backward | None) -> None:
        self.op, self._on_cuda = op, backward
        trains = op.format.TRAINS
        self.needs = ("need_x", "need_values", "need_bias") if trains else ("need_x", "need_bias")
        self.arguments = ("grad", "x", *op.fields, "bias", "activation", *self.needs)
        results = ", ".join("Tensor" for _ in self.needs)
        self.backward = define(
            f"{op.name}_backward(Tensor grad, Tensor x, {op.format.SCHEMA}, Tensor? bias, "
            f"str activation, {', '.join(f'bool {need}' for need in self.needs)}) -> ({results})",
            self._serve,
        )
        self._expression = in_words(self.backward, self.reference)
        register(
            self.backward,
            fake=self._fake,
            backward=self._double,
            setup=self._setup_double,
            vmap=self._vmap,
            cuda=None if backward is None else self._cuda,
        )
        tensors = op.format.TENSORS
        sizes = [name for name in op.fields if name not in tensors]
        self._weights = _picker(op.fields, tensors)
        self._saved = _picker(op.arguments, ("x", *tensors, "bias"))
        self._plain = _picker(op.arguments, (*sizes, "activation"))
        self._twice = ("grad", "x", *tensors, "bias")
        self.eager, self.functorch = self._functions()

        def node(*args: Any) -> Tensor:
            # Runs when a graph is lowered, below the transforms of torch.func that it was traced in
            if torch._C._are_functorch_transforms_active():
                return self.functorch(*args)
            return op.forward(*op._encoded(args))  # type: ignore[no-any-return]

        self.node = _NODES[op.name] = node

    # reference, fake ------------------------------------------------------------------------

    def call(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Call, dict[str, bool]]:
        """The arguments of the backward op in words as a call, and what is needed."""
        named = dict(zip(self.arguments, (grad, x, *rest), strict=True))
        weight = self.op.weight(x, *(named[field] for field in self.op.fields))
        call = Call(x, weight, named["bias"], None, named["activation"])
        return call, {need: named[need] for need in self.needs}

    def reference(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        """The results of the backward op as a differentiable expression; None where not needed."""
        call, need = self.call(grad, x, *rest)
        bias = None if call.bias is None else call.bias.float()
        w = call.weight.to_dense(torch.float32)
        gz = grad.float()
        if call.activation != "none":
            z = F.linear(x.float(), w, bias)
            if call.weight.rounds:
                seen = self.op.reference(x.float(), call.weight, bias)
                z = z + (seen - z).detach()
            gz = act.epilogue_backward(call.activation, gz, z)
        gx = (gz @ w).to(x.dtype) if need["need_x"] else None
        rows = list(range(gz.dim() - 1))
        gb = (gz.sum(rows) if rows else gz).to(x.dtype) if need["need_bias"] else None
        if "need_values" not in need:
            return gx, gb
        gv = None
        if need["need_values"]:
            n, k = w.shape
            gv = call.weight.sample(
                gz.reshape(-1, n).t() @ x.float().reshape(-1, k) if n and k else w
            )
        return gx, gv, gb

    def _serve(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        backend.note(f"reference.{self.op.name}_backward")
        with torch.autocast(x.device.type, enabled=False):
            found = self.reference(grad, x, *rest)
        return tuple(x.new_empty(0) if g is None else g for g in found)  # none is another's

    def _fake(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        call, need = self.call(grad, x, *rest)
        like = {"need_x": x, "need_values": getattr(call.weight, "values", x), "need_bias": x}
        shape = {"need_x": x.shape, "need_bias": grad.shape[-1:]}
        if need.get("need_values"):
            shape["need_values"] = like["need_values"].shape
        return tuple(
            like[name].new_empty(shape[name]) if wanted else x.new_empty((0,))
            for name, wanted in need.items()
        )

    def _cuda(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        call, need = self.call(grad, x, *rest)
        assert self._on_cuda is not None
        found = self._on_cuda(grad, call, **need)
        return self._serve(grad, x, *rest) if found is None else found

    # once -----------------------------------------------------------------------------------

    def wanted(
        self, x: Tensor, arguments: tuple[Any, ...], bias: Tensor | None, residual: Tensor | None
    ) -> bool:
        """Whether a call is to be recorded; raise ValueError for storage that has no gradient."""
        weights = [t is not None and t.requires_grad for t in self._weights(arguments)]
        if any(weights):
            self._refuse(self._weights(arguments), weights)
            return True
        return (
            x.requires_grad
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )

    def _refuse(self, tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> None:
        op = self.op
        for name, t, need in zip(op.format.TENSORS, tensors, needs, strict=True):
            trains = op.format.TRAINS and name == "values"
            if need and not (trains and t is not None and t.is_floating_point()):
                what = "is frozen storage; train the dense weight and convert it anew"
                if op.format.TRAINS:
                    what += ", or train its floating-point values"
                raise ValueError(
                    f"{name}: expected a tensor that needs no gradient (the weight of {op.name} "
                    f"{what}); got one with requires_grad"
                )

    def save(self, ctx: Any, args: Sequence[Any]) -> None:
        """Keep what the gradients need of the arguments of the op, in codes."""
        ctx.plain = self._plain(args)
        ctx.save_for_backward(*self._saved(args))

    def setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """`torch.library`'s setup of the context of the raw op."""
        _, *tensors, _ = self._saved(inputs)
        _, *needs, _ = self._saved(ctx.needs_input_grad)
        self._refuse(tensors, needs)
        self.save(ctx, inputs)

    def raw_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Gradients of all inputs of the op: by the kernel, or as an expression."""
        x, *tensors, bias = ctx.saved_tensors
        *sizes, code = ctx.plain
        asked = dict(zip(self.op.arguments, ctx.needs_input_grad, strict=True))
        self._refuse(tensors, [asked[name] for name in self.op.format.TENSORS])
        need = {name: asked[name.removeprefix("need_")] for name in self.needs}
        args = (grad, x, *tensors, *sizes, bias, code, *need.values())
        found: dict[str, Tensor | None] = {}
        if any(need.values()):
            # create_graph: the expression is differentiable again
            made = (self._expression if torch.is_grad_enabled() else self.backward)(*args)
            found = {
                name.removeprefix("need_"): gradient if wanted else None
                for (name, wanted), gradient in zip(need.items(), made, strict=True)
            }
        found["residual"] = grad if asked["residual"] else None
        return tuple(found.get(name) for name in self.op.arguments)

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
            outputs = self._expression(*(named[name] for name in self.arguments))
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
            return name == "values" and self.op.format.TRAINS and t.is_floating_point()
        return True

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Per-example gradients: those of bias and values are one each, so each is its own call."""
        return loop(self.backward, args, in_dims, info.batch_size), (0,) * len(self.needs)

    # roads ----------------------------------------------------------------------------------

    def _functions(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """The eager Function (ctx form, 10 microseconds a call) and the one for torch.func."""
        gradients, op = self, self.op

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):  # type: ignore[no-untyped-def]
                gradients.save(ctx, args)
                with torch._C._AutoDispatchBelowAutograd():
                    return op.forward(*args)

            @staticmethod
            def backward(ctx, grad):  # type: ignore[no-untyped-def]
                return gradients.raw_backward(ctx, grad)

        class Functorch(torch.autograd.Function):
            # Each level lowers to the public road, so that levels nest (grad of vmap and back), and
            # takes words as that does.
            @staticmethod
            def forward(x, *rest):  # type: ignore[no-untyped-def]
                *arguments, bias, residual, activation = rest
                return op(x, tuple(arguments), x.shape[-1], bias, residual, activation)

            @staticmethod
            def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
                gradients.save(ctx, op._encoded(inputs))

            @staticmethod
            def backward(ctx, grad):  # type: ignore[no-untyped-def]
                with torch.enable_grad():
                    return gradients.raw_backward(ctx, grad)

            @staticmethod
            def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
                return op.fold(Functorch.forward, args, in_dims, info.batch_size), 0

        return Eager.apply, Functorch.apply

    def traced(self, *args: Any) -> Tensor:
        """The op in a graph that torch.compile or torch.export makes."""
        _allow_in_graph(self.op.name)
        return self.node(*args)  # type: ignore[no-any-return]


_NODES: dict[str, Callable[..., Tensor]] = {}


def _allow_in_graph(name: str) -> bool:
    """Let dynamo put calls of a node into its graphs as they are.

    Dynamo runs this while it traces (`torch._dynamo.assume_constant_result`, whose mark is set
    below): to ask earlier would import dynamo with bigops, which takes as long as torch itself. The
    node goes by its name, since what dynamo has looked at before would stay as it was.
    """
    torch.compiler.allow_in_graph(_NODES[name])
    return True


_allow_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _picker(
    names: Sequence[str], wanted: Sequence[str]
) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the values of ``wanted`` out of those of ``names``, as a tuple."""
    places = [names.index(name) for name in wanted]
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)
