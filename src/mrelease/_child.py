"""Work done in a forked child, where it cannot harm the caller.

The answer comes back through shared memory, so that no descriptor is needed.
"""

from __future__ import annotations

import os
from _thread import allocate_lock
from mmap import mmap
from signal import SIG_BLOCK, SIG_SETMASK, SIGSYS, pthread_sigmask, valid_signals
from warnings import catch_warnings, simplefilter

from ._locks import locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    _T = TypeVar("_T")

_HEADER = 8  # bytes that hold the length of the answer
# For the filters of warnings: of two threads that change them, the later one would put
# back what the earlier one had changed.
_lock = allocate_lock()


def _renew_lock() -> None:
    global _lock
    _lock = allocate_lock()  # the thread that held the other one is not in this process


os.register_at_fork(after_in_child=_renew_lock)


def run(work: Callable[[], bytes], room: int = 4096) -> tuple[bytes, int]:
    """Do work in a child; return its answer, and the number of what killed it, or 0.

    The answer, of at most room bytes, is empty if there was none.
    """
    with mmap(-1, _HEADER + room) as area:

        def answer() -> None:
            found = work()
            area[_HEADER : _HEADER + len(found)] = found
            area[:_HEADER] = len(found).to_bytes(_HEADER, "little")

        killed = without_signals(lambda: _reap(fork(answer)))
        length = int.from_bytes(area[:_HEADER], "little")
        return area[_HEADER : _HEADER + length], killed


def fork(work: Callable[[], None]) -> int:
    """Do work in a child, which then exits; return its pid. Have signals blocked."""
    child = locked(_lock, _fork)
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def _fork() -> int:
    with catch_warnings():
        # Of a threaded process's child, which may wait for a lock that another thread
        # held. This one takes none.
        simplefilter("ignore", DeprecationWarning)
        return os.fork()


def without_signals(act: Callable[[], _T]) -> _T:
    """Do something with all signals blocked, for a child and until its pid is known.

    A handler that raises in the child would go on with the caller's program there. No
    context manager, for the reason that locked() has: another thread may get a signal.
    """
    before = pthread_sigmask(SIG_BLOCK, [])
    try:
        pthread_sigmask(SIG_BLOCK, valid_signals())
        return act()
    finally:
        pthread_sigmask(SIG_SETMASK, before)


def close_all() -> None:
    """In a child: close every descriptor. Somebody may wait for the end of a pipe."""
    os.closerange(0, 256)  # and so have one for the directory
    for name in os.listdir("/proc/self/fd"):
        try:
            os.close(int(name))
        except OSError:  # that of the directory
            continue


def _reap(child: int) -> int:
    """Wait for a child's end; return the signal that killed it."""
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except ChildProcessError:
        # The application reaps every child itself. A filter is the likeliest reason
        # for an answer that is missing.
        return SIGSYS
    return -status
