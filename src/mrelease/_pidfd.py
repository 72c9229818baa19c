"""One process, held by a descriptor that can never come to mean another one."""

from __future__ import annotations

import os
from _operator import index  # operator and warnings would import more
from _warnings import warn
from errno import EBADF, EINVAL, ENODATA, ENOENT, ENOSYS, EPERM, ESRCH
from select import POLLIN, POLLNVAL, poll
from sys import byteorder
from time import monotonic

from . import _proc
from ._mrelease import PIDFD_THREAD, pidfd_open, pidfd_send_signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Any, Self, Unpack

    from ._kill import KillResult
    from ._types import KillOptions, Target, TerminateOptions
else:
    from _collections import deque  # collections would import more

_PIDFD_GET_INFO = 0xC040FF0B  # Linux 6.13; ioctl(2) encodes it alike everywhere
_PIDFD_INFO_CGROUPID = 4
_LONGEST_POLL = 86400.0  # seconds; poll(2) counts milliseconds in an int

_SHARED = -1  # no descriptor's number
# Of waitid(2), Linux 5.4; os has the first only if the C library's headers do.
_P_PIDFD = 3
_WALL = 0x40000000

INFINITY = float("inf")


class Pidfd:
    """An owned descriptor of one process: ``Pidfd.open(target)`` or ``Pidfd(fd)``.

    While it is open it means this process and no other, even after the exit, so a
    signal sent through it cannot hit a process that got the same pid later. Use it as
    a context manager; collected while open it gives a ResourceWarning.

    Any number of threads may use one at once, except that, as with every descriptor,
    close() must wait until the others are done. Linux 5.3. See pidfd_open(2).
    """

    __slots__ = ("__weakref__", "_claims", "_fd", "_pid", "_taken")

    _fd: int
    _pid: int
    # Of all that share the descriptor. The first, which is taken last, is its number.
    # A deque, as no pop() of it needs memory.
    _claims: deque[int]
    _taken: Iterator[int]  # takes one with each step

    def __init__(self, fd: int, /) -> None:
        """Take over a descriptor from pidfd_open(2), clone3(2) or SCM_PIDFD.

        Raises OSError with EBADF if fd is no pidfd, ValueError if it was opened with
        PIDFD_THREAD; the descriptor then stays the caller's. Needs the /proc of the
        caller's pid namespace: OSError with ENOSYS without.
        """
        self._fd = self._pid = -1
        if isinstance(fd, bool):
            raise TypeError("a descriptor must be an int, not bool")
        number = index(fd)
        self._pid = _pid_of_descriptor(number)
        self._claims = deque((number,))
        self._taken = iter(self._claims.pop, None)
        self._fd = number

    @classmethod
    def open(
        cls, target: Target, *, verify: Callable[[int], bool] | None = None
    ) -> Self:
        """Open a process: a pid, or an object with a ``.pid``, such as a Popen.

        verify(pid) is asked after the descriptor is open; the process must then still
        be running. So what verify finds in /proc is true of this very process.

        Raises ProcessLookupError if there is no such process, if the object says that
        it has been reaped, if the object has a returncode, as those of subprocess and
        asyncio, and the process is not, or no more, the caller's child, nor older than
        the caller, or if verify says no; ValueError for a pid that is not
        positive, or is the id of a thread; TypeError for what is no target; and OSError
        with EMFILE when no descriptor is left. A Pidfd gives a second one, which needs
        none: they share theirs, until both are closed.
        """
        self = cls.__new__(cls)
        self._fd = self._pid = -1
        opened: deque[int] = deque()
        try:
            if isinstance(target, Pidfd):
                self._share(target)
            else:
                self._pid = pid_of(target)
                _open(self._pid, target, opened)
                self._claims = opened
                self._taken = iter(opened.pop, None)
                self._fd = opened[0]
            # Asked now, because the pid could have been reused until it was open.
            _check_not_reaped(self._pid, target)
            if hasattr(target, "returncode"):
                _check_is_child(self._pid, self._fd)
            if verify is not None:
                self._verify(verify)
        except BaseException:
            if self._fd < 0 and opened:
                os.close(opened[0])
            self.close()
            raise
        return self

    def _share(self, other: Pidfd) -> None:
        fd = other.fileno()
        self._pid = other._pid
        joined: list[None] = []
        try:
            joined.extend(map(other._claims.append, (_SHARED,)))  # as in _open_into()
            self._claims = other._claims
            self._taken = iter(self._claims.pop, None)
            self._fd = fd
        except BaseException:
            if joined and self._fd < 0:
                other._claims.pop()
            raise

    def _verify(self, verify: Callable[[int], bool]) -> None:
        if not verify(self._pid):
            raise ProcessLookupError(ESRCH, f"Process {self._pid} is not the one meant")
        if self.exited:
            raise ProcessLookupError(ESRCH, f"Process {self._pid} has exited")

    @property
    def pid(self) -> int:
        """The process's pid, which may be another's once this process has been reaped.

        For ``Pidfd(fd)``, -1 if it had been reaped before, and 0 if it is in a pid
        namespace that the caller cannot see.
        """
        return self._pid

    def fileno(self) -> int:
        """The descriptor; it polls readable when the process has exited."""
        if self._fd < 0:
            raise ValueError("operation on a closed Pidfd")
        return self._fd

    def close(self) -> None:
        """Close the descriptor, if no other shares it. A second call does nothing."""
        if self._fd < 0:
            return
        # A loop's step is made in C: no exception of a signal handler can come between
        # it and os.close(), as it could after the call of pop().
        for claim in self._taken:
            self._fd = -1
            if claim != _SHARED:
                os.close(claim)
            break

    @property
    def exited(self) -> bool:
        """Whether the process has exited, a zombie included: its memory is back."""
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the exit, at most timeout seconds; say whether it has come.

        It never reaps: the exit status stays with the parent.
        """
        remaining = seconds("timeout", timeout, optional=True)
        deadline = monotonic() + remaining
        while not poll_exited([self], remaining):
            remaining = deadline - monotonic()
            if remaining <= 0:
                return False
        return True

    def send_signal(self, sig: int, /) -> None:
        """Send a signal; 0 only checks that the process exists and may be signalled.

        Raises ProcessLookupError if it has been reaped, PermissionError if the caller
        may not signal it, and ValueError if sig is no signal number.
        """
        try:
            pidfd_send_signal(self.fileno(), sig)
        except OSError as error:
            # The kernel says EINVAL, too, of a process outside the caller's namespace.
            if error.errno == EINVAL and self._pid != 0:
                raise ValueError(f"{sig!r} is not a signal number") from None
            raise

    def kill(self, **options: Unpack[KillOptions]) -> KillResult:
        """Kill the process and free its memory: see mrelease.kill()."""
        from ._kill import kill

        return kill(self, **options)

    def terminate(self, **options: Unpack[TerminateOptions]) -> KillResult:
        """Ask the process to end, then kill it: see mrelease.terminate()."""
        from ._kill import terminate

        return terminate(self, **options)

    def release(self, *, timeout: float | None = 0.0) -> KillResult:
        """Free the memory of a process that was killed: see mrelease.release()."""
        from ._kill import release

        return release(self, timeout=timeout)

    def cgroup_id(self) -> int:
        """The inode number of the process's cgroup v2 directory. Linux 6.13.

        Raises OSError: ENOTTY or EINVAL on older kernels, ESRCH once the process has
        been reaped, ENODATA if the kernel does not say.
        """
        from fcntl import ioctl

        info = bytearray(64)  # struct pidfd_info: u64 mask, u64 cgroupid, ...
        info[:8] = _PIDFD_INFO_CGROUPID.to_bytes(8, byteorder)
        ioctl(self.fileno(), _PIDFD_GET_INFO, info)
        if not int.from_bytes(info[:8], byteorder) & _PIDFD_INFO_CGROUPID:
            raise OSError(ENODATA, "The kernel does not tell the cgroup id")
        return int.from_bytes(info[8:16], byteorder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Unset if __init__() was called with the wrong arguments.
        if getattr(self, "_fd", -1) >= 0:
            try:
                warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            finally:
                self.close()

    def __repr__(self) -> str:
        state = f"fd={self._fd}" if self._fd >= 0 else "closed"
        return f"<Pidfd pid={self._pid} {state}>"

    def __reduce__(self) -> str:
        raise TypeError("cannot copy or pickle a Pidfd: it owns a descriptor")


def seconds(name: str, value: float | None, *, optional: bool = False) -> float:
    """Check a number of seconds; None, where it is allowed, means no limit."""
    if value is None and optional:
        return INFINITY
    # A str would convert as well, and is surely a mistake.
    if value is None or not (
        hasattr(value, "__float__") or hasattr(value, "__index__")
    ):
        raise TypeError(
            f"{name} must be a number of seconds, not {type(value).__name__}"
        )
    try:
        number = float(value)
    except OverflowError:
        raise OverflowError(f"{name} is too large") from None
    if not number >= 0:  # NaN is not
        raise ValueError(f"{name} must be zero or more seconds, not {value!r}")
    return number


def milliseconds(timeout: float) -> float:
    """Seconds as poll(2) wants them: none that are negative, and at most a day."""
    return 1000 * min(max(timeout, 0.0), _LONGEST_POLL)


def poll_exited(pidfds: list[Pidfd], timeout: float) -> list[Pidfd]:
    """Wait for an exit, at most timeout seconds and a day; return who has exited."""
    poller = poll()
    for pidfd in pidfds:
        poller.register(pidfd.fileno(), POLLIN)
    events = dict(poller.poll(milliseconds(timeout)))
    if any(event & POLLNVAL for event in events.values()):
        raise OSError(EBADF, "The descriptor was closed outside its Pidfd")
    # Some may share one.
    return [pidfd for pidfd in pidfds if pidfd.fileno() in events] if events else []


def _open_into(opened: deque[int], opener: Callable[[int], int], number: int) -> None:
    # What C calls and C stores, no exception of a signal handler can come between: it
    # would take a descriptor with it that nobody knows of.
    opened.extend(map(opener, (number,)))


def _open(pid: int, target: object, opened: deque[int]) -> None:
    try:
        _open_into(opened, pidfd_open, pid)
        return
    except OSError as error:
        if error.errno not in (ESRCH, EINVAL, ENOENT):
            raise
    _check_not_reaped(pid, target)
    # EINVAL may also come of a process just being reaped, so look again.
    leader = _proc.leader(pid)
    if leader not in (None, pid):
        raise ValueError(f"{pid} is the id of a thread of process {leader}")
    raise ProcessLookupError(ESRCH, f"No process has the pid {pid}")


def pid_of(target: object) -> int:
    pid: Any = getattr(target, "pid", target)
    if target is not None and pid is None:
        raise ValueError(f"{target!r} has not been started")
    if isinstance(pid, bool):
        pid = None  # True is no pid of 1: whoever passes it did not mean to
    try:
        number = index(pid)
    except TypeError:
        raise TypeError(
            "a target must be a pid, a Pidfd or an object with a pid, "
            f"not {type(target).__name__}"
        ) from None
    if number <= 0:
        raise ValueError(f"a pid must be positive, not {number}")
    return number


def _pid_of_descriptor(fd: int) -> int:
    os.fstat(fd)  # EBADF unless it is open
    if not _proc.is_ours():
        raise OSError(ENOSYS, "No /proc of this pid namespace, to tell the pid")
    info = _proc.fields(f"/proc/thread-self/fdinfo/{fd}")
    if b"Pid" not in info:
        raise OSError(EBADF, f"Descriptor {fd} is not a pidfd")
    if int(info[b"flags"], 8) & PIDFD_THREAD:
        raise ValueError(f"pidfd {fd} is of a thread, not a process (PIDFD_THREAD)")
    return int(info[b"Pid"])


def _check_not_reaped(pid: int, target: object) -> None:
    """Raise ProcessLookupError if a process object says that it has been reaped."""
    is_running = getattr(target, "is_running", None)  # psutil
    if (
        getattr(target, "returncode", None) is not None
        or getattr(target, "exitcode", None) is not None
        or (is_running is not None and not is_running())
    ):
        raise ProcessLookupError(ESRCH, f"Process {pid} has been reaped")


def _check_is_child(pid: int, fd: int) -> None:
    """Raise ProcessLookupError if this process has no such child, or no more.

    The object of a child may be told of its end long after that was reaped, and the
    pid free: asyncio's when its loop runs next. Another child that has got the pid
    cannot be told from it. A process that is older than this one cannot have got it
    since: it is a child of the parent's, whose object this one has by a fork.
    """
    try:
        os.waitid(_P_PIDFD, fd, os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL)
    except ChildProcessError:
        born, caller = _proc.started(pid), _proc.started(os.getpid())
        if born is None or caller is None or born > caller:
            raise ProcessLookupError(
                ESRCH, f"Process {pid} has been reaped, or is not this process's child"
            ) from None
    except OSError as error:
        # Of Linux 5.3, of filters: then what the object says has to do.
        if error.errno not in (EINVAL, ENOSYS, EPERM):
            raise
