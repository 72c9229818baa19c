"""Work done in a forked child, where it cannot harm the caller.

The answer comes back through shared memory, so that no descriptor is needed.
"""

from __future__ import annotations

import os
from _thread import RLock
from functools import partial
from mmap import mmap
from operator import call
from signal import (
    SIG_BLOCK,
    SIG_SETMASK,
    SIGKILL,
    SIGSYS,
    pthread_sigmask,
    valid_signals,
)
from warnings import catch_warnings, simplefilter

from ._locks import locked, uninterrupted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    _T = TypeVar("_T")

_HEADER = 8  # bytes that hold the length of the answer
# For the filters of warnings: of two threads that change them, the later one would put
# back what the earlier one had changed. A signal's handler may fork in between.
_lock = RLock()


def _renew_lock() -> None:
    global _lock
    _lock = RLock()  # the thread that held the other one is not in this process


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

        killed = without_signals(lambda: _run(answer))
        length = int.from_bytes(area[:_HEADER], "little")
        return area[_HEADER : _HEADER + length], killed


def fork(work: Callable[[], None], forked: list[int]) -> None:
    """Do work in a child, which then exits. Have signals blocked.

    Its pid is put into a list: a handler may raise at any moment nevertheless, as
    another thread may get the signal, and the caller has to end() the child then.
    """
    try:
        locked(_lock, partial(_fork, forked))
        if forked == [0]:
            work()
    finally:
        if forked == [0]:
            os._exit(0)


def _fork(forked: list[int]) -> None:
    with catch_warnings():
        # Of a threaded process's child, which may wait for a lock that another thread
        # held. This one takes none.
        simplefilter("ignore", DeprecationWarning)
        forked.extend(map(call, (os.fork,)))  # in C: forked and noted, or neither


def end(forked: list[int]) -> None:
    """Kill and reap what was forked, if nobody has reaped it. Can be done again."""
    for child in [*forked]:
        try:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(child, SIGKILL)
        except (ChildProcessError, ProcessLookupError):
            pass  # the application has reaped it
        _reap(forked)


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


def _run(work: Callable[[], None]) -> int:
    """Do work in a child and wait for its end; return the signal that killed it."""
    forked: list[int] = []
    try:
        fork(work, forked)
        return _reap(forked)
    except BaseException:
        end(forked)
        raise


def _reap(forked: list[int]) -> int:
    """Wait for the end of what was forked, and forget it with that."""
    reaped: list[tuple[int, int]] = []
    wait = partial(reaped.extend, map(os.waitpid, forked, (0,)))
    try:
        uninterrupted([wait, forked.clear])
    except ChildProcessError:
        forked.clear()
        # The application reaps every child itself. A filter is the likeliest reason
        # for an answer that is missing.
        return SIGSYS
    return -os.waitstatus_to_exitcode(reaped[0][1])
