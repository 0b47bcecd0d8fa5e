"""Autograd, vmap and fake roads shared by the linear ops whose weight is frozen storage.

Such an op takes ``(x, *storage, bias, residual, activation)`` and has a backward op
``(grad, x, *storage, bias, activation, need_x, need_bias) -> (grad_x, grad_bias)``. Storage has no
gradient. Where the forward rounds its activations, the gradient is the straight-through one: that
of the dequantised weight, taken at the pre-activation which the forward saw (Bengio et al. 2013,
arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.ops import _activation as act
from bigops.ops import _checks as checks
from bigops.ops._library import LIB, autocast, define


class FrozenLinear:
    """Defines one such op and its backward in the library, and applies it.

    Args:
        name: name of the op.
        schema: schema of the storage arguments, such as ``"Tensor weight, Tensor scale"``.
        reference: the meaning in plain torch, with the signature of the op.
        dense: ``dense(x, *storage) -> [N, K]`` float32, the dequantised weight.
        check: raises ValueError or TypeError; the signature of the op.
        rounds: ``rounds(*storage)``: whether the forward quantises its activations.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Tensor],
        dense: Callable[..., Tensor],
        check: Callable[..., None],
        rounds: Callable[..., bool],
    ) -> None:
        self.name = name
        self.storage = tuple(part.split()[-1] for part in schema.split(","))
        self.count = len(self.storage)
        self.reference, self.dense, self.check, self.rounds = reference, dense, check, rounds
        self.forward = define(
            f"{name}(Tensor x, {schema}, Tensor? bias, Tensor? residual, str activation) -> Tensor",
            self._serve,
        )
        self.backward = define(
            f"{name}_backward(Tensor grad, Tensor x, {schema}, Tensor? bias, str activation, "
            "bool need_x, bool need_bias) -> (Tensor, Tensor)",
            self._serve_backward,
        )
        forward, backward = f"bigops::{name}", f"bigops::{name}_backward"
        torch.library.register_fake(forward, self._fake, lib=LIB)
        torch.library.register_fake(backward, self._fake_backward, lib=LIB)
        torch.library.register_autograd(
            forward, self._raw_backward, setup_context=self._setup, lib=LIB
        )
        torch.library.register_autograd(
            backward, self._double_backward, setup_context=self._setup_backward, lib=LIB
        )
        torch.library.register_vmap(forward, self._vmap, lib=LIB)
        torch.library.register_vmap(backward, self._vmap_backward, lib=LIB)
        self._eager, self._functorch = self._functions()

    # reference ------------------------------------------------------------------------------

    def _serve(self, *args: Any) -> Tensor:
        self.check(*args)
        backend.note(f"reference.{self.name}")
        return self.reference(*args)

    def _serve_backward(self, *args: Any) -> tuple[Tensor, Tensor]:
        backend.note(f"reference.{self.name}_backward")
        gx, gb = self.reference_backward(*args)
        empty = args[0].new_empty(0)
        return empty if gx is None else gx, empty if gb is None else gb

    def reference_backward(
        self, grad: Tensor, x: Tensor, *rest: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients for x and bias as a differentiable expression; None where not needed."""
        storage, (bias, activation, need_x, need_bias) = rest[: self.count], rest[self.count :]
        w = self.dense(x, *storage)  # [N, K] float32
        gz = grad.float()
        if activation != "none":
            z = F.linear(x.float(), w, None if bias is None else bias.float())
            if self.rounds(*storage):
                float_bias = None if bias is None else bias.float()
                seen = self.reference(x.float(), *storage, float_bias, None, "none")
                z = z + (seen - z).detach()
            gz = act.epilogue_backward(activation, gz, z)
        gx = (gz @ w).to(x.dtype) if need_x else None
        rows = list(range(gz.dim() - 1))
        gb = (gz.sum(rows) if rows else gz).to(x.dtype) if need_bias else None
        return gx, gb

    # fake -----------------------------------------------------------------------------------

    def _fake(self, x: Tensor, *rest: Any) -> Tensor:
        self.check(x, *rest)
        return x.new_empty((*x.shape[:-1], self.rows(x, *rest[: self.count])))

    def _fake_backward(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        need_x, need_bias = rest[-2:]
        return (
            x.new_empty(x.shape if need_x else (0,)),
            x.new_empty((grad.shape[-1],) if need_bias else (0,)),
        )

    def rows(self, x: Tensor, *storage: Tensor | None) -> int:
        """N, the number of output features."""
        raise AssertionError("each op says where its storage keeps N")

    # autograd -------------------------------------------------------------------------------

    def _refuse(self, needs: tuple[bool, ...]) -> None:
        for name, need in zip(self.storage, needs, strict=True):
            if need:
                raise ValueError(
                    f"{name}: expected a tensor that needs no gradient (the weight of {self.name} "
                    "is frozen storage; train the dense weight and convert it anew); got one "
                    "with requires_grad"
                )

    def _gradients(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs of the op: by the kernel, or as an expression."""
        x, *storage, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        self._refuse(needs[1 : 1 + self.count])
        need_x, need_bias, need_residual = needs[0], needs[-3], needs[-2]
        args = (grad, x, *storage, bias, ctx.activation, need_x, need_bias)
        gx: Tensor | None = None
        gb: Tensor | None = None
        if torch.is_grad_enabled():  # create_graph: the expression is differentiable again
            gx, gb = self.reference_backward(*args)
        elif need_x or need_bias:
            gx, gb = self.backward(*args)
        nothing = (None,) * self.count
        return (
            gx if need_x else None,
            *nothing,
            gb if need_bias else None,
            grad if need_residual else None,
            None,
        )

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self._refuse(ctx.needs_input_grad[1 : 1 + self.count])
        ctx.activation = inputs[-1]
        ctx.save_for_backward(*inputs[:-2])

    def _raw_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return self._gradients(ctx, grad)

    def _setup_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.rest = inputs[-3:]
        ctx.save_for_backward(*inputs[:-3])

    def _double_backward(self, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Vector-Jacobian product of the raw backward op, through its differentiable form."""
        grad, x, *storage, bias = ctx.saved_tensors
        with torch.enable_grad():
            wanted: list[Any] = [
                t if t is None else t.detach().requires_grad_() for t in (grad, x, bias)
            ]
            outputs = self.reference_backward(*wanted[:2], *storage, wanted[2], *ctx.rest)
            pairs = [(o, v) for o, v in zip(outputs, grads, strict=True) if o is not None]
            found = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    [t for t in wanted if t is not None],
                    [v for _, v in pairs],
                    allow_unused=True,
                )
            )
        ggrad, gx, gbias = (None if t is None else next(found) for t in wanted)
        nothing = (None,) * self.count
        return (ggrad, gx, *nothing, gbias, None, None, None)

    def _functions(self) -> tuple[type, type]:
        """The eager Function (ctx form, 10 microseconds a call) and the one for torch.func."""
        road = self

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):  # type: ignore[no-untyped-def]
                ctx.activation = args[-1]
                ctx.save_for_backward(*args[:-2])
                with torch._C._AutoDispatchBelowAutograd():
                    return road.forward(*args)

            @staticmethod
            def backward(ctx, grad):  # type: ignore[no-untyped-def]
                return road._gradients(ctx, grad)

        class Functorch(torch.autograd.Function):
            # Each level lowers to the public road, so that levels nest (grad of vmap and back).
            @staticmethod
            def forward(*args):  # type: ignore[no-untyped-def]
                return road.apply(*args)

            @staticmethod
            def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
                ctx.activation = inputs[-1]
                ctx.save_for_backward(*inputs[:-2])

            @staticmethod
            def backward(ctx, grad):  # type: ignore[no-untyped-def]
                with torch.enable_grad():
                    return road._gradients(ctx, grad)

            @staticmethod
            def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
                return road._fold(road.apply, args, in_dims, info.batch_size), 0

        return Eager, Functorch

    # vmap -----------------------------------------------------------------------------------

    def _fold(
        self, op: Callable[..., Tensor], args: tuple[Any, ...], in_dims: tuple[Any, ...], batch: int
    ) -> Tensor:
        """Rows are independent, so a batch of x and residual is more rows of one call.

        A batch of biases or weights is a call each: there is no kernel for many weights at once.
        """

        def front(t: Tensor | None, dim: int | None) -> Tensor | None:
            if t is None:
                return None
            return t.unsqueeze(0).expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)

        x, residual = front(args[0], in_dims[0]), front(args[-2], in_dims[-2])
        assert x is not None
        if all(dim is None for dim in in_dims[1:-2]):
            return op(x, *args[1:-2], residual, args[-1])
        if batch == 0:
            return x.new_empty((0, *x.shape[1:-1], self.rows(args[0], *args[1 : 1 + self.count])))
        fixed = [front(t, d) for t, d in zip(args[1:-2], in_dims[1:-2], strict=True)]
        return torch.stack(
            [
                op(
                    x[i],
                    *(None if t is None else t[i] for t in fixed),
                    None if residual is None else residual[i],
                    args[-1],
                )
                for i in range(batch)
            ]
        )

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return self._fold(self.forward, args, in_dims, info.batch_size), 0

    def _vmap_backward(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Per-example gradients: grad_bias is one per example, so each is a call of its own."""
        tensors, rest = args[:-3], args[-3:]
        calls = [
            self.backward(
                *(
                    t if t is None or dim is None else t.select(dim, i)
                    for t, dim in zip(tensors, in_dims[:-3], strict=True)
                ),
                *rest,
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0, 0)

    # dispatch -------------------------------------------------------------------------------

    def apply(self, x: Tensor, *rest: Any) -> Tensor:
        """Run the op by the road that the caller's context needs."""
        try:
            *storage, bias, residual, activation = rest
            device_type = x.device.type
            if torch.is_autocast_enabled(device_type):  # storage keeps its own dtypes
                x, bias, residual = autocast(device_type, x, bias, residual)  # type: ignore[assignment]
                rest = (*storage, bias, residual, activation)
            if torch.compiler.is_compiling():
                return self.forward(x, *rest)
            # Under functorch `requires_grad` of the wrapped tensors says nothing: ask this first.
            if torch._C._are_functorch_transforms_active():
                return self._functorch.apply(x, *rest)  # type: ignore[attr-defined, no-any-return]
            if torch.is_grad_enabled():
                for t in storage:
                    if t is not None and t.requires_grad:
                        self._refuse(tuple(t is not None and t.requires_grad for t in storage))
                if (
                    x.requires_grad
                    or (bias is not None and bias.requires_grad)
                    or (residual is not None and residual.requires_grad)
                ):
                    return self._eager.apply(x, *rest)  # type: ignore[attr-defined, no-any-return]
            with torch._C._AutoDispatchBelowAutograd():
                return self.forward(x, *rest)
        except (RuntimeError, AttributeError, TypeError):
            # The kernel checks its arguments; only a refused call pays for naming what is wrong.
            if not torch.compiler.is_compiling():
                names = ("x", *self.storage, "bias", "residual")
                checks.tensors(**dict(zip(names, (x, *rest[:-1]), strict=True)))
                self.check(x, *rest)
            raise


def check_call(
    x: Tensor,
    n: int,
    k: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Checks of everything but the storage; raise naming argument, expected and given."""
    act.check_name(activation, gated=False)
    checks.floating("x", x, dtypes)
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"x: expected shape [.., {k}] for a weight of [{n}, {k}]; got {list(x.shape)}"
        )
    if bias is not None:
        checks.shape("bias", bias, [n])
        checks.like("bias", bias, x)
    if residual is not None:
        checks.shape("residual", residual, [*x.shape[:-1], n])
        checks.like("residual", residual, x)


def explain(
    name: str, x: Tensor, device: str | None, choose: Callable[..., tuple[str, str]] | None
) -> backend.Explanation:
    """Which kernel serves: `choose()` is the extension's own decision, None where it is absent."""
    target = device or ("cpu" if x.device.type == "meta" else x.device.type)
    if target != "cpu":
        reason = f"{name} has no GPU kernel yet; plain torch serves"
        return backend.Explanation(name, f"reference.{name}", reason)
    if choose is None:
        return backend.Explanation(name, f"reference.{name}", backend.extension_error)
    return backend.Explanation(name, *choose())
