"""One script on one process, on two spawned ones and on two of torchrun: the same losses.

The script is `script`: gloo, a `Sampler` that gives each rank its share of a batch, and torch's
DistributedDataParallel, in float64. Batches are of an odd size, so that shares differ.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from bigops.files import replacing
from bigops.graph.plain import plain
from bigops.parallel import World, init
from bigops.recipes.data import load
from bigops.recipes.mlp import build
from bigops.recipes.run import STATE, Run
from bigops.train import AdamW, Sampler

RANKS, ROWS, BATCH, LR = 2, 10_000, 255, 1e-3
HIDDEN = (256, 128)


def script(world: World, options: dict[str, Any], *, by_torch: bool = False) -> None:
    """Train on this rank; the first one writes the losses of all steps at the end.

    Args:
        options: leg, folder, seed, epochs, data and hidden.
        by_torch: with torch's own layers and optimiser.
    """
    folder = Path(options["folder"]) / options["leg"]
    # Ranks save together, so at the end of an epoch and not by the clock of one of them.
    run = Run(
        folder,
        seed=options["seed"],
        epochs=options["epochs"],
        progress=world.is_first,
        save_every=math.inf,
    )
    dataset = load(options["data"])
    rows = min(ROWS, len(dataset.train_x))
    x, y = dataset.train_x[:rows].double(), dataset.train_y[:rows]
    sizes = dataset.features, options["hidden"], dataset.classes
    model: torch.nn.Module = build(*sizes, seed=run.seed, dtype=torch.float64)
    model = plain(model) if by_torch else model
    optimizer = (torch.optim.AdamW if by_torch else AdamW)(model.parameters(), lr=LR)
    sampler = Sampler(rows, BATCH, seed=run.seed, pad=False, rank=world.rank, world_size=world.size)
    wrapped = world.wrap(model)
    run.start(run.epochs * len(sampler), model=model, optimizer=optimizer, sampler=sampler)
    while sampler.epoch < run.epochs:
        for taken in sampler:
            chosen = torch.tensor(taken, dtype=torch.int64, device=world.device)
            losses = F.cross_entropy(wrapped(x[chosen]), y[chosen], reduction="none")
            loss = world.batch_loss(losses, sampler.taken.size)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=world.mean(loss))
        run.save()
    run.close()
    if world.is_first:
        with replacing(folder / "losses.json") as temporary:
            temporary.write_text(json.dumps(run.curves["loss"]))


def _alone(options: dict[str, Any]) -> None:
    script(World(0, 1, torch.device("cpu")), options)


def _by_torch(options: dict[str, Any]) -> None:
    script(World(0, 1, torch.device("cpu")), options, by_torch=True)


def _rank(rank: int, options: dict[str, Any]) -> None:
    torch.set_num_threads(options["threads"])
    with init(rank=rank, world_size=RANKS) as world:
        script(world, options)


def _spawned(options: dict[str, Any]) -> None:
    torch.multiprocessing.spawn(_rank, args=(options,), nprocs=RANKS)


def _under_torchrun(options: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={RANKS}", "-m", "bigops.recipes.ddp", json.dumps(options)]
    if code := subprocess.run(command).returncode:
        raise ChildProcessError(f"torchrun: ended with {code}")


LEGS: dict[str, Callable[[dict[str, Any]], None]] = {
    "one": _alone,
    "torch": _by_torch,
    "spawn": _spawned,
    "torchrun": _under_torchrun,
}


def compared(curves: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
    """Largest difference of two ranks' losses to those of one process, over what may be.

    What may be is the numerics rule: twice the largest difference that torch's own layers and
    optimiser have on one process, and 32 eps of the largest loss.

    Args:
        curves: [step, loss] pairs of each leg.

    Raises:
        ValueError: legs of other steps.
    """
    found = {leg: torch.tensor(curves[leg], dtype=torch.float64, device="cpu") for leg in LEGS}
    one = found.pop("one")
    for leg, curve in found.items():
        if curve.shape != one.shape or not torch.equal(curve[:, 0], one[:, 0]):
            raise ValueError(f"{leg}: expected the steps of one process; got {len(curve)} points")
    differs = {leg: float((curve - one)[:, 1].abs().max()) for leg, curve in found.items()}
    largest = float(one[:, 1].abs().max())
    may = 2 * differs["torch"] + 32 * torch.finfo(torch.float64).eps * largest
    return {"difference": max(differs["spawn"], differs["torchrun"]) / may, **differs}


def train(run: Run, data: str = "mnist", hidden: Sequence[int] = HIDDEN) -> dict[str, float]:
    """Run all legs, each in a folder of its own from which it goes on, and compare them."""
    legs = run.folder / STATE  # which goes when the run has ended
    options = {"folder": str(legs), "seed": run.seed, "epochs": run.epochs, "data": data}
    options |= {"hidden": list(hidden), "threads": max(1, torch.get_num_threads() // RANKS)}
    run.start(len(LEGS))
    run.save()  # before a leg leaves something there
    for leg in list(LEGS)[run.done :]:
        LEGS[leg]({**options, "leg": leg})
        run.step()
        run.save()
    for leg in LEGS:
        run.curves[leg] = json.loads((legs / leg / "losses.json").read_text())
    return compared(run.curves)


def main(arguments: Sequence[str]) -> None:
    """A rank under torchrun; its argument is the options as JSON."""
    options = json.loads(arguments[0])
    torch.set_num_threads(options["threads"])
    with init() as world:
        script(world, options)


if __name__ == "__main__":
    main(sys.argv[1:])
