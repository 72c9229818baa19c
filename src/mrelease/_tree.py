"""A process and its descendants, found while they may fork."""

from __future__ import annotations

import os
from time import monotonic, sleep

from . import _proc
from ._pidfd import Pidfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._stops import Stops

_STOP_PATIENCE = 0.1  # seconds; who is starved or stuck in the kernel needs longer
_STOP_PAUSE = 0.001


class Tree:
    """The descendants of a process, as they are found: pids with start times.

    With stops, each is stopped. Needs the /proc of this pid namespace.
    """

    def __init__(self, root: Pidfd, stops: Stops | None = None) -> None:
        self._stops = stops
        started = _proc.started(root.pid)
        # In this order: once it has gone, its pid may be another's, with children.
        self._found = {} if root.exited else {root.pid: started}
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
            self._running = [
                pid for pid in self._running if not _proc.stopped(pid, traced=True)
            ]

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


def is_descendant(pid: int, ancestor: int) -> bool:
    """Whether a process is an ancestor's child, or its child's, and so on."""
    parent = _proc.parent(pid)
    while parent and parent != ancestor:
        parent = _proc.parent(parent)
    return parent == ancestor
