"""What each rank of test_ranks.py runs; argument: a folder for results."""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bigops import amp
from bigops.optim.grad_norm import norm_over_ranks
from bigops.parallel import World, init
from bigops.train import SGD, AdamW, MixedPrecision

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "own": lambda p: AdamW(p, lr=1e-2),
    "own 8 bits": lambda p: AdamW(p, lr=1e-2, eight_bit=True),
    "torch": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "torch fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "torch momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def held(params: list[Tensor], optimizer: Any) -> list[Tensor]:
    """A copy of weights and states, each rank's own part."""
    tensors = [p.detach() for p in params]
    for param in params:
        state = optimizer.state.get(param, {})
        tensors += [state[key] for key in sorted(state) if isinstance(state[key], Tensor)]
    return [(t.to_local() if isinstance(t, DTensor) else t).clone() for t in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(
    params: list[Tensor], optimizer: Any, give: Callable[[int], None], bad: int, steps: int = 4
) -> dict[str, Any]:
    """Steps of MixedPrecision on gradients that ``give(step)`` plants, of which ``bad`` skips."""
    precision = MixedPrecision("fp16-mixed", init_scale=1024.0)
    seen: dict[str, Any] = {"stepped": [], "norm": [], "scale": [], "skips": []}
    for step in range(steps):
        precision.backward(torch.zeros((), requires_grad=True) * 1.0)
        give(step)
        before = held(params, optimizer)
        result = precision.step(optimizer, clip_norm=1.0)
        seen["stepped"].append(bool(result))
        seen["norm"].append(float(result.norm))
        seen["scale"].append(float(result.scale))
        seen["skips"].append(int(result.skips))
        if step >= bad:
            seen["kept" if step == bad else "moved"] = same(before, held(params, optimizer))
    seen["weights"] = [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in params]
    return seen


def unreduced(world: World, name: str) -> dict[str, Any]:
    """Plain gradients that no all-reduce has seen: rank 1 alone has an inf."""
    torch.manual_seed(0)
    params = [torch.randn(70, 90, requires_grad=True), torch.randn(7, requires_grad=True)]

    def give(step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) * 1024
        if step == 2 and world.rank == 1:
            params[1].grad[3] = float("inf")

    return run(params, OPTIMIZERS[name](params), give, bad=2)


def meshes(world: World, bad_in: int) -> dict[str, Any]:
    """DTensors of two meshes beside plain parameters; rank 1's part of one holds a NaN."""
    torch.manual_seed(0)
    full = [torch.randn(5, 6), torch.randn(4, 3), torch.randn(8), torch.randn(6, 2)]
    line = init_device_mesh("cpu", (2,))
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    places = [
        lambda t: distribute_tensor(t, line, [Shard(0)]),  # 3 rows and 2
        lambda t: distribute_tensor(t, line, [Replicate()]),
        lambda t: distribute_tensor(t, square, [Replicate(), Shard(0)]),
        lambda t: t,
    ]
    params = [place(t.clone()).requires_grad_() for place, t in zip(places, full, strict=True)]
    sizes: list[float] = []

    def give(step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(t.shape, generator=generator) * 1024 for t in full]
        sizes.append(float(torch.cat([g.double().flatten() for g in grads]).norm()) / 1024)
        for param, place, grad in zip(params, places, grads, strict=True):
            param.grad = place(grad)
        if step == 1 and world.rank == 1:
            grad = params[bad_in].grad
            (grad.to_local() if isinstance(grad, DTensor) else grad).view(-1)[-1] = float("nan")

    optimizer = torch.optim.AdamW(
        [{"params": params[:2]}, {"params": params[2:3]}, {"params": params[3:]}], lr=1e-2
    )
    seen = run(params, optimizer, give, bad=1)
    halves = DTensor.from_local(full[0] * (1 + world.rank), line, [Partial()])
    partial, _ = norm_over_ranks([halves, params[0]])
    expected = (3 * full[0].double()).norm().hypot(params[0].full_tensor().double().norm())
    return {**seen, "sizes": sizes, "partial": float(partial), "expected": float(expected)}


def microbatch(world: World) -> dict[str, Any]:
    """A NaN in the first of two microbatches of rank 0, which no_sync keeps to itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    wrapped = DistributedDataParallel(model)
    params = list(model.parameters())
    optimizer = AdamW(params, lr=1e-2)
    precision = MixedPrecision("bf16-mixed")
    seen: dict[str, Any] = {"stepped": []}
    for step in range(3):
        optimizer.zero_grad()
        before = held(params, optimizer)
        for part in range(2):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(4 * step + part))
            if step == 1 and part == 0 and world.rank == 0:
                x[2, 3] = float("nan")
            with wrapped.no_sync() if part == 0 else nullcontext():
                with precision.autocast():
                    loss = wrapped(x).float().square().mean()
                precision.backward(loss)
        seen["stepped"].append(bool(precision.step(optimizer, clip_norm=1.0)))
        if step == 1:
            seen["kept"] = same(before, held(params, optimizer))
    return {**seen, "weights": [p.detach() for p in params]}


TOKENS = ((3, 11), (0, 6))  # of the microbatches of each rank; the others are padding
VOCABULARY = 7


def batch(rank: int, part: int) -> tuple[Tensor, Tensor]:
    """x [12, 5] and targets [12], -100 where there is no token."""
    generator = torch.Generator().manual_seed(10 * rank + part)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, VOCABULARY, (12,), generator=generator)
    y[TOKENS[rank][part] :] = -100
    return x, y


def tokens(world: World, sharded: bool) -> list[Tensor]:
    """The weights after a step of lr 1: they moved by the gradient of the mean over all tokens."""
    torch.manual_seed(0)
    model = nn.Linear(5, VOCABULARY, dtype=torch.float64)
    start = [p.detach().clone() for p in model.parameters()]
    wrapped: Any = fully_shard(model) if sharded else DistributedDataParallel(model)
    optimizer: Any = (torch.optim.SGD if sharded else SGD)(model.parameters(), lr=1.0)
    precision = MixedPrecision("fp32")
    for part in range(2):
        x, y = batch(world.rank, part)
        with nullcontext() if sharded or part == 1 else wrapped.no_sync():
            loss = F.cross_entropy(wrapped(x), y, reduction="sum")
            precision.backward(loss, weight=(y != -100).sum())
    assert precision.step(optimizer)
    ends = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [a - b.detach() for a, b in zip(start, ends, strict=True)]


def apex(world: World, wrap: bool) -> dict[str, Any]:
    """amp O2: the half gradients of rank 1 alone overflow, or those that DDP reduces."""
    torch.manual_seed(0)
    model: Any = nn.Linear(8, 4)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = amp.initialize(model, optimizer, opt_level="O2")
    model = DistributedDataParallel(model) if wrap else model
    seen: dict[str, Any] = {"scale": [], "kept": []}
    for step in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        loss = model(torch.full((2, 8), 0.1 + 0.1 * world.rank)).square().mean()
        with amp.scale_loss(loss, optimizer) as scaled:
            (scaled * (float("inf") if step == 1 and world.rank == 1 else 1.0)).backward()
        optimizer.step()
        seen["scale"].append(amp.state_dict()["loss_scaler0"]["loss_scale"])
        seen["kept"].append(same(before, [p.detach() for p in model.parameters()]))
        optimizer.zero_grad()
    return {**seen, "weights": [p.detach() for p in model.parameters()]}


def stages(world: World) -> list[float]:
    """Norm, as clipped, and verdict of the stages of a pipeline, each with its own parameters."""
    found = []
    for bad in (False, True):
        param = torch.zeros(3, requires_grad=True)
        optimizer = SGD([param], lr=1.0)
        precision = MixedPrecision("fp32", pipeline=dist.group.WORLD)
        precision.backward((param * (3.0 + world.rank)).sum() * (math.nan if bad else 1.0))
        result = precision.step(optimizer, clip_norm=1.0)
        found += [float(result.norm), float(param.detach()[0])]
    return found


def alone(world: World) -> list[bool]:
    """process_group="none": each rank goes its own way; a group of one is the same."""
    groups = [dist.new_group([rank]) for rank in range(world.size)]
    stepped = []
    for group in ("none", groups[world.rank]):
        param = torch.ones(3, requires_grad=True)
        precision = MixedPrecision("fp32", process_group=group)
        precision.backward((param * (float("nan") if world.rank else 1.0)).sum())
        stepped.append(bool(precision.step(SGD([param]), clip_norm=float("inf"))))
        stepped.append(SGD([param]).step_checked(process_group=group))
    return stepped


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with init("cpu", timeout_s=120) as world:
        seen = {
            "unreduced": {name: unreduced(world, name) for name in OPTIMIZERS},
            "meshes": [meshes(world, i) for i in range(4)],
            "microbatch": microbatch(world),
            "tokens": [tokens(world, sharded) for sharded in (False, True)],
            "apex": [apex(world, wrap) for wrap in (False, True)],
            "stages": stages(world),
            "alone": alone(world),
        }
        torch.save(seen, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    main()
