"""The best approximation of a matrix at a rank: its largest singular values and vectors.

LAPACK's SVD of a 2048 x 2048 matrix takes half a minute on two cores; the eigenvectors of the
smaller Gram matrix, W W^T, take two seconds and span the same space (Golub and Van Loan, Matrix
Computations, 8.6). A Gram matrix squares the condition: singular values below about 1e-7 of the
largest drown in its rounding. So what came out is held against what is known of the best one, and
where it may fall short the SVD itself is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 128  # a smaller side up to which the SVD itself costs milliseconds
EXCESS = 1e-6  # error that the approximation may have beyond the best one, relative to that
ROUNDING = 32.0  # times eps of the weight's dtype and its norm: what storing the factors costs


class TruncatedSVD(NamedTuple):
    """``left * values @ right`` approximates a matrix [N, K]; all float64."""

    left: Tensor  # [N, r], columns of length 1, orthogonal where N <= K
    values: Tensor  # [r], falling
    right: Tensor  # [r, K], rows of length 1, orthogonal where K <= N; 0 beside a value of 0
    fallback: str  # why the Gram matrix would not do; "": it did, or nobody asked it

    @property
    def rank(self) -> int:
        """r."""
        return self.values.shape[0]


def truncated_svd(
    weight: Tensor, rank: int | None = None, energy: float | None = None, exact: bool = False
) -> TruncatedSVD:
    """The largest singular values of ``weight`` with their vectors.

    By the eigenvectors of the smaller Gram matrix in float64. The SVD itself is taken where that
    is cheap (a side of up to 128), where ``exact`` asks for it, and where the Gram matrix cannot
    tell: the error of the result exceeds the least possible one (Eckart and Young 1936) by more
    than 1e-6 of it and by more than what rounding the factors to the weight's dtype costs anyway,
    or ``energy`` leaves less out than the Gram matrix resolves.

    Args:
        weight: ``[N, K]``, any floating dtype, finite.
        rank: r, from 0 to min(N, K); or
        energy: the share of the sum of the squared singular values to keep, above 0 up to 1: the
            least rank that keeps it is taken. Give one of the two.
        exact: take the SVD itself.
    """
    if exact or min(weight.shape) <= SMALL:
        return _exact(weight, rank, energy, "")
    size = weight.detach().abs().amax().double().clamp(min=torch.finfo(torch.float64).tiny)
    scaled = weight.detach().double() / size  # so that no square is past float64
    if scaled.shape[0] > scaled.shape[1]:
        found, reason = _by_gram(scaled.t(), rank, energy, weight.dtype)
        if found is not None:
            found = found._replace(left=found.right.t(), right=found.left.t())
    else:
        found, reason = _by_gram(scaled, rank, energy, weight.dtype)
    if found is None:
        return _exact(weight, rank, energy, reason)
    return found._replace(values=found.values * size)


def _by_gram(
    w: Tensor, rank: int | None, energy: float | None, dtype: torch.dtype
) -> tuple[TruncatedSVD | None, str]:
    """The decomposition of a wide float64 matrix, or None and why its Gram matrix cannot tell."""
    eigenvalues, vectors = torch.linalg.eigh(w @ w.t())
    squares = eigenvalues.flip(0).clamp(min=0)  # rounding leaves some of them below 0
    total = float(squares.sum())
    # LAPACK's bound on the error of each eigenvalue, eps times the norm, over all that are left out
    noise = len(squares) * torch.finfo(torch.float64).eps * float(squares[0])
    if rank is None:
        assert energy is not None
        if total and (1 - energy) * total <= noise:
            return None, f"energy={energy:g} leaves less out than the Gram matrix resolves"
        rank = rank_of(squares, energy)
    left = vectors.flip(1)[:, :rank]
    product = left.t() @ w  # values * right; its row norms are more accurate than the roots
    values = product.norm(dim=1)
    order = values.argsort(descending=True, stable=True)
    left, values, product = left[:, order], values[order], product[order]
    right = torch.where(values[:, None] > 0, product / values[:, None], 0)
    error = float(torch.linalg.matrix_norm(w - left @ product))
    least = max(0.0, float(squares[rank:].sum()) - noise) ** 0.5
    allowed = (1 + EXCESS) * least + ROUNDING * torch.finfo(dtype).eps * total**0.5
    if not error <= allowed:
        return None, (
            f"the Gram matrix leaves an error of {error / total**0.5:.3g} of the norm where "
            f"{allowed / total**0.5:.3g} was allowed"
        )
    return TruncatedSVD(left, values, right, ""), ""


def _exact(weight: Tensor, rank: int | None, energy: float | None, reason: str) -> TruncatedSVD:
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    if rank is None:
        assert energy is not None
        rank = rank_of(values.square(), energy)
    return TruncatedSVD(left[:, :rank], values[:rank], right[:rank], reason)


def rank_of(squares: Tensor, energy: float) -> int:
    """The least rank that holds ``energy`` of the sum of these squares, which fall."""
    total = squares.sum()
    if total == 0:
        return 0
    # What is left out, summed from the smallest: sums from the largest lose small ones to rounding.
    left_out = squares.flip(0).cumsum(0).flip(0)
    return int((left_out > (1 - energy) * total).sum())
