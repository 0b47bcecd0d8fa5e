"""A weight in the form its kernel reads, kept beside the tensors it was made from.

No part of a module's state: layers drop it on `deepcopy`, pickle, `.to()`, `train()`, `eval()` and
`load_state_dict`, and make it anew once the weight has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pack(NamedTuple):
    """The form, and the state of the tensors it was made from."""

    storage: Any
    # The sources themselves are held, so no later tensor can take their addresses.
    sources: tuple[tuple[Tensor, int], ...]

    def is_fresh(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether nothing has been written to the sources since."""
        return all(
            not now.is_inference()
            and now._version == version
            and now.data_ptr() == then.data_ptr()
            and now.shape == then.shape
            for now, (then, version) in zip(sources, self.sources, strict=True)
        )


def renewed(
    pack: Pack | None, sources: tuple[Tensor, ...], make: Callable[[], Any]
) -> tuple[Any, Pack | None]:
    """The form as it is now, and the pack to keep: the old one while it is fresh.

    Tensors made under `torch.inference_mode` count no versions: a pack of them is never kept.
    """
    if pack is not None and pack.is_fresh(sources):
        return pack.storage, pack
    # A form made under inference_mode could never take part in autograd later.
    with torch.inference_mode(False), torch.no_grad():
        storage = make()
    if any(t.is_inference() for t in sources):
        return storage, None
    return storage, Pack(storage, tuple((t.detach(), t._version) for t in sources))
