"""Layer: what a layer of this package says of itself to whoever saves, measures or swaps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from bigops.formats.patterns import Pattern
from bigops.nn.fields import Field
from bigops.ops.choice import Choice


class Layer(nn.Module):
    """The base of the layers of `bigops.nn` that files and verbs know.

    Verbs ask these capabilities and no class; the defaults are those of a dense layer with one
    float weight.
    """

    FIELDS: ClassVar[dict[str, Field]] = {}  # what each of `arguments` may be, in a file
    # Layers of its own that a verb may swap, by name, with the kind that the constructor makes.
    parts: ClassVar[dict[str, str]] = {}
    # Linear layers that its state_dict names, whose weights are rows of one Parameter.
    stacked: ClassVar[tuple[str, ...]] = ()
    # Of a block whose layers are asked in its place: why `compress_` leaves them.
    inside: ClassVar[str | None] = None
    compressed: ClassVar[bool] = False  # the weight is stored otherwise than as a float matrix
    freezes: ClassVar[bool] = False  # it has `freeze`, `set_storage` and `storage`
    unpacks: ClassVar[bool] = False  # `unpacked` gives another layer
    for_bytes: ClassVar[bool] = False  # it takes less, and is no faster than what it replaces

    in_features: int
    out_features: int
    frozen: bool = False  # whether its compressed storage alone is left
    thawed: bool = False  # whether of that the values are trained
    rank: int | None = None  # of the two factors that stand for the weight
    pattern: Pattern | None = None  # of the entries that are kept
    gpu_nbytes: int = 0  # of a second form of the weight, beside the storage
    storage_names: tuple[str, ...] = ()  # the frozen tensors, whose sizes are free in a file
    # entries of older files: what each is called today, None where it is read past
    older_names: ClassVar[Mapping[str, str | None]] = {}

    def arguments(self) -> dict[str, Any]:
        """What `from_arguments` needs to make this layer again, as plain data."""
        raise NotImplementedError

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> Self:
        """An empty layer on "meta" as `arguments` describes it, to be loaded."""
        return cls(**arguments, device="meta")

    def explain(self, x: Tensor) -> Choice | None:
        """Which kernel serves the layer on x; None where no op of this package does."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    @property
    def density(self) -> float:
        """Share of the entries that are stored."""
        return 1.0

    def least_bytes(self) -> int:
        """Bytes once frozen, by arithmetic alone; of a sparse layer all but its values."""
        return self.nbytes

    @property
    def closed_to_compress(self) -> str | None:
        """Why `compress_` leaves the layer in the state that it is in, or None."""
        return None

    @property
    def closed_to_pack(self) -> str | None:
        """Why `pack_` leaves the layer in the state that it is in, or None."""
        return f"it is a {type(self).__name__}, which has a storage of its own"

    def packed(self) -> Layer:
        """A layer in panels with the values of this one; of one that is open to `pack_`."""
        raise NotImplementedError

    def unpacked(self) -> nn.Module:
        """The layer that this one stands for: itself, of a packed one its drop-in."""
        return self

    def picture(self) -> str | None:
        """Where the stored entries lie, as text; None where all of them are stored."""
        return None


def layer_of(module: nn.Module | None) -> Layer | None:
    """``module`` where it is a layer of this package that files and verbs know."""
    return module if isinstance(module, Layer) else None
