"""What a forward pass leaves in memory for the backward pass, by the block that made it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigops.graph.looking import looking
from bigops.graph.sites import as_call

Runs = Callable[[], Any]


class Held(NamedTuple):
    """Bytes of one training step, beyond what lived before it: parameters, inputs, states."""

    saved: int
    """Alive when the forward pass has ended, its result included."""
    peak: int
    """The most alive at a time until all gradients are made, these included."""
    of: dict[str, int]
    """What of ``saved`` each block made."""


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operators give, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.block = ""
        self.of: dict[str, int] = {}
        self._known: dict[int, Any] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out what lives already."""
        for tensor in tensors:
            self._add(tensor, counts=False)

    def _add(self, tensor: Tensor, counts: bool = True) -> None:
        if tensor.layout is not torch.strided or tensor.is_nested:
            return
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # of a wrapper without one
            return
        key, size, block = storage._cdata, storage.nbytes() if counts else 0, self.block
        if key in self._known:
            return

        def freed(_: Any) -> None:
            del self._known[key]
            self.now -= size
            self.of[block] = self.of.get(block, 0) - size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.of[block] = self.of.get(block, 0) + size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ignore(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return found


@contextmanager
def _around(
    blocks: Mapping[str, nn.Module], begin: Callable[[str], None], end: Callable[[str], None]
) -> Iterator[None]:
    """Call these before and after each block."""
    hooks = []
    try:
        for path, block in blocks.items():
            # of a loop variable each
            before = lambda *_, path=path: begin(path)  # noqa: E731
            after = lambda *_, path=path: end(path)  # noqa: E731
            hooks.append(block.register_forward_pre_hook(before))
            hooks.append(block.register_forward_hook(after, always_call=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def held(model: nn.Module, example_inputs: Any, blocks: Mapping[str, nn.Module]) -> Held:
    """What one training step of ``model`` holds; the model is as before afterwards.

    Tensors that operators give are counted, not the scratch memory within them.
    """
    args, kwargs = as_call(example_inputs)
    alive = _Alive()

    def block_is(path: str) -> None:
        alive.block = path

    with looking(model), torch.enable_grad(), _around(blocks, block_is, lambda _: block_is("")):
        lived = [*model.parameters(), *model.buffers(), *_tensors((args, kwargs))]
        alive.ignore(lived)
        with alive:
            result = model(*args, **kwargs)
            saved, of = alive.now, dict(alive.of)
            total = scalar(result)
            wanted = [p for p in model.parameters() if p.requires_grad]
            # that frees what it has been through, as a loop does
            del result
            grads = torch.autograd.grad(total, wanted, allow_unused=True)
            peak = alive.peak
        del grads, total
    return Held(saved, peak, {path: of.get(path, 0) for path in blocks})


def seconds(
    model: nn.Module, example_inputs: Any, blocks: Mapping[str, nn.Module]
) -> dict[str, float]:
    """Seconds of each block's forward pass: the shorter of two."""
    args, kwargs = as_call(example_inputs)
    started: dict[str, float] = {}
    best: dict[str, float] = {}

    def now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(path: str) -> None:
        started[path] = now()

    def end(path: str) -> None:
        best[path] = min(best.get(path, float("inf")), now() - started[path])

    for _ in range(2):
        with looking(model, timed=True), torch.no_grad(), _around(blocks, begin, end):
            model(*args, **kwargs)
    return best


def scalar(result: Any) -> Tensor:
    """What a backward pass may begin with: the loss of a result, or the sum of its tensors."""
    loss = getattr(result, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss
    parts = [t.sum() for t in _tensors(result) if t.requires_grad]
    if not parts:
        raise ValueError(
            "example_inputs: expected inputs whose result has a gradient; got a result without"
        )
    return torch.stack([part.double() for part in parts]).sum()


def _tensors(of: Any) -> list[Tensor]:
    return [t for t in tree_leaves(of) if isinstance(t, Tensor)]
