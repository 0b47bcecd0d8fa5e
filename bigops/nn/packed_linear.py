"""PackedLinear: a dense weight in panels, for inference; what all packed layers share.

Packing replaces the float Parameters, it does not shadow them: while a layer is packed, its panels
are all there is, so nothing can be stale and memory is not doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bigops.formats import checks
from bigops.formats.base import Format
from bigops.formats.packed import SERVED, PackedWeight
from bigops.nn import fields
from bigops.nn.compressed_linear import CompressedLinear
from bigops.nn.linear import Linear
from bigops.nn.stored_parameter import StoredParameter
from bigops.nn.stored_state import STATES
from bigops.ops.choice import Choice

Self = TypeVar("Self", bound="PackedBase")


class PackedBase(CompressedLinear):
    """What `PackedLinear` and `PackedLowRankLinear` share.

    Frozen means packed: a `StoredParameter` of panels for each float matrix, in no `state_dict`. In
    its place `state_dict` has the matrices themselves, unpacked bit for bit under the names they
    had, and `load_state_dict` packs what it is given: files of packed and unpacked layers are the
    same.
    """

    FIELDS = fields.COMPRESSED
    unpacks = True
    _trained: dict[str, bool]  # requires_grad of each Parameter that is packed

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trained = {}

    @classmethod
    def from_arguments(cls: type[Self], arguments: dict[str, Any]) -> Self:
        """An empty layer on "meta" as `arguments()` describes it, to be loaded."""
        given = {k: v for k, v in arguments.items() if k not in STATES}
        new = cls(**given, device="meta")
        return new.freeze() if arguments["frozen"] else new

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of each float matrix by name, in the order of `storage_names`."""
        return {"weight": (self.out_features, self.in_features)}

    def _packs(self) -> Iterator[tuple[str, str, PackedWeight]]:
        """Name of the float matrix, name of its panels, its pack."""
        for (name, shape), stored in zip(self._shapes().items(), self.storage_names, strict=True):
            panels = self._parameters[stored]
            assert panels is not None
            if hasattr(panels, "device_mesh"):
                raise TypeError(
                    f"{stored}: expected whole panels to unpack; got a DTensor: a packed layer "
                    "that is sharded has no state_dict (unpack_ it before)"
                )
            yield name, stored, PackedWeight(panels, *shape)

    def _weight_like(self) -> tuple[torch.dtype, torch.device, bool]:
        if not self.frozen:
            return super()._weight_like()
        panels = self._parameters[self.storage_names[0]]
        assert panels is not None
        return panels.dtype, panels.device, False

    def _dtype_argument(self) -> dict[str, str]:
        return {}  # panels have the dtype of their matrix

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.frozen:
            return self.run(x, self._arguments(), residual)
        return self.run_trained(x, residual)  # thawed, it is the layer that it was

    @property
    def closed_to_compress(self) -> str | None:
        return "it is packed already; unpack_ gives the float weight back" if self.frozen else None

    @property
    def closed_to_pack(self) -> str | None:
        return "it is packed already" if self.frozen else "it is thawed; freeze_ packs it"

    # --- packing and unpacking --------------------------------------------------------------

    def freeze(self: Self, storage: Format | None = None) -> Self:
        """Pack: the float Parameters go, their panels are left. In place; twice is once.

        Raises:
            TypeError: a dtype that no packed kernel takes. The layer stays as it was.
        """
        return super().freeze(storage)

    def set_storage(self, storage: Any) -> None:
        found = {name: self._parameters.get(name) for name in self.trained_names}
        self._trained |= {n: p.requires_grad for n, p in found.items() if p is not None}
        super().set_storage(storage)

    def thaw(self: Self) -> Self:
        """Unpack: the float Parameters are back bit for bit, the panels go. In place.

        They are new objects, with the ``requires_grad`` that they had; an optimiser needs them
        anew. Until `freeze` packs it again the layer is trained and written like any other.
        """
        if self.frozen:
            unpacked = self._matrices()
            for stored in self.storage_names:
                del self._parameters[stored]
            self.frozen = False
            bias = self._parameters.pop("bias")  # comes last, as optimisers saw it before
            for name, value in unpacked.items():
                parameter = nn.Parameter(value, self._trained.get(name, True))
                self.register_parameter(name, parameter)
            self.register_parameter("bias", bias)
        return self

    def _matrices(self) -> dict[str, Tensor]:
        """Each float matrix by name, in memory of its own and of just its size."""
        with torch.inference_mode(False), torch.no_grad():
            return {
                name: pack.to_dense().clone(memory_format=torch.contiguous_format)
                for name, _, pack in self._packs()
            }

    def unpacked(self) -> nn.Module:
        """The drop-in layer that this one stands for, beside it."""
        raise AssertionError("each packed layer has a drop-in of its own")

    def explain(self, x: Tensor) -> Choice:
        if not self.frozen:
            return self.unpacked().explain(x)  # type: ignore[no-any-return, operator]
        return super().explain(x)

    def _float(self, name: str) -> nn.Parameter:
        """A float Parameter: that of the layer where it is thawed, else a new one."""
        if self.frozen:
            return nn.Parameter(self._matrices()[name], self._trained.get(name, True))
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    @property
    def _where_it_went(self) -> str:
        return (
            "the layer is packed and has panels in its place; state_dict() has the values, "
            "load_state_dict() packs others, thaw() (of a model: bigops.unpack_) gives the "
            "Parameter back"
        )

    # --- state ------------------------------------------------------------------------------

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.frozen:
            # Panels are no codes: `.half()` means them as it means the matrix they stand for.
            changed = {}
            for name, stored, pack in self._packs():
                dtype = fn(pack.panels.new_empty(0)).dtype
                if dtype not in SERVED:
                    raise TypeError(
                        f"{name}: expected a dtype that packed kernels take, one of "
                        f"{', '.join(map(checks.short, SERVED))}; got {dtype} (thaw() the layer)"
                    )
                if dtype != pack.panels.dtype:
                    panels = PackedWeight.from_dense(pack.to_dense().to(dtype)).panels
                    changed[stored] = StoredParameter(panels)
            self._parameters.update(changed)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.frozen:
            for name, value in self._matrices().items():
                destination[prefix + name] = value
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._fixed():
            del destination[prefix + name]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.frozen:
            state_dict = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
            assign = local_metadata.get("assign_to_params_buffers", False)
            fixed = [prefix + name for name in self._fixed()]  # which no state_dict has
            unexpected_keys.extend(key for key in fixed if strict and key in state_dict)
            for name, stored, pack in self._packs():
                key = prefix + name
                value = state_dict.pop(key, None)
                if value is None:
                    missing_keys.extend([key] if strict else [])
                    continue
                try:
                    panels = _packed_as(pack, name, value, assign)
                    self._parameters[stored] = StoredParameter(panels)
                except (TypeError, ValueError) as error:
                    error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_storage(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> set[str]:
        return {prefix + name for name in self._fixed()}  # loaded, from the float matrices


def _packed_as(old: PackedWeight, name: str, value: Any, assign: bool) -> Tensor:
    """Panels of a matrix that is loaded in place of ``old``; its dtype and device stay as
    `load_state_dict` leaves those of a Parameter.
    """
    if not isinstance(value, Tensor) or value.shape != old.shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected shape {list(old.shape)}; got {got}")
    with torch.inference_mode(False), torch.no_grad():
        value = value.detach()
        if not assign:
            value = value.to(old.panels.device, old.panels.dtype)
        return PackedWeight.from_dense(value).panels


class PackedLinear(PackedBase):
    """``act(x @ weight.T + bias) + residual``, the weight in panels (`PackedWeight`).

    For inference on the CPU. Two states:

    - Packed (`freeze`, `bigops.pack_`): ``panels`` in place of the Parameter ``weight``;
      one `bigops.packed_linear` call, on x of the weight's dtype. x, bias and residual have
      gradients, the weight has none. Reading ``weight`` unpacks it; `state_dict` has it.
      Under `torch.autocast` x is cast to the weight's dtype, and the result has that one.
    - Thawed (`thaw`): the float Parameter is back, and the layer is `bigops.nn.Linear`.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has a bias [N].
        activation: none, relu, relu2, gelu, gelu_tanh, silu, sigmoid or tanh.

    Shapes: x [.., K] float32, bfloat16 or float16, as the weight; residual [.., N] or None; result
    [.., N].

    Raises:
        ValueError: unknown activation, or a size below 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (in_features, out_features, bias, activation, device, dtype)
        super().__init__(PackedWeight, *sizes)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls, linear: nn.Module, activation: str | None = None
    ) -> PackedLinear:
        """`CompressedLinear.from_linear` in this format; the layer is not packed yet."""
        return cls._beside(linear, activation)

    def unpacked(self) -> Linear:
        """A `bigops.nn.Linear` with the bias of this layer, and its weight, unpacked if need be."""
        size = self.in_features, self.out_features
        new = Linear(*size, False, device="meta", activation=self.activation)
        new.weight = self._float("weight")
        new.register_parameter("bias", self._parameters["bias"])
        return new.train(self.training)

    def trained_weight(self) -> Tensor:
        return self.weight
