"""The frame of a recipe: options, progress, saves to go on from, result.json and plot.png."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bigops
from bigops.backend import crossover, machine
from bigops.files import check_writable, replacing
from bigops.recipes.catalog import RECIPES, module_of
from bigops.recipes.data import DataError
from bigops.recipes.progress import reporter
from bigops.train import TrainState

RESULT, PLOT, STATE = "result.json", "plot.png", "state"
SAVE_EVERY = 20.0  # seconds: what a killed run loses at most
POINTS = 200  # of a curve, each the mean of the steps since the one before


class Paused(Exception):
    """The minutes that a call was given are over; the state is saved."""


class Run:
    """What a recipe's loop is given.

    ::

        def train(run):
            ...
            run.start(steps, model=model, optimizer=optimizer, sampler=sampler)
            while sampler.epoch < run.epochs:
                for x, y in sampler.over(loader):
                    ...
                    run.step(loss=loss)
                run.point(validation=accuracy(model))
            return {"test accuracy": accuracy(model)}

    Attributes:
        seed, epochs, precision: as asked for.
        done, steps: steps taken, and those of the whole run.
        curves: by name, [step, value] pairs: what the plot shows.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int = 0,
        epochs: int = 1,
        precision: str = "fp32",
        minutes: float | None = None,
        progress: bool = True,
        save_every: float = SAVE_EVERY,
    ) -> None:
        self.folder, self.seed, self.epochs, self.precision = folder, seed, epochs, precision
        self.done = self.steps = 0
        self.curves: dict[str, list[list[float]]] = {}
        self._sums: dict[str, list[float]] = {}  # since the last point: sum and count
        self._minutes, self._progress, self._save_every = minutes, progress, save_every
        # Seconds, and those of the CPU, of the calls that this one goes on from.
        self._before, self._cpu_before = 0.0, 0.0
        self._begin = self._saved = time.perf_counter()
        self._cpu_begin = time.process_time()
        self._open = contextlib.ExitStack()
        self._report: Callable[[int, str], None] = lambda step, said: None
        self._state: TrainState | None = None

    @property
    def seconds(self) -> float:
        """Of all calls together, what was lost by a kill left out."""
        return self._before + time.perf_counter() - self._begin

    @property
    def cpu_seconds(self) -> float:
        """Of all threads of all calls: what a machine that others share does not lengthen."""
        return self._cpu_before + time.process_time() - self._cpu_begin

    def start(self, steps: int, **parts: Any) -> None:
        """Take over what was saved in the folder, if anything, and begin to show progress.

        Args:
            steps: of the whole run.
            **parts: of the loop's state, as `bigops.train.TrainState` takes them.

        Raises:
            ValueError: the folder's run had other options.
        """
        self.steps = steps
        self._state = TrainState(run=self, **parts)
        self._state.load(self.folder / STATE, required=False)
        self._report = self._open.enter_context(reporter(steps, enabled=self._progress))

    def step(self, **values: Tensor | float) -> None:
        """Count a step of the loop, whose values (losses) become points of curves.

        Raises:
            Paused: the minutes are over.
        """
        self.done += 1
        for name, value in values.items():
            total = self._sums.setdefault(name, [0.0, 0])
            total[0] += float(value.detach() if isinstance(value, Tensor) else value)
            total[1] += 1
        if self.done % max(1, self.steps // POINTS) == 0 or self.done == self.steps:
            self.point(**{name: total / count for name, (total, count) in self._sums.items()})
            self._sums.clear()
        last = {name: curve[-1][1] for name, curve in self.curves.items()}
        self._report(self.done, "  ".join(f"{name} {value:.4f}" for name, value in last.items()))
        now = time.perf_counter()
        if self._minutes is not None and now - self._begin > 60 * self._minutes:
            self.save()
            raise Paused(f"step {self.done} of {self.steps}")
        if now - self._saved >= self._save_every:
            self.save(background=True)

    def point(self, **values: float) -> None:
        """Add a point to curves, at the steps done so far."""
        for name, value in values.items():
            self.curves.setdefault(name, []).append([self.done, float(value)])

    def save(self, *, background: bool = False) -> None:
        """Write the state of the run as it is."""
        assert self._state is not None
        self._state.save(self.folder / STATE, self.done, background=background)
        self._saved = time.perf_counter()

    def close(self) -> None:
        """End the progress bar and wait for a save that is under way."""
        self._open.close()
        if self._state is not None:
            self._state.wait()

    # --- a part of its own state -----------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "epochs": self.epochs,
            "precision": self.precision,
            "steps": self.steps,
        }

    def state_dict(self) -> dict[str, Any]:
        """Options, progress, curves and seconds."""
        return {
            "options": self._options(),
            "done": self.done,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "curves": {name: [list(p) for p in curve] for name, curve in self.curves.items()},
            "sums": {name: list(total) for name, total in self._sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: it had other options.
        """
        for name, value in self._options().items():
            if state["options"][name] != value:
                raise ValueError(
                    f"{name}: expected {state['options'][name]!r}, that of the run in "
                    f"{self.folder}; got {value!r}"
                )
        self.done, self.curves, self._sums = state["done"], state["curves"], state["sums"]
        self._before, self._begin = state["seconds"], time.perf_counter()
        self._cpu_before, self._cpu_begin = state["cpu_seconds"], time.process_time()


def carry_out(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    epochs: int | None = None,
    precision: str = "fp32",
    minutes: float | None = None,
    resume: bool = False,
    **options: Any,
) -> int:
    """Run a recipe and write its result.json and plot.png into ``folder``, which is made.

    Args:
        name: of the catalogue.
        epochs: instead of the recipe's own number; no bar is asked of such a run.
        minutes: leave off after so many, with the state saved.
        resume: go on with the run that is in the folder.
        **options: of the recipe's ``train``.

    Returns:
        0: done, or paused; 1: the bar was missed.

    Raises:
        ValueError, OSError, ModuleNotFoundError: a mistake in the request, data or a package
            missing, a run in the folder without ``resume``.
    """
    recipe = RECIPES[name]
    if precision not in recipe.precisions:
        expected = ", ".join(recipe.precisions)
        raise ValueError(f"precision: {name}: expected one of {expected}; got {precision!r}")
    module = module_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder)
    if not resume and TrainState.latest(folder / STATE) is not None:
        raise ValueError(
            f"out: {folder} holds a run that did not end: --resume goes on with it, another --out "
            "begins anew"
        )
    run = Run(
        folder, seed=seed, epochs=epochs or recipe.epochs, precision=precision, minutes=minutes
    )
    try:
        values = module.train(run, **options)
    except DataError as error:
        raise ValueError(str(error)) from error
    except Paused as paused:
        print(f"{name}: left off at {paused}; --resume --out {folder} goes on")
        return 0
    finally:
        run.close()
    value = float(values[recipe.metric])
    asked = epochs is None or epochs == recipe.epochs
    result = {
        "recipe": name,
        "metric": recipe.metric,
        "value": value,
        "unit": recipe.unit,
        "bar": recipe.bar if asked else None,
        "higher is better": recipe.higher,
        "holds": recipe.holds(value) if asked else None,
        "seconds": round(run.seconds, 1),
        "cpu_seconds": round(run.cpu_seconds, 1),
        "options": run._options(),
        "values": values,
        "curves": run.curves,
        "versions": versions(tuple(recipe.packages)),
        "machine": {
            "cpu": crossover.cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": machine.extension.isa() if machine.extension is not None else "none",
        },
        "date": date.today().isoformat(),
    }
    with replacing(folder / RESULT) as temporary:
        temporary.write_text(json.dumps(result) + "\n")
    draw(run, result, folder / PLOT)
    shutil.rmtree(folder / STATE, ignore_errors=True)  # the run has ended: nothing goes on from it
    said = f"{recipe.metric} {value:.4g}{recipe.unit}"
    print(f"{name}: {said} in {run.seconds:.0f} s; wrote {folder / RESULT} and {PLOT}")
    if result["holds"] is False:
        print(f"bigops recipe: bar missed: {said} against {recipe.bar:g}", file=sys.stderr)
        return 1
    return 0


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of Python, bigops, torch and packages."""
    found = {"python": platform.python_version(), "bigops": bigops.__version__}
    homes = importlib.metadata.packages_distributions()
    for package in ("torch", *packages):
        for home in homes.get(package, [])[:1]:
            found[home] = importlib.metadata.version(home)
    return found


def draw(run: Run, result: Mapping[str, Any], path: Path) -> None:
    """The curves of a run, one beside the other, as PNG."""
    from matplotlib.figure import Figure

    count = max(1, len(run.curves))
    figure = Figure(figsize=(5 * count, 3.6), layout="constrained")
    for axes, (name, curve) in zip(
        figure.subplots(1, count, squeeze=False)[0], run.curves.items(), strict=False
    ):
        axes.plot(*zip(*curve, strict=True), marker="." if len(curve) < 40 else "")
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        if name == result["metric"] and result["bar"] is not None:
            axes.axhline(result["bar"], color="gray", linestyle="--")
    figure.suptitle(f"{result['recipe']}: {result['metric']} {result['value']:.4g}")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
