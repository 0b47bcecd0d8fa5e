"""The one writer of files: whole or not at all, and what the target is stays what it is."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bigops
from bigops.benches import rows, summary
from bigops.files import replacing, writable_target
from bigops.train import load_checkpoint, save_checkpoint
from tests.compress.test_receipt import _made


def _text(path: Path, text: str = "new") -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


# Every way in which the package writes a file that a user named.
VERBS: dict[str, Callable[[Path], object]] = {
    "text": _text,
    "save": lambda path: bigops.save(nn.Linear(3, 2), path),
    "checkpoint": lambda path: save_checkpoint(path, model=nn.Linear(3, 2)),
    "receipt": lambda path: _made().save_json(path),
    "csv": lambda path: rows.write_csv([], path),
    "summary": lambda path: summary.write([], path),
}


@pytest.fixture(params=VERBS)
def verb(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return VERBS[request.param]


def test_a_link_stays_and_its_target_is_replaced(verb, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "runs").mkdir()
    real, link, far = tmp_path / "runs" / "1", tmp_path / "latest", tmp_path / "far"
    real.write_text("old")
    link.symlink_to(real)
    far.symlink_to("latest")  # a relative link to a link
    verb(far)
    assert far.is_symlink()
    assert link.is_symlink()
    assert not real.is_symlink()
    assert real.read_bytes() != b"old"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "runs" / "2")
    verb(dangling)
    assert dangling.is_symlink()
    assert sorted(os.listdir(tmp_path / "runs")) == ["1", "2"]
    assert sorted(os.listdir(tmp_path)) == ["dangling", "far", "latest", "runs"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_the_mode_of_a_file_is_kept(verb, mode: int, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "m"
    path.write_text("old")
    path.chmod(mode)
    verb(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() != b"old"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_of_a_file_is_kept(verb, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "m"
    path.write_text("old")
    os.chown(path, 1234, 4321)
    path.chmod(0o640)
    verb(path)
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 4321, 0o640)


def test_a_group_that_cannot_be_kept_gets_no_more_than_others(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "m"
    path.write_text("old")
    path.chmod(0o664)
    found = os.stat(path)

    def foreign(target: object, **kwargs: object) -> os.stat_result:
        result = real(target, **kwargs)  # type: ignore[arg-type, call-overload]
        if result.st_ino != found.st_ino:
            return result
        return os.stat_result((*result[:4], 4242, 4242, *result[6:]))

    def refuse(*args: object) -> None:
        raise PermissionError

    real = os.stat
    monkeypatch.setattr(os, "stat", foreign)
    monkeypatch.setattr(os, "fchown", refuse)
    _text(path)
    monkeypatch.undo()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_new_file_follows_the_umask_which_nobody_touches(
    verb, tmp_path: Path, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask is the process's"))
            verb(tmp_path / "m")
        assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o640
    finally:
        assert os.umask(before) == 0o027


def test_devices_fifos_sockets_and_folders_are_refused_by_name(verb, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name, kind in (
            ("fifo", "a FIFO"),
            ("folder", "a folder"),
            ("socket", "a socket"),
            ("link", "a device"),
        ):
            with pytest.raises(OSError, match=rf"{name}: expected a file to write; it is {kind}"):
                verb(tmp_path / name)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "folder", "link", "socket"]


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        _text(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), SystemExit()])
def test_nothing_is_left_behind(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)), replacing(path) as temporary:
        half(temporary)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["m"]


def test_what_a_killed_process_left_is_in_nobodys_way(verb, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name in (".bigops-0123456789abcdef.part", ".m.1.part", f".m.{os.getpid()}.part"):
        (tmp_path / name).write_text("half")
        (tmp_path / name).chmod(0)
    verb(tmp_path / "m")
    assert len(os.listdir(tmp_path)) == 4


def test_the_longest_name_that_a_folder_takes(verb, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    verb(tmp_path / ("n" * 255))
    assert os.listdir(tmp_path) == ["n" * 255]


def test_the_file_and_its_folder_are_synced_in_this_order(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    seen = []
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("name"), replace(a, b)))
    _text(tmp_path / "m")
    assert seen == ["file", "name", "folder"]


def test_threads_that_write_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    path, errors = tmp_path / "last.pt", []
    model = nn.Linear(64, 64)
    save_checkpoint(path, model=model, step=0)

    def work(step: int) -> None:
        try:
            for _ in range(8):
                save_checkpoint(path, model=model, step=step)
                assert load_checkpoint(path, rng=False)["step"] in range(4)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert os.listdir(tmp_path) == ["last.pt"]


def test_two_processes_of_one_number_do_not_meet(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers on a shared folder
    path = tmp_path / "m"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the last one to end


def test_a_target_is_looked_at_without_a_trace(tmp_path: Path) -> None:
    assert writable_target(tmp_path / "m") == (tmp_path / "m").resolve()
    with pytest.raises(FileNotFoundError, match="nowhere: expected an existing folder"):
        writable_target(tmp_path / "nowhere" / "m")
    assert os.listdir(tmp_path) == []


def test_checksums_are_written_where_torch_was_told_to_write_none(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint(tmp_path / "m", model=nn.Linear(3, 2))
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    load_checkpoint(tmp_path / "m", model=nn.Linear(3, 2))


def test_json_that_tuning_writes_goes_through_the_same_writer(tmp_path: Path) -> None:
    from bigops.tune.measured import TunedFile

    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real.json")
    kind = SimpleNamespace(FORMAT=1, tuned_file=lambda _: link, read=lambda *_: {})
    file = TunedFile(kind, {"machine": "this"}, ())  # type: ignore[arg-type]
    with file.editing() as data:
        data["a"] = 1
    assert link.is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["a"] == 1
    (tmp_path / "real.json").unlink()
    file.prepare()
    assert link.is_symlink()
    assert (tmp_path / "real.json").exists()
