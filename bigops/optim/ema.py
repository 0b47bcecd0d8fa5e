"""Exponential moving average of a model's weights, kept beside them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigops.nn.stored_parameter import StoredParameter
from bigops.optim import placed


class EMA:
    """Averages of a model's weights: ``average = decay * average + (1 - decay) * weight``.

    ::

        ema = EMA(model, decay=0.999)
        for ...:
            ema.update(precision.step(optimizer))  # only where a step was taken
        with ema.averaged():
            evaluate(model)
        save_checkpoint(path, model=model, ema=ema)  # beside the weights, never in their place

    torch.optim.swa_utils.AveragedModel copies the module and averages in the weights' dtype: at
    0.999 the part of a bfloat16 weight that is added rounds to nothing.

    Args:
        model: whose floating parameters are averaged, tied ones once, in float32 (float64 where
            they are float64), also DTensors, each rank its part. Buffers, codes of compressed
            layers and what is no floating number are copied as they were at the last update.
        decay: from 0 up to below 1.
        warmup: lower decays at first, ``min(decay, (1 + n) / (10 + n))`` at update n from 1 on (as
            TensorFlow's ExponentialMovingAverage), so that the first weights are soon forgotten.

    Raises:
        ValueError: decay out of range, or a model without floating parameters.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number from 0 up to below 1; got {decay}")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self._model = model
        self._kept: dict[str, Tensor] | None = None
        with torch.no_grad():
            self._averages = {
                name: t.detach().to(_wide(t), copy=True)
                for name, t in _tensors(model)
                if _is_averaged(t)
            }
            self._copies = {
                name: t.detach().clone() for name, t in _tensors(model) if not _is_averaged(t)
            }
        if not self._averages:
            raise ValueError("model: expected floating parameters; got none")

    def __repr__(self) -> str:
        return f"EMA(decay={self.decay}, warmup={self.warmup}, updates={self.updates})"

    @torch.no_grad()
    def update(self, stepped: object = True) -> None:
        """Take the weights into the averages.

        Args:
            stepped: what the step answered; where it is false, a skipped step, nothing moves.

        Raises:
            RuntimeError: inside `averaged`.
            ValueError: a parameter or buffer came, went or has another shape.
        """
        if not stepped:
            return
        self._outside("update")
        model = self._checked()
        self.updates += 1
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        alike: tuple[list[Tensor], list[Tensor]] = [], []
        for name, average in self._averages.items():
            to, weight = placed.local(average), placed.local(model[name])
            if to.dtype == weight.dtype and to.device == weight.device:
                alike[0].append(to)
                alike[1].append(weight)
            else:  # widened one by one: the weights of 16 bits never all exist in 32
                to.lerp_(weight.to(to), 1 - decay)
        if alike[0]:
            torch._foreach_lerp_(*alike, 1 - decay)
        for name, copy in self._copies.items():
            placed.local(copy).copy_(placed.local(model[name]))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with the averages for weights, in their dtype; afterwards with its own again.

        The own weights come back bit by bit, also after an exception. Meanwhile the model's
        ``state_dict`` raises: averages that are saved in the place of weights spoil the run that
        goes on with them. `weights` gives them for a file of their own.

        Raises:
            RuntimeError: inside another `averaged`.
            ValueError: a parameter or buffer came, went or has another shape.
        """
        self._outside("averaged")
        model = self._checked()
        kept = {name: t.detach().clone() for name, t in model.items()}
        hook = self._model.register_state_dict_pre_hook(_refuse)
        self._kept = kept
        try:
            _write(model, {**self._averages, **self._copies})
            yield self._model
        finally:
            _write(model, kept)
            self._kept = None
            hook.remove()

    def weights(self) -> dict[str, Tensor]:
        """The averages and copies in the model's dtypes, under the names of its ``state_dict``.

        Raises:
            RuntimeError: inside `averaged`.
        """
        self._outside("weights")
        both = {**self._averages, **self._copies}
        held = {id(t): both[name] for name, t in _tensors(self._model)}
        return {
            name: held[id(t)].to(t.dtype, copy=True)
            for name, t in self._model.state_dict(keep_vars=True).items()
            if id(t) in held
        }

    def state_dict(self) -> dict[str, Any]:
        """Averages, copies, decay and number of updates: a resumed run continues bitwise."""
        return {
            "decay": self.decay,
            "warmup": self.warmup,
            "updates": self.updates,
            "averages": dict(self._averages),
            "copies": dict(self._copies),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a ``state_dict`` of such a model; its decay wins.

        Raises:
            ValueError: see `check_state_dict`; nothing has changed then.
        """
        self.check_state_dict(state)
        with torch.no_grad():
            for own, given in self._pairs(state):
                own.copy_(placed.laid(given, own))
        self.decay, self.warmup = float(state["decay"]), bool(state["warmup"])
        self.updates = int(state["updates"])

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise what `load_state_dict` would raise, and change nothing.

        Raises:
            ValueError: no such dict, or one of another model.
        """
        keys = {"decay", "warmup", "updates", "averages", "copies"}
        if not isinstance(state, Mapping) or set(state) != keys:
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state: expected keys {sorted(keys)}; got {got}")
        if not 0 <= state["decay"] < 1 or state["updates"] < 0:
            raise ValueError(
                f"state: expected a decay from 0 up to below 1 and updates from 0 on; got "
                f"{state['decay']}, {state['updates']}"
            )
        for kind, own in (("averages", self._averages), ("copies", self._copies)):
            for name in sorted(set(own) ^ set(state[kind])):
                where = "state" if name in state[kind] else "the model"
                raise ValueError(f"state: {kind}: only {where} has {name!r}")
        for own_tensor, given in self._pairs(state):
            if not isinstance(given, Tensor) or given.shape != own_tensor.shape:
                came = f"{list(given.shape)}" if isinstance(given, Tensor) else repr(given)
                raise ValueError(f"state: expected shape {list(own_tensor.shape)}; got {came}")

    def _pairs(self, state: Mapping[str, Any]) -> list[tuple[Tensor, Any]]:
        return [
            (own, state[kind][name])
            for kind, held in (("averages", self._averages), ("copies", self._copies))
            for name, own in held.items()
        ]

    def _outside(self, what: str) -> None:
        if self._kept is not None:
            raise RuntimeError(f"{what}: expected a call outside averaged(); got one inside")

    def _checked(self) -> dict[str, Tensor]:
        """The model's tensors by name, which are those that are kept here."""
        model = dict(_tensors(self._model))
        held = {**self._averages, **self._copies}
        for name in sorted(set(model) ^ set(held)):
            what = "new" if name in model else "gone"
            raise ValueError(f"model: expected its tensors of before; {name!r} is {what}")
        for name, t in model.items():
            if t.shape != held[name].shape:
                raise ValueError(
                    f"model: {name}: expected shape {list(held[name].shape)}; got {list(t.shape)}"
                )
        return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _is_averaged(t: Tensor) -> bool:
    is_code = isinstance(t, StoredParameter)
    return isinstance(t, nn.Parameter) and t.is_floating_point() and not is_code


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@torch.no_grad()
def _write(model: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        placed.local(model[name]).copy_(placed.local(value))


def _refuse(*_: object) -> None:
    raise RuntimeError(
        "state_dict: expected the model's own weights; got EMA's averages in their place, inside "
        "averaged() (EMA.weights() gives them)"
    )
