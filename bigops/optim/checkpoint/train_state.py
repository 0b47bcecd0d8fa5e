"""TrainState: the last few states of a run in a folder, from which it goes on bit for bit."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from bigops.files import FormatError, leftovers, locked
from bigops.optim.checkpoint import one_file, random_states, trainer_folder
from bigops.optim.checkpoint.ranks import Ranks
from bigops.optim.checkpoint.tree import Writer

_NAME = re.compile(r"(\d{6,})-step-(\d+)\.safetensors")
_MARK = "state-"


class TrainState:
    """Everything that a run goes on from, saved whole or not at all.

    ::

        state = TrainState(model=model, optimizer=optimizer, precision=precision, sampler=sampler)
        begin = state.load("run", required=False).get("step", 0)
        for step, batch in enumerate(batches, begin + 1):
            ...
            if step % 100 == 0:
                state.save("run", step)
        state.wait()

    A part is anything with ``state_dict`` and ``load_state_dict``: model, optimisers, precision or
    scaler, EMA, schedule, `Sampler`, a loader that has them. The random states of torch (the CPU
    and each GPU), numpy and Python of every rank are saved in any case.

    Each save is one file, ``<folder>/000012-step-1200.safetensors``: safetensors and JSON with
    checksums, no pickle. It is written beside itself, synced and renamed, so that a process that is
    killed at any moment loses what came after the last save, never a file. Under torch.distributed
    all ranks call `save` and `load` together, and the folder is one that all of them see: parts are
    taken to be the same on all ranks and come from the first one, but for those in ``per_rank``.
    The keys of a model are those that it has without torch.compile or DistributedDataParallel.

    Args:
        per_rank: names of parts of which each rank has its own, such as a loader of its share.
        keep: how many saves stay in the folder, None for all.
        **parts: what is saved, by name.

    Raises:
        TypeError: a part without ``state_dict`` or ``load_state_dict``.
        ValueError: ``keep`` below 1, a name in ``per_rank`` that is no part.
    """

    def __init__(
        self, *, per_rank: Collection[str] = (), keep: int | None = 3, **parts: Any
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep: expected at least 1, or None for all; got {keep}")
        for name, part in parts.items():
            if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
                raise TypeError(
                    f"{name}: expected an object with state_dict and load_state_dict; got "
                    f"{type(part).__name__}"
                )
        unknown = sorted(set(per_rank) - set(parts))
        if isinstance(per_rank, str) or unknown:
            raise ValueError(f"per_rank: expected names out of {sorted(parts)}; got {per_rank!r}")
        self.keep = keep
        self._own = {name: parts[name] for name in per_rank}
        self._shared = {name: part for name, part in parts.items() if name not in self._own}
        self._writing: _Background | None = None

    # --- saving ------------------------------------------------------------------------------

    def save(
        self,
        folder: str | os.PathLike[str],
        step: int,
        *,
        background: bool = False,
        **values: Any,
    ) -> None:
        """Write one file into ``folder``, which is made, and remove those past ``keep``.

        Args:
            folder: of this run alone.
            step: the number of steps taken.
            background: copy the states and leave the writing to a thread. What fails there is
                raised by the next `save`, `load` or `wait`.
            **values: plain values to give back by `load`, beside ``step``.

        Raises:
            TypeError, ValueError: a state that a file cannot hold, which is named, or no step.
            OSError: the folder cannot be written, the disk is full. Files of before are as they
                were; on all ranks, whichever has it.
        """
        self.wait()
        ranks = Ranks.now()
        payload: Any = None
        failed: Exception | None = None
        content: dict[str, Any] = {}
        shared, own = Writer(background), Writer()
        try:
            if type(step) is not int or step < 0:
                raise ValueError(f"step: expected a whole number from 0 on; got {step!r}")
            if ranks.rank == 0:
                content = one_file.encoded(shared, self._shared, {**values, "step": step})
            state = one_file.encoded_rank(own, self._own, ranks.rank)
            # As bytes: torch's pickle does not take tensors of unsigned whole numbers.
            payload = state, save_bytes({name: t.clone() for name, t in own.tensors.items()})
        except Exception as error:
            failed = error
        ranks.agree(failed)
        gathered = ranks.gather(payload)
        write: Callable[[], None] = lambda: None  # noqa: E731
        if ranks.rank == 0:
            tensors = dict(shared.tensors)
            for _, theirs in gathered:
                tensors.update(load_bytes(theirs))
            states = [state for state, _ in gathered]
            where = Path(folder)
            write = lambda: self._write(where, step, content, states, tensors)  # noqa: E731
        self._writing = _Background(write, started=background)
        if not background:
            self.wait()

    def _write(self, folder: Path, step: int, content: Any, ranks: Any, tensors: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "save"):  # a run that was started twice writes one after the other
            for file in leftovers(folder, _MARK):
                file.unlink(missing_ok=True)
            before = _saves(folder)
            number = 1 + (int(before[-1].name.split("-")[0]) if before else 0)
            path = folder / f"{number:06d}-step-{step}.safetensors"
            one_file.write(path, content, ranks, tensors, _MARK)
            if self.keep is not None:
                for file in before[: max(0, len(before) + 1 - self.keep)]:
                    file.unlink(missing_ok=True)

    def wait(self) -> None:
        """Return once all is on the disk; a call of all ranks.

        Raises:
            OSError: what failed in the background.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            Ranks.now().agree(writing.outcome())

    # --- loading -----------------------------------------------------------------------------

    @staticmethod
    def latest(folder: str | os.PathLike[str]) -> Path | None:
        """The file that was saved last, None where there is none."""
        saves = _saves(Path(folder))
        return saves[-1] if saves else None

    def load(
        self,
        source: str | os.PathLike[str],
        *,
        required: bool = True,
        elastic: bool = False,
        map_location: str = "cpu",
    ) -> dict[str, Any]:
        """Load all parts and random states, or change nothing, on all ranks alike.

        Args:
            source: a folder, of which the last save is taken, or one file; or a ``checkpoint-N``
                of transformers' Trainer (parts model, optimizer, scheduler or schedule, scaler).
            required: whether there has to be one.
            elastic: take a state of another number of ranks. A rank that it has no random states
                of gets new ones, made of those that it has; parts in ``per_rank`` are refused.
            map_location: device on which tensors are read before they are copied into place.

        Returns:
            ``step`` and the values that were saved; empty where there is no save.

        Raises:
            FormatError: no save, a truncated, damaged or foreign file, one of another number of
                ranks, or a part that does not fit (another model, other groups, another precision).
        """
        self.wait()
        ranks = Ranks.now()
        chosen: tuple[Path | None, str] | None = None
        failed: Exception | None = None
        if ranks.rank == 0:
            chosen = self._choose(Path(source))
        path, other = ranks.of_first(chosen)
        if path is None:
            if required:
                raise FormatError(f"source: expected a folder with saves of a run; got {source}")
            return {}
        content: dict[str, Any] = {}
        parts = {**self._shared, **self._own}
        with contextlib.ExitStack() as undo:
            try:
                content = one_file.read(path, map_location)
                rank = self._rank(path, content, ranks, elastic)
                one_file.load(path, content, parts, rank, undo, self._own)
            except Exception as error:
                failed = error
            if isinstance(failed, FormatError) and other:
                failed = FormatError(f"{failed} (the save before it is {other})")
            ranks.agree(failed)
            undo.pop_all()
        return content["values"]  # type: ignore[no-any-return]

    @staticmethod
    def _choose(source: Path) -> tuple[Path | None, str]:
        """The file to load, and the one to try where it is damaged."""
        if not source.is_dir() or trainer_folder.is_one(source):
            return (source, "") if source.exists() else (None, "")
        saves = _saves(source)
        return (saves[-1] if saves else None), (saves[-2].name if len(saves) > 1 else "")

    def _rank(self, path: Path, content: dict[str, Any], ranks: Ranks, elastic: bool) -> int:
        """Whose random states and own parts this rank takes."""
        states = content["ranks"]
        count = len(states)
        if count != ranks.size:
            if not elastic:
                raise FormatError(
                    f"{path}: expected the state of {ranks.size} rank(s); got that of {count} "
                    "(elastic=True takes it, with new random states for ranks that it lacks)"
                )
            if self._own:
                raise FormatError(
                    f"{path}: expected parts that any number of ranks shares; got "
                    f"{sorted(self._own)}, of which each of {count} rank(s) had its own"
                )
        if ranks.rank >= count:
            random_states.check(str(path), states[0]["rng"])
            new = {"rng": random_states.derived(states[0]["rng"], ranks.rank), "states": {}}
            states.append(new)
            return len(states) - 1
        return ranks.rank


def _saves(folder: Path) -> list[Path]:
    """In the order in which they were written, which after a step back is not that of steps."""
    found = {file: _NAME.fullmatch(file.name) for file in folder.glob("*.safetensors")}
    numbers = {file: int(match[1]) for file, match in found.items() if match}
    return sorted(numbers, key=numbers.__getitem__)


class _Background:
    """A write that is under way, or done, and what became of it."""

    def __init__(self, write: Callable[[], None], *, started: bool) -> None:
        self._failed: list[Exception] = []
        words: list[str] = []  # an error holds the frames that it went through, and they this
        failed = self._failed

        def run() -> None:
            try:
                write()
            except Exception as error:
                failed.append(error)
                words.append(str(error))

        # At exit Python waits for a thread that is no daemon: the last save is not lost.
        self._thread = threading.Thread(target=run, name="bigops.TrainState")
        self._tell = weakref.finalize(self, _tell, self._thread, words)
        if started:
            self._thread.start()
        else:
            run()

    def outcome(self) -> Exception | None:
        """Wait for the end; the error that it had."""
        if self._thread.ident is not None:
            self._thread.join()
        self._tell.detach()
        return self._failed[0] if self._failed else None


def _tell(thread: threading.Thread, words: list[str]) -> None:
    """Nobody asked any more: an error must not go by in silence."""
    if thread.ident is not None:
        thread.join()
    if words:
        warnings.warn(f"TrainState: the last save failed: {words[0]}", stacklevel=2)
