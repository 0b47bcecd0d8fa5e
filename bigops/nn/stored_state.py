"""Moving and loading of a layer whose storage is buffers: it stays whole, whatever it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from bigops.formats import quantize
from bigops.formats.base import Format
from bigops.nn.layer import Layer

RETIRED = "y_grid"  # in files of older layers, which gave u8 to the next one: read past

Self = TypeVar("Self", bound="StoredState")


class StoredState(Layer):
    """A layer that keeps a `Format` in buffers once it is frozen."""

    retired_names = (RETIRED,)
    format: type[Format]
    _empty: Format | None  # frozen: the storage without its tensors

    def check_storage(self, storage: Format) -> None:
        """Raise ValueError or TypeError unless the storage is whole and fits this layer."""
        storage.validate()
        if storage.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"{self.format.TENSORS[0]}: expected a weight of "
                f"{[self.out_features, self.in_features]}; got {list(storage.shape)}"
            )

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        names = self.storage_names if self.frozen else ()
        storage = [self._stored(name) for name in (*names, "x_grid")]
        ids = {id(t) for s in storage if s is not None for t in (s, s.grad) if t is not None}

        def move(t: Tensor) -> Tensor:
            new = fn(t)
            if id(t) not in ids:
                return new
            # .half() and channels_last mean the activations: storage keeps its dtype and layout.
            new = new if new.dtype == t.dtype else t.to(new.device)
            return new if new.stride() == t.stride() else new.contiguous()

        super()._apply(move, recurse)
        return self

    def _stored(self, name: str) -> Tensor | None:
        """A storage tensor: a buffer, or a Parameter where it is trained."""
        found: Tensor | None = self._parameters.get(name, self._buffers.get(name))
        return found

    def _store(self, name: str, value: Tensor | None) -> None:
        parameter = self._parameters.get(name)
        if value is None and name not in self._buffers:
            return
        if parameter is None or value is None:
            self._buffers[name] = value
        elif parameter.is_meta:  # its data cannot come from another device
            self._parameters[name] = nn.Parameter(value.detach(), parameter.requires_grad)
        else:
            if parameter.shape != value.shape:
                parameter.grad = None
            parameter.data = value.detach()  # optimisers keep the object

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
        if prefix + RETIRED in state_dict:
            state_dict = {k: v for k, v in state_dict.items() if k != prefix + RETIRED}
        state_dict = self._check_grid(state_dict, prefix, error_msgs)
        if self.frozen:
            state_dict = self._load_storage(state_dict, prefix, local_metadata, error_msgs)
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        # A state_dict of nn.Linear has no mask: the layer's own pattern stays.
        missing_keys.extend(key for key in missing if key != prefix + "mask")

    def _check_grid(
        self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]
    ) -> dict[str, Any]:
        """Refuse an ``x_grid`` that is none; the layer keeps its own then."""
        own, given = self._buffers.get("x_grid"), state_dict.get(prefix + "x_grid")
        if own is None or given is None or given.is_meta:
            return state_dict
        if self.frozen and "x_grid" in self.storage_names:
            return state_dict
        if not self.frozen and given.shape == own.shape and not bool(given.any()):
            return state_dict  # not calibrated yet
        try:
            quantize.check_grid("x_grid", given)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return {**state_dict, prefix + "x_grid": own}
        return state_dict

    def _load_storage(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        error_msgs: list[str],
    ) -> dict[str, Any]:
        """Take whole, valid storage of whatever size; give the dict that is left to load."""
        names = [name for name in self.storage_names if self._stored(name) is not None]
        if any(prefix + name not in state_dict for name in names):
            return state_dict  # torch names what is missing
        found: dict[str, Tensor | None] = dict.fromkeys(self.storage_names)
        found.update({name: state_dict[prefix + name].contiguous() for name in names})
        try:
            assert self._empty is not None
            self.check_storage(self._empty.with_tensors(found))
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            found = {name: self._stored(name) for name in self.storage_names}
        else:
            if not local_metadata.get("assign_to_params_buffers", False):
                for name in names:
                    old, new = self._stored(name), found[name]
                    assert old is not None
                    assert new is not None
                    found[name] = new.detach().to(old.device, copy=True)
            for name, value in found.items():
                self._store(name, value)
        return {**state_dict, **{prefix + name: found[name] for name in names}}
