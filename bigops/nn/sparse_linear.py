"""SparseLinear: weight in 1x4 blocks, of int8 or float32 values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigops.nn.compressed_linear import CompressedLinear, check_source
from bigops.nn.quant_linear import straight_through
from bigops.ops.sparse_linear import (
    BLOCK,
    SparseWeight,
    block_mask,
    panels,
    sparse_linear,
    sparsify_weight,
)


class SparseLinear(CompressedLinear):
    """``act(x @ weight.T + bias) + residual``, most 1x4 blocks of the weight gone.

    Recovery state: a float ``weight`` [N, K] and the pattern ``mask`` bool [N, ceil(K / 4)]. The
    forward pass uses ``weight * mask`` (rounded to int8 with a straight-through gradient where
    ``int8``), so the gradient stays on the pattern; in eval with gradients off the sparse kernel
    runs. `freeze()` leaves the buffers ``values``, ``index``, ``panel_ptr`` and ``scale``, whose
    layout `bigops.ops.sparse_linear` describes.

    Args:
        in_features: K.
        out_features: N.
        sparsity: share of the blocks that goes, 0 <= sparsity < 1; the smallest L2 norms go.
        int8: whether the values are stored as int8 (activations are then quantised per token).
        bias: whether the layer has a bias [N].
        activation: none, relu, relu2, gelu, gelu_tanh, silu, sigmoid or tanh.

    Shapes: x [.., K] float32, bfloat16 or float16; residual [.., N] or None; result [.., N].

    Raises:
        ValueError: unknown activation, sparsity out of range, or a size below 0.
    """

    storage_names = ("values", "index", "panel_ptr", "scale")
    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sparsity: float = 0.8,
        int8: bool = True,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, activation)
        check_sparsity(sparsity)
        self.int8 = bool(int8)
        source = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight, self.bias = source.weight, source.bias
        if self.weight.is_meta:
            blocks = (in_features + BLOCK - 1) // BLOCK
            mask = torch.empty(out_features, blocks, dtype=torch.bool, device="meta")
        else:
            mask = block_mask(self.weight, sparsity)
        self.register_buffer("mask", mask)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        sparsity: float = 0.8,
        int8: bool = True,
        activation: str | None = None,
    ) -> SparseLinear:
        """A layer in recovery state that shares the Parameter objects of ``linear``.

        The values outside the pattern are left in the weight and masked in every use; what
        `freeze()` stores has no trace of them.

        Raises:
            TypeError: ``linear`` is no `nn.Linear` and no compressed layer.
            ValueError: ``linear`` is frozen, sparsity out of range, or NaN or inf in the weight.
        """
        source = check_source(linear)
        check_sparsity(sparsity)
        # What an earlier pattern dropped does not come back.
        weight = linear.masked_weight() if isinstance(linear, SparseLinear) else source.weight
        mask = block_mask(weight, sparsity)
        name = source.activation if activation is None else activation
        new = cls(source.in_features, source.out_features, 0.0, int8, False, name, device="meta")
        new.weight, new.bias = source.weight, source.bias
        new.mask = mask
        return new.train(linear.training)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> SparseLinear:
        """An empty layer on "meta" as `arguments()` describes it, to be loaded."""
        frozen = arguments["frozen"]
        rest = {k: v for k, v in arguments.items() if k != "frozen"}
        new = cls(**rest, sparsity=0.0, device="meta")
        if frozen:
            n, k = new.out_features, new.in_features

            def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
                return torch.empty(shape, dtype=dtype, device="meta")

            new.set_storage(
                SparseWeight(
                    empty((0, BLOCK), torch.int8 if new.int8 else torch.float32),
                    empty((0,), torch.uint8),
                    empty((panels(k) * n + 1,), torch.int32),
                    empty((n,), torch.float32) if new.int8 else None,
                    (n, k),
                )
            )
        return new

    def make_storage(self) -> SparseWeight:
        return sparsify_weight(self.weight, self.mask, self.int8)

    def make_frozen(self, tensors: dict[str, Any]) -> SparseWeight:
        shape = (self.out_features, self.in_features)
        values, index, panel_ptr, scale = (tensors[name] for name in self.storage_names)
        return SparseWeight(values, index, panel_ptr, scale, shape)

    def masked_weight(self) -> Tensor:
        """``weight * mask`` [N, K], differentiable (recovery state only)."""
        n, k = self.weight.shape
        mask = self.mask.unsqueeze(-1)
        if k % BLOCK == 0:
            return (self.weight.reshape(n, k // BLOCK, BLOCK) * mask).view(n, k)
        return self.weight * mask.expand(-1, -1, BLOCK).reshape(n, -1)[:, :k]

    def trained_weight(self) -> Tensor:
        weight = self.masked_weight()
        return straight_through(weight) if self.int8 else weight

    def run(self, x: Tensor, storage: Any, residual: Tensor | None) -> Tensor:
        return sparse_linear(x, storage, self.bias, residual, self.activation)

    def pack_sources(self) -> tuple[Tensor, ...]:
        return (self.weight, self.mask)

    @property
    def density(self) -> float:
        """Share of the 1x4 blocks that are kept."""
        if self.frozen:
            return float(self.storage().density)
        return float(self.mask.float().mean()) if self.mask.numel() else 1.0

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "int8": self.int8}

    def extra_repr(self) -> str:
        known = "" if any(t is not None and t.is_meta for t in self.buffers()) else (
            f", density={self.density:.3f}"
        )  # fmt: skip
        return super().extra_repr() + f", int8={self.int8}" + known


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless 0 <= sparsity < 1."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: expected 0 <= sparsity < 1; got {sparsity}")
