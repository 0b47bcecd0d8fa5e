"""Choice: which kernel serves a call, with which config, and why; for dispatch and for explain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bigops.backend import machine

Said = tuple[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Choice:
    """What ``choose(call, target)`` of an op answers, and `bigops.explain` gives.

    Reason and config are made where they are asked for: dispatch needs neither.
    """

    op: str
    kernel: str
    said: Callable[[], Said]
    run: Callable[..., Any] | None = None  # on a checked call; None: torch's dispatcher knows it

    @classmethod
    def of(cls, op: str, kernel: str, reason: str, config: dict[str, Any] | None = None) -> Choice:
        """A choice whose reason and config are known."""
        return cls(op, kernel, lambda: (reason, config or {}))

    @property
    def reason(self) -> str:
        """Why this kernel."""
        return self.said()[0]

    @property
    def config(self) -> dict[str, Any]:
        """Its tile and the like."""
        return self.said()[1]

    def __eq__(self, other: object) -> bool:
        """Whether they say the same."""
        if not isinstance(other, Choice):
            return NotImplemented
        return (self.op, self.kernel, self.said()) == (other.op, other.kernel, other.said())

    def __hash__(self) -> int:
        return hash((self.op, self.kernel))

    def __str__(self) -> str:
        reason, given = self.said()
        config = ", ".join(f"{k}={v}" for k, v in given.items())
        return f"{self.op}: {self.kernel}" + (f" [{config}]" if config else "") + f"; {reason}"


def reference(op: str, reason: str, kernel: str | None = None) -> Choice:
    """Plain torch serves; ``kernel``: the name of the reference, where it has another."""
    return Choice.of(op, f"reference.{kernel or op}", reason)


def on_cpu(op: str, ask: Callable[[Any], tuple[str, str]]) -> Choice:
    """What the C++ extension itself chooses: ``ask(extension)`` gives its kernel and reason."""
    if machine.extension is None:
        return reference(op, machine.extension_error)
    return Choice.of(op, *ask(machine.extension))
