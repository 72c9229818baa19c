"""probe and is_supported where nothing is filtered; test_faults.py has the filters."""

from __future__ import annotations

import os
import threading

import pytest

from calls import errno_of, run_python
from mrelease import _probe, is_supported, probe, process_mrelease


def test_the_probe_says_what_the_kernel_says() -> None:
    found = probe()
    assert found["kernel"] == os.uname().release
    assert found["pidfd_open"] is True
    works = errno_of(process_mrelease, -1) == 9  # EBADF
    assert found["process_mrelease"] == (True if works else "kernel older than 5.15")
    assert is_supported() == works
    for feature, since in (("pidfd_info", "6.13"), ("cgroup_kill", "5.14")):
        if _probe._kernel_before(since):
            assert found[feature] == f"kernel older than {since}"
        else:
            assert found[feature] in (True, "no cgroup v2 mounted")


def test_other_threads_do_not_matter() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert probe()["pidfd_open"] is True
    finally:
        stop.set()
        thread.join()


def test_no_child_leaves_the_probe_where_handlers_raise() -> None:
    program = """
import os, signal
from mrelease import is_supported

def handler(number, frame):
    while frame:
        if frame.f_code is is_supported.__code__:
            raise ZeroDivisionError
        frame = frame.f_back

parent = os.getpid()
raised = 0
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
for _ in range(300):
    try:
        is_supported()
    except ZeroDivisionError:
        raised += 1
    if os.getpid() != parent:
        print("a child has left", flush=True)
        os._exit(1)
signal.setitimer(signal.ITIMER_REAL, 0)
try:
    os.waitpid(-1, os.WNOHANG)
    print("a child was not reaped")
except ChildProcessError:
    print("raised" if raised else "never raised")
"""
    result = run_python(program)
    assert (result.returncode, result.stdout, result.stderr) == (0, "raised\n", "")


def test_a_caller_that_reaps_every_child_itself_does_not_matter() -> None:
    program = """
import signal
from mrelease import is_supported, probe
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(probe()["pidfd_open"])
"""
    result = run_python(program)
    assert (result.stdout, result.stderr) == ("True\n", "")


@pytest.mark.parametrize(
    ("release", "numbers"),
    [
        ("6.18.44", (6, 18)),
        ("5.10.0-28-cloud-amd64", (5, 10)),
        ("7.0-rc1+", (7, 0)),
        ("6.1", (6, 1)),
        ("5.15.167.4-microsoft-standard-WSL2", (5, 15)),
    ],
)
def test_kernel_releases_are_understood(release: str, numbers: tuple[int, int]) -> None:
    assert _probe._numbers(release) == numbers
