"""Files that are written whole or not at all, and checks of those that are read."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_OTHER_KINDS = {
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


class FormatError(ValueError):
    """A file that cannot be taken: the message names it, what was expected and what came."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mark: str = "") -> Iterator[Path]:
    """Give a temporary path beside ``path``; at the end of the block it takes its place.

    Each call has a temporary file of its own, so threads, processes and machines that share the
    folder may write one path at the same time: the last one stays, whole. Symbolic links are
    followed: the link stays, the file that it names is replaced. An existing file's mode, and its
    owner where the system lets us, are kept; a new file has the mode that the umask gives it. What
    was written is on the disk before the name changes, and the name before this returns.

    When the block raises (Ctrl-C too), the temporary file goes and ``path`` stays as it was. A
    process that is killed leaves a file ``.bigops-<mark>*.part``, which nothing reads; a writer
    that has a folder to itself finds those of its mark (`leftovers`).

    Raises:
        OSError: the folder is missing or cannot be written, or ``path`` is a folder, a device, a
            FIFO or a socket; the message names it.
    """
    target = writable_target(path)
    try:
        old = os.stat(target)
    except FileNotFoundError:
        old = None
    temporary = target.parent / f".bigops-{mark}{secrets.token_hex(8)}.part"
    try:
        # The kernel applies the umask (os.umask would change it for all threads). What replaces a
        # file that others may not read is never open to them.
        mode = 0o666 if old is None else 0o600
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        wanted = os.stat(temporary) if old is None else old
        yield temporary
        with open(temporary, "rb") as file:
            _take_over(file.fileno(), wanted)  # a writer may have made the file anew
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: str | os.PathLike[str], mark: str) -> list[Path]:
    """What writers of a mark that were killed, or write now, have in a folder."""
    return sorted(Path(folder).glob(f".bigops-{mark}*.part"))


def writable_target(path: str | os.PathLike[str]) -> Path:
    """The file that writing to ``path`` would replace or make, links followed.

    Raises:
        OSError: as `replacing`.
    """
    target = Path(os.path.realpath(path))
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(target).st_mode
        if stat.S_ISDIR(found):
            raise IsADirectoryError(f"{path}: expected a file to write; it is a folder")
        if not stat.S_ISREG(found):
            kind = _OTHER_KINDS.get(stat.S_IFMT(found), "something else")
            raise OSError(f"{path}: expected a file to write; it is {kind}")
    check_writable(target.parent)
    return target


def _take_over(fd: int, old: os.stat_result) -> None:
    """Give a file the owner and the mode of another one."""
    new, mode = os.fstat(fd), stat.S_IMODE(old.st_mode)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.fchown(fd, old.st_uid, old.st_gid)
        except PermissionError:
            try:
                os.fchown(fd, -1, old.st_gid)
            except PermissionError:  # what its group could do is not for ours
                mode = mode & ~0o070 | (mode & 0o007) << 3
    os.fchmod(fd, mode)


def _sync_folder(folder: Path) -> None:
    # The file is in its place: a file system that syncs no folders must not make that an error.
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise OSError, naming the folder, unless a file can be made in it now.

    Tried by making one: permission bits say nothing to root, nor about a read-only mount.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected an existing folder to write into")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"{folder}: cannot write into this folder ({error.strerror})"
        ) from None


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes that ask for the same path waiting until the block ends.

    The lock is a file beside ``path``; the system lets go of it when its holder dies.
    """
    import fcntl  # of POSIX systems

    target = Path(path)
    with open(target.parent / f".{target.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
