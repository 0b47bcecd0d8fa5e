"""The receipt: what a compression cost and what it gave, measured, with the user's floors."""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigops import backend, timing
from bigops.compress import measure
from bigops.files import replacing
from bigops.graph.looking import looking
from bigops.timing import Ratio

if TYPE_CHECKING:
    from rich.console import RenderableType

VERSION = 1


@dataclass(frozen=True)
class Floors:
    """What the user asked for; None asks for nothing.

    Args:
        min_speedup: eager time / new time, at least.
        max_drop: points of accuracy given up, at most.
        min_size_ratio: old bytes / new bytes, at least; on disk where both files are known.
        beat_compile: the new model is not slower than torch.compile of the old one.
    """

    min_speedup: float | None = None
    max_drop: float | None = None
    min_size_ratio: float | None = None
    beat_compile: bool = False


class FloorBreached(ValueError):
    """A receipt that does not hold what the user asked for; the message lists every breach."""


@dataclass(frozen=True)
class Side:
    """One whole model. Accuracy in percent; bytes_disk is the size of its file."""

    name: str
    latency_us: float
    spread: float
    bytes_memory: int
    peak_bytes: int | None = None
    bytes_disk: int | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Layer:
    """One linear layer before and after; shape is [N, K]."""

    name: str
    kind: str
    shape: list[int]
    density: float
    bytes_before: int
    bytes_after: int
    us_before: float | None
    us_after: float | None
    kernel: str


@dataclass(frozen=True)
class Candidate:
    """One configuration that was tried: a point in the plot. Accuracy None: not tried that far."""

    name: str
    latency_us: float
    accuracy: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Receipt:
    """Accuracy, time and bytes before and after, whole and per layer.

    `Receipt.measure` makes one; print it, or take `table()`, `to_json()`, `to_png()`.
    """

    before: Side
    after: Side
    speedup: Ratio
    compiled: Side | None = None
    speedup_compile: Ratio | None = None
    layers: list[Layer] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    floors: Floors = Floors()
    machine: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def measure(
        cls,
        before: nn.Module,
        after: nn.Module,
        example_inputs: Any,
        *,
        accuracy: Callable[[nn.Module], float] | tuple[float, float] | None = None,
        files: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
        floors: Floors | None = None,
        candidates: list[Candidate] | None = None,
        with_compile: bool = True,
        pairs: int = timing.MIN_PAIRS,
        notes: list[str] | None = None,
    ) -> Receipt:
        """Measure two models against each other on this machine.

        Both are as before afterwards, and so are the random states (`bigops.graph.looking`).

        Args:
            before: the model as it was, of plain torch modules for an honest baseline.
            after: the compressed one. Layers at equal paths are compared one by one.
            example_inputs: x (a list is one, too), a tuple of positions or a mapping of keywords,
                at the batch size that latency is to be measured at.
            accuracy: percent correct (higher is better) of a model, or both numbers.
            files: the saved files of before and after, for their sizes.
            floors: what was asked for; see `breaches`.
            candidates: further points of the plot.
            with_compile: also measure ``torch.compile(before)``.
            pairs: interleaved rounds, at least 30 for an interval that means something. While a
                floor lies inside its interval as many again are taken, up to five times in all,
                and all of them count.

        Raises:
            FileNotFoundError: one of ``files`` is missing.
        """
        sizes = tuple(Path(f).stat().st_size for f in files) if files else (None, None)
        if callable(accuracy):
            with looking(before, after):
                accuracy = (accuracy(before), accuracy(after))
        reached: tuple[Any, Any] = accuracy or (None, None)
        models: dict[str, nn.Module] = {"eager": before, "bigops": after}
        notes = list(notes or [])
        if with_compile:
            module, reason = measure.compiled(before, example_inputs)
            if module is not None:
                models["torch.compile"] = module
            else:
                notes.append(reason)
        floors = floors or Floors()

        def decided(samples: dict[str, timing.Samples]) -> bool:
            """Whether noise leaves no doubt on which side of the floors the ratios lie."""
            over = timing.speedup(samples["eager"], samples["bigops"])
            if not measure.clear(over, floors.min_speedup):
                return False
            if not floors.beat_compile or "torch.compile" not in samples:
                return True
            return measure.clear(timing.speedup(samples["torch.compile"], samples["bigops"]), 1.0)

        samples = measure.latency(models, example_inputs, pairs, decided)

        def side(name: str, model: nn.Module, size: Any, percent: Any) -> Side:
            times = samples[name]
            peak = measure.peak_bytes(model, example_inputs) if name != "torch.compile" else None
            return Side(
                name,
                timing.median(times) * 1e6,
                timing.spread(times),
                measure.model_bytes(model),
                peak,
                size,
                percent,
            )

        compiled = "torch.compile" in models
        return cls(
            before=side("eager", before, sizes[0], reached[0]),
            after=side("bigops", after, sizes[1], reached[1]),
            speedup=timing.speedup(samples["eager"], samples["bigops"]),
            compiled=side("torch.compile", before, sizes[0], reached[0]) if compiled else None,
            speedup_compile=timing.speedup(samples["torch.compile"], samples["bigops"])
            if compiled
            else None,
            layers=[Layer(**row) for row in measure.layers(before, after, example_inputs, pairs)],
            candidates=list(candidates or []),
            floors=floors,
            machine={**machine(), "pairs": len(samples["eager"]), "input": _shape(example_inputs)},
            notes=notes,
        )

    # --- judgement --------------------------------------------------------------------------

    @property
    def drop(self) -> float | None:
        """Points of accuracy given up; negative for a gain."""
        if self.before.accuracy is None or self.after.accuracy is None:
            return None
        return self.before.accuracy - self.after.accuracy

    @property
    def size_ratio(self) -> float:
        """Old bytes / new bytes: of the files where both are known, else in memory."""
        if self.before.bytes_disk and self.after.bytes_disk:
            return self.before.bytes_disk / self.after.bytes_disk
        return self.before.bytes_memory / max(1, self.after.bytes_memory)

    def breaches(self) -> list[str]:
        """One line per floor that does not hold; empty when all do. NaN never holds."""
        floors, found = self.floors, []
        if floors.min_speedup is not None and not self.speedup.value >= floors.min_speedup:
            found.append(
                f"speed-up: at least {floors.min_speedup:g}x over eager was asked for; measured "
                f"{_ratio(self.speedup)}"
            )
        if floors.beat_compile:
            if self.speedup_compile is None:
                found.append("speed-up: torch.compile was to be beaten, but was not measured")
            elif not self.speedup_compile.value >= 1:
                found.append(
                    "speed-up: not slower than torch.compile was asked for; measured "
                    f"{_ratio(self.speedup_compile)}"
                )
        if floors.max_drop is not None:
            if self.drop is None:
                found.append("accuracy: a largest drop was asked for, but accuracy not measured")
            elif not self.drop <= floors.max_drop:
                found.append(
                    f"accuracy: a drop of at most {floors.max_drop:g} points was asked for; "
                    f"measured {self.drop:.2f} ({self.before.accuracy:.2f}% to "
                    f"{self.after.accuracy:.2f}%)"
                )
        if floors.min_size_ratio is not None and not self.size_ratio >= floors.min_size_ratio:
            found.append(
                f"size: at least {floors.min_size_ratio:g}x smaller was asked for; measured "
                f"{self.size_ratio:.2f}x"
            )
        return found

    def check(self) -> Receipt:
        """Raise FloorBreached, naming every floor that does not hold; else return self."""
        found = self.breaches()
        if found:
            raise FloorBreached("; ".join(found))
        return self

    # --- forms ------------------------------------------------------------------------------

    def to_json(self) -> str:
        """All of it as JSON; `from_json` gives an equal receipt."""
        data = asdict(self)
        data["speedup"] = list(self.speedup)
        if self.speedup_compile is not None:
            data["speedup_compile"] = list(self.speedup_compile)
        return json.dumps({"receipt": VERSION, **data, "breaches": self.breaches()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        """Read what `to_json` wrote.

        Raises:
            ValueError: no JSON, another version, or fields that do not belong.
        """
        try:
            data = json.loads(text)
            version = data.pop("receipt")
            if version != VERSION:
                raise ValueError(f"expected version {VERSION}; got {version!r}")
            data.pop("breaches")
            for name in ("before", "after", "compiled"):
                data[name] = None if data[name] is None else Side(**data[name])
            for name in ("speedup", "speedup_compile"):
                data[name] = None if data[name] is None else Ratio(*data[name])
            data["layers"] = [Layer(**row) for row in data["layers"]]
            data["candidates"] = [Candidate(**row) for row in data["candidates"]]
            data["floors"] = Floors(**data["floors"])
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                "receipt: expected JSON as Receipt.to_json writes it; got "
                f"{text[:60]!r} ({type(error).__name__}: {error})"
            ) from None

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_json() + "\n")

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Draw accuracy against latency and the layers' bytes and times; whole or not at all.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``pip install bigops[plot]``).
        """
        from bigops.compress import receipt_views

        with replacing(path) as temporary:
            receipt_views.draw(self, temporary)

    def table(self) -> RenderableType:
        """Tables for rich's ``print``."""
        from bigops.compress import receipt_views

        return receipt_views.tables(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=110)
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "isa": backend.machine.extension.isa() if backend.machine.extension is not None else "none",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _shape(example_inputs: Any) -> str:
    leaves = torch.utils._pytree.tree_leaves(example_inputs)
    return ", ".join(str(list(t.shape)) for t in leaves if isinstance(t, torch.Tensor))
