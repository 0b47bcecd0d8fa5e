"""What a sharding rule is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

# Placements of the results and of the arguments; None for whatever is no tensor.
Rule: TypeAlias = "tuple[list[Placement | None], list[Placement | None]]"


def _if(tensor: Any, placement: Placement) -> Placement | None:
    return None if tensor is None else placement
