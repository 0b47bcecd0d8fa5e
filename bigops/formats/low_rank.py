"""LowRankWeight: a weight as two factors, each of them stored in a format of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bigops.formats.base import Format, storage


@storage
class LowRankWeight(Format):
    """A weight [N, K] as ``u @ v``."""

    u: Format  # [N, r]
    v: Format  # [r, K]

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.u.n

    @property
    def k(self) -> int:  # type: ignore[override]
        return self.v.k

    @property
    def rank(self) -> int:
        """r, the columns of u and rows of v."""
        return self.v.n

    @classmethod
    def from_factors(cls, u: Tensor, v: Tensor, format: type[Format], **form: Any) -> LowRankWeight:
        """Store the factors u [N, r] and v [r, K].

        Raises:
            ValueError: what ``format`` refuses, by the name of the factor, or factors that do not
                belong together.
            TypeError: no floating tensors.
        """
        stored = []
        for name, factor in (("u", u), ("v", v)):
            try:
                stored.append(format.from_dense(factor, **form))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}{str(error).removeprefix('w')}") from None
        made = cls(*stored)
        check_ranks(made.u, made.v)
        return made

    def tensors(self) -> dict[str, Tensor | None]:
        return {
            f"{name}_{leaf}": tensor
            for name, factor in (("u", self.u), ("v", self.v))
            for leaf, tensor in factor.tensors().items()
        }

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of u and those of v; an op takes either, not both."""
        return self.u.arguments, self.v.arguments

    def with_tensors(self, tensors: Mapping[str, Tensor | None]) -> LowRankWeight:
        u, v = (
            factor.with_tensors({leaf: tensors[f"{name}_{leaf}"] for leaf in factor.TENSORS})
            for name, factor in (("u", self.u), ("v", self.v))
        )
        return LowRankWeight(u, v)

    @property
    def density(self) -> float:
        n, k = self.n, self.k
        return self.rank * (n + k) / (n * k) if n * k else 1.0

    @property
    def rounds(self) -> bool:
        return self.v.rounds

    @property
    def x_dtypes(self) -> tuple[torch.dtype, ...]:
        return self.v.x_dtypes

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.u.to_dense(torch.float64) @ self.v.to_dense(torch.float64)).to(dtype)

    @property
    def sizes(self) -> tuple[Any, ...]:
        return self.u.sizes, self.v.sizes

    def check(self) -> None:
        self._each(lambda factor: factor.check())
        check_ranks(self.u, self.v)

    def check_structure(self) -> None:
        self._each(lambda factor: factor.check_structure())

    def validate(self) -> None:
        self._each(lambda factor: factor.validate())
        check_ranks(self.u, self.v)

    def _each(self, function: Any) -> None:
        for name, factor in (("u", self.u), ("v", self.v)):
            try:
                function(factor)
            except (TypeError, ValueError) as error:  # it starts with the tensor's name
                raise type(error)(f"{name}_{error}") from None


def check_ranks(u: Format, v: Format) -> None:
    """Raise TypeError or ValueError unless two stored factors belong together."""
    for name, factor, other in (("u", u, v), ("v", v, u)):
        if not isinstance(factor, Format) or (name == "v" and type(factor) is not type(other)):
            raise TypeError(
                f"{name}: expected a {type(other).__name__}, as the other factor is; got "
                f"{type(factor).__name__}"
            )
    if u.k != v.n:
        raise ValueError(f"v: expected {u.k} rows for u of {[u.n, u.k]}; got {[v.n, v.k]}")
    if u.k > min(u.n, v.k):
        raise ValueError(
            f"u, v: expected a rank of at most {min(u.n, v.k)}, the smaller side of "
            f"[{u.n}, {v.k}]; got {u.k}"
        )
