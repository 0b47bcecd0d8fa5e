"""SparseLinear: a sparse weight of any pattern, stored as int8, bfloat16 or float32 values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigops.formats import checks, quantize
from bigops.formats.base import Format
from bigops.formats.patterns import Criterion, Pattern, magnitude
from bigops.formats.sparse import VALUES, SparseWeight
from bigops.formats.sparse24 import check_blocks, uneven
from bigops.formats.sparse_layout import chunk_rows
from bigops.nn.compressed_linear import CompressedLinear, wants_gradient
from bigops.nn.fields import COMPRESSED, FLAG, SIZE, TEXT, left_out
from bigops.ops.choice import Choice
from bigops.ops.family import op_of
from bigops.ops.fused_linear import fused_linear
from bigops.ops.library import is_autocast_on
from bigops.ops.sparse_linear import forms, sparse_linear

SPARSITY = 0.8  # where none is given and the pattern does not say it


class SparseLinear(CompressedLinear):
    """``act(x @ weight.T + bias) + residual``, most of the weight gone.

    Three states:

    - Recovery: a float ``weight`` [N, K] and the pattern ``mask``, bool, one entry a block. The
      forward pass uses ``weight * mask`` (rounded to ``values`` with a straight-through gradient),
      dense, so the gradient stays on the pattern; in eval with gradients off the sparse kernel
      runs, on storage that each call makes anew (the speed comes with `freeze`). For fine-tuning
      right after pruning, with the optimiser of the layer that it replaces, and for int8, whose
      rounding is trained through. Of "2:4t" with values "bf16" and x bfloat16,
      where sparse tensor cores serve, the weight is packed anew in every step and forward and
      gradients run on it; N and K divide by 4.
    - Frozen (`freeze`): the tensors ``values``, ``index``, ``rows``, ``length``, ``ptr``,
      ``scale`` and ``sums``, whose layout `bigops.formats.sparse` describes. For inference,
      and under adapters that are trained around it: x has a gradient, the weight has none. On a
      GPU a second form is made on first use and kept beside them (`nbytes` counts it): of
      2:4 that of the sparse tensor cores, of other patterns with floating values a bitmap for up
      to 16 rows, if it is fewer bytes. `load_state_dict`, `.to()`, `thaw` and `freeze` drop it; it
      does not follow what is written into them in place.
    - Thawed (`thaw`, from frozen, floating values only): ``values`` is a Parameter. Forward and
      backward run the sparse kernels; gradient and optimiser state have the size of what is
      stored; padding counts as 0, whatever writes it. For long training at a fixed pattern, where
      the dense weight does not fit or its product costs too much.

    Args:
        in_features: K.
        out_features: N.
        sparsity: share of the blocks that goes, 0 <= sparsity < 1; the smallest L2 norms go. None:
            0.8, or what an N:M pattern says.
        pattern: "1x4" (rows x columns of a block), "1x1" for single entries, "2:4" for N:M, "2:4t"
            for 2:4 along rows and columns at once, which GPUs can train sparse.
        values: "int8" (activations are then quantised), "bf16" (the product is in bf16, x of
            another dtype is cast there and back, outside autocast) or "fp32".
        bias: whether the layer has a bias [N].
        activation: none, relu, relu2, gelu, gelu_tanh, silu, sigmoid or tanh.
        chunk: rows of a chunk of the storage, 64, 128 or 256; None chooses by N.
        activations: "dynamic": with int8 values each row of x becomes u8 with its own qparams.
            "static": all with those of the buffer ``x_qparams``, which `calibrate` fills.

    Shapes: x [.., K] float32, bfloat16 or float16, or uint8 on ``x_qparams``; residual [.., N] or
    None; result [.., N] in x's dtype, of a uint8 x in that of bias, else of residual, else float32.

    Raises:
        ValueError: unknown activation, pattern or values, sparsity out of range, a size below 0,
            or activations that the values do not take.
    """

    FIELDS = COMPRESSED | {
        "pattern": TEXT,
        "values": TEXT,
        "chunk": SIZE,
        "thawed": FLAG,
        "activations": left_out(TEXT),
    }
    pattern: Pattern
    mask: Tensor
    values: Tensor  # once frozen

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sparsity: float | None = None,
        pattern: str = "1x4",
        values: str = "int8",
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        chunk: int | None = None,
        activations: str = "dynamic",
    ) -> None:
        self.pattern = Pattern.parse(pattern)
        sparsity = check_sparsity(sparsity, self.pattern)
        sizes = (in_features, out_features, bias, activation, device, dtype)
        super().__init__(SparseWeight, *sizes, values=values, chunk=chunk, activations=activations)
        self.stored = values
        self.chunk: int = self.form["chunk"] or chunk_rows(out_features)
        self._gpu_form: Format | None = None
        self._inside: Tensor | None = None  # thawed: which values stand for an entry
        if self.weight.is_meta:
            shape = self.pattern.mask_shape(out_features, in_features)
            mask = torch.empty(shape, dtype=torch.bool, device="meta")
        else:
            mask = self.pattern.mask(self.weight, sparsity)
        self.register_buffer("mask", mask)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        linear: nn.Module,
        sparsity: float | None = None,
        pattern: str = "1x4",
        values: str = "int8",
        activation: str | None = None,
        mask: Tensor | None = None,
        activations: str = "dynamic",
        criterion: Criterion = magnitude,
    ) -> SparseLinear:
        """A layer in recovery state that shares the Parameter objects of ``linear``.

        The values outside the pattern are left in the weight and masked in every use; what
        `freeze()` stores has no trace of them. ``criterion`` chooses what stays. A ``mask`` of the
        caller's, one entry a block, takes its place; for "2:4t" it keeps two entries in each row
        and column of every 4 x 4 block. What the pattern of a `SparseLinear` dropped does not come
        back by a new choice.

        Raises:
            TypeError: ``linear`` is no `nn.Linear` and no compressed layer.
            ValueError: ``linear`` is frozen or thawed, sparsity out of range, a mask of another
                shape, NaN or inf in the weight, or a pattern whose blocks would bring back entries
                that the pattern of ``linear`` dropped.
        """
        new = cls._beside(
            linear,
            activation,
            sparsity=sparsity,
            pattern=pattern,
            values=values,
            activations=activations,
        )
        if mask is None:
            sparsity = check_sparsity(sparsity, new.pattern)
            if isinstance(linear, SparseLinear):
                mask = _narrowed(linear, new.pattern, sparsity, criterion)
            else:
                mask = criterion(new.weight, new.pattern, sparsity)
        elif mask.dtype != torch.bool or mask.shape != new.mask.shape:
            raise ValueError(
                f"mask: expected bool of shape {list(new.mask.shape)}; got {mask.dtype} of "
                f"{list(mask.shape)}"
            )
        if new.pattern.transposable and not uneven(mask):
            check_blocks(mask)
        new.mask = mask
        return new

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> SparseLinear:
        """An empty layer on "meta" as `arguments()` describes it, to be loaded."""
        new = super().from_arguments(arguments)
        return new.thaw() if arguments["thawed"] else new

    def empty_storage(self) -> SparseWeight:
        shape = (self.out_features, self.in_features)
        return SparseWeight.empty(*shape, VALUES[self.stored], self.chunk)

    def make_storage(self) -> SparseWeight:
        if self.thawed:
            storage = self.storage()
            if not bool(torch.isfinite(storage.values).all()):
                raise ValueError("values: expected finite values; got NaN or inf")
            return storage
        self.check_calibrated()
        block = (self.pattern.height, self.pattern.width)
        return SparseWeight.from_mask(
            self.weight, self.mask, VALUES[self.stored], block, self.chunk
        )

    def check_storage(self, storage: Format) -> None:
        values = storage.tensors()["values"]
        if values is not None and values.dtype != VALUES[self.stored]:
            raise TypeError(
                f"values: expected dtype {self.stored} as the layer has; got {values.dtype}"
            )
        super().check_storage(storage)

    def masked_weight(self) -> Tensor:
        """``weight * mask`` [N, K], differentiable (recovery state only)."""
        n, k = self.out_features, self.in_features
        height, width = self.pattern.height, self.pattern.width
        if n % height or k % width or not n * k:
            return self.weight * self.pattern.expand(self.mask, n, k)
        blocks = self.weight.reshape(n // height, height, k // width, width)
        return (blocks * self.mask[:, None, :, None]).view(n, k)

    def trained_weight(self) -> Tensor:
        weight = self.masked_weight()
        kept = self.stored == "fp32"
        if kept or (isinstance(weight, Tensor) and weight.dtype == VALUES[self.stored]):
            return weight
        return self._straight_through(weight)

    def run_trained(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if not (
            self.pattern.transposable
            and self.stored == "bf16"
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
            and forms.trains_packed(x, self.weight)
        ):
            return super().run_trained(x, residual)
        weight = forms.packed(self.weight, self.mask)
        return sparse_linear(x, weight, self.bias, residual, self.activation)

    def run(self, x: Tensor, arguments: tuple[Any, ...], residual: Tensor | None) -> Tensor:
        proxy = not isinstance(x, Tensor)  # of torch.fx, which answers no question
        if not proxy and x.is_cuda and (form := self._second_form(x, residual)) is not None:
            op = op_of(type(form))
            return op.run(x, form.arguments, form.k, self.bias, residual, self.activation)
        bias, low = self.bias, torch.bfloat16
        if self.x_qparams is not None:
            if isinstance(x, Tensor) and wants_gradient(x, bias, residual):
                return self._static_with_gradient(x, self.storage(), residual)
            weight = SparseWeight.of(self.in_features, *arguments)
            return sparse_linear(
                x, weight, bias, residual, self.activation, x_qparams=self.x_qparams
            )
        served = self.stored != "bf16" or (not proxy and x.dtype == low)
        if served or (not proxy and is_autocast_on(x)):  # autocast casts by itself
            return super().run(x, arguments, residual)
        bias = None if bias is None else bias.to(low)
        y = self.op.run(x.to(low), arguments, self.in_features, bias, None, self.activation).to(
            x.dtype
        )
        if residual is None:
            return y
        checks.shape("residual", residual, list(y.shape))
        checks.like("residual", residual, x)
        return y + residual  # in x's dtype: a residual stream keeps its precision

    def _arguments(self) -> tuple[Any, ...]:
        return self.storage().arguments if self.thawed else super()._arguments()  # type: ignore[no-any-return]

    def explain(self, x: Tensor) -> Choice:
        bias = self.bias
        if self.stored == "bf16":  # the layer casts x there and back
            x, bias = x.to(torch.bfloat16), None if bias is None else bias.to(torch.bfloat16)
        return self.op.explain(x, self.storage(), bias, activation=self.activation)

    def _second_form(self, x: Tensor, residual: Tensor | None) -> Format | None:
        """The frozen weight in the form that the op wants for a call on x, made once."""
        fits = self.frozen and not self.thawed and self.x_qparams is None
        if not fits or torch.compiler.is_compiling() or wants_gradient(x, self.bias, residual):
            return None
        pattern, stored = self.pattern, VALUES[self.stored]
        form = forms.wanted(x, stored, (pattern.n, pattern.m) == (2, 4))
        if form is None:
            return None
        self._gpu_form = self._gpu_form or forms.converted(self.storage(), form)
        return self._gpu_form

    def _static_with_gradient(self, x: Tensor, storage: Any, residual: Tensor | None) -> Tensor:
        """The numbers of the static kernel by a dense product, straight through its rounding."""
        assert self.x_qparams is not None
        dtype = x.dtype
        if is_autocast_on(x):
            dtype = torch.get_autocast_dtype(x.device.type)
        rows = quantize.act_quant(x.detach().to(dtype), "static", self.x_qparams)
        seen = (rows.q - rows.zero_point) * rows.scale
        seen = seen + (x.float() - x.detach().float())
        bias, add = (None if t is None else t.to(dtype).float() for t in (self.bias, residual))
        on = is_autocast_on(x)  # some devices have none
        with torch.autocast(x.device.type, enabled=False) if on else contextlib.nullcontext():
            weight = storage.to_dense()
            return fused_linear(seen, weight, bias, add, self.activation).to(dtype)

    # --- the second form on a GPU ---------------------------------------------------------------

    @property
    def gpu_nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the second form on a GPU, 0 where there is none."""
        form = self._gpu_form
        return 0 if form is None or isinstance(form, SparseWeight) else form.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of parameters, buffers and the second form on a GPU."""
        return super().nbytes + self.gpu_nbytes

    def set_storage(self, storage: Any) -> None:
        self._forget()
        super().set_storage(storage)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _forget(self) -> None:
        """Drop what was made of the frozen storage."""
        self._gpu_form = self._inside = None

    def __getstate__(self) -> dict[str, Any]:
        # pickle, copy and deepcopy all come by here
        return {**self.__dict__, "_gpu_form": None, "_inside": None}

    # --- training on the stored values ------------------------------------------------------

    def storage(self) -> Any:
        """The compressed weight; of a thawed layer its padding is 0, whatever wrote the values."""
        storage = super().storage()
        if not self.thawed:
            return storage
        inside = self._inside
        if inside is None or inside.device != storage.values.device:
            with torch.no_grad():
                inside = storage.inside()
            if not torch.compiler.is_compiling():
                self._inside = inside
        return storage.replace(values=storage.values.where(inside, 0))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # a rank does not know the padding in its shard
        sharded = hasattr(self._parameters.get("values"), "device_mesh")
        if self.thawed and not self.values.is_meta and not sharded:
            values = self.storage().values
            if not torch.equal(values, self.values):  # padding was written, which no file may hold
                destination[prefix + "values"] = values if keep_vars else values.detach()

    def thaw(self) -> SparseLinear:
        """Make the stored values of a frozen layer trainable, in place; twice is once.

        The gradient is on the stored positions only. With bfloat16 values these are pairs of
        neighbours: an entry that was pruned beside one that was kept is trained too.

        Raises:
            ValueError: the layer is not frozen, or stores int8.
        """
        if not self.frozen:
            raise ValueError("thaw: expected a frozen layer (freeze() makes it one)")
        if self.stored == "int8":
            raise ValueError(
                "thaw: expected floating values; got int8 (train in recovery state, or store "
                "values='fp32')"
            )
        if not self.thawed:
            self._forget()
            values = self.values.data
            if values.is_inference():  # loaded under inference_mode: it could not be trained
                values = values.clone()
            parameters = {**self._parameters, "values": nn.Parameter(values)}
            vars(self).update(_parameters=parameters, thawed=True)
        return self

    @property
    def density(self) -> float:
        """Share of the entries that are stored (recovery: of the blocks that are kept)."""
        if self.frozen:
            return float(self.storage().density)
        return float(self.mask.float().mean()) if self.mask.numel() else 1.0

    def picture(self) -> str | None:
        return str(self.storage().picture())

    def arguments(self) -> dict[str, Any]:
        given = super().arguments()
        if self.activations == "dynamic":
            del given["activations"]  # left out, older files and versions read each other
        return {
            **given,
            "pattern": str(self.pattern),
            "chunk": self.chunk,
            "thawed": self.thawed,
        }

    def extra_repr(self) -> str:
        known = (
            ""
            if any(t is not None and t.is_meta for t in (*self.parameters(), *self.buffers()))
            else (f", density={self.density:.3f}")
        )
        static = ", activations=static" if self.activations == "static" else ""
        return (
            f"{super().extra_repr()}, pattern={self.pattern}, values={self.stored}{static}{known}"
        )


def _narrowed(old: SparseLinear, pattern: Pattern, sparsity: float, criterion: Criterion) -> Tensor:
    """The mask of a new pattern for a layer that has one; what that dropped does not come back.

    The dropped entries still stand in the shared weight, so a block that holds one cannot stay.
    """
    n, k = old.weight.shape
    mask = criterion(old.masked_weight(), pattern, sparsity)
    if pattern == old.pattern:
        return mask & old.mask
    kept = old.pattern.expand(old.mask, n, k)
    if (pattern.height, pattern.width) == (1, 1):
        return mask & kept
    if bool((pattern.expand(mask, n, k) & ~kept).any()):
        raise ValueError(
            f"pattern: expected {old.pattern}, which the layer has, or one of single entries; got "
            f"{pattern}, whose blocks would bring back what was dropped"
        )
    return mask


def check_sparsity(sparsity: float | None, pattern: Pattern) -> float:
    """The sparsity that is meant; raise ValueError unless 0 <= sparsity < 1 and N:M agrees."""
    if sparsity is not None and not isinstance(sparsity, int | float):
        raise TypeError(f"sparsity: expected a float; got {type(sparsity).__name__}")
    if pattern.m:
        implied = 1 - pattern.n / pattern.m
        if sparsity is not None and abs(sparsity - implied) > 1e-9:
            raise ValueError(
                f"sparsity: expected {implied:g} or None for {pattern}; got {sparsity}"
            )
        return implied
    if sparsity is None:
        return SPARSITY
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: expected 0 <= sparsity < 1; got {sparsity}")
    return sparsity
