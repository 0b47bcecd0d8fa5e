"""How near a side's output is to the float32 model's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """``cosine`` of the whole outputs; ``argmax``: share of positions with the same class, None
    where the output has no classes."""

    cosine: float
    argmax: float | None

    @classmethod
    def of(cls, out: Tensor, reference: Tensor, classes: bool) -> Agreement:
        """Compare two outputs.

        Raises:
            ValueError: of different shapes.
        """
        if out.shape != reference.shape:
            raise ValueError(
                f"out: expected shape {tuple(reference.shape)}, got {tuple(out.shape)}"
            )
        mine, truth = out.double(), reference.double()
        cosine = F.cosine_similarity(mine.flatten(), truth.flatten(), dim=0)
        same = (mine.argmax(-1) == truth.argmax(-1)).double().mean() if classes else None
        return cls(float(cosine), None if same is None else float(same))


def wrong(agreement: Agreement) -> bool:
    """Whether an output has nothing to do with the model's, or is not finite."""
    return not agreement.cosine > 0.5 or not torch.isfinite(torch.tensor(agreement.cosine))
