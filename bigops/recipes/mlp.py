"""The model and the training loop of the main job: a classifier of fused linear layers.

Run it alone or on several processes::

    python -m bigops.recipes.mlp --data mnist --precision bf16-mixed
    torchrun --nproc-per-node 2 -m bigops.recipes.mlp --data digits --precision fp32

The loop sees plain modules only, so the same call fine-tunes a compressed model: its layers keep
their own pattern of zeros.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigops.files import replacing
from bigops.nn import Linear
from bigops.parallel import World, init
from bigops.recipes.data import NAMES, DataError, Dataset, load
from bigops.recipes.progress import reporter
from bigops.train import PRECISIONS, AdamW, MixedPrecision, Sampler

HIDDEN = (2048, 1024)


def build(
    features: int = 784,
    hidden: Sequence[int] = HIDDEN,
    classes: int = 10,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Sequential:
    """The MLP features-hidden-classes, relu fused into every layer but the last.

    The weights depend on ``seed`` and the sizes alone; torch's global random state stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [features, *hidden]
        layers: list[nn.Module] = [
            Linear(n, m, activation="relu") for n, m in itertools.pairwise(widths)
        ]
        layers.append(Linear(widths[-1], classes))
    return nn.Sequential(*layers).to(device, dtype)


@dataclass
class History:
    """What a training run saw."""

    losses: list[float] = field(default_factory=list)  # global batch loss of every step
    skipped: int = 0  # steps left out because of inf or NaN
    seconds: float = 0.0


def train(
    model: nn.Module,
    dataset: Dataset,
    *,
    epochs: int = 6,
    batch_size: int = 256,
    lr: float = 1e-3,
    precision: str | MixedPrecision = "bf16-mixed",
    weight_decay: float = 0.01,
    label_smoothing: float = 0.05,
    clip_norm: float | None = None,
    seed: int = 0,
    world: World | None = None,
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> History:
    """Train in place with AdamW and a one-cycle schedule; deterministic for equal arguments.

    Args:
        model: maps [rows, features] to logits [rows, classes]; left in training mode.
        dataset: its training split is used, in the model's own floating dtype.
        epochs, batch_size: passes over the data; rows per step over all ranks together. The last
            batch of an epoch may be smaller.
        lr: the schedule's peak, reached after a fifth of the steps.
        precision: a precision string, or a MixedPrecision to go on with; "bf16-true" takes a model
            in bfloat16.
        weight_decay: decoupled, on matrices only.
        label_smoothing: as in torch's cross_entropy.
        clip_norm: largest norm of the gradients together; None for no clipping.
        seed: of the order of rows. Every number of ranks visits the same batches.
        world: the processes of the run, from ``bigops.parallel.init``; None is one process.
        progress: show a bar on a terminal, a line now and then elsewhere (first rank only).
        on_step: called after each step with its number and the global batch loss.

    Raises:
        ValueError: ``epochs``, ``batch_size`` or ``lr`` out of range, or a model without
            trainable parameters.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs, batch_size: expected at least 1; got {epochs}, {batch_size}")
    if not lr > 0:
        raise ValueError(f"lr: expected a number above 0; got {lr}")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("model: expected trainable parameters, found none")
    device, dtype = params[0].device, params[0].dtype
    world = world or World(0, 1, device)
    if isinstance(precision, str):
        precision = MixedPrecision(precision, device)
    matrices = [p for p in params if p.dim() > 1]
    others = [p for p in params if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = AdamW(groups, lr=lr)
    x, y = dataset.train_x.to(device, dtype), dataset.train_y.to(device)
    sampler = Sampler(
        len(x), batch_size, seed=seed, pad=False, rank=world.rank, world_size=world.size
    )
    steps = epochs * len(sampler)
    history = History()
    wrapped = world.wrap(model)
    wrapped.train()
    begin = time.perf_counter()
    with reporter(steps, enabled=progress and world.is_first) as report:
        for _ in range(epochs):
            for batch in sampler:
                step = len(history.losses)
                for group in optimizer.param_groups:
                    group["lr"] = lr * one_cycle(step, steps)
                rows = torch.tensor(batch, dtype=torch.int64, device=device)
                with precision.autocast():
                    logits = wrapped(x[rows])
                    losses = F.cross_entropy(
                        logits, y[rows], reduction="none", label_smoothing=label_smoothing
                    )
                    loss = world.batch_loss(losses, sampler.taken.size)
                optimizer.zero_grad()
                precision.backward(loss)
                history.skipped += not precision.step(optimizer, clip_norm)
                history.losses.append(world.mean(loss).item())
                report(step + 1, f"loss {history.losses[-1]:.4f}")
                if on_step is not None:
                    on_step(step, history.losses[-1])
    history.seconds = time.perf_counter() - begin
    return history


def one_cycle(step: int, steps: int, warmup: float = 0.2) -> float:
    """Learning rate factor: linear up to 1 over ``warmup`` of the steps, then a cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1)))


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> float:
    """Share of rows classified correctly, in percent, in inference mode.

    Args:
        model: maps [rows, features] to logits [rows, classes]; its mode is restored.
        x, y: [rows, features] and int64 [rows].
        batch: rows per call.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            hits = sum(
                int((model(part).argmax(-1) == labels).sum())
                for part, labels in zip(x.split(batch), y.split(batch), strict=True)
            )
    finally:
        model.train(was_training)
    return 100.0 * hits / len(x)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and evaluate from the command line, in one process or under torchrun."""
    parser = argparse.ArgumentParser(prog="bigops.recipes.mlp", description=main.__doc__)
    parser.add_argument("--data", choices=NAMES, default="mnist")
    parser.add_argument("--root", help="folder that holds the data, instead of the package's")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16-mixed")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--hidden", type=int, nargs="+", default=list(HIDDEN), metavar="WIDTH")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=256, help="over all ranks together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--save", type=Path, help="write losses (JSON) and weights beside it (.pt)")
    args = parser.parse_args(arguments)

    try:
        dataset = load(args.data, args.root)
    except DataError as error:
        parser.error(str(error))
    with init(args.device) as world:
        true = args.precision == "bf16-true"  # its weights are in bfloat16 themselves
        dtype = torch.bfloat16 if true else getattr(torch, args.dtype)
        model = build(
            dataset.features,
            args.hidden,
            dataset.classes,
            seed=args.seed,
            dtype=dtype,
            device=world.device,
        )
        world.print(f"{args.data}: {len(dataset.train_x)} rows, {world.size} process(es)")
        history = train(
            model,
            dataset,
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            precision=args.precision,
            seed=args.seed,
            world=world,
            progress=not args.quiet,
        )
        if world.is_first:
            x = dataset.test_x.to(world.device, dtype)
            test = accuracy(model, x, dataset.test_y.to(world.device))
            print(f"{history.seconds:.1f} s, {history.skipped} steps skipped, test {test:.2f}%")
            if args.save:
                with replacing(args.save) as temporary:
                    temporary.write_text(json.dumps({"losses": history.losses, "test": test}))
                with replacing(args.save.with_suffix(".pt")) as temporary:
                    torch.save(model.state_dict(), temporary)


if __name__ == "__main__":
    main()
