"""The kill sequence: signal, release, and wait until the memory is known to be back."""

from __future__ import annotations

import os
from errno import EAGAIN, EBADF, EINVAL, ENOSYS, ESRCH
from time import monotonic

from . import _proc
from ._mrelease import bar_kill_and_release, process_mrelease
from ._pidfd import INFINITY, Pidfd, poll_exited, seconds
from ._sched import boost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Literal, NoReturn, TypeAlias

    from ._types import Target

    _Outcome: TypeAlias = Literal[
        "released",
        "exited",
        "exiting",
        "busy",
        "partial",
        "unsupported",
        "blocked",
        "alive",
    ]


# Linux has these numbers on every architecture; the signal module costs an enum.
SIGKILL = 9
SIGTERM = 15

# Seconds between releases that may succeed later.
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.05

_PASSING = (EAGAIN, EINVAL)
_OUTCOMES: dict[int, _Outcome] = {
    0: "released",
    EAGAIN: "partial",
    EINVAL: "busy",
    ENOSYS: "unsupported",
    ESRCH: "exiting",
}  # any other errno is a seccomp filter's: "blocked"


class KillResult:
    """What became of one process. Immutable; equal if all fields are; str() for a log.

    pid: the process.
    outcome: "released", its memory was freed at once; "exited", it has exited and its
        memory is back with it, but for what a living process shares; "exiting", the
        kernel is past helping and the process was not gone by the timeout; "busy", it
        writes a core dump or shares its memory with a living process; "partial", a
        device driver kept a part; "unsupported", the kernel has no
        process_mrelease(2); "blocked", a seccomp filter forbids it; "alive", it is not
        dying: nobody has killed it, or it is a kernel thread.
    released: whether its private memory is known to be back.
    exited: whether it has exited, so that the rest (shared memory, ports) is back too.
    signal: the number of the signal sent last, None if none was.
    errno: of the last release, 0 if there was none or it succeeded; with 0 attempts, of
        groups, what kept it from being killed or opened (EPERM, EMFILE).
    attempts: how many times the release was called.
    elapsed: seconds from the call to its return.
    freed: bytes of anonymous memory and swap that it no longer holds; None unless asked
        for by measure=True, and where it cannot be known, as after EINVAL. Counted is
        what a living forked child shares, and what any living process does if no
        release was answered, though it comes back only with that.
    """

    __slots__ = (
        "attempts",
        "elapsed",
        "errno",
        "exited",
        "freed",
        "outcome",
        "pid",
        "released",
        "signal",
    )

    pid: int
    outcome: _Outcome
    released: bool
    exited: bool
    signal: int | None
    errno: int
    attempts: int
    elapsed: float
    freed: int | None

    def __init__(
        self,
        pid: int,
        outcome: _Outcome,
        released: bool,
        exited: bool,
        signal: int | None,
        errno: int,
        attempts: int,
        elapsed: float,
        freed: int | None,
    ) -> None:
        set_field = object.__setattr__
        set_field(self, "pid", pid)
        set_field(self, "outcome", outcome)
        set_field(self, "released", released)
        set_field(self, "exited", exited)
        set_field(self, "signal", signal)
        set_field(self, "errno", errno)
        set_field(self, "attempts", attempts)
        set_field(self, "elapsed", elapsed)
        set_field(self, "freed", freed)

    def as_dict(self) -> dict[str, object]:
        """The fields by name, ready for json.dumps()."""
        return {
            "pid": self.pid,
            "outcome": self.outcome,
            "released": self.released,
            "exited": self.exited,
            "signal": self.signal,
            "errno": self.errno,
            "attempts": self.attempts,
            "elapsed": self.elapsed,
            "freed": self.freed,
        }

    def __str__(self) -> str:
        text = f"pid {self.pid} {self.outcome} after {self.elapsed * 1000:.1f} ms"
        if self.signal is not None:
            text += f", signal {self.signal}"
        if self.attempts:
            text += f", release {self.attempts}"
        if self.errno:
            text += f": {os.strerror(self.errno)}"
        if self.freed is not None:
            text += f", {self.freed / 2**20:.1f} MiB freed"
        return text

    def __repr__(self) -> str:
        fields = [f"{name}={value!r}" for name, value in self.as_dict().items()]
        return f"KillResult({', '.join(fields)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KillResult):
            return NotImplemented
        return self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.as_dict().values()))

    def __reduce__(self) -> tuple[type[KillResult], tuple[object, ...]]:
        return KillResult, tuple(self.as_dict().values())

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"cannot set {name!r}: a KillResult is immutable")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"cannot delete {name!r}: a KillResult is immutable")


def kill(
    target: Target,
    *,
    timeout: float | None = 1.0,
    wait: bool = False,
    boost: bool = True,
    settle: float = 0.0,
    measure: bool = False,
) -> KillResult:
    """Kill a process with SIGKILL and free its memory at once.

    target: a pid, a Pidfd, or an object with a ``.pid`` (subprocess.Popen,
        multiprocessing.Process, asyncio's Process, psutil.Process). Pids are reused:
        only a child's pid, an object, or a Pidfd opened early is sure to mean the
        process you mean.
    timeout: seconds from the SIGKILL until it gives up waiting for the memory; None for
        no limit. A release that is already under way can outlast it.
    wait: wait for the exit, too, when the memory is back.
    boost: keep the victim off the caller's CPU during the kill, then raise the priority
        of what is left of it, as far as the caller may (CAP_SYS_NICE). Where a seccomp
        filter kills for sched_setaffinity or setpriority (systemd's @resources), say
        False, or it takes the caller.
    settle: seconds that the victim gets to exit by itself before it is released. A
        victim that holds a robust mutex (LMDB's lock) and is released before it has run
        its exit leaves the waiters hanging; a few milliseconds avoid it. With more than
        timeout it is never released.
    measure: report the bytes given back.

    Returns as soon as the private memory is known to be back. The SIGKILL has been sent
    whatever the outcome, on kernels without process_mrelease(2), too.

    Raises ProcessLookupError if there is no such process, PermissionError if the caller
    may not signal it, ValueError for the caller itself, pid 1, a thread's id or a pid
    that is not positive, TypeError for what is no target, and OSError with EMFILE when
    no descriptor is left for the pidfd. Then nothing was killed.

    Linux 5.15 for the release, 5.3 for the kill. Thread-safe; the GIL is released.
    """
    options = Options(timeout, wait, boost, settle, measure)
    return _with_pidfd(target, lambda pidfd: _kill(Sequence(pidfd, options)))


def terminate(
    target: Target,
    *,
    grace: float = 10.0,
    signal: int = SIGTERM,
    timeout: float | None = 1.0,
    wait: bool = False,
    boost: bool = True,
    settle: float = 0.0,
    measure: bool = False,
) -> KillResult:
    """Ask a process to end, and kill() it if it has not within grace seconds.

    The release is never tried on a process that has not been sent SIGKILL: the kernel
    would answer EINVAL. timeout counts from the SIGKILL; it and the rest are kill()'s,
    as are the errors, and ValueError if signal is not the number of one. A stopped
    process gets the signal only when continued. Linux 5.15 for the release.
    Thread-safe.
    """
    options = Options(timeout, wait, boost, settle, measure)
    grace = check_asking(grace, signal)
    return _with_pidfd(
        target, lambda pidfd: _terminate(Sequence(pidfd, options), grace, signal)
    )


def release(target: Target, *, timeout: float | None = 0.0) -> KillResult:
    """Free the memory of a process that somebody else killed; no signal is sent.

    It tries for timeout seconds (None: no limit) while the process is not dying yet, or
    shares its memory with one that lives. The outcome is "alive" if it was not dying to
    the end. No permission is needed. Raises as kill() for a target that cannot be
    opened. Linux 5.15. Thread-safe; the GIL is released.
    """
    options = Options(timeout)
    return _with_pidfd(target, lambda pidfd: _release(Sequence(pidfd, options)))


def check_asking(grace: float, signal: int) -> float:
    """Check what terminate() takes beyond kill(); return the grace in seconds."""
    if not isinstance(signal, int):
        raise TypeError(f"signal must be an int, not {type(signal).__name__}")
    if signal <= 0:
        raise ValueError(f"{signal} is not the number of a signal that ends a process")
    return seconds("grace", grace)


def _with_pidfd(target: Target, run: Callable[[Pidfd], KillResult]) -> KillResult:
    """Run a sequence on the caller's Pidfd, or on one of its own."""
    if isinstance(target, Pidfd):
        return run(target)
    with Pidfd.open(target) as pidfd:
        return run(pidfd)


def _kill(sequence: Sequence) -> KillResult:
    sequence.check()
    sequence.kill()
    finish([sequence])
    return sequence.result()


def _terminate(sequence: Sequence, grace: float, signal: int) -> KillResult:
    sequence.check()
    sequence.ask(signal, grace)
    finish([sequence])
    return sequence.result()


def _release(sequence: Sequence) -> KillResult:
    sequence.watch()
    sequence.release()
    finish([sequence])
    return sequence.result()


def check_victim(pidfd: Pidfd) -> None:
    """Raise, with nothing touched, unless this process may be killed."""
    if pidfd.pid == 1:
        raise ValueError("refusing to kill pid 1, the init process")
    if pidfd.pid == os.getpid():
        raise ValueError(f"refusing to kill the calling process, {pidfd.pid}")
    pidfd.send_signal(0)


class Options:
    """kill()'s options, checked, and when it was called."""

    __slots__ = ("boost", "measure", "settle", "start", "timeout", "wait")

    def __init__(
        self,
        timeout: float | None = 1.0,
        wait: bool = False,
        boost: bool = True,
        settle: float = 0.0,
        measure: bool = False,
    ) -> None:
        self.timeout = seconds("timeout", timeout, optional=True)
        self.settle = seconds("settle", settle)
        # Asked now: some objects refuse to be true or false, and the kill stands then.
        self.wait = bool(wait)
        self.boost = bool(boost)
        self.measure = bool(measure)
        self.start = monotonic()


class Sequence:
    """The kill of one process: what has happened so far, and what is due next.

    Whoever runs it begins by kill(), send(), ask() or release(), calls act() when that
    is due, and stops when the process has exited, the deadline has passed or nothing is
    pending. finish() does that for any number of them. Times are monotonic()'s.
    """

    __slots__ = (
        "_asked",
        "_pause",
        "_was_busy",
        "attempts",
        "deadline",
        "due",
        "errno",
        "held",
        "options",
        "pidfd",
        "signal",
        "to_kill",
    )

    def __init__(self, pidfd: Pidfd, options: Options) -> None:
        self.pidfd = pidfd
        self.options = options
        self.held: int | None = None
        self.signal: int | None = None
        self._asked: int | None = None  # the signal that ask() has sent
        self.errno: int | None = None  # the last release's; None before the first
        self._was_busy = False  # a release has said EINVAL
        self.attempts = 0
        self.to_kill = True  # SIGKILL is still to be sent
        self.due = options.start
        self.deadline = INFINITY  # not before SIGKILL has been sent
        self._pause = _FIRST_PAUSE

    def check(self) -> None:
        """Raise, with nothing touched, unless it may be killed; measure its memory."""
        check_victim(self.pidfd)
        if self.options.measure:
            self.weigh()

    def weigh(self) -> int:
        """Note how much memory it holds, in bytes; 0 where that cannot be known."""
        self.held = _proc.anonymous(self.pidfd.pid)
        return self.held or 0

    def ask(self, signal: int, grace: float) -> None:
        """Send a signal that may make it end by itself; the kill is due after grace."""
        self._send(signal)
        self._asked = signal
        self.due = monotonic() + grace

    def watch(self) -> None:
        """Only wait for the exit, at most for the timeout."""
        self.to_kill = False
        self.due = INFINITY
        self.deadline = self.options.start + self.options.timeout

    def act(self) -> None:
        """Do what is due: kill, or release once more."""
        if self.to_kill:
            self.kill()
        else:
            self.release()

    def kill(self) -> None:
        """Send SIGKILL and release, or let it settle first if that was asked for."""
        if self.options.settle:
            self.send()
            # At once: a starved victim could not use the time it is given.
            self.hurry()
            return
        self.begin()
        # Its priority is not touched before: it might starve the caller.
        pid = self.pidfd.pid if self.options.boost else 0
        try:
            errno = bar_kill_and_release(self.pidfd.fileno(), pid)
        except BaseException as error:
            self.undo()
            if not (isinstance(error, ProcessLookupError) and self.pidfd.exited):
                raise  # else it has been reaped since it was checked
        else:
            self._released(errno)

    def begin(self) -> None:
        """Note that SIGKILL and a release are about to be sent, in one call.

        Ahead, for whoever looks at it while the release is blocked.
        """
        self._start_timeout(monotonic())
        self.signal = SIGKILL
        self.attempts = 1

    def end(self, sent: bool, errno: int) -> None:
        """Take the answer to what was begun; raise if SIGKILL could not be sent."""
        if sent:
            self._released(errno)
            return
        self.undo()
        if errno != ESRCH or not self.pidfd.exited:
            raise OSError(errno, os.strerror(errno))

    def undo(self) -> None:
        """Note that what was begun has not been done."""
        self.signal = self._asked
        self.attempts = 0

    def _released(self, errno: int) -> None:
        self._answered(errno)
        self.hurry()

    def send(self) -> None:
        """Send SIGKILL alone, and make the release due."""
        now = monotonic()
        self._start_timeout(now)
        try:
            self._send(SIGKILL)
        except ProcessLookupError:
            if not self.pidfd.exited:
                raise
        else:
            self._settle(now)

    def found_dying(self, since: float, signal: int | None) -> None:
        """Note that somebody else has killed it, and make the release due."""
        self.signal = signal
        self._start_timeout(since)
        self._settle(since)

    def help_out(self) -> None:
        """After SIGKILL: release it if that is due, and hurry it through its exit."""
        if self.due <= monotonic():
            self.release()
        self.hurry()

    def hurry(self) -> None:
        """After SIGKILL: hurry it through its exit, if that was asked for."""
        if not self.options.boost:
            return
        # Whoever has shown no memory may be a kernel thread, which never had any and
        # ignores SIGKILL: that one keeps the scheduling it had.
        if self.errno in (0, EAGAIN) or not _proc.is_kernel_thread(self.pidfd.pid):
            boost(self.pidfd)

    def release(self) -> None:
        """Release, without a signal."""
        self.attempts += 1
        try:
            process_mrelease(self.pidfd.fileno())
        except OSError as error:
            if error.errno == EBADF:  # not the kernel's answer to a pidfd
                raise
            self._answered(error.errno or 0)
        else:
            self._answered(0)

    @property
    def pending(self) -> bool:
        """Whether there is something to wait for, if it has not exited."""
        return self.errno != 0 or self.options.wait

    def result(self) -> KillResult:
        pid = self.pidfd.pid
        exited = self.pidfd.exited
        outcome = self._outcome(pid, exited)
        released = exited or outcome == "released"
        return KillResult(
            pid=pid,
            outcome=outcome,
            released=released,
            exited=exited,
            signal=self.signal,
            errno=self.errno or 0,
            attempts=self.attempts,
            elapsed=monotonic() - self.options.start,
            freed=self._freed(exited, released) if self.options.measure else None,
        )

    def _start_timeout(self, now: float) -> None:
        """Have it run from the time of the SIGKILL."""
        self.to_kill = False
        self.due = INFINITY
        self.deadline = now + self.options.timeout

    def _settle(self, since: float) -> None:
        """Make the release due once it has had its time to exit by itself."""
        settled = since + self.options.settle
        self.due = settled if settled <= self.deadline else INFINITY

    def _send(self, signal: int) -> None:
        # Ahead, for whoever sees the exit that follows from another thread.
        last, self.signal = self.signal, signal
        try:
            self.pidfd.send_signal(signal)
        except BaseException:
            self.signal = last
            raise

    def _answered(self, errno: int) -> None:
        self.errno = errno
        self._was_busy = self._was_busy or errno == EINVAL
        self.due = INFINITY
        if errno in _PASSING:
            self.due = monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _outcome(self, pid: int, exited: bool) -> _Outcome:
        # None: it obeyed, was given time to settle, or the release has not returned.
        if self.errno is None:
            return "exited" if exited else "exiting"
        if exited and self.errno:
            return "exited"
        outcome = _OUTCOMES.get(self.errno, "blocked")
        if outcome in ("busy", "exiting"):
            dying = _proc.dying(pid)
            # Unknown: EINVAL without a kill most likely means that there was none.
            unkilled = dying is None and self.signal is None and outcome == "busy"
            if dying is False or unkilled:
                return "alive"
        return outcome

    def _freed(self, exited: bool, released: bool) -> int | None:
        if exited and self.errno and self._was_busy:
            return None  # whoever shares the memory may hold all of it
        left = 0 if exited else _proc.anonymous(self.pidfd.pid)
        if left is None and released:
            left = 0
        # None: the victim has let go of its memory, and nobody can see how much of it
        # is still to be freed.
        if left is None or self.held is None:
            return None
        return max(0, self.held - left)


def finish(sequences: Iterable[Sequence], patience: float = INFINITY) -> None:
    """Run sequences to their ends: exit, memory back if that is enough, or deadline.

    patience: seconds for all of that.
    """
    end = monotonic() + patience
    left: list[Sequence] = [s for s in sequences if s.pending]
    while left and monotonic() < end:
        until = min(min(sequence.due, sequence.deadline, end) for sequence in left)
        pidfds = [sequence.pidfd for sequence in left]
        exited = poll_exited(pidfds, until - monotonic())
        now = monotonic()
        left = [sequence for sequence in left if sequence.pidfd not in exited]
        for sequence in left:
            if sequence.due <= min(now, sequence.deadline):
                sequence.act()
        left = [s for s in left if s.pending and now < s.deadline]
