"""A folder appears whole or not at all, whenever its process is killed; one process at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch

from gainlens.errors import FileFormatError, InputError
from gainlens.files import (
    check_sums,
    folders,
    locked,
    save_tensors,
    write_json,
    written_folder,
    written_whole,
)
from gainlens.files.folders import SUMS

pytestmark = [
    pytest.mark.one_env,
    pytest.mark.skipif(os.name != "posix", reason="needs locks that die with their process"),
]
FILES = {"config.json": "settings", "a/weights.bin": "x" * 5000, "slice_plan.json": "plan"}


def forked(work) -> int:
    """The exit status of a process that does ``work``: 7 if it came to the end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 7
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (7, -signal.SIGKILL)
    return status


def run_child(step, number, target, *, replace=False, mounted=False, exchange=True):
    """Write a folder in a process that is killed at the ``number``-th call of ``step``."""
    name, left = step.removeprefix("os."), [number]
    real = getattr(os, name)

    def dying(*args, **kwargs):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return real(*args, **kwargs)

    def work():
        if mounted:
            os.path.ismount = lambda path: True
        if not exchange:
            folders._exchange = lambda new, old: False
        with written_folder(target, replace=replace) as beside:
            fill(beside, " new")
            setattr(os, name, dying)  # from here on: everything that puts it in place

    return forked(work)


def content(folder: Path):
    return {
        str(p.relative_to(folder)): p.read_text()
        for p in folder.rglob("*")
        if p.is_file() and p.name != SUMS and not p.relative_to(folder).parts[0].startswith(".")
    }


def fill(folder, ending):
    (folder / "a").mkdir()
    for file, text in FILES.items():
        (folder / file).write_text(text + ending)


def hidden(*places):
    return [p for place in places if place.is_dir() for p in place.iterdir() if p.name[0] == "."]


NEW = {file: text + " new" for file, text in FILES.items()}
OLD = {file: text + " old" for file, text in FILES.items()}


@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
@pytest.mark.parametrize("step", ["os.rename", "os.unlink", "os.chmod"])
def test_killed_at_any_step_a_reader_finds_all_or_what_was_there(before, step, tmp_path):
    finished = False
    for number in range(40):
        target = tmp_path / str(number) / "out"
        target.parent.mkdir()
        if before != "nothing":
            target.mkdir()
        if before == "old":
            fill(target, " old")
        status = run_child(step, number, target, replace=before == "old")
        found = content(target) if target.is_dir() else None
        allowed = {"nothing": [None, NEW], "empty": [{}, NEW], "old": [OLD, NEW]}[before]
        assert found in allowed, (step, number)
        if found == NEW:
            check_sums(target)
        # The next run of the same output finds what the dead one left, and removes it.
        with written_folder(target, replace=True) as beside:
            fill(beside, " new")
        assert content(target) == NEW
        assert hidden(target.parent, target) == []
        if status == 7:
            finished = True
            break
        assert status == -signal.SIGKILL
    assert finished


@pytest.mark.parametrize("before", ["empty", "old"])
def test_a_mounted_folder_is_finished_or_restored_by_the_next_run(before, tmp_path, monkeypatch):
    """It can't be replaced as a whole: what a dead run had begun is undone or completed."""
    seen = []
    for number in range(40):
        target = tmp_path / str(number) / "out"
        target.mkdir(parents=True)
        if before == "old":
            fill(target, " old")
        status = run_child("os.replace", number, target, replace=before == "old", mounted=True)
        with locked(target):  # what every run of the output begins with
            pass
        found = content(target)
        assert found in ({"empty": [{}, NEW], "old": [OLD, NEW]}[before])
        assert hidden(target.parent, target) == []
        seen.append(found)
        if status == 7:
            break
    assert NEW in seen[:-1]  # finished for a dead run
    assert (seen[0] == OLD) == (before == "old")


def test_without_an_exchange_the_old_folder_comes_back(tmp_path):
    """Two renames: killed between them there is none, until the next run of the output."""
    gone = 0
    for number in range(5):
        target = tmp_path / str(number) / "out"
        target.mkdir(parents=True)
        fill(target, " old")
        if run_child("os.rename", number, target, replace=True, exchange=False) == 7:
            break
        gone += not target.exists()
        with locked(target):
            pass
        assert content(target) in (OLD, NEW)
        assert hidden(target.parent) == []
    assert gone == 1


def test_an_old_folder_is_there_at_every_instant(tmp_path):
    """A reader that looks as fast as it can while a report is replaced, again and again."""
    target = tmp_path / "out"
    with written_folder(target) as beside:
        fill(beside, " 0")
    looking = subprocess.Popen(
        [sys.executable, "-c", LOOK, str(target / "config.json")], stdout=subprocess.PIPE, text=True
    )
    assert looking.stdout.readline() == "looking\n"
    for turn in range(30):
        with written_folder(target, replace=True) as beside:
            fill(beside, f" {turn}")
    looking.terminate()
    assert looking.communicate()[0] == ""


LOOK = """
import sys
import threading
import time
print("looking", flush=True)
while True:
    try:
        open(sys.argv[1]).close()
    except FileNotFoundError:
        print("there is none", flush=True)
"""


def test_one_process_at_a_time_and_its_lock_dies_with_it(tmp_path):
    target = tmp_path / "new" / "out"
    held, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(target):
            os.write(ready, b"held")
            time.sleep(60)
        os._exit(1)
    assert os.read(held, 4) == b"held"
    for write in (written_folder, locked):
        with pytest.raises(InputError, match="out is being written by another"), write(target):
            pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(held)
    os.close(ready)
    with locked(target), written_folder(target) as beside:  # who holds it may take it again
        fill(beside, " new")
    assert content(target) == NEW
    assert hidden(target.parent) == []


def test_what_another_live_process_writes_is_left_alone(tmp_path):
    target = tmp_path / "gains.safetensors"
    with written_whole(target) as mine:
        mine.write_text("mine")

        def write():
            with written_whole(target) as file:
                file.write_text("theirs")

        assert forked(write) == 7
        assert target.read_text() == "theirs"
        assert mine.read_text() == "mine"
    assert target.read_text() == "mine"
    assert hidden(tmp_path) == []


def test_parts_of_other_names_are_no_parts(tmp_path):
    for name in (
        ".out.b.01234567.part",
        ".out.0123.part",
        "out.01234567.part",
        ".outs.01234567.part",
    ):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.iterdir())
    with locked(tmp_path / "out"):
        pass
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_and_folders_follow_the_umask(mask, tmp_path):
    out = tmp_path / "out"

    def write():
        os.umask(mask)
        with written_folder(out / "folder") as beside:
            (beside / "a").mkdir(mode=0o700)
            os.close(os.open(beside / "a/secret", os.O_CREAT, 0o600))
        write_json(out / "plain.json", [1])
        save_tensors(out / "t.safetensors", "x", {"a": torch.ones(1)}, {})

    out.mkdir()
    assert forked(write) == 7
    modes = {p.name: p.stat().st_mode & 0o777 for p in out.rglob("*")}
    assert modes.pop("folder") == modes.pop("a") == 0o777 & ~mask
    assert set(modes) == {"secret", SUMS, "plain.json", "t.safetensors"}
    assert set(modes.values()) == {0o666 & ~mask}


def test_the_umask_of_the_process_is_never_touched(tmp_path, monkeypatch):
    """It belongs to all threads: another's file made in between would have the wrong mode."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
    with written_folder(tmp_path / "out") as beside:
        fill(beside, "")
    with written_whole(tmp_path / "file") as file:
        file.write_text("x")


def test_a_changed_file_is_found_and_standard_tools_agree(tmp_path):
    target = tmp_path / "out"
    with written_folder(target) as beside:
        fill(beside, "")
    check_sums(target)
    subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=target, check=True)
    file = target / "a/weights.bin"
    data = bytearray(file.read_bytes())
    data[1234] ^= 1
    file.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"weights\.bin does not match its checksum"):
        check_sums(target)
    file.unlink()
    with pytest.raises(FileFormatError, match=r"weights\.bin.*missing"):
        check_sums(target)


@pytest.mark.parametrize("code", [28, 122, 5, 13])
def test_a_full_disk_is_one_line_and_leaves_nothing(code, tmp_path):
    target = tmp_path / "new" / "out"
    caught = pytest.raises(InputError, match=r"out' can't be written: ")
    with caught as found, written_folder(target) as beside:
        fill(beside, "")
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == []


def test_a_really_full_disk():
    """/dev/full says so at the first byte."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(InputError, match="pipe or device"), written_whole("/dev/full"):
        pass
    assert not Path("/dev/full").is_file()


def test_pipes_devices_and_folders_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(InputError, match="expected a file"), written_whole(target):
            pass
    assert not Path("/dev/null").is_file()


def test_threads_take_turns_too(tmp_path):
    with locked(tmp_path / "out"):
        caught = []

        def other():
            try:
                with locked(tmp_path / "out"):
                    pass
            except InputError as error:
                caught.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(caught) == 1


def test_the_current_folder_is_filled_where_it_is(tmp_path, monkeypatch):
    """Replaced, the shell that runs the command would stand in a folder that is gone."""
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    with written_folder(".") as beside:
        fill(beside, " new")
    assert tmp_path.stat().st_ino == before
    assert content(tmp_path) == NEW


def test_interrupts_leave_nothing(tmp_path):
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), written_folder(tmp_path / "out") as beside:
            fill(beside, "")
            raise error
    assert list(tmp_path.iterdir()) == []
