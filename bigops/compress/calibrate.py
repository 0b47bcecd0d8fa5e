"""Static qparams: what the inputs of each layer over batches of data say, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from bigops.compress.observers import MINMAX, Observer, Qparams, Seen
from bigops.graph.sites import evaluating, run_example


class Calibration(NamedTuple):
    """What the data says of each layer."""

    qparams: dict[str, Qparams]
    left: dict[str, str]  # layers without a range, and why
    notes: list[str]


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


def run_batches(
    model: nn.Module, batches: Iterable[Any], what: str, after: Callable[[int], None]
) -> None:
    """Give the model one batch after the other, in `eval` with gradients off.

    The model is as before afterwards, whatever becomes of it (`bigops.graph.looking`).

    Args:
        batches: each as `run_example` takes it.
        what: the name of the argument that they come from.
        after: is called after each batch, with its number.

    Raises:
        ValueError: there is none.
        Exception: whatever the model raises.
    """
    count = 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            run_example(model, batch)
            after(count)
            count += 1
    if not count:
        raise ValueError(
            f"{what}: expected at least one batch to calibrate with; got none (a generator gives "
            "its batches once)"
        )


def calibrate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    what: str,
    observers: Mapping[str, Observer] | None = None,
) -> Calibration:
    """The u8 qparams of all that each of ``layers`` is given while the model takes the batches.

    Every call counts, all of them where a layer is called several times in a forward pass. What is
    kept of a layer is of one size (`Seen`), so data of any length will do; it is read once.

    Args:
        model: in any mode; it runs in `eval` with gradients off.
        layers: by path.
        batches: each as `run_example` takes it.
        what: the name of the argument that they come from.
        observers: by path; `MinMax` where there is none.

    Raises:
        ValueError: no batch, or NaN or inf in what a layer is given.
        Exception: whatever the model raises.
    """
    chosen = {path: (observers or {}).get(path, MINMAX) for path in layers}
    seen = {path: Seen(observer.counts) for path, observer in chosen.items()}
    broken: list[str] = []

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(x, Tensor):
                return
            try:
                seen[path].add(x)
            except ValueError:
                broken.append(path)

        return hook

    def check(batch: int) -> None:
        if broken:
            raise ValueError(
                f"{what}: expected finite inputs of every layer to calibrate; got NaN or inf for "
                f"{broken[0]} in batch {batch}"
            )

    handles = []
    try:
        for path, module in layers.items():
            handles.append(module.register_forward_pre_hook(watch(path), with_kwargs=True))
        run_batches(model, batches, what, check)
    finally:
        for handle in handles:
            handle.remove()
    found = Calibration({}, {}, [])
    for path, observer in chosen.items():
        settled = observer.find(seen[path])
        if settled is not None:
            found.qparams[path] = settled.qparams
            if settled.remark:
                found.notes.append(f"{path}: {settled.remark}")
        elif seen[path].numbers:
            found.left[path] = (
                f"{what} gives it zeros alone, of which static activations take no range"
            )
        else:
            found.left[path] = f"{what} never calls it, so its static activations have no range"
    return found
