"""A weight in the form its kernel reads, kept beside the tensors it was made from.

No part of a module's state: layers drop it on `deepcopy`, pickle, `.to()`, `train()`, `eval()` and
`load_state_dict`, and make it anew once the weight has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Self = TypeVar("Self", bound="KeepsPack")


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


class KeepsPack(nn.Module):
    """A layer that lays its weights out for the kernels of inference; comes before nn's own class.

    The forms are in ``_pack``: one with ``nbytes``, or a list of them.
    """

    _pack: Pack | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters and of the packed forms, where there are any."""
        layers = [m for m in self.modules() if isinstance(m, KeepsPack) and m._pack is not None]
        packed = sum(form.nbytes for layer in layers for form in layer._forms())
        return sum(p.nbytes for p in self.parameters()) + packed

    def _forms(self) -> list[Any]:
        forms = [] if self._pack is None else self._pack.storage
        return forms if isinstance(forms, list) else [forms]

    def train(self: Self, mode: bool = True) -> Self:
        self._pack = None
        return super().train(mode)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._pack = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._pack = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pack": None}  # pickle, copy and deepcopy all come by here
