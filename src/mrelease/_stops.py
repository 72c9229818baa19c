"""Processes that are stopped for a while, and surely go on, if they are not killed."""

from __future__ import annotations

import os
from mmap import mmap
from signal import SIGCONT, SIGSTOP
from struct import Struct

from . import _proc
from ._child import close_all, end, fork, run, without_signals
from ._pidfd import Pidfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_COUNT = Struct("=q")
_ENTRY = Struct("=qq")  # pid, start time
_ROOM = 1 << 16  # entries; more than can be stopped before they are killed
_PATIENCE = 0.1  # seconds between the guard's looks for an exec(2) of the caller
_TRIES = 10  # to come to the end, though a signal's handler raises in between


class Stops:
    """A context manager, at whose end the processes that it stopped go on.

    Should the caller be killed before that, or be replaced by exec(2), as far as /proc
    tells of that, a forked child lets them go on, unless it is killed with it, as of
    one cgroup or process group. Where no child can be had, for want of processes or
    memory, they would stay stopped.
    """

    def __init__(self) -> None:
        self._started: dict[int, int] = {}
        self._guard: list[int] = []  # its pid
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
            without_signals(lambda: fork(lambda: _guard(caller, shared), self._guard))
        except (OSError, RuntimeError) as error:  # the class says why
            if isinstance(error, TimeoutError):  # a signal handler's
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
            end(self._guard)

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


def _guard(caller: int, shared: mmap) -> None:
    """In the child: wait for the caller's end, and let go on whom it had stopped."""
    close_all()
    # A fork keeps it, exec(2) makes another; 0 is of one that cannot be seen.
    unchanged = (_proc.stack(os.getpid()), 0, None)
    try:
        with Pidfd.open(caller) as pidfd:
            if os.getppid() == caller:
                while not pidfd.wait(_PATIENCE) and _proc.stack(caller) in unchanged:
                    pass
    except ProcessLookupError:
        pass  # its end has come
    (count,) = _COUNT.unpack_from(shared)
    for index in range(count):
        _let_go_on(*_ENTRY.unpack_from(shared, _COUNT.size + index * _ENTRY.size))
