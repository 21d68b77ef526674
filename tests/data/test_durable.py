"""Files that are there whole or not at all, and folders of one writer."""

import errno
import os
import subprocess
import sys

import pytest

from jaxkd.data import durable
from jaxkd.data.durable import LOCK, FolderLock, put_in_place, sync, writing


def test_a_file_gets_its_name_after_it_is_on_the_disk(tmp_path, monkeypatch):
    calls = []
    original = os.replace

    def replace(a, b):
        calls.append("replace")
        original(a, b)

    def fsync(number):
        calls.append("fsync")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "a.part").write_text("new")
    (tmp_path / "a").write_text("old")
    put_in_place(tmp_path / "a.part", tmp_path / "a")
    # The file, its name, and the folder that lists the name.
    assert calls == ["fsync", "replace", "fsync"]
    assert (tmp_path / "a").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_folders_are_put_in_place_too(tmp_path):
    (tmp_path / "a.part").mkdir()
    (tmp_path / "a.part" / "file").write_text("x")
    put_in_place(tmp_path / "a.part", tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "x"


def test_folders_that_cannot_be_synced_are_let_be_and_files_are_not(
    tmp_path, monkeypatch
):
    def fsync(number):
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(os, "fsync", fsync)
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("No space left on device; writing x; at byte 3"),
    ],
)
def test_what_cannot_be_written_is_named_in_one_line(tmp_path, error):
    path = tmp_path / "a"
    with pytest.raises(OSError, match="a: No space left on device$") as found:
        with writing(path):
            raise error
    assert str(found.value) == f"cannot write {path}: No space left on device"


def test_other_errors_pass(tmp_path):
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("x")


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(BlockingIOError, match="another process is writing"):
        FolderLock(tmp_path)
    lock.release()
    other = FolderLock(tmp_path)
    lock.release()  # once more does nothing to the other
    with pytest.raises(BlockingIOError):
        FolderLock(tmp_path)
    other.release()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import os, sys, pathlib\n"
        "from jaxkd.data.durable import FolderLock\n"
        "lock = FolderLock(pathlib.Path(sys.argv[1]))\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            FolderLock(tmp_path)
        process.kill()
    assert (tmp_path / LOCK).exists()
    FolderLock(tmp_path).release()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    import fcntl

    def flock(number, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    FolderLock(tmp_path).release()
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match="^cannot write .*missing"):
        FolderLock(tmp_path / "missing")
    assert durable.LOCK == ".lock"
