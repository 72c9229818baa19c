"""Work done in a forked child, where it cannot harm the caller.

The answer comes back through shared memory, so that no descriptor is needed.
"""

from __future__ import annotations

import os
from mmap import mmap
from signal import SIG_BLOCK, SIG_SETMASK, SIGSYS, pthread_sigmask, valid_signals
from warnings import catch_warnings, simplefilter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

_HEADER = 8  # bytes that hold the length of the answer


def run(work: Callable[[], bytes], room: int = 4096) -> tuple[bytes, int]:
    """Do work in a child; return its answer, and the number of what killed it, or 0.

    The answer, of at most room bytes, is empty if there was none.
    """
    with mmap(-1, _HEADER + room) as area:
        killed = _fork_and_reap(work, area)
        length = int.from_bytes(area[:_HEADER], "little")
        return area[_HEADER : _HEADER + length], killed


def _fork_and_reap(work: Callable[[], bytes], area: mmap) -> int:
    # A signal handler that raises in the child would go on with the caller's program
    # there; blocked, no signal reaches the child's one thread.
    before = pthread_sigmask(SIG_BLOCK, [])
    try:
        pthread_sigmask(SIG_BLOCK, valid_signals())
        child = _fork()
        if child == 0:
            _answer(work, area)
        return _reap(child)
    finally:
        pthread_sigmask(SIG_SETMASK, before)


def _fork() -> int:
    with catch_warnings():
        # Of a threaded process's child, which may wait for a lock that another thread
        # held. This one takes none.
        simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _answer(work: Callable[[], bytes], area: mmap) -> NoReturn:
    """In the child: do the work and exit, whatever happens."""
    try:
        answer = work()
        area[_HEADER : _HEADER + len(answer)] = answer
        area[:_HEADER] = len(answer).to_bytes(_HEADER, "little")
    finally:
        os._exit(0)


def _reap(child: int) -> int:
    """Wait for a child's end; return the signal that killed it."""
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except ChildProcessError:
        # The application reaps every child itself. A filter is the likeliest reason
        # for an answer that is missing.
        return SIGSYS
    return -status
