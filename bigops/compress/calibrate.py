"""Static qparams: the range of each layer's inputs over batches of data, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from bigops.formats import quantize
from bigops.graph.sites import evaluating, run_example

Qparams = tuple[float, float]  # scale and zero point


class Calibration(NamedTuple):
    """What the data says of each layer."""

    qparams: dict[str, Qparams]
    left: dict[str, str]  # layers without a range, and why


def check_data(data: Any) -> None:
    """Raise TypeError unless ``data`` can be iterated for batches."""
    if isinstance(data, Tensor | Mapping | str | bytes) or not isinstance(data, Iterable):
        raise TypeError(
            "data: expected an iterable of batches, each as example_inputs (a list of one is "
            f"enough); got a {type(data).__name__}"
        )


def batches_of(data: Iterable[Any]) -> Iterator[Any]:
    """The batches of ``data``, each as `run_example` takes it.

    A list is one input. That of a `DataLoader` whose `default_collate` made it stands for the tuple
    that the data set has, and gives positions.
    """
    collated = isinstance(data, DataLoader) and data.collate_fn is default_collate
    for batch in data:
        yield tuple(batch) if collated and isinstance(batch, list) else batch


def calibrate(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], what: str
) -> Calibration:
    """The u8 qparams of all that each of ``layers`` is given while the model takes the batches.

    Every call counts, all of them where a layer is called several times in a forward pass. Of each
    layer two numbers are kept, so data of any length will do; it is read once.

    Args:
        model: in any mode; it runs in `eval` with gradients off.
        layers: by path.
        batches: each as `run_example` takes it.
        what: the name of the argument that they come from.

    Raises:
        ValueError: no batch, or NaN or inf in what a layer is given.
        Exception: whatever the model raises.
    """
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    broken: list[str] = []
    count = 0

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(x, Tensor) or not x.numel():
                return
            least, most = (float(edge) for edge in torch.aminmax(x.detach()))
            if not (math.isfinite(least) and math.isfinite(most)):
                broken.append(path)
            low[path] = min(low.get(path, 0.0), least)
            high[path] = max(high.get(path, 0.0), most)

        return hook

    handles = []
    try:
        for path, module in layers.items():
            handles.append(module.register_forward_pre_hook(watch(path), with_kwargs=True))
        with evaluating(model), torch.no_grad():
            for batch in batches:
                run_example(model, batch)
                if broken:
                    raise ValueError(
                        f"{what}: expected finite inputs of every layer to calibrate; got NaN or "
                        f"inf for {broken[0]} in batch {count}"
                    )
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError(f"{what}: expected at least one batch to calibrate with; got none")
    qparams: dict[str, Qparams] = {}
    left: dict[str, str] = {}
    for path in layers:
        if path not in low:
            left[path] = f"{what} never calls it, so its static activations have no range"
        elif low[path] == high[path] == 0:
            left[path] = f"{what} gives it zeros alone, of which static activations take no range"
        else:
            scale, zero = quantize.static_qparams(low[path], high[path]).tolist()
            qparams[path] = (scale, zero)
    return Calibration(qparams, left)
