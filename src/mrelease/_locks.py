"""Steps that no signal handler's exception comes between, and a lock held so."""

from __future__ import annotations

from collections import deque
from operator import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from threading import Lock, RLock
    from typing import TypeVar

    _T = TypeVar("_T")


def locked(lock: Lock | RLock, act: Callable[[], _T]) -> _T:
    """Do something with a lock held, in a thread that signal handlers may run in.

    A with statement does not see to that in Python 3.14: there a handler may run when
    it has taken the lock, and is not yet to give it up (CPython's issue 148874).
    """
    held: list[bool] = []
    try:
        held.extend(map(call, (lock.acquire,)))  # in C: taken and noted, or neither
        return act()
    finally:
        if held:
            lock.release()


def uninterrupted(steps: Iterable[Callable[[], object]]) -> None:
    """Do all of these C functions in C; a generator of them would be Python."""
    deque(map(call, steps), maxlen=0)
