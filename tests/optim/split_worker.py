"""What each of two ranks of test_split.py runs; arguments: the case and a folder for results.

Gradients are made by the whole and cut, so that one process can make the same ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bigops.optim import placed
from bigops.parallel import init
from bigops.train import EMA, SGD, Adam, AdamW, step_in_backward

# 70 rows are uneven for 3, the second layer's for 2; a short bias that is split inside a block.
SIZES = (300, 71, 130)
FORMS: dict[str, tuple[torch.dtype, Any, dict[str, Any]]] = {
    "stochastic": (torch.bfloat16, AdamW, {}),
    "8 bit": (torch.bfloat16, AdamW, {"eight_bit": True}),
    "masters": (torch.bfloat16, Adam, {"master_weights": True, "eight_bit": True}),
    "momentum": (torch.bfloat16, SGD, {"momentum": 0.9, "eight_bit": True}),
    "fp32": (torch.float32, AdamW, {}),
}


def model_of(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Linear(*SIZES[:2]), nn.Linear(*SIZES[1:])
    return nn.Sequential(first, nn.Tanh(), second).to(dtype)


def optimizer_of(model: nn.Module, form: str) -> Any:
    _, make, options = FORMS[form]
    return make(model.parameters(), lr=2e-2, weight_decay=0.1, seed=3, **options)


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(50 + step)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = placed.laid(grad, p)  # type: ignore[assignment]


def run(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def whole(value: Any) -> Any:
    """Everything gathered, codes as plain tensors."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, DTensor):
        return value.full_tensor()
    return value.clone() if isinstance(value, Tensor) else value


def seen(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {
        "weights": [whole(p.detach()) for p in model.parameters()],
        "states": [whole(dict(optimizer.state[p])) for p in model.parameters()],
    }


def straight(form: str, steps: int, split: bool) -> tuple[nn.Module, Any]:
    model = model_of(FORMS[form][0])
    if split:
        fully_shard(model)
    optimizer = optimizer_of(model, form)
    run(model, optimizer, range(steps))
    return model, optimizer


def content(model: nn.Module, optimizer: Any, path: Path) -> tuple[dict[str, Any], Any]:
    """What a file holds: by groups, and as pipelines save it, by names alone."""
    options = StateDictOptions(flatten_optimizer_state_dict=path.name.endswith("whole"))
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    return {"model": model.state_dict(), "optim": optim}, options


def saved(model: nn.Module, optimizer: Any, path: Path) -> None:
    state, _ = content(model, optimizer, path)
    dcp.save(state, checkpoint_id=path)


def loaded(form: str, path: Path, split: bool) -> tuple[nn.Module, Any]:
    model = model_of(FORMS[form][0])
    if split:
        fully_shard(model)
    optimizer = optimizer_of(model, form)
    optimizer.make_states()
    state, options = content(model, optimizer, path)
    dcp.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"], options=options)
    return model, optimizer


def from_plain(form: str, path: Path) -> tuple[nn.Module, Any]:
    """The file of one process, whole on every rank, into a split model and its optimiser."""
    state = torch.load(path, weights_only=True)
    model = model_of(FORMS[form][0])
    model.load_state_dict(state["model"])
    fully_shard(model)
    optimizer = optimizer_of(model, form)
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


def tensor_parallel() -> dict[str, Any]:
    """A split after whole blocks and one inside a row, by columns; what is refused."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weights = [torch.randn(9, 1024).bfloat16(), torch.randn(30, 7).bfloat16()]
    params = [nn.Parameter(distribute_tensor(w, mesh, [Shard(1)])) for w in weights]
    plain = [nn.Parameter(w.clone()) for w in weights]
    results = []
    for held in (params, plain):
        optimizer = AdamW(held, lr=1e-2, eight_bit=True)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            for p in held:
                grad = torch.randn(p.shape, generator=generator).bfloat16()
                p.grad = placed.laid(grad, p)  # type: ignore[assignment]
            optimizer.step()
        results.append(
            [[whole(p.detach()) for p in held], [whole(dict(optimizer.state[p])) for p in held]]
        )
    said = []
    split = params[1]
    moved = AdamW([split])
    moved.make_states()
    moved.state[split]["exp_avg"] = torch.zeros(30, 7)
    bad = nn.Parameter(distribute_tensor(torch.randn(9, 700), mesh, [Shard(1)]))
    bad.grad = torch.zeros_like(bad)
    optimizer = AdamW([bad], eight_bit=True)
    version = bad._version
    AdamW([bad]).step()
    assert bad._version > version  # a graph that saved it is told
    assert AdamW([bad]).step_checked(clip_norm=1.0)
    for call in (optimizer.step, moved.step):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return {"split": results[0], "plain": results[1], "said": said}


def in_backward(folder: Path) -> list[Any]:
    """FSDP2 hands each reduced gradient to the step; the bits of the ordinary step."""
    results = []
    for hooked in (False, True):
        model = model_of(torch.float32)
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
        optimizer = optimizer_of(model, "fp32")
        ema = EMA(model, 0.9)
        if hooked:
            step_in_backward(optimizer)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(5, SIZES[0], generator=generator)).square().mean().backward()
            assert hooked == all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
        results.append([seen(model, optimizer), whole(ema.state_dict())])
    refused = ""
    plain = model_of(torch.float32)
    try:
        step_in_backward(optimizer_of(plain, "fp32"))
    except ValueError as error:
        refused = str(error)
    return [*results, refused]


def main() -> None:
    folder = Path(sys.argv[1])
    results: dict[str, Any] = {}
    with init("cpu", timeout_s=120) as world:
        for form in FORMS:
            path = folder / f"{form} split"
            model, optimizer = straight(form, 3, True)
            first = optimizer.state[next(model.parameters())]
            kinds = {k: type(v).__name__ for k, v in first.items() if k != "step"}
            saved(model, optimizer, path)
            run(model, optimizer, range(3, 5))
            again = loaded(form, path, True)
            run(*again, range(3, 5))
            back = loaded(form, folder / f"{form} whole", True)  # one process has written it
            run(*back, range(3, 5))
            plain = from_plain(form, folder / f"{form}.pt")
            run(*plain, range(3, 5))
            results[form] = {
                "kinds": kinds,
                "straight": seen(model, optimizer),
                "again": seen(*again),
                "back": seen(*back),
                "plain": seen(*plain),
            }
        results["tensor parallel"] = tensor_parallel()
        results["in backward"] = in_backward(folder)
        if world.rank == 0:
            torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main()
