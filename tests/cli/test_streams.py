"""Standard output that is closed or full, Ctrl-C while libraries load, two runs of one output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gainlens.cli import main as entry
from gainlens.cli.verbs import COMMANDS
from gainlens.files import locked

pytestmark = [pytest.mark.one_env, pytest.mark.skipif(os.name != "posix", reason="Unix streams")]


@pytest.fixture
def ready(monkeypatch, tmp_path):
    """A verb that has nothing to do but say many lines."""
    lines = {"lines": ["x" * 100] * 3000}
    monkeypatch.setattr(COMMANDS["probe"], "run", lambda options: lines)
    return ["probe", "--out", str(tmp_path / "out")]


def status_with(stdout, arguments):
    """Exit status and standard error of a process with this standard output."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.dup2(write, 2)
        if stdout is None:
            os.close(1)
            sys.stdout = None
        else:
            os.dup2(stdout, 1)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        status = 99
        try:
            status = entry.main(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # as the interpreter does at its end
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with open(read) as said:
        errors = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), errors


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_a_reader_that_went_away_is_silence(ready, json):
    read, write = os.pipe()
    os.close(read)
    assert status_with(write, [*ready, *json]) == (128 + signal.SIGPIPE, "")
    os.close(write)


def test_a_full_standard_output_is_one_line(ready):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    full = os.open("/dev/full", os.O_WRONLY)
    status, errors = status_with(full, ready)
    os.close(full)
    assert status == 1
    assert errors == (
        "gainlens: error: standard output can't be written: No space left on device\n"
    )


def test_a_closed_standard_output_is_one_line(ready):
    status, errors = status_with(None, ready)
    assert status == 1
    assert errors == "gainlens: error: standard output can't be written: it is closed\n"


@pytest.mark.parametrize("code", [28, 2])
def test_a_full_disk_or_a_folder_that_vanished_is_one_line(ready, code, monkeypatch, capsys):
    def run(options):
        raise OSError(code, os.strerror(code), "somewhere")

    monkeypatch.setattr(COMMANDS["probe"], "run", run)
    assert entry.main(ready) == 2
    error = capsys.readouterr().err
    assert os.strerror(code) in error
    assert error.count("\n") == 1


def test_a_second_run_of_one_output_ends_before_its_work(ready, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(COMMANDS["probe"], "run", lambda options: pytest.fail("it ran"))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(tmp_path / "out"):
            os.write(write, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    try:
        assert entry.main(ready) == 2
        assert "out is being written by another process" in capsys.readouterr().err
        monkeypatch.setenv("RANK", "1")  # of one run with several processes the first holds it
        monkeypatch.setattr(COMMANDS["probe"], "run", lambda options: {})
        assert entry.main(ready) == 0
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("after", [0.3, 1.5])
def test_ctrl_c_while_libraries_load_is_one_line(after, tmp_path):
    # A process started in the background inherits that Ctrl-C is ignored.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv[0] = 'gainlens'; import gainlens.starting"
    )
    slow = tmp_path / "torch.py"  # imported in the place of PyTorch: a disk that takes its time
    slow.write_text("print('loading', flush=True)\nimport time\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"},
    )
    assert process.stdout.readline() == "loading\n"
    time.sleep(after / 10)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, ("", "gainlens: interrupted\n"))
