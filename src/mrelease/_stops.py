"""Processes that are stopped for a while, and surely go on, if they are not killed."""

from __future__ import annotations

import os
from functools import partial
from itertools import repeat
from mmap import mmap
from operator import call
from select import POLLIN, poll
from signal import SIGCONT, SIGSTOP
from struct import Struct

from . import _proc
from ._child import close_all, end, fork, run, without_signals
from ._locks import uninterrupted
from ._pidfd import Pidfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_COUNT = Struct("=q")
_ENTRY = Struct("=qq")  # pid, start time
_ROOM = 1 << 16  # entries; more than can be stopped before they are killed
_TRIES = 10  # to come to the end, though a signal's handler raises in between


class Stops:
    """A context manager, at whose end the processes that it stopped go on.

    Should the caller be killed before that, or replaced by exec(2), a forked child lets
    them go on, unless it is killed with it, as of one cgroup or process group. Where no
    child can be had, for want of processes, memory or descriptors, they would stay
    stopped.
    """

    def __init__(self) -> None:
        self._started: dict[int, int] = {}
        self._guard: list[int] = []  # its pid
        self._fds: list[int] = []  # of a pipe, whose end tells the guard of an exec(2)
        self._list: mmap | None = None  # what the guard sees: their number, entries

    def stop(self, pidfd: Pidfd) -> bool:
        """Stop a process; say whether that was needed and allowed."""
        pid = pidfd.pid
        started = _proc.started(pid)
        if started is None or self._started.get(pid) == started or _proc.stopped(pid):
            return False
        self._note(pid, started)  # ahead: an exception may come at any moment
        try:
            pidfd.send_signal(SIGSTOP)
        except (PermissionError, ProcessLookupError):
            self.forget(pid)
            return False
        return True

    def forget(self, pid: int) -> None:
        """Leave a process as it is: it has been killed."""
        self._started.pop(pid, None)

    def _note(self, pid: int, started: int) -> None:
        if self._list is None:
            self._start_guard()
        self._started[pid] = started
        if self._list is not None:
            (count,) = _COUNT.unpack_from(self._list)
            if count < _ROOM:
                offset = _COUNT.size + count * _ENTRY.size
                _ENTRY.pack_into(self._list, offset, pid, started)
                _COUNT.pack_into(self._list, 0, count + 1)

    def _start_guard(self) -> None:
        caller = os.getpid()
        try:
            shared = self._list = mmap(-1, _COUNT.size + _ROOM * _ENTRY.size)
            without_signals(lambda: self._fork_guard(caller, shared))
        except (OSError, RuntimeError) as error:  # the class says why
            if isinstance(error, TimeoutError):  # a signal handler's
                raise

    def _fork_guard(self, caller: int, shared: mmap) -> None:
        try:
            made = map(call, (os.pipe,))
            uninterrupted(map(partial, repeat(self._fds.extend), made))
            reader = self._fds[0]
            fork(lambda: _guard(caller, shared, reader), self._guard)
            uninterrupted(
                [partial(self._fds.remove, reader), partial(os.close, reader)]
            )
        except BaseException:
            self._end_guard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        raised: BaseException | None = None
        for _try in range(_TRIES):
            try:
                # Other threads have their signals, whose handlers run in the main one.
                without_signals(self._end)
                break
            except BaseException as error:  # raised again below
                raised = error
        if raised:
            raise raised

    def _end(self) -> None:
        """Let all go on, and end the guard. Can be done again."""
        try:
            if not all(_let_go_on(*one) for one in self._started.items()):
                run(self._let_all_go_on)
        finally:
            self._end_guard()

    def _end_guard(self) -> None:
        end(self._guard)
        closes = [partial(os.close, fd) for fd in self._fds]
        uninterrupted([self._fds.clear, *closes])

    def _let_all_go_on(self) -> bytes:
        """In a child, which can close its copies of the descriptors."""
        close_all()
        for pid, started in self._started.items():
            _let_go_on(pid, started)
        return b""


def open_known(pid: int, started: int) -> Pidfd:
    """Open a process that is known by its pid and start time."""

    def is_known(pid: int) -> bool:
        return _proc.started(pid) == started

    return Pidfd.open(pid, verify=is_known)


def _let_go_on(pid: int, started: int) -> bool:
    """Let one go on; False for want of descriptors."""
    try:
        # Opened first: then the start time is that of the process opened, or none.
        with Pidfd.open(pid) as pidfd:
            if _proc.started(pid) == started:
                pidfd.send_signal(SIGCONT)
    except (OSError, ValueError) as error:  # gone, or its pid is a thread's now
        return getattr(error, "errno", 0) not in _proc.NO_DESCRIPTOR
    return True


def _guard(caller: int, shared: mmap, reader: int) -> None:
    """In the child: wait for the caller's end, and let go on whom it had stopped."""
    os.dup2(reader, 0)
    close_all(1)
    try:
        with Pidfd.open(caller) as pidfd:
            poller = poll()
            poller.register(pidfd.fileno(), POLLIN)
            # Closed by exec(2), unless the caller has forked another child meanwhile.
            poller.register(0, POLLIN)
            if os.getppid() == caller:
                poller.poll()
    except ProcessLookupError:
        pass  # its end has come
    (count,) = _COUNT.unpack_from(shared)
    for index in range(count):
        _let_go_on(*_ENTRY.unpack_from(shared, _COUNT.size + index * _ENTRY.size))
