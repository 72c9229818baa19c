"""``mrelease kill``: what it does with its targets, and what it says of them."""

from __future__ import annotations

import resource
import sys
from contextlib import ExitStack, suppress
from errno import EPERM
from heapq import nlargest
from time import monotonic

from . import _proc
from ._batch import kill_all, unopened
from ._kill import SIGTERM, KillResult, Options, check_victim
from ._output import (
    INTERRUPTED,
    LATE,
    NOT_PERMITTED,
    NOT_SUPPORTED,
    OK,
    Output,
    complain,
    discard,
    message,
    status_of_error,
)
from ._pidfd import Pidfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable
    from typing import Any, TypeVar

    from ._types import KillOptions

    _T = TypeVar("_T")

_MIB = 2**20
_PROGRESS_PAUSE = 0.2  # seconds
_BAR = 20  # characters
_SHOWN = 256  # processes whose memory is looked at for the progress
_LAST_WORK = 2.0  # seconds after Ctrl-C, for a tree not to be left stopped


def run(command: Command, targets: list[Any]) -> int:
    """Kill what was asked for and print it; return the exit status."""
    _allow_descriptors()
    try:
        command.kill(targets)
    except KeyboardInterrupt:
        left = [pid for pid in command.pids if _proc.anonymous(pid) is not None]
        complain(f"interrupted; still there: {' '.join(map(str, left)) or 'none'}")
        return INTERRUPTED
    return max(command.status, command.output.status())


class Command:
    """One run of the command: its options, its output, and what it has seen so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.output = Output(options.json)
        self.status = OK
        self.pids: list[int] = []  # of whom it is about to kill
        self._dry_run: bool = options.dry_run
        self._grace: float | None = options.term
        self._wait: bool = options.wait
        self._options: KillOptions = {
            "timeout": options.timeout,
            "wait": options.wait,
            "boost": not options.no_boost,
            "settle": options.settle,
            "measure": True,
        }
        self._start = monotonic()
        self._names: dict[int, str] = {}
        self._sizes: dict[int, int] = {}  # by pid, in bytes
        self._results: list[KillResult] = []

    def kill(self, targets: list[Any]) -> None:
        """Kill the processes with these pids."""
        with ExitStack() as stack:
            victims = self._open(targets, stack)
            if self._dry_run:
                self._list(self.pids)
                return
            done = self._ask(victims)
            left = [pidfd for pidfd in victims if pidfd not in done]
            killed = self._watch(lambda: kill_all(left, **self._options))
            results = {**done, **dict(zip(left, killed, strict=True))}
            for pidfd in victims:
                self._say(pidfd.pid, results[pidfd])

    def _open(self, pids: list[int], stack: ExitStack) -> list[Pidfd]:
        """Open all, before any is killed, and complain of those that cannot be."""
        victims: list[Pidfd] = []
        for pid in pids:
            try:
                pidfd = stack.enter_context(Pidfd.open(pid))
                check_victim(pidfd)
            except (OSError, ValueError) as error:
                self._fail(pid, error)
                continue
            victims.append(pidfd)
        self._note([pidfd.pid for pidfd in victims])
        return victims

    def _note(self, pids: list[int]) -> None:
        """Take down what cannot be seen any more once they have been killed."""
        fresh = [pid for pid in pids if pid not in self._names]
        self.pids += fresh
        self._names.update((pid, _proc.name(pid)) for pid in fresh)
        self._sizes.update((pid, _proc.anonymous(pid) or 0) for pid in fresh)

    def _ask(self, pidfds: list[Pidfd]) -> dict[Pidfd, KillResult]:
        """Send SIGTERM, and wait for the grace; return the results of who obeyed."""
        if self._grace is None:
            return {}
        options = Options()
        for pidfd in pidfds:
            # Who may not be signalled, or has gone, is reported by the kill.
            with suppress(PermissionError, ProcessLookupError):
                pidfd.send_signal(SIGTERM)
        end = monotonic() + self._grace
        self._watch(lambda: [p.wait(max(0.0, end - monotonic())) for p in pidfds])
        return {
            pidfd: unopened(
                pidfd.pid,
                options,
                "exited",
                signal=SIGTERM,
                freed=self._sizes.get(pidfd.pid),
            )
            for pidfd in pidfds
            if pidfd.exited
        }

    def _watch(self, work: Callable[[], list[_T]]) -> list[_T]:
        """Do it in a thread; on a terminal, show how far it is while it lasts."""
        if not sys.stderr.isatty():
            return work()
        # The kill in hand has not begun, and without a terminal there is no need.
        from threading import Thread

        ended: list[list[_T] | Exception] = []

        def begin() -> None:
            try:
                ended.append(work())
            except Exception as error:  # raised again below
                ended.append(error)

        # A daemon, so that Ctrl-C ends the command even while a release is blocked.
        thread = Thread(target=begin, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads to be had: then without progress
            return work()
        try:
            while thread.is_alive():
                thread.join(_PROGRESS_PAUSE)
                if thread.is_alive():
                    _show(self._progress())
        except KeyboardInterrupt:
            thread.join(_LAST_WORK)  # a tree must not be left stopped
            raise
        finally:
            _show("")
        if isinstance(ended[0], Exception):
            raise ended[0]
        return ended[0]

    def _progress(self) -> str:
        largest = nlargest(_SHOWN, self.pids, key=lambda pid: self._sizes[pid])
        held = sum(_proc.anonymous(pid) or 0 for pid in largest)
        all_of_it = sum(self._sizes[pid] for pid in largest)
        back = 1 - min(1.0, held / all_of_it) if all_of_it else 0.0
        bar = "#" * round(_BAR * back)
        count = len(self.pids)
        who = str(self.pids[0]) if count == 1 else f"{count} processes"
        waited = monotonic() - self._start
        return f"{who}: {waited:.1f} s [{bar:<{_BAR}}] {held / _MIB:.1f} MiB held"

    def _list(self, pids: Iterable[int]) -> None:
        for pid in pids:
            name, size = self._names[pid], self._sizes[pid]
            if self.output.as_json:
                self.output.fields({"pid": pid, "name": name, "anonymous": size})
            else:
                self.output.line(row(pid, name, "would kill", size))

    def _say(self, pid: int, result: KillResult | OSError) -> None:
        if isinstance(result, OSError):
            self._fail(pid, result)
            return
        name = self._names.get(pid) or _proc.name(pid)  # forked meanwhile
        self._results.append(result)
        self.status = max(self.status, _status(result, self._wait))
        if self.output.as_json:
            self.output.fields({"name": name, **result.as_dict()})
        else:
            columns = (pid, name, result.outcome, result.freed, result.elapsed)
            self.output.line(row(*columns))

    def _fail(self, target: object, error: OSError | ValueError) -> None:
        # The path of a cgroup is in the error already.
        text = message(error)
        complain(text if str(target) in text else f"{target}: {text}")
        self.status = max(self.status, status_of_error(error))


def _allow_descriptors() -> None:
    """Raise the limit of descriptors as far as it goes, for a group that is large."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # more than the system allows
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _status(result: KillResult, wait: bool) -> int:
    if result.exited or (result.released and not wait):
        return OK
    if result.outcome in ("unsupported", "blocked"):
        return NOT_SUPPORTED
    return NOT_PERMITTED if result.errno == EPERM else LATE


def _show(text: str) -> None:
    """Replace the line of progress."""
    try:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)  # the terminal has gone, the kill has not


def row(
    who: object,
    name: str,
    outcome: str,
    size: int | None,
    elapsed: float | None = None,
) -> str:
    # No control characters to the terminal.
    safe = "".join(char if char.isprintable() else "?" for char in name)
    mib = "?" if size is None else f"{size / _MIB:.1f}"
    line = f"{who!s:>7} {safe:<15} {outcome:<11} {mib:>9} MiB"
    return line if elapsed is None else f"{line} {elapsed * 1000:9.1f} ms"
