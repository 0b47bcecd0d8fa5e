"""Our sides: the verbs on a copy of the model, eager, compiled, and deployed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import fx, nn

import bigops
from bigops.backend import machine
from bigops.benches.harness import OWN, LeftOut
from bigops.benches.models.rivals_torch import frozen, narrowed
from bigops.benches.models.side import Make, Side, inference, nbytes
from bigops.benches.models.subject import Call, Subject
from bigops.compress import Int4, Int8, Sparse
from bigops.compress.config import Configs
from bigops.formats.patterns import block_mask

SPARSITY = 0.8
SPARSE = f"sparse int8 {SPARSITY:.0%}"


def isa() -> str:
    """What our kernels use."""
    return "none" if machine.extension is None else str(machine.extension.isa())


def pruned(model: nn.Module, sparsity: float = SPARSITY) -> nn.Module:
    """A copy without the 1x4 blocks that `Sparse` drops, still dense."""
    sparse = copy.deepcopy(model)
    for part in sparse.modules():
        if isinstance(part, nn.Linear):
            mask = block_mask(part.weight, sparsity).repeat_interleave(4, dim=1)
            with torch.no_grad():
                part.weight.mul_(mask[:, : part.in_features])
    return sparse


Way = Callable[[nn.Module, Subject], tuple[Call, nn.Module | None]]
"""(model, subject) -> its call, and the module whose operators the profiler sees, if it does."""


def as_it_is(model: nn.Module, subject: Subject) -> tuple[Call, nn.Module]:
    """Eager."""
    return inference(model), model


def by_inductor(model: nn.Module, subject: Subject) -> tuple[Call, None]:
    """``torch.compile`` of a compressed model: its products are ours, the rest Inductor's."""
    return frozen(model, subject.inputs), None


def by_backend(model: nn.Module, subject: Subject) -> tuple[Call, None]:
    """``torch.compile(model, backend="bigops")``; the one place that calls it.

    Raises:
        LeftOut: this bigops has none.
    """
    if OWN not in torch._dynamo.list_backends(exclude_tags=()):
        raise LeftOut(f"{OWN}: the installed package has no backend of torch.compile")
    return frozen(model, subject.inputs, OWN), None


def deployed(model: nn.Module, subject: Subject, dynamic: bool = False) -> tuple[Call, nn.Module]:
    """`bigops.deploy` of a model, compressed or not; the one place that calls it.

    Raises:
        LeftOut: this bigops has none.
    """
    deploy = getattr(bigops, "deploy", None)
    if deploy is None:
        raise LeftOut(f"{OWN}: no deploy in this version")
    ready: nn.Module = deploy(named(model, len(subject.inputs)), subject.inputs, dynamic=dynamic)
    return inference(ready), ready


def named(model: nn.Module, count: int) -> nn.Module:
    """The model behind arguments x0, x1 ..: deploy wants names where a forward takes ``*past``."""
    graph = fx.Graph()
    places = tuple(graph.placeholder(f"x{place}") for place in range(count))
    graph.output(graph.call_module("model", places))
    return fx.GraphModule(nn.ModuleDict({"model": model}), graph).eval()


def deployed_at_any_size(model: nn.Module, subject: Subject) -> tuple[Call, nn.Module]:
    """`deployed` with what sizes the model lets vary left open."""
    return deployed(model, subject, dynamic=True)


def side(name: str, config: Configs | None, way: Way, subject: Subject) -> Side:
    """A copy of the model, its activations fused and its layers compressed, run in a way.

    Raises:
        LeftOut: this bigops lacks the way.
    """
    model = copy.deepcopy(subject.model)
    twin = None
    if config is not None:
        if way is as_it_is:
            bigops.fuse_(model)
        record = bigops.compress_(model, config)
        if "sparse" in name:
            twin = copy.deepcopy(subject.model)
            for layer in record.done:
                twin.set_submodule(layer.name, pruned(twin.get_submodule(layer.name)))
    return _side(name, model, way, subject, twin)


def bf16(subject: Subject) -> Side:
    """Deployed in bfloat16, nothing compressed.

    Raises:
        LeftOut: this bigops has no deploy.
    """
    return _side("deployed bf16", narrowed(subject, torch.bfloat16), deployed, subject)


def _side(
    name: str, model: nn.Module, way: Way, subject: Subject, twin: nn.Module | None = None
) -> Side:
    call, module = way(model, subject)
    size = nbytes(model if module is None else module)
    return Side(f"{OWN} {name}", call, isa(), size, reference=twin, module=module)


def makers(decode: bool) -> dict[str, Make]:
    """Our sides by name."""
    forms: dict[str, Configs] = {"int8": Int8(), SPARSE: Sparse(SPARSITY) + Int8()}
    if decode:
        forms["int4"] = Int4(group=64)
    ways: dict[str, Way] = {"": as_it_is, "compiled ": by_inductor, "deployed ": deployed}
    found: dict[str, Make] = {
        f"{OWN} {way}{form}": partial(side, f"{way}{form}", config, run)
        for form, config in forms.items()
        for way, run in ways.items()
    }
    found[f"{OWN} backend"] = partial(side, "backend", None, by_backend)
    found[f"{OWN} deployed bf16"] = bf16
    return found
