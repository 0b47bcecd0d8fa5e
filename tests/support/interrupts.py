"""Exceptions at every line of a verb in turn, as Ctrl-C or a lack of memory raises them there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor, nn

import bigops
from bigops.graph.atomic import MODES

ROOT = str(Path(bigops.__file__).parent)


def state(model: nn.Module) -> list[Any]:
    """Everything by which two states of one model differ: objects by identity, values by content.

    Objects are kept, not their ids, so that none takes the place of one that is gone.
    """
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        found += [name, Same(module), module.training, len(module._forward_pre_hooks)]
        found += [(k, list(v)) for k, v in vars(module).items() if isinstance(v, list | dict)]
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            kept = None if tensor is None else (Same(tensor), tensor.requires_grad, _bits(tensor))
            found.append((leaf, kept))
        if type(module).__module__.startswith("bigops"):
            rest = {k: v for k, v in vars(module).items() if isinstance(v, int | str | tuple)}
            found.append(rest)
    return found


class Same:
    """An object that equals itself only."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held

    __hash__ = None  # type: ignore[assignment]


def _bits(tensor: Tensor) -> Any:
    return None if tensor.is_meta else tensor.detach().cpu().double().nan_to_num(7.0).tolist()


def lines(call: Callable[[], object], at: int = -1) -> tuple[int, str | None]:
    """Run ``call``; the lines of the package that ran, and where KeyboardInterrupt was raised.

    Args:
        call: calls a verb.
        at: the number of the line, from 1, before which it is raised; -1: at none.
    """
    count = 0
    place: str | None = None

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count, place
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        if event in ("call", "line"):
            count += 1
            if count == at:
                sys.settrace(None)
                place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt(place)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return count, place
    finally:
        sys.settrace(before)
    return count, None  # none was raised, or Python dropped it (at the end of a generator)


def check_every_line(
    make: Callable[[], nn.Module],
    verb: Callable[[nn.Module], object],
    which: Callable[[int], Iterable[int]] = lambda count: range(1, count + 1),
) -> int:
    """Interrupt a verb at its lines in turn and fail unless the model is each time as it was.

    Args:
        make: a new model, the same each time.
        verb: what is called with it.
        which: of the numbers 1 to ``count`` of the lines, those to interrupt.

    Returns:
        How often it was interrupted.
    """
    verb(make())  # what is made once per process is made now
    done = make()
    untouched = state(done)
    count, _ = lines(lambda: verb(done))
    assert state(done) != untouched, "the verb changes nothing"
    depths = [len(stack()) for stack in MODES]
    hit = 0
    for at in which(count):
        model = make()
        before = state(model)
        _, place = lines(lambda m=model: verb(m), at)  # type: ignore[misc]
        if place is None:
            continue
        hit += 1
        assert state(model) == before, f"interrupted at {place} the model is changed"
        assert [len(stack()) for stack in MODES] == depths, f"{place}: a mode of torch is left on"
    return hit
