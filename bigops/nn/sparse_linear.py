"""SparseLinear: a sparse weight of any pattern, stored as int8, bfloat16 or float32 values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigops.formats import checks, quantize
from bigops.formats.bitmap import BitmapWeight
from bigops.formats.patterns import Pattern
from bigops.formats.sparse import SparseWeight
from bigops.formats.sparse24 import Sparse24Weight, check_blocks, uneven
from bigops.formats.sparse_layout import CHUNKS, chunk_rows
from bigops.nn.compressed_linear import STATES, CompressedLinear, check_source, wants_gradient
from bigops.nn.quant_linear import straight_through
from bigops.nn.sparse_packs import Packed24, as_bitmap, compressed
from bigops.ops.fused_linear import fused_linear
from bigops.ops.sparse_linear import bitmap, sparse24, sparse_linear
from bigops.ops.sparse_linear import cuda as decode
from bigops.ops.sparse_linear import sparse24_pack as packing

VALUES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}
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
    - Frozen (`freeze`): the buffers ``values``, ``index``, ``rows``, ``length``, ``ptr``,
      ``scale`` and ``sums``, whose layout `bigops.formats.sparse` describes. For inference,
      and under adapters that are trained around it: x has a gradient, the weight has none. On a
      GPU a second form is made on first use and kept beside the buffers (`nbytes` counts it): of
      2:4 that of the sparse tensor cores, of other patterns with floating values a bitmap for up
      to 16 rows, if it is fewer bytes. `load_state_dict`, `.to()`, `thaw` and `freeze` drop it; it
      does not follow what is written into the buffers in place.
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
        activations: "dynamic": with int8 values each row of x becomes u8 with its own grid.
            "static": all with that of the buffer ``x_grid``, which `calibrate` fills.

    Shapes: x [.., K] float32, bfloat16 or float16, or uint8 on ``x_grid``; residual [.., N] or
    None; result [.., N] in x's dtype, of a uint8 x in that of bias, else of residual, else float32.

    Raises:
        ValueError: unknown activation, pattern or values, sparsity out of range, a size below 0,
            or activations that the values do not take.
    """

    storage_names = SparseWeight.TENSORS
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
        super().__init__(in_features, out_features, activation)
        self.pattern = Pattern.parse(pattern)
        sparsity = check_sparsity(sparsity, self.pattern)
        self.stored = check_values(values)
        self.activations = check_activations(activations, values)
        self._gpu_form: SparseWeight | Sparse24Weight | BitmapWeight | None = None
        self._inside: Tensor | None = None  # thawed: which values stand for an entry
        self.chunk = chunk_rows(out_features) if chunk is None else chunk
        if self.chunk not in CHUNKS:
            raise ValueError(f"chunk: expected 64, 128 or 256; got {chunk}")
        source = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight, self.bias = source.weight, source.bias
        if self.weight.is_meta:
            shape = self.pattern.mask_shape(out_features, in_features)
            mask = torch.empty(shape, dtype=torch.bool, device="meta")
        else:
            mask = self.pattern.mask(self.weight, sparsity)
        self.register_buffer("mask", mask)
        empty = torch.zeros(2, device=device) if activations == "static" else None
        self.register_buffer("x_grid", empty)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        sparsity: float | None = None,
        pattern: str = "1x4",
        values: str = "int8",
        activation: str | None = None,
        mask: Tensor | None = None,
        activations: str = "dynamic",
    ) -> SparseLinear:
        """A layer in recovery state that shares the Parameter objects of ``linear``.

        The values outside the pattern are left in the weight and masked in every use; what
        `freeze()` stores has no trace of them. A ``mask`` of the caller's, one entry a block,
        takes the place of the choice by size; for "2:4t" it keeps two entries in each row and
        column of every 4 x 4 block. What the pattern of a `SparseLinear` dropped does not come back
        by a new choice.

        Raises:
            TypeError: ``linear`` is no `nn.Linear` and no compressed layer.
            ValueError: ``linear`` is frozen or thawed, sparsity out of range, a mask of another
                shape, NaN or inf in the weight, or a pattern whose blocks would bring back entries
                that the pattern of ``linear`` dropped.
        """
        source = check_source(linear)
        name = source.activation if activation is None else activation
        new = cls(
            source.in_features, source.out_features, sparsity, pattern, values, False, name, "meta",
            activations=activations,
        )  # fmt: skip
        if new.x_grid is not None:
            new.x_grid = torch.zeros(2, device=source.weight.device)
        if mask is None:
            sparsity = check_sparsity(sparsity, new.pattern)
            if isinstance(linear, SparseLinear):
                mask = _narrowed(linear, new.pattern, sparsity)
            else:
                mask = new.pattern.mask(source.weight, sparsity)
        elif mask.dtype != torch.bool or mask.shape != new.mask.shape:
            raise ValueError(
                f"mask: expected bool of shape {list(new.mask.shape)}; got {mask.dtype} of "
                f"{list(mask.shape)}"
            )
        if new.pattern.transposable and not uneven(mask):
            check_blocks(mask)
        new.weight, new.bias = source.weight, source.bias
        new.mask = mask
        return new.train(linear.training)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> SparseLinear:
        """An empty layer on "meta" as `arguments()` describes it, to be loaded."""
        frozen, thawed = arguments["frozen"], arguments["thawed"]
        new = cls(**{k: v for k, v in arguments.items() if k not in STATES}, device="meta")
        if frozen:
            shape = (new.out_features, new.in_features)
            new.set_storage(SparseWeight.empty(*shape, VALUES[new.stored], new.chunk))
        return new.thaw() if thawed else new

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

    def make_frozen(self, tensors: dict[str, Any]) -> SparseWeight:
        return SparseWeight(**tensors, n=self.out_features, k=self.in_features, chunk=self.chunk)

    def check_storage(self, storage: Any) -> None:
        if storage.values is not None and storage.values.dtype != VALUES[self.stored]:
            raise TypeError(
                f"values: expected dtype {self.stored} as the layer has; got {storage.values.dtype}"
            )
        super().check_storage(storage)

    def masked_weight(self) -> Tensor:
        """``weight * mask`` [N, K], differentiable (recovery state only)."""
        n, k = self.weight.shape
        height, width = self.pattern.height, self.pattern.width
        if n % height or k % width or not self.weight.numel():
            return self.weight * self.pattern.expand(self.mask, n, k)
        blocks = self.weight.reshape(n // height, height, k // width, width)
        return (blocks * self.mask[:, None, :, None]).view(n, k)

    def trained_weight(self) -> Tensor:
        weight = self.masked_weight()
        if self.stored == "int8":
            return straight_through(weight)
        if self.stored == "bf16" and weight.dtype != torch.bfloat16:
            rounded = weight.detach().to(torch.bfloat16).to(weight.dtype)
            return rounded + (weight - weight.detach())
        return weight

    def run_trained(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if not self._trains_on_sparse_tensor_cores(x):
            return super().run_trained(x, residual)
        values, meta, meta_t = Packed24.apply(self.weight, self.mask)
        weight = Sparse24Weight(values, meta, None, None, meta_t, self.in_features)
        return sparse_linear(x, weight, self.bias, residual, self.activation)

    def _trains_on_sparse_tensor_cores(self, x: Tensor) -> bool:
        """Whether forward and backward run on a pack of the masked weight."""
        if not (self.pattern.transposable and self.stored == "bf16" and x.is_floating_point()):
            return False
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        kind, low = x.device.type, torch.bfloat16
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return (
            dtype == low
            and not uneven(self.weight)
            and x.shape[-1:] == self.weight.shape[1:]  # else the other road says what is wrong
            and sparse24.serves(low, self.in_features, x.device)
            and packing.serves(self.weight, low)
        )

    def run(self, x: Tensor, storage: Any, residual: Tensor | None) -> Tensor:
        if self._on_sparse_tensor_cores(x, storage, residual):
            storage = self._gpu_form = self._gpu_form or compressed(storage) or storage
        elif self._decodes_bitmaps(x, storage, residual):
            storage = self._gpu_form = self._gpu_form or as_bitmap(storage) or storage
        bias, low = self.bias, torch.bfloat16
        if self.x_grid is not None:
            if wants_gradient(x, bias, residual):
                return self._static_with_gradient(x, storage, residual)
            return sparse_linear(x, storage, bias, residual, self.activation, x_grid=self.x_grid)
        served = storage.values.dtype != low or x.dtype == low
        if served or torch.is_autocast_enabled(x.device.type):  # autocast casts by itself
            return sparse_linear(x, storage, bias, residual, self.activation)
        bias = None if bias is None else bias.to(low)
        y = sparse_linear(x.to(low), storage, bias, None, self.activation).to(x.dtype)
        if residual is None:
            return y
        checks.shape("residual", residual, list(y.shape))
        checks.like("residual", residual, x)
        return y + residual  # in x's dtype: a residual stream keeps its precision

    def _on_sparse_tensor_cores(self, x: Tensor, storage: Any, residual: Tensor | None) -> bool:
        """Whether a frozen 2:4 weight is packed for the sparse tensor cores of x's device.

        The few rows of a decode step stay with the kernel for them, which divides K among blocks.
        """
        return (
            (self.pattern.n, self.pattern.m) == (2, 4)
            and self.frozen
            and not self.thawed
            and self.stored != "fp32"
            and self.x_grid is None
            and x.shape[:-1].numel() > decode.MAX_ROWS
            and not torch.compiler.is_compiling()
            and not wants_gradient(x, self.bias, residual)
            and sparse24.serves(storage.values.dtype, self.in_features, x.device)
        )

    def _decodes_bitmaps(self, x: Tensor, storage: Any, residual: Tensor | None) -> bool:
        """Whether a frozen floating weight may be kept as a bitmap for a decode step on a GPU.

        Of 2:4 the form that is kept is the one for sparse tensor cores.
        """
        return (
            (self.pattern.n, self.pattern.m) != (2, 4)
            and self.frozen
            and not self.thawed
            and self.x_grid is None
            and x.dtype == storage.values.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
            and not wants_gradient(x, self.bias, residual)
            and bitmap.serves(x.shape[:-1].numel(), x.device)
        )

    def _static_with_gradient(self, x: Tensor, storage: Any, residual: Tensor | None) -> Tensor:
        """The numbers of the static kernel by a dense product, straight through its rounding."""
        assert self.x_grid is not None
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        rows = quantize.quantize_rows(x.detach().to(dtype), "static", self.x_grid)
        seen = (rows.q - rows.zero_point) * rows.scale
        seen = seen + (x.float() - x.detach().float())
        bias, add = (None if t is None else t.to(dtype).float() for t in (self.bias, residual))
        with torch.autocast(x.device.type, enabled=False):
            weight = storage.to_dense()
            return fused_linear(seen, weight, bias, add, self.activation).to(dtype)

    # --- the second form on a GPU ---------------------------------------------------------------

    @property
    def gpu_nbytes(self) -> int:
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
        """Drop what was made of the frozen buffers."""
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
        if self.thawed and not self.values.is_meta:
            values = self.storage().values
            if not torch.equal(values, self.values):  # padding was written, which no file may hold
                destination[prefix + "values"] = values if keep_vars else values.detach()

    @property
    def thawed(self) -> bool:
        """Whether ``values`` is a Parameter."""
        return "values" in self._parameters

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
            values = self._buffers.pop("values")
            assert values is not None
            if values.is_inference():  # loaded under inference_mode: it could not be trained
                values = values.clone()
            self.register_parameter("values", nn.Parameter(values))
        return self

    @property
    def density(self) -> float:
        """Share of the entries that are stored (recovery: of the blocks that are kept)."""
        if self.frozen:
            return float(self.storage().density)
        return float(self.mask.float().mean()) if self.mask.numel() else 1.0

    def arguments(self) -> dict[str, Any]:
        static = {"activations": "static"} if self.activations == "static" else {}
        return {
            **super().arguments(),
            "pattern": str(self.pattern),
            "values": self.stored,
            "chunk": self.chunk,
            "thawed": self.thawed,
            **static,  # left out, older files and versions read each other
        }

    def extra_repr(self) -> str:
        known = "" if any(t is not None and t.is_meta for t in self.buffers()) else (
            f", density={self.density:.3f}"
        )  # fmt: skip
        static = ", activations=static" if self.activations == "static" else ""
        return (
            f"{super().extra_repr()}, pattern={self.pattern}, values={self.stored}{static}{known}"
        )


def _narrowed(old: SparseLinear, pattern: Pattern, sparsity: float) -> Tensor:
    """The mask of a new pattern for a layer that has one; what that dropped does not come back.

    The dropped entries still stand in the shared weight, so a block that holds one cannot stay.
    """
    n, k = old.weight.shape
    mask = pattern.mask(old.masked_weight(), sparsity)
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


def check_values(values: str) -> str:
    """Raise ValueError unless ``values`` names a dtype that can be stored."""
    if not isinstance(values, str) or values not in VALUES:
        raise ValueError(f"values: expected {', '.join(VALUES)}; got {values!r}")
    return values


def check_activations(activations: str, values: str) -> str:
    """Raise ValueError unless the product can do this with x."""
    if activations not in ("dynamic", "static"):
        raise ValueError(f"activations: expected dynamic or static; got {activations!r}")
    if activations == "static" and values != "int8":
        raise ValueError(f"activations: expected 'dynamic' with values {values!r}; got 'static'")
    return activations
