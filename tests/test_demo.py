"""The demonstration, on small victims: that it shows, measures and cleans up."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from test_cli import COMMAND, on_terminal

pytestmark = [pytest.mark.needs("release"), pytest.mark.timeout(120)]


def test_it_shows_lines_and_ends_with_a_table() -> None:
    result = subprocess.run(
        [*COMMAND, "demo", "--size", "16"], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "16 MiB" in result.stdout
    assert "\r" not in result.stdout
    # A slow machine's victims may be cut off: lines below say so.
    table = result.stdout.rpartition("\n\n")[2]
    _, alone, ours, ratio, *_ = table.splitlines()
    assert alone.startswith("SIGKILL alone ")
    assert ratio.startswith("times sooner ")
    name, back, exit_ = ours.split()
    assert name == "mrelease.kill"
    assert float(back) <= float(exit_)


def test_on_a_terminal_a_bar_is_redrawn() -> None:
    status, output = on_terminal("demo", "--size", "16", "--runs", "2")
    assert status == 0
    # At least once a kill, and empty at its end.
    assert output.count("\x1b[K") >= 4
    exits = output.count(f"exited          {'.' * 30}\x1b[K")
    assert exits == 4 or (exits >= 2 and "cut off" in output)
    assert "times sooner" in output


def test_ctrl_c_ends_it_and_leaves_nothing() -> None:
    process = subprocess.Popen(
        [*COMMAND, "demo", "--size", "64"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        while "held" not in process.stdout.readline():
            assert process.poll() is None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = children.read_text().split() if children.exists() else []
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "mrelease: interrupted\n")
    assert len(pids) == len(os.sched_getaffinity(0)) + 1 or not children.exists()
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize("size", ["1", "99999999"])
def test_a_victim_of_a_size_that_cannot_be_is_refused(size: str) -> None:
    result = subprocess.run(
        [*COMMAND, "demo", "--size", size], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "--size must be from 16 to" in result.stderr


def test_a_victim_that_cannot_be_made_is_an_error_and_leaves_nothing() -> None:
    # A free-threaded interpreter has a GiB of address space to begin with.
    program = """
import resource
from mrelease._cli import main
with open("/proc/self/statm") as statm:
    pages = int(statm.read().split()[0])
limit = pages * resource.getpagesize() + 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
exit(main(["demo", "--size", "1024"]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr == (
        f"mrelease: a child could not be made ready: {os.strerror(errno.ENOMEM)}\n"
    )
