"""What each rank of test_parallel.py runs; arguments: the case and a folder for results."""

import sys
from pathlib import Path

import torch
from torch import nn

from bigops.nn import Linear
from bigops.parallel import World, init
from bigops.recipes import mlp
from bigops.recipes.data import load
from bigops.train import AdamW, MixedPrecision


def skip(world: World, own: bool) -> dict:
    """One rank alone meets an inf; every rank must leave out the step."""
    torch.manual_seed(0)
    model = nn.Sequential(Linear(8, 16, activation="relu"), Linear(16, 4))
    wrapped = world.wrap(model)
    optimizer: torch.optim.Optimizer
    if own:
        optimizer = AdamW(model.parameters(), lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    precision = MixedPrecision("fp16-mixed", init_scale=1024.0)
    seen: dict = {"stepped": [], "scale": [], "weights": []}
    for step in range(4):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        x = world.shard(x)
        if step == 2 and world.rank == 1:
            x[0, 0] = float("inf")
        with precision.autocast():
            loss = wrapped(x).float().square().mean()
        optimizer.zero_grad()
        precision.backward(loss)
        seen["stepped"].append(bool(precision.step(optimizer, clip_norm=1.0)))
        seen["scale"].append(precision.scale)
        seen["weights"].append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return seen


def train(world: World) -> dict:
    """Ragged shares: batches of 33 rows and a last one of 1 row, which leaves rank 1 none."""
    dataset = load("digits").subset(331)
    model = mlp.build(dataset.features, (24, 16), seed=5, dtype=torch.float64)
    history = mlp.train(
        model, dataset, epochs=2, batch_size=33, precision="fp32", world=world, seed=7
    )
    model_after = nn.utils.parameters_to_vector(model.parameters()).detach()
    return {"losses": history.losses, "weights": model_after}


def main() -> None:
    case, folder = sys.argv[1], Path(sys.argv[2])
    with init("cpu", timeout_s=120) as world:
        world.print("first rank")
        if case == "fail":
            if world.rank == 1:
                raise RuntimeError("planted failure")
            return
        seen = {"skip": skip(world, False), "skip_own": skip(world, True), "train": train(world)}
        torch.save(seen, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    main()
