"""Kills that are begun one after the other and waited for together: of a list."""

from __future__ import annotations

import os
from contextlib import suppress
from errno import EINVAL
from functools import partial
from time import monotonic, sleep

from . import _proc
from ._kill import KillResult, Options, Sequence, check_victim, finish
from ._pidfd import INFINITY, Pidfd, pid_of, poll_exited
from ._proc import NO_DESCRIPTOR
from ._sched import cpus, has_idle_cpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Literal, ParamSpec, Self, TypeVar, Unpack

    from ._types import KillOptions, Target

    _P = ParamSpec("_P")
    _T = TypeVar("_T")

_MOST = 1024
_PATIENCE = 0.05  # seconds that the next kills may wait for room
CROWD = 64  # of so many each has a small part of the memory
# Seconds in which some of a crowd exit where nothing is starved; then so much is left.
_MOMENT = 0.005
_SLOW = 15 / 16
# Seconds in which a few use this part of the CPUs' time, as the kernel counts it: not
# less, as it counts at each tick, of 1 to 10 ms.
_SPELL = 0.02
_BUSY = 1 / 2


def kill_all(
    targets: Iterable[Target], **options: Unpack[KillOptions]
) -> list[KillResult | OSError]:
    """Kill processes and free their memory, the largest first.

    Each is released before the next is killed, as starved processes come back sooner
    so; where each of them could have a CPU that is idle, all are killed at once, and
    those are released that do not exit by themselves in good time. The options are
    kill()'s; the waiting, up to timeout seconds from a process's SIGKILL, is for all of
    them together, after the last kill. Targets beyond 1024, or a quarter of
    RLIMIT_NOFILE if that is less, come after those before them, whatever their size.

    Returns one result a target, in order. One that cannot be opened or killed gives
    its exception, and the rest are still killed; what kill() refuses with ValueError
    gives one that is an OSError, too, with EINVAL. Raises TypeError for what is no
    target, and what kill() raises for an option, before anything is killed.

    Of more targets than twice that some results may come early, with what was known
    then. Linux 5.15 for the release, 5.3 for the kill. Thread-safe.
    """
    settings = Options(**options)
    if isinstance(targets, bytes | bytearray | memoryview):
        raise TypeError(f"targets must not be {type(targets).__name__}: pids are ints")
    targets = list(targets)
    for target in targets:
        with suppress(ValueError):  # a result, in its turn
            pid_of(target)
    with Batch(settings) as batch:
        begun = [_begin(target, batch) for target in targets]
        batch.finish()
    return [one if isinstance(one, OSError) else batch.results[one] for one in begun]


class Batch:
    """Kills with the same options, and a bounded number of descriptors open.

    A context manager, which closes what it owns.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.begun: list[Sequence] = []
        self.results: dict[Sequence, KillResult | OSError] = {}
        self._owned: set[Sequence] = set()
        self._queued: list[Sequence] = []
        self._running: list[Sequence] = []
        # Of each of these two, so that half of what may be open is left to the caller.
        limit = os.sysconf("SC_OPEN_MAX")
        self._most = min(max(1, limit // 4), _MOST) if limit > 0 else _MOST
        self.patience = _PATIENCE
        # Whether there were idle CPUs before those were killed that are dying.
        self.had_idle_cpu = False

    def open(self, opener: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call what opens a process; when no descriptor is left, make room first."""
        try:
            return opener(*args, **kwargs)
        except OSError as error:
            if error.errno not in NO_DESCRIPTOR or not self._owned:
                raise
        self.flush(self.patience)
        self._conclude(self._running)
        return opener(*args, **kwargs)

    def add(self, pidfd: Pidfd, *, own: bool = True) -> Sequence:
        """Have a process killed and released by the next flush().

        own: close the Pidfd after it.
        """
        sequence = Sequence(pidfd, self.options)
        self._add(sequence, own)
        return sequence

    def add_dying(self, pidfd: Pidfd, since: float, signal: int | None) -> None:
        """Have a process released by the next flush() that somebody else has killed."""
        sequence = Sequence(pidfd, self.options)
        sequence.found_dying(since, signal)
        self._add(sequence, own=True)

    def _add(self, sequence: Sequence, own: bool) -> None:
        self.begun.append(sequence)
        self._queued.append(sequence)
        if own:
            self._owned.add(sequence)
        if len(self._queued) >= self._most:
            self.flush(self.patience)

    def flush(self, patience: float = INFINITY) -> None:
        """Kill and release what was added, the largest first.

        patience: seconds at most in which they are left to exit by themselves.
        """
        queued, self._queued = self._queued, []
        to_kill = [sequence for sequence in queued if sequence.to_kill]
        dying = [sequence for sequence in queued if not sequence.to_kill]
        # Where nothing is starved, they free their memory themselves, side by side.
        pids = [s.pidfd.pid for s in to_kill]
        if len(pids) > 1 and not self.options.settle and has_idle_cpu(pids):
            self._kill_at_once(to_kill, patience)
        else:
            self._kill_in_turn(to_kill)
        # After them, as a release may block.
        if self.options.measure:
            for sequence in dying:
                sequence.weigh()
        left = self._let_exit(dying, patience) if self.had_idle_cpu else dying
        for sequence in left:
            self._try(sequence, sequence.help_out)
        self._running += queued
        self._conclude([s for s in queued if s not in self.results and s.pidfd.exited])
        if len(self._running) > self._most:
            # Not those whose release might block: there is somebody left to kill.
            ready = [s for s in self._running if not _proc.stuck(s.pidfd.pid)]
            finish(ready, self.patience)
            self._conclude([s for s in self._running if s.pidfd.exited])
            # The oldest have had the most time.
            self._conclude(self._running[: -self._most])

    def _kill_in_turn(self, sequences: list[Sequence]) -> None:
        """Release each before the next is killed."""
        sequences = [s for s in sequences if self._check(s)]
        # A stuck one might block its release; and it loses no race by waiting for it.
        stuck = {s for s in sequences if _proc.stuck(s.pidfd.pid)}
        for sequence in stuck:
            if self._try(sequence, sequence.send):
                self._try(sequence, sequence.hurry)
        for sequence in _largest_first(sequences):
            if sequence in stuck or not self._try(sequence, sequence.kill):
                continue
            if not sequence.pending:
                self._report(sequence)  # at once, for the time it took

    def _kill_at_once(self, sequences: list[Sequence], patience: float) -> None:
        """Kill all, then release those that need it."""
        if self.options.measure or len(sequences) <= CROWD:
            sequences = _largest_first(sequences)
        sent = [s for s in sequences if self._check(s) and self._try(s, s.send)]
        for sequence in self._let_exit(sent, patience):
            # The release of a stuck one, which might block, comes when all are done.
            is_stuck = _proc.stuck(sequence.pidfd.pid)
            help_out = sequence.hurry if is_stuck else sequence.help_out
            if self._try(sequence, help_out) and not sequence.pending:
                self._report(sequence)

    def _let_exit(self, sequences: list[Sequence], patience: float) -> list[Sequence]:
        """Wait while they exit by themselves, side by side; return those that have not.

        That is a crowd of which many exit in each short while, or more than there are
        CPUs that keep these busy: a release would take its CPU from another's exit.
        """
        until = min([monotonic() + patience, *(s.deadline for s in sequences)])
        most = cpus()

        def look(timeout: float = 0) -> int:
            nonlocal sequences
            exited = {*poll_exited([s.pidfd for s in sequences], timeout)}
            self._conclude([s for s in sequences if s.pidfd in exited])
            sequences = [s for s in sequences if s.pidfd not in exited]
            return len(sequences)

        wait_while_fewer(look, until)
        is_busy = True
        while is_busy and len(sequences) > most and (start := monotonic()) < until:
            number, end = len(sequences), min(start + _SPELL, until)
            before = {s: _proc.run_time(s.pidfd.pid) for s in sequences}
            while len(sequences) > most and (now := monotonic()) < end:
                look(end - now)
            ran = sum(_proc.run_time(s.pidfd.pid) - before[s] for s in sequences)
            fewer = len(sequences) <= number * _SLOW
            is_busy = fewer or ran > _BUSY * most * (end - start)
        return sequences

    def finish(self) -> None:
        """Kill what was added, and wait until all is over."""
        self.flush()
        finish(self._running)
        self._conclude(self._running)

    def killed(self, sequences: Iterable[Sequence]) -> list[KillResult]:
        """The results; for those that may not be killed or have gone, too."""
        return [
            _unkilled(sequence, result) if isinstance(result, OSError) else result
            for sequence in sequences
            for result in (self.results[sequence],)
        ]

    def _check(self, sequence: Sequence) -> bool:
        return self._try(sequence, partial(check_victim, sequence.pidfd))

    def _try(self, sequence: Sequence, act: Callable[[], None]) -> bool:
        try:
            act()
        except (OSError, ValueError) as error:
            self.results[sequence] = as_os_error(error)
            self._close(sequence)
            return False
        return True

    def _conclude(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._report(sequence)
        self._running = [s for s in self._running if s not in self.results]

    def _report(self, sequence: Sequence) -> None:
        self.results[sequence] = sequence.result()
        self._close(sequence)

    def _close(self, sequence: Sequence) -> None:
        if sequence in self._owned:
            self._owned.remove(sequence)
            sequence.pidfd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sequence in self._owned:
            sequence.pidfd.close()


def wait_while_fewer(count: Callable[[], int], until: float) -> None:
    """Wait while the members of a crowd exit, many of them in each short while."""
    left = count()
    while left > CROWD and monotonic() < until:
        sleep(_MOMENT)
        before, left = left, count()
        if left > before * _SLOW:
            return


def _largest_first(sequences: list[Sequence]) -> list[Sequence]:
    sizes = {sequence: sequence.weigh() for sequence in sequences}
    return sorted(sizes, key=sizes.__getitem__, reverse=True)


def _begin(target: Target, batch: Batch) -> Sequence | OSError:
    try:
        if isinstance(target, Pidfd):
            return batch.add(target, own=False)
        return batch.add(batch.open(Pidfd.open, target))
    except (OSError, ValueError, OverflowError) as error:
        return as_os_error(error)


class Refused(OSError, ValueError):
    """A ValueError that can stand among OSErrors."""


def as_os_error(error: OSError | ValueError | OverflowError) -> OSError:
    return error if isinstance(error, OSError) else Refused(EINVAL, str(error))


def unopened(
    pid: int,
    options: Options,
    outcome: Literal["exited", "exiting", "alive"],
    *,
    signal: int | None = None,
    errno: int = 0,
    freed: int | None = None,
) -> KillResult:
    """What became of a process that this one has not killed itself."""
    return KillResult(
        pid=pid,
        outcome=outcome,
        released=outcome == "exited",
        exited=outcome == "exited",
        signal=signal,
        errno=errno,
        attempts=0,
        elapsed=monotonic() - options.start,
        freed=freed,
    )


def _unkilled(sequence: Sequence, error: OSError) -> KillResult:
    pid = sequence.pidfd.pid
    if isinstance(error, ProcessLookupError):
        return unopened(pid, sequence.options, "exited", signal=sequence.signal)
    if not isinstance(error, PermissionError | Refused):
        raise error  # which no kernel is known to say
    return unopened(pid, sequence.options, "alive", errno=error.errno or 0)
