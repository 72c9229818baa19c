"""The ways to kill that are compared, each as people would write it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import mrelease

from . import lab

# Kills; returns when the decision was taken, or None for when it was called.
Kill = Callable[[], float | None]

PIDFD_OPEN, PIDFD_SEND_SIGNAL, PROCESS_MRELEASE = 434, 424, 448


class Ctypes:
    """The three calls through ctypes, done right: types of the arguments, and errno."""

    def __init__(self) -> None:
        syscall = ctypes.CDLL(None, use_errno=True).syscall
        syscall.restype = ctypes.c_long
        number, fd, flags = ctypes.c_long, ctypes.c_int, ctypes.c_uint
        # Each its own function, as the arguments differ.
        self._open = _typed(syscall, number, fd, flags)
        self._send = _typed(syscall, number, fd, ctypes.c_int, ctypes.c_void_p, flags)
        self._release = _typed(syscall, number, fd, flags)

    def pidfd_open(self, pid: int) -> int:
        fd = self._open(PIDFD_OPEN, pid, 0)
        if fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return fd

    def process_mrelease(self, pidfd: int) -> None:
        if self._release(PROCESS_MRELEASE, pidfd, 0):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def kill_and_release(self, pidfd: int) -> int:
        if self._send(PIDFD_SEND_SIGNAL, pidfd, signal.SIGKILL, None, 0):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        if self._release(PROCESS_MRELEASE, pidfd, 0):
            return ctypes.get_errno()
        return 0


def _typed(function: object, *types: object) -> Callable[..., int]:
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    prototype = ctypes.CFUNCTYPE(ctypes.c_long, *types, use_errno=True)  # type: ignore[arg-type]
    return prototype(address)  # type: ignore[arg-type]


@contextmanager
def by_sigkill(victim: lab.Process) -> Iterator[Kill]:
    yield lambda: os.kill(victim.pid, signal.SIGKILL)


@contextmanager
def by_psutil(victim: lab.Process) -> Iterator[Kill]:
    import psutil

    process = psutil.Process(victim.pid)
    yield process.kill


@contextmanager
def by_ctypes(victim: lab.Process) -> Iterator[Kill]:
    calls = Ctypes()
    pidfd = calls.pidfd_open(victim.pid)

    def kill() -> None:
        calls.kill_and_release(pidfd)

    try:
        yield kill
    finally:
        os.close(pidfd)


@contextmanager
def by_c(victim: lab.Process) -> Iterator[Kill]:
    with lab.process(lab.peer("killer"), "nolock", victim.pid) as killer:

        def kill() -> float:
            start = time.monotonic()
            killer.tell()
            killer.line()
            return start

        yield kill


@contextmanager
def by_mrelease(victim: lab.Process) -> Iterator[Kill]:
    with mrelease.Pidfd.open(victim) as pidfd:

        def kill() -> None:
            mrelease.kill(pidfd, timeout=lab.LIMIT)

        yield kill


Way = Callable[[lab.Process], AbstractContextManager[Kill]]


def at_once(way: Way, victim: lab.Process) -> float:
    """Prepare and kill; return when all was prepared."""
    with way(victim) as kill:
        start = time.monotonic()
        return kill() or start


SIGKILL = "SIGKILL alone"
PSUTIL = "psutil"
C = "C program"
CTYPES = "ctypes"
MRELEASE = "mrelease.kill"

WAYS = {
    SIGKILL: by_sigkill,
    PSUTIL: by_psutil,
    CTYPES: by_ctypes,
    C: by_c,
    MRELEASE: by_mrelease,
}


def here(*names: str) -> dict[str, Way]:
    """The ways of these names that can be gone here."""
    return {name: WAYS[name] for name in names if not lacks(name)}


def lacks(name: str) -> str | None:
    """What a way needs that is not there."""
    if name == PSUTIL and not importlib.util.find_spec("psutil"):
        return "psutil"
    return None
