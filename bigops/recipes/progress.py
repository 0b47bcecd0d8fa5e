"""A progress bar on a terminal; elsewhere ten lines in all, so that logs stay readable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def reporter(steps: int, *, enabled: bool = True) -> Iterator[Callable[[int, str], None]]:
    """Give a function that takes the number of steps done and what to say of them."""
    if not enabled:
        yield lambda step, said: None
        return
    console = Console()
    if not console.is_terminal:
        every = max(1, steps // 10)

        def line(step: int, said: str) -> None:
            if step % every == 0 or step == steps:
                print(f"  step {step}/{steps}  {said}", flush=True)

        yield line
        return
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=steps, said="")
        yield lambda step, said: bar.update(task, completed=step, said=said)
