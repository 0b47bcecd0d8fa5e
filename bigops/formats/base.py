"""What every format says of itself: a weight [N, K] as it is stored.

A format is one frozen dataclass: tensors first, then the plain data that says how they lie. It is
the only place that knows its layout; ops, layers, files, receipts and sharding ask it by the names
of its fields.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import Self, dataclass_transform

from bigops.formats import checks

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

F = TypeVar("F", bound="Format")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Format:
    """A weight [N, K] in some storage."""

    SCHEMA: ClassVar[str]
    """The arguments that stand for the weight in the schema of its op, as torch writes them."""
    TENSORS: ClassVar[tuple[str, ...]]
    """Names of the tensors, in the order of the schema."""
    OPTIONAL: ClassVar[frozenset[str]]
    """Those of them that a weight may lack."""
    TRAINED: ClassVar[tuple[str, ...]] = ()
    """Those that have gradients where they are floating."""
    PLAIN: ClassVar[bool] = False
    """Whether the tensors are torch's own, of x's dtype: a product computes in that one."""
    GATED: ClassVar[bool] = False
    """Whether a gated pair may follow: the first half of the rows of W is the gate, then up."""
    KEPT: ClassVar[str] = ""
    """What a forward keeps for its gradients, as a schema has it, the pre-activation last."""
    K_OF_X: ClassVar[bool] = False
    """Whether K is in no tensor and no field: kernels take that of x."""

    n: int
    k: int

    @property
    def shape(self) -> torch.Size:
        """[N, K] of the matrix."""
        return torch.Size([self.n, self.k])

    def tensors(self) -> dict[str, Tensor | None]:
        """The storage by name; None where this weight has no such tensor."""
        return {name: getattr(self, name) for name in self.TENSORS}

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return sum(t.nbytes for t in self.tensors().values() if t is not None)

    @property
    def density(self) -> float:
        """Share of the entries that are stored."""
        return 1.0

    @property
    def rounds(self) -> bool:
        """Whether a product with this weight quantises x."""
        return False

    @property
    def takes_rows(self) -> bool:
        """Whether a product may take x as `QuantizedRows`: it finds those of each row itself."""
        return False

    @property
    def x_dtypes(self) -> tuple[torch.dtype, ...]:
        """The floating dtypes that x may have in a product with this weight."""
        return FLOATS

    def check_beside(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless x has a dtype and device for this weight."""
        for name, t in self.tensors().items():
            if t is not None and t.device != x.device:
                checks.device(name, t, x)
        checks.floating("x", x, self.x_dtypes)

    @classmethod
    def autocast_dtype(cls, *arguments: Any) -> torch.dtype | None:
        """What `torch.autocast` casts x to for a weight of these `arguments`; None: its own."""
        return None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The weight as its op takes it: the arguments of `SCHEMA`."""
        raise NotImplementedError

    @property
    def sizes(self) -> tuple[Any, ...]:
        """What `arguments` has after the tensors."""
        return tuple(a for a in self.arguments if a is not None and not isinstance(a, Tensor))

    of: ClassVar[Callable[..., Any]]
    """``of(k, *arguments)``: the weight of ``k`` columns that these are; not validated."""
    from_dense: ClassVar[Callable[..., Any]]
    """``from_dense(w, **form)``: store a matrix [N, K]; the form is the format's own."""
    empty: ClassVar[Callable[..., Any]]
    """``empty(n, k, **form)``: the storage of a weight [N, K] on "meta", to be loaded."""

    @classmethod
    def form(cls, *args: Any, **given: Any) -> dict[str, Any]:
        """Keyword arguments of `from_dense` and `empty`, defaults filled in, as plain data.

        Raises:
            ValueError, TypeError: a form that is not there.
        """
        if args or given:
            raise TypeError(f"{cls.__name__}: expected no arguments; got {args}, {given}")
        return given

    @classmethod
    def rounded(cls, w: Tensor, *args: Any, **form: Any) -> Tensor:
        """The matrix [N, K], float32, that ``w`` is stored as."""
        stored: Tensor = cls.from_dense(w, *args, **form).to_dense()
        return stored

    def to_dense(self, dtype: Any = torch.float32) -> Tensor:
        """The matrix [N, K] that this weight stands for; differentiable for floating values."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ValueError or TypeError unless dtypes and shapes belong together.

        Every call of the op asks it; it reads no contents.
        """
        raise NotImplementedError

    def check_structure(self) -> None:
        """Raise ValueError for contents that memory safety rests on; the C++ kernels ask it too."""

    def check_tensors(self) -> None:
        """Raise TypeError for what is no tensor, or is missing where each weight has one."""
        for name, t in self.tensors().items():
            if t is not None or name not in self.OPTIONAL:
                checks.tensor(name, t)

    def validate(self) -> None:
        """Raise ValueError or TypeError unless the storage is whole; asked when a file loads."""
        self.check_tensors()
        self.check()
        self.check_structure()

    def sample(self, grad: Tensor) -> Tensor:
        """Entries of a matrix [N, K] where a trained tensor stores its own, as that has them."""
        raise NotImplementedError

    def kept(self, x: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """What `KEPT` names, of a product with x [.., K]; differentiable."""
        raise NotImplementedError

    def kept_sizes(self) -> dict[str, int]:
        """The last dimension of each of them."""
        return {}

    def backward(
        self, gz: Tensor, x: Tensor, wanted: Collection[str], kept: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """Gradients of z = x W^T as a differentiable expression.

        Args:
            gz: [.., N], of z; with x in the dtype of the computation.
            wanted: "x" and names in `TRAINED`.
            kept: what `KEPT` names.
        """
        found = {}
        if "x" in wanted:
            found["x"] = gz @ self.to_dense(gz.dtype)
        for name in self.TRAINED:
            if name in wanted:
                found[name] = self.sample(rows(gz).transpose(0, 1) @ rows(x))
        return found

    def replace(self, **fields: Any) -> Self:
        """The same weight but for some fields; not validated."""
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]

    def with_tensors(self, tensors: Mapping[str, Tensor | None]) -> Self:
        """The same weight with other tensors, all of them by name; not validated."""
        return self.replace(**tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same weight with ``function`` of each of its tensors."""
        given = self.tensors().items()
        return self.with_tensors({name: t if t is None else function(t) for name, t in given})

    # --- parts of a weight: rows of W ----------------------------------------------------------

    def row_dims(self) -> dict[str, int]:
        """Along which dimension each tensor splits with the rows of W; the others are whole."""
        return {}

    def sum_dims(self) -> dict[str, int]:
        """Along which dimension tensors, x and what is kept split so that products add up."""
        return {}

    @property
    def row_unit(self) -> int:
        """Rows of W that stay together where it splits."""
        return 1

    def splits(self, parts: int) -> bool:
        """Whether the rows of W split into ``parts`` weights of this format, of equal sizes."""
        return bool(self.row_dims()) and self.n % (self.row_unit * parts) == 0

    def placements(self, split: bool) -> dict[str, Placement | None]:
        """Where DTensor puts each tensor, with the rows of W split or whole; None for no tensor."""
        from torch.distributed.tensor import Replicate, Shard

        dims = self.row_dims() if split else {}
        return {
            name: None if t is None else Shard(dims[name]) if name in dims else Replicate()
            for name, t in self.tensors().items()
        }

    def shard(self, rank: int, parts: int) -> Self:
        """The weight of the rows that are rank's of ``parts``.

        Raises:
            ValueError: the rows do not split so, or no part has that rank.
        """
        if not 0 <= rank < parts:
            raise ValueError(f"rank, parts: expected 0 <= rank < parts; got {rank}, {parts}")
        if not self.splits(parts):
            raise ValueError(
                f"parts: expected a number into which {self.n} rows of a {type(self).__name__} "
                f"split; got {parts}"
            )
        dims = self.row_dims()
        found = {
            name: t if t is None or name not in dims else t.chunk(parts, dims[name])[rank]
            for name, t in self.tensors().items()
        }
        return self._with_rows(self.n // parts, found)

    @classmethod
    def can_merge(cls, parts: Sequence[Self]) -> bool:
        """Whether `merge` takes these: whole units of rows, and one of what does not split."""
        if not all(part.row_dims() and part.n % part.row_unit == 0 for part in parts):
            return False
        first, *others = (part.tensors() for part in parts)
        return all(
            t is None or torch.equal(t, other[name])  # type: ignore[arg-type]
            for name, t in first.items()
            if name not in parts[0].row_dims()
            for other in others
        )

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """The weight of which these are the parts in order; the inverse of `shard`.

        Raises:
            ValueError: several parts of a format that does not split.
        """
        whole, *others = parts
        dims = whole.row_dims()
        if others and not dims:
            raise ValueError(f"parts: expected one, since a {cls.__name__} does not split")
        found = {
            name: torch.cat([getattr(part, name) for part in parts], dims[name])
            if t is not None and name in dims
            else t
            for name, t in whole.tensors().items()
        }
        return whole._with_rows(sum(part.n for part in parts), found)

    def _with_rows(self, n: int, tensors: dict[str, Tensor | None]) -> Self:
        made = self.with_tensors(tensors)
        names = {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return made.replace(n=n) if "n" in names else made


def rows(t: Tensor) -> Tensor:
    """[.., K] as [M, K]; reshape(-1, K) cannot, where K is 0."""
    # reshape, as flatten has no rule in batches of torch.autograd.grad
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


@dataclass_transform(frozen_default=True, eq_default=False)
def storage(cls: type[F]) -> type[F]:
    """Make a class of annotated fields a format: a frozen dataclass, to torch a pytree.

    Its leaves are the tensors. The plain data belongs to the structure: numbers and words as leaves
    would be inputs of an exported program, guarded one by one.
    """
    made = dataclasses.dataclass(frozen=True, eq=False)(cls)
    hints = {f.name: str(f.type) for f in dataclasses.fields(made)}  # type: ignore[arg-type]
    made.TENSORS = tuple(name for name, hint in hints.items() if "Tensor" in hint)
    made.OPTIONAL = frozenset(name for name in made.TENSORS if "None" in hints[name])

    inner = [name for name, hint in hints.items() if "Tensor" in hint or hint == "Format"]
    plain = [name for name in hints if name not in inner]

    def flatten(weight: F) -> tuple[list[Any], list[Any]]:
        return [getattr(weight, name) for name in inner], [getattr(weight, name) for name in plain]

    def unflatten(parts: Any, sizes: list[Any]) -> F:
        return made(**dict(zip(inner, parts, strict=True)), **dict(zip(plain, sizes, strict=True)))

    pytree.register_pytree_node(
        made,
        flatten,
        unflatten,
        serialized_type_name=f"bigops.{made.__name__}",
        flatten_with_keys_fn=lambda weight: (
            [(pytree.GetAttrKey(name), getattr(weight, name)) for name in inner],
            [getattr(weight, name) for name in plain],
        ),
    )
    return made
