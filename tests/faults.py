"""A call made in a forked child whose system calls fail as told, from that call on.

strace attaches to the child before it calls, so that "the second openat" is that of the
call, and none of an import's.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import pickle
import re
import signal
import socket
import subprocess
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import victims
from mrelease import KillResult, _proc

TIMEOUT = 120  # seconds for what takes milliseconds: emulated machines are slow

PR_SET_PTRACER = 0x59616D61
# What the child calls until strace answers in the kernel's place: getpgid(0) of none.
MARK = "getpgid"
MARKED = 7654321
READY = b"."

_libc = ctypes.CDLL(None)
_libc.prctl.argtypes = (ctypes.c_int,) + (ctypes.c_ulong,) * 4


@dataclass
class Outcome:
    """What became of a call."""

    value: Any  # what it returned, or the exception that it raised
    leaked: set[int]  # descriptors that are open since then
    children: bool  # whether it has left a child
    status: int  # exit code of the child, or minus the signal that ended it
    injected: int = 0  # how many faults there were

    @property
    def raised(self) -> BaseException | None:
        return self.value if isinstance(self.value, BaseException) else None


class _Before:
    """What was open before a call. It asks of what is open without opening anything."""

    def __init__(self) -> None:
        gc.collect()
        # The first one that is free is the one that lists them.
        numbers = list(map(int, os.listdir("/proc/self/fd")))
        self._range = range(max(numbers) + 64)
        self._open = self._opened()

    def _opened(self) -> set[int]:
        return {fd for fd in self._range if _is_open(fd)}

    def leaked(self) -> set[int]:
        gc.collect()
        return self._opened() - self._open


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _answer(function: Callable[[], Any], before: _Before) -> Outcome:
    value: Any
    try:
        value = function()
    except BaseException as error:
        # Its frames would keep alive what they were to close.
        value = error.with_traceback(None)
        value.__context__ = value.__cause__ = None
    return Outcome(value, before.leaked(), _has_children(), 0)


@contextmanager
def _forked(
    work: Callable[[socket.socket], Outcome],
) -> Iterator[tuple[int, socket.socket]]:
    """A child that works and sends what came of it; ended and reaped whatever comes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # Of threads, in the child of a process that has some: it takes none of theirs.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                ours.close()
                theirs.sendall(pickle.dumps(work(theirs)))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        ours.settimeout(TIMEOUT)
        try:
            yield child, ours
        finally:
            if not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _received(child: int, ours: socket.socket) -> Outcome:
    text = b"".join(iter(lambda: ours.recv(1 << 16), b""))
    report = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert report
    exited = report.si_code == os.CLD_EXITED
    status = report.si_status if exited else -report.si_status
    if not text:
        return Outcome(None, set(), False, status)
    outcome: Outcome = pickle.loads(text)
    outcome.status = status
    return outcome


def called(function: Callable[[], Any]) -> Outcome:
    """Call it in a child."""
    with _forked(lambda _: _answer(function, _Before())) as (child, ours):
        return _received(child, ours)


def injected(
    function: Callable[[], Any], *faults: str, follow: bool = False
) -> Outcome:
    """Call it in a child with strace's faults (``call:error=...``); count them.

    follow: its threads and children as well, each with a count of its own.
    """

    def work(theirs: socket.socket) -> Outcome:
        _libc.prctl(PR_SET_PTRACER, ctypes.c_ulong(-1).value, 0, 0, 0)
        before = _Before()
        theirs.sendall(READY)
        while os.getpgid(0) != MARKED:
            pass
        return _answer(function, before)

    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        with _forked(work) as (child, ours):
            if ours.recv(len(READY)) != READY:
                raise RuntimeError("the child did not start")
            faults = (*faults, f"{MARK}:retval={MARKED}")
            with _strace(child, log.name, faults, follow):
                outcome = _received(child, ours)
        lines = [line for line in log if f"{MARK}(" not in line]
    # A signal alone is shown apart from the call.
    outcome.injected = sum("(INJECTED" in line for line in lines)
    outcome.injected += outcome.status == -signal.SIGKILL
    return outcome


@contextmanager
def _strace(
    child: int, log: str, faults: tuple[str, ...], follow: bool
) -> Iterator[None]:
    names = ",".join(fault.partition(":")[0] for fault in faults)
    command = ["strace", "-qq", "-o", log, "-p", str(child), *["-f"] * follow]
    if "!" not in names:
        command += ["-e", f"trace={names}"]
    for fault in faults:
        command += ["-e", f"inject={fault}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        try:
            yield
        except TimeoutError:
            raise AssertionError(f"no answer under {faults}") from None
        finally:
            strace.terminate()
            _, said = strace.communicate(timeout=TIMEOUT)
            assert not re.search("inject|invalid", said), said


def filtered(function: Callable[[], Any], error: int, *calls: str) -> Outcome:
    """Call it in a child where these calls fail each time, by a seccomp filter."""

    def work(_: socket.socket) -> Outcome:
        from pyseccomp import ALLOW, ERRNO, SyscallFilter

        before = _Before()
        answers = SyscallFilter(ALLOW)
        for call in calls:
            answers.add_rule(ERRNO(error), call)
        answers.load()
        return _answer(function, before)

    with _forked(work) as (child, ours):
        return _received(child, ours)


class Checked:
    """A victim for one fault after the other, and a process that must stay alive.

    holds: the victim keeps its memory until it is released; it cannot be stopped and
    go on, as any other can.
    """

    def __init__(self, stack: ExitStack, *, holds: bool = True) -> None:
        self._stack = stack
        self._own = ExitStack()
        self._make = victims.exit_stopped if holds else victims.victim
        self.bystander = stack.enter_context(victims.victim(1))
        self.count = 0
        self.renew()

    def renew(self) -> None:
        self._own.close()
        self._own = self._stack.enter_context(ExitStack())
        self.victim = self._own.enter_context(self._make(1))
        self.affinity = os.sched_getaffinity(self.victim.pid)

    def check(
        self, outcome: Outcome, call: str = "", error: str = "", *, midway: bool = False
    ) -> None:
        """call and error: what has been injected; neither if memory was short.

        midway: it may raise when it has sent a signal.
        """
        self.count += outcome.injected > 0
        said = f"{call} {error}: {outcome}"
        assert outcome.status == 0, said
        assert not outcome.leaked, said
        # A child whom the kernel does not let it end ends with it; as does one whose
        # pid os.fork() had no memory to tell.
        unended = call == "pidfd_send_signal" or isinstance(outcome.value, MemoryError)
        assert not outcome.children or (midway and unended), said
        assert self.bystander.state() == "S", said
        killed = bool(_proc.dying(self.victim.pid))
        if outcome.raised is None:
            # The kernel says that it has gone, and is believed.
            if error != "ESRCH" or getattr(outcome.value, "outcome", "") != "exited":
                self._check_result(outcome.value, killed, said)
        else:
            check_error(outcome.value, call, error, said)
            # Without memory, or if the wait fails, nobody can say how it went on.
            midway |= call == "poll" or not (call or isinstance(outcome.value, OSError))
            assert midway or not killed, said
        if killed:
            self.renew()
        else:
            self.victim.wait_state("S")
            assert os.sched_getaffinity(self.victim.pid) == self.affinity, said

    def _check_result(self, result: Any, killed: bool, said: str) -> None:
        assert isinstance(result, KillResult | OSError), said
        if isinstance(result, OSError):
            assert not killed, said
            return
        assert result.pid == self.victim.pid, said
        assert killed == (result.outcome != "alive"), said
        assert killed == (result.signal in (signal.SIGKILL, signal.SIGTERM)), said
        if killed and isinstance(self.victim, victims.Tracee):
            self.victim.wait_exit_stop()
            released = self.victim.anon() == 0
            assert released or not result.released, said
            assert not result.exited, said
        elif killed:
            self.victim.wait_exit()


def check_error(raised: BaseException, call: str, error: str, said: str) -> None:
    """It is what was injected, or what that means."""
    if isinstance(raised, MemoryError):
        assert error in ("", "ENOMEM"), said
    elif isinstance(raised, SystemError) and not error:
        # Some functions of the interpreter forget to say MemoryError.
        forgotten = "without exception set", "without setting an exception"
        assert any(words in str(raised) for words in forgotten), said
    elif isinstance(raised, OSError) and error:
        means = {"pidfd_open": errno.ESRCH, "readlink": errno.ENOSYS}.get(call)
        assert raised.errno in (getattr(errno, error), means), said
    else:
        # No such signal; no thread can be started.
        assert isinstance(raised, OSError | ValueError | RuntimeError), said
