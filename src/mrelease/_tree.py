"""A process and its descendants, stopped so that none can fork its way out."""

from __future__ import annotations

import os
from signal import SIGCONT, SIGSTOP
from time import monotonic, sleep

from . import _proc
from ._pidfd import Pidfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_STOP_PATIENCE = 0.1  # seconds; who is starved or stuck in the kernel needs longer
_STOP_PAUSE = 0.001


class Stops:
    """Processes that were stopped: a context manager, which lets them go on."""

    def __init__(self) -> None:
        self._started: dict[int, int] = {}

    def stop(self, pidfd: Pidfd) -> bool:
        """Stop a process; say whether that was needed and allowed."""
        pid = pidfd.pid
        started = _proc.started(pid)
        if started is None or self._started.get(pid) == started or _proc.stopped(pid):
            return False
        self._started[pid] = started  # ahead: an exception may come at any moment
        try:
            pidfd.send_signal(SIGSTOP)
        except (PermissionError, ProcessLookupError):
            self.forget(pid)
            return False
        return True

    def forget(self, pid: int) -> None:
        """Leave a process as it is: it has been killed."""
        self._started.pop(pid, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pid, started in self._started.items():
            try:
                with open_known(pid, started) as pidfd:
                    pidfd.send_signal(SIGCONT)
            except (OSError, ValueError):  # it has gone
                continue


class Tree:
    """The descendants of a process, as they are found: pids with start times.

    With stops, each is stopped. Needs the /proc of this pid namespace.
    """

    def __init__(self, root: Pidfd, stops: Stops | None = None) -> None:
        self._stops = stops
        self._found = {root.pid: _proc.started(root.pid)}
        self._running = [root.pid]  # told to stop, and perhaps not there yet
        if stops:
            stops.stop(root)

    def look_until_none(self) -> list[tuple[int, int]]:
        """Look, again and again, until there is nobody new; return who was."""
        found: list[tuple[int, int]] = []
        while True:
            self._await_stopped()
            fresh = self.look()
            if not fresh:
                return found
            found += fresh
            self._running = [pid for pid, _ in fresh]

    def _await_stopped(self) -> None:
        end = monotonic() + _STOP_PATIENCE
        while self._running and monotonic() < end:
            sleep(_STOP_PAUSE)
            self._running = [pid for pid in self._running if not _proc.stopped(pid)]

    def look(self) -> list[tuple[int, int]]:
        """Look once for descendants that are not known; stop and return them."""
        children: dict[int, list[tuple[int, int]]] = {}
        for pid, (parent, started) in _proc.processes().items():
            children.setdefault(parent, []).append((pid, started))
        fresh: list[tuple[int, int]] = []
        parents = list(self._found)
        for parent in parents:  # which grows meanwhile
            for pid, started in children.get(parent, ()):
                known = self._found.get(pid) == started
                if not known and self._take(pid, started, parent):
                    parents.append(pid)
                    fresh.append((pid, started))
        return fresh

    def _take(self, pid: int, started: int, parent: int) -> bool:
        """Take note of a process, and stop it, if its parent is one that is known."""

        def is_child(pid: int) -> bool:
            # In this order: the parent's pid was the parent's when the child named it.
            return (
                pid != os.getpid()
                and _proc.started(pid) == started
                and _proc.parent(pid) == parent
                and _proc.started(parent) == self._found[parent]
            )

        try:
            with Pidfd.open(pid, verify=is_child) as pidfd:
                self._found[pid] = started
                if self._stops:
                    self._stops.stop(pidfd)
        except (ProcessLookupError, ValueError):  # gone; or the pid is a thread's now
            return False
        return True


def open_known(pid: int, started: int) -> Pidfd:
    """Open a process that is known by its pid and start time."""
    return Pidfd.open(pid, verify=lambda pid: _proc.started(pid) == started)


def is_descendant(pid: int, ancestor: int) -> bool:
    """Whether a process is an ancestor's child, or its child's, and so on."""
    parent = _proc.parent(pid)
    while parent and parent != ancestor:
        parent = _proc.parent(parent)
    return parent == ancestor
