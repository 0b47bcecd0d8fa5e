"""Where the processes that one parent spawned meet, without an environment and without a port.

Rank 0 opens a store on a free port and leaves that in a file whose name no other parent's children
know. Whoever finds the file of a rank 0 that has ended, goes on waiting.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import Store, TCPStore

_HOST = "127.0.0.1"


def meet(rank: int, size: int, timeout: timedelta) -> Store:
    """The store of this rank and its siblings.

    Raises:
        RuntimeError: rank 0 did not come in time, has another size, or the rank is taken.
    """
    file = _file()
    taken = f"rank: expected one process of each; rank {rank} is there already"
    if rank == 0:
        found = _living(file)
        if found is not None and found[1] != os.getpid():
            raise RuntimeError(taken)
        store = TCPStore(_HOST, 0, size, True, timeout, wait_for_workers=False)
        handle, draft = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(handle, "w") as out:
            out.write(f"{store.port} {os.getpid()} {size}")
        os.replace(draft, file)
    else:
        port, world_size = _wait(file, rank, timeout)
        if world_size != size:
            raise RuntimeError(f"world_size: expected {world_size}, that of rank 0; got {size}")
        store = TCPStore(_HOST, port, size, False, timeout)
    if store.add(f"rank {rank}", 1) != 1:
        raise RuntimeError(taken)
    if store.add("came", 1) == size:
        file.unlink(missing_ok=True)  # the next world of this parent makes its own
    return store


def _file() -> Path:
    parent = multiprocessing.parent_process()
    assert parent is not None
    secret = multiprocessing.current_process().authkey + str(parent.pid).encode()
    return Path(tempfile.gettempdir()) / f"bigops-{hashlib.sha256(secret).hexdigest()[:32]}"


def _living(file: Path) -> tuple[int, int, int] | None:
    """Port, process and size of the world of a rank 0 that lives."""
    try:
        port, pid, size = map(int, file.read_text().split())
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return port, pid, size


def _wait(file: Path, rank: int, timeout: timedelta) -> tuple[int, int]:
    """Port and size of the world, as soon as its rank 0 is there."""
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        found = _living(file)
        if found is not None:
            return found[0], found[2]
        time.sleep(0.02)
    raise RuntimeError(
        f"rank {rank}: expected rank 0 among the processes of the same parent within "
        f"{timeout.total_seconds():g} s; none came"
    )
