"""Calls as the tests want them: an errno for an OSError, a pidfd that is closed."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mrelease import _mrelease, pidfd_open
from mrelease._mrelease import kill_and_release_next

TESTS = Path(__file__).parent

# Stops at the calls that are traced alone, so that the others take no time; signals it
# cannot inject.
QUICK_STRACE = ("strace", "-f", "--seccomp-bpf", "-qq")

C_FUNCTIONS = sorted(
    name for name in dir(_mrelease) if callable(getattr(_mrelease, name))
)


def errno_of(function: Callable[..., object], *args: object, **options: object) -> int:
    """Call it; return the errno of the OSError it raised, 0 if none."""
    try:
        function(*args, **options)
    except OSError as error:
        assert error.errno
        return error.errno
    return 0


@contextmanager
def opened(pid: int, flags: int = 0) -> Iterator[int]:
    """A raw pidfd."""
    pidfd = pidfd_open(pid, flags)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def killed_next(pidfd: int, pid: int = 0) -> tuple[int, int, int]:
    """kill_and_release_next(), with this request in the pipe."""
    reader, writer = os.pipe()
    try:
        os.write(writer, struct.pack("=ii", pidfd, pid))
        return kill_and_release_next(reader)
    finally:
        os.close(reader)
        os.close(writer)


def run_python(
    program: str,
    *,
    under: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a program that may import the tests' modules, in a fresh interpreter.

    It is killed with the test that calls it, when that has taken too long.
    """
    path = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [*under, sys.executable, *options, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )


def apart() -> tuple[str, ...]:
    """A command that runs a command where it can name no process but its own.

    That is in a pid namespace; for a user who can have none, nothing more than a user.
    """
    # The first process of a namespace, which is exempt from signals, is not ours.
    keep = ["sh", "-c", '"$@"; exit $?', "sh"]
    options = ["--kill-child", "-pf", "--mount-proc"]
    for user in ([], ["-Ur"]):
        command = ["unshare", *user, *options, *keep]
        try:
            if not subprocess.run([*command, "true"], capture_output=True).returncode:
                return tuple(command)
        except FileNotFoundError:
            break
    if os.geteuid() == 0:
        pytest.skip("needs a pid namespace: root could kill anybody")
    return ()
