"""Autograd, vmap and fake roads shared by the linear ops whose weight is compressed storage.

Such an op takes ``(x, *storage, *sizes, bias, residual, activation)``: tensors of the storage
first, then plain numbers and words, which the kernels and all of autograd see as codes
(`library.define`). Its backward op takes ``(grad, x, *storage, *sizes, bias, activation,
need_x, need_bias)`` and gives ``(grad_x, grad_bias)``; where the stored values can be trained it
takes ``need_values`` besides and gives ``(grad_x, grad_values, grad_bias)``. The other storage has
no gradient. Where the forward rounds its activations, the gradient is the straight-through one:
that of the dequantised weight, taken at the pre-activation which the forward saw (Bengio et al.
2013, arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.backend import machine
from bigops.formats import checks
from bigops.ops import activation as act
from bigops.ops.explain import Explanation
from bigops.ops.library import autocast, define, encoder, in_words, register


class Arguments(NamedTuple):
    """The arguments of a forward call, by kind."""

    x: Tensor
    storage: tuple[Tensor | None, ...]
    sizes: tuple[Any, ...]
    bias: Tensor | None
    residual: Tensor | None
    activation: str | int


class FrozenLinear:
    """Defines one such op and its backward in the library, and applies it.

    Args:
        name: name of the op.
        schema: schema of the storage and size arguments, such as ``"Tensor weight, int n"``.
        reference: the meaning in plain torch, with the signature of the op.
        dense: ``dense(x, *storage, *sizes) -> [N, K]`` float32, the dequantised weight,
            differentiable for floating values.
        check: raises ValueError or TypeError; the signature of the op.
        rounds: ``rounds(*storage, *sizes)``: whether the forward quantises its activations.
        sample: ``sample(g, x, *storage, *sizes)``: the entries of a matrix ``g`` [N, K] at the
            stored positions, in the shape and dtype of the first storage tensor, 0 where it only
            pads; None where values have no gradient.
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
        sample: Callable[..., Tensor] | None = None,
    ) -> None:
        self.name, self.schema = name, schema
        parts = [part.split() for part in schema.split(",")]
        self.storage = tuple(part[-1] for part in parts if part[0].startswith("Tensor"))
        self.sizes = tuple(part[-1] for part in parts if not part[0].startswith("Tensor"))
        self.count = len(self.storage)
        self.fixed = len(parts)  # storage and sizes
        self.reference, self.dense, self.check, self.rounds = reference, dense, check, rounds
        self.sample = sample
        self.needs = ("need_x", "need_bias") if sample is None else (
            "need_x", "need_values", "need_bias"
        )  # fmt: skip
        self.forward = define(
            f"{name}(Tensor x, {schema}, Tensor? bias, Tensor? residual, str activation) -> Tensor",
            self._serve,
        )
        self.backward = define(
            f"{name}_backward(Tensor grad, Tensor x, {schema}, Tensor? bias, str activation, "
            + ", ".join(f"bool {need}" for need in self.needs)
            + ") -> ("
            + ", ".join("Tensor" for _ in self.needs)
            + ")",
            self._serve_backward,
        )
        self._encoded = encoder(self.forward)
        self._expression = in_words(self.backward, self.reference_backward)
        register(
            self.forward,
            fake=self._fake,
            backward=self._raw_backward,
            setup=self._setup,
            vmap=self._vmap,
        )
        register(
            self.backward,
            fake=self._fake_backward,
            backward=self._double_backward,
            setup=self._setup_backward,
            vmap=self._vmap_backward,
        )
        self._eager, self._functorch = self._functions()

    def split(self, args: tuple[Any, ...]) -> Arguments:
        """The arguments of the op by kind."""
        return Arguments(
            args[0], args[1 : 1 + self.count], args[1 + self.count : 1 + self.fixed], *args[-3:]
        )

    # reference ------------------------------------------------------------------------------

    def _serve(self, *args: Any) -> Tensor:
        self.check(*args)
        backend.note(f"reference.{self.name}")
        with _as_given(args[0]):
            return self.reference(*args)

    def _serve_backward(self, *args: Any) -> tuple[Tensor, ...]:
        backend.note(f"reference.{self.name}_backward")
        with _as_given(args[0]):
            found = self.reference_backward(*args)
        return tuple(args[0].new_empty(0) if g is None else g for g in found)  # none is another's

    def reference_backward(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        """The results of the backward op as a differentiable expression; None where not needed."""
        fixed, (bias, activation, *needs) = rest[: self.fixed], rest[self.fixed :]
        need = dict(zip(self.needs, needs, strict=True))
        w = self.dense(x, *fixed)  # [N, K] float32
        gz = grad.float()
        if activation != "none":
            z = F.linear(x.float(), w, None if bias is None else bias.float())
            if self.rounds(*fixed):
                float_bias = None if bias is None else bias.float()
                seen = self.reference(x.float(), *fixed, float_bias, None, "none")
                z = z + (seen - z).detach()
            gz = act.epilogue_backward(activation, gz, z)
        gx = (gz @ w).to(x.dtype) if need["need_x"] else None
        rows = list(range(gz.dim() - 1))
        gb = (gz.sum(rows) if rows else gz).to(x.dtype) if need["need_bias"] else None
        if self.sample is None:
            return gx, gb
        gv = None
        if need["need_values"]:
            n, k = w.shape
            dense = gz.reshape(-1, n).t() @ x.float().reshape(-1, k) if n and k else w
            gv = self.sample(dense, x, *fixed)
        return gx, gv, gb

    # fake -----------------------------------------------------------------------------------

    def _fake(self, x: Tensor, *rest: Any) -> Tensor:
        self.check(x, *rest)
        return x.new_empty((*x.shape[:-1], self.rows(x, *rest[: self.fixed])))

    def _fake_backward(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        need = dict(zip(self.needs, rest[-len(self.needs) :], strict=True))
        gx = x.new_empty(x.shape if need["need_x"] else (0,))
        gb = x.new_empty((grad.shape[-1],) if need["need_bias"] else (0,))
        if self.sample is None:
            return gx, gb
        values = rest[0]
        gv = values.new_empty(values.shape) if need["need_values"] else x.new_empty((0,))
        return gx, gv, gb

    def rows(self, x: Tensor, *fixed: Any) -> int:
        """N, the number of output features."""
        raise AssertionError("each op says where its storage keeps N")

    # autograd -------------------------------------------------------------------------------

    def _refuse(self, storage: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> None:
        for place, (name, t, need) in enumerate(zip(self.storage, storage, needs, strict=True)):
            trainable = place == 0 and self.sample is not None
            if need and not (trainable and t is not None and t.is_floating_point()):
                what = "is frozen storage; train the dense weight and convert it anew"
                if self.sample is not None:
                    what += ", or train its floating-point values"
                raise ValueError(
                    f"{name}: expected a tensor that needs no gradient (the weight of {self.name} "
                    f"{what}); got one with requires_grad"
                )

    def _gradients(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs of the op: by the kernel, or as an expression."""
        x, *storage, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        self._refuse(tuple(storage), needs[1 : 1 + self.count])
        need = {"need_x": needs[0], "need_values": needs[1], "need_bias": needs[-3]}
        wanted = [need[name] for name in self.needs]
        args = (grad, x, *storage, *ctx.sizes, bias, ctx.activation, *wanted)
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if torch.is_grad_enabled():  # create_graph: the expression is differentiable again
            found = self._expression(*args)
        elif any(wanted):
            found = self.backward(*args)
        gx, *gv, gb = (g if w else None for g, w in zip(found, wanted, strict=True))
        nothing = (None,) * (self.fixed - len(gv))
        return (gx, *gv, *nothing, gb, grad if needs[-2] else None, None)

    def _save(self, ctx: Any, args: tuple[Any, ...]) -> None:
        x, storage, ctx.sizes, bias, _, ctx.activation = self.split(args)
        ctx.save_for_backward(x, *storage, bias)

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self._refuse(self.split(inputs).storage, ctx.needs_input_grad[1 : 1 + self.count])
        self._save(ctx, inputs)

    def _raw_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return self._gradients(ctx, grad)

    def _setup_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = 2 + self.count
        ctx.sizes = inputs[tensors : 2 + self.fixed]
        bias, *ctx.rest = inputs[2 + self.fixed :]
        ctx.save_for_backward(*inputs[:tensors], bias)

    def _double_backward(self, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Vector-Jacobian product of the raw backward op, through its differentiable form."""
        grad, x, *storage, bias = ctx.saved_tensors
        values = storage[0] if self.sample is not None else None
        if values is not None and not values.is_floating_point():
            values = None
        with torch.enable_grad():
            wanted: list[Any] = [
                t if t is None else t.detach().requires_grad_() for t in (grad, x, values, bias)
            ]
            if wanted[2] is not None:
                storage[0] = wanted[2]
            outputs = self._expression(*wanted[:2], *storage, *ctx.sizes, wanted[3], *ctx.rest)
            pairs = [(o, v) for o, v in zip(outputs, grads, strict=True) if o is not None]
            found = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    [t for t in wanted if t is not None],
                    [v for _, v in pairs],
                    allow_unused=True,
                )
            )
        ggrad, gx, gvalues, gbias = (None if t is None else next(found) for t in wanted)
        nothing = (None,) * (self.fixed - 1)
        return (ggrad, gx, gvalues, *nothing, gbias, *(None for _ in ctx.rest))

    def _functions(self) -> tuple[type, type]:
        """The eager Function (ctx form, 10 microseconds a call) and the one for torch.func."""
        road = self

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):  # type: ignore[no-untyped-def]
                road._save(ctx, args)
                with torch._C._AutoDispatchBelowAutograd():
                    return road.forward(*args)

            @staticmethod
            def backward(ctx, grad):  # type: ignore[no-untyped-def]
                return road._gradients(ctx, grad)

        class Functorch(torch.autograd.Function):
            # Each level lowers to the public road, so that levels nest (grad of vmap and back), and
            # takes words as that does.
            @staticmethod
            def forward(*args):  # type: ignore[no-untyped-def]
                return road.apply(*args)

            @staticmethod
            def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
                road._save(ctx, tuple(road._encoded(inputs)))

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
            return x.new_empty((0, *x.shape[1:-1], self.rows(args[0], *args[1 : 1 + self.fixed])))
        return torch.stack(
            [
                op(
                    x[i],
                    *_pick(args[1:-2], in_dims[1:-2], i),
                    None if residual is None else residual[i],
                    args[-1],
                )
                for i in range(batch)
            ]
        )

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return self._fold(self.forward, args, in_dims, info.batch_size), 0

    def _vmap_backward(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Per-example gradients: those of bias and values are one each, so each is its own call."""
        calls = [self.backward(*_pick(args, in_dims, i)) for i in range(info.batch_size)]
        outputs = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)

    # dispatch -------------------------------------------------------------------------------

    def apply(self, x: Tensor, *rest: Any) -> Tensor:
        """Run the op by the road that the caller's context needs."""
        try:
            device_type = x.device.type
            if torch.is_autocast_enabled(device_type):  # storage keeps its own dtypes
                x, bias, residual = autocast(device_type, x, *rest[-3:-1])  # type: ignore[assignment]
                rest = (*rest[:-3], bias, residual, rest[-1])
            if torch.compiler.is_compiling():
                return self.forward(*self._encoded((x, *rest)))
            # Under functorch `requires_grad` of the wrapped tensors says nothing: ask this first.
            if torch._C._are_functorch_transforms_active():
                return self._functorch.apply(x, *rest)  # type: ignore[attr-defined, no-any-return]
            coded = self._encoded((x, *rest))
            if torch.is_grad_enabled():
                storage = rest[: self.count]
                wants = [t is not None and t.requires_grad for t in storage]
                if any(wants):
                    self._refuse(storage, tuple(wants))
                wants += [t is not None and t.requires_grad for t in rest[-3:-1]]
                if x.requires_grad or any(wants):
                    return self._eager.apply(*coded)  # type: ignore[attr-defined, no-any-return]
            elif torch.is_inference_mode_enabled():  # autograd is out of the way already
                return self.forward(*coded)
            with torch._C._AutoDispatchBelowAutograd():
                return self.forward(*coded)
        except (RuntimeError, AttributeError, TypeError, KeyError):
            # The kernel checks its arguments; only a refused call pays for naming what is wrong.
            act.check_name(rest[-1], gated=False)
            if not torch.compiler.is_compiling():
                names = ("x", *self.storage, "bias", "residual")
                given = (x, *rest[: self.count], *rest[-3:-1])
                checks.tensors(**dict(zip(names, given, strict=True)))
                self.check(x, *rest)
            raise


def _as_given(x: Tensor) -> torch.autocast:
    """No autocast inside an op: it would round the products of a reference that holds float32."""
    return torch.autocast(x.device.type, enabled=False)


def _pick(args: tuple[Any, ...], dims: tuple[Any, ...], i: int) -> list[Any]:
    """Example ``i`` of each argument that is batched."""
    return [a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)]


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
) -> Explanation:
    """Which kernel serves: `choose()` is the extension's own decision, None where it is absent."""
    target = device or ("cpu" if x.device.type == "meta" else x.device.type)
    if target != "cpu":
        reason = f"{name} has no GPU kernel yet; plain torch serves"
        return Explanation(name, f"reference.{name}", reason)
    if choose is None:
        return Explanation(name, f"reference.{name}", machine.extension_error)
    return Explanation(name, *choose())
