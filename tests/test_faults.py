"""What the kernel cannot be made to say here: injected by strace, or filtered."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

import faults
import victims
from calls import killed_next, run_python
from mrelease import (
    KillResult,
    Pidfd,
    kill,
    kill_and_release,
    process_mrelease,
    terminate,
)

needs_release = pytest.mark.needs("release")
pytestmark = pytest.mark.timeout(120)

# What it reports goes to standard output.
PRELUDE = """
import errno, json, os, signal, sys
import victims
from mrelease import *

def report(value):
    json.dump(value, sys.stdout)
"""


def inject(function: Callable[[], Any], *injected: str) -> Any:
    """Call it in a child whose system calls fail as told; return what it returns."""
    outcome = faults.injected(function, *injected)
    assert outcome.injected
    if outcome.raised:
        raise outcome.raised
    return outcome.value


def killed(timeout: float | None, *injected: str) -> tuple[KillResult, int]:
    """kill() a victim that any release succeeds on; what it holds after that, too."""
    with victims.exit_stopped() as victim:
        result = inject(lambda: kill(victim.pid, timeout=timeout), *injected)
        return result, victim.anon()


def filtered(program: str, action: str, *calls: str) -> Any:
    """The same under a seccomp filter, loaded where the program says load()."""
    rules = "".join(f"filter.add_rule({action}, {call!r})\n    " for call in calls)
    load = f"""
def load():
    from pyseccomp import ALLOW, ERRNO, KILL_PROCESS, SyscallFilter
    filter = SyscallFilter(ALLOW)
    {rules}
    filter.load()
"""
    result = run_python(PRELUDE + load + program)
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


strace = pytest.mark.needs("strace", "release")
seccomp = pytest.mark.needs("seccomp", "release")


# ---- Passing errors are tried again


@strace
def test_eagain_is_tried_again() -> None:
    result, held = killed(None, "process_mrelease:error=EAGAIN:when=1..3")
    assert (result.outcome, result.attempts, result.errno) == ("released", 4, 0)
    assert held == 0


@strace
def test_eagain_to_the_end_is_partial() -> None:
    result, held = killed(0.05, "process_mrelease:error=EAGAIN")
    assert (result.outcome, result.released) == ("partial", False)
    assert (result.errno, held > 0) == (errno.EAGAIN, True)


@strace
def test_einval_after_the_kill_is_tried_again() -> None:
    result, held = killed(None, "process_mrelease:error=EINVAL:when=1..2")
    assert (result.outcome, result.attempts, held) == ("released", 3, 0)


# ---- Final errors are not, and the kill stands


@strace
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ("ESRCH", "exiting"),
        ("ENOSYS", "unsupported"),
        ("EPERM", "blocked"),
        ("EACCES", "blocked"),
        ("ECANCELED", "blocked"),
    ],
)
def test_an_error_that_will_not_pass_ends_it_at_the_timeout(
    error: str, outcome: str
) -> None:
    result, held = killed(0.05, f"process_mrelease:error={error}")
    assert (result.outcome, result.released) == (outcome, False)
    assert (result.signal, result.attempts) == (signal.SIGKILL, 1)
    assert result.errno == getattr(errno, error)
    assert held > 0


@strace
@pytest.mark.parametrize("error", ["ENOSYS", "EPERM", "EAGAIN", "EINVAL"])
def test_whatever_the_errno_who_has_exited_has_exited(error: str) -> None:
    with victims.victim() as victim:
        result = inject(
            lambda: kill(victim.pid, timeout=None), f"process_mrelease:error={error}"
        )
    assert (result.outcome, result.released) == ("exited", True)
    assert result.errno in (getattr(errno, error), errno.ESRCH)


# ---- EINTR


EINTR = "process_mrelease:error=EINTR:signal=SIGUSR1:when=1"


def _kill_then_release(pidfd: Pidfd) -> None:
    pidfd.send_signal(signal.SIGKILL)
    process_mrelease(pidfd.fileno())


# With what each returns.
RELEASES: dict[str, tuple[Callable[[Pidfd], Any], Any]] = {
    "kill_and_release": (lambda pidfd: kill_and_release(pidfd.fileno()), 0),
    "process_mrelease": (_kill_then_release, None),
    "kill": (lambda pidfd: kill(pidfd).errno, 0),
}
CALLS = {name: call for name, (call, _) in RELEASES.items()}
CALLS["Pidfd.release"] = lambda pidfd: pidfd.release(timeout=1)


def interrupted(
    call: Callable[[Pidfd], Any], error: type[Exception] | None
) -> tuple[Any, int, int]:
    """What a call returns, how often the handler ran, what the victim holds."""
    calls: list[int] = []

    def handler(number: int, _: object) -> None:
        calls.append(number)
        if error:
            raise error

    with victims.exit_stopped() as victim:

        def run() -> tuple[Any, int]:
            signal.signal(signal.SIGUSR1, handler)
            with Pidfd.open(victim.pid) as pidfd:
                try:
                    return call(pidfd), len(calls)
                except ZeroDivisionError:
                    return "raised", len(calls)

        outcome, count = inject(run, EINTR)
        victim.kill()
        victim.wait_exit_stop()
        return outcome, count, victim.anon()


@strace
@pytest.mark.parametrize("name", RELEASES)
def test_after_a_signal_the_handler_runs_and_the_release_goes_on(name: str) -> None:
    call, returned = RELEASES[name]
    assert interrupted(call, None) == (returned, 1, 0)


@strace
@pytest.mark.parametrize("name", CALLS)
def test_after_a_signal_the_exception_of_its_handler_wins(name: str) -> None:
    outcome, calls, held = interrupted(CALLS[name], ZeroDivisionError)
    assert (outcome, calls) == ("raised", 1)
    assert held > 0


@strace
@pytest.mark.parametrize("call", ["pidfd_open", "pidfd_send_signal"])
def test_the_other_calls_go_on_after_a_signal_as_well(call: str) -> None:
    calls: list[int] = []
    with victims.exit_stopped() as victim:

        def run() -> tuple[str, int]:
            signal.signal(signal.SIGUSR1, lambda number, _: calls.append(number))
            return kill(victim.pid).outcome, len(calls)

        fault = f"{call}:error=EINTR:signal=SIGUSR1:when=1"
        assert inject(run, fault) == ("released", 1)


@strace
def test_a_signal_that_was_sent_is_not_sent_again() -> None:
    with victims.exit_stopped() as victim, Pidfd.open(victim.pid) as pidfd:

        def run() -> int:
            signal.signal(signal.SIGUSR1, lambda *_: None)
            return kill_and_release(pidfd.fileno())

        # Of two sendings the second would fail.
        assert inject(run, EINTR, "pidfd_send_signal:error=EPERM:when=2+") == 0


# ---- The kill itself fails


@strace
@pytest.mark.parametrize(
    ("function", "fault", "error"),
    [
        (kill, "pidfd_open:error=EMFILE", "EMFILE"),
        (kill, "pidfd_open:error=ENOSYS", "ENOSYS"),
        (kill, "pidfd_send_signal:error=EPERM:when=1", "EPERM"),
        (kill, "pidfd_send_signal:error=EPERM:when=2", "EPERM"),
        (kill, "pidfd_send_signal:error=ESRCH:when=2", "ESRCH"),
        (terminate, "pidfd_open:error=EPERM", "EPERM"),
        (terminate, "pidfd_send_signal:error=EPERM:when=2", "EPERM"),
    ],
)
def test_where_nothing_can_be_sent_nothing_is_changed(
    function: Callable[[int], KillResult], fault: str, error: str
) -> None:
    with victims.victim(threads=3) as victim:
        before = victim.affinities()
        with pytest.raises(OSError, check=lambda e: e.errno == getattr(errno, error)):
            inject(lambda: function(victim.pid), fault)
        assert victim.state() == "S"
        assert victim.affinities() == before


@strace
def test_where_a_reapers_worker_may_not_kill_the_threads_get_their_cpus_back() -> None:
    with victims.victim(threads=3) as victim, Pidfd.open(victim.pid) as pidfd:
        before = victim.affinities()
        fault = "pidfd_send_signal:error=EPERM"
        answer = inject(lambda: killed_next(pidfd.fileno(), victim.pid), fault)
        assert answer[1:] == (0, errno.EPERM)
        assert victim.state() == "S"
        assert victim.affinities() == before


# ---- Filters


@seccomp
@pytest.mark.parametrize(
    ("error", "outcome"),
    [("ENOSYS", "unsupported"), ("EPERM", "blocked"), ("EACCES", "blocked")],
)
def test_a_filter_that_answers_leaves_the_kill_standing(
    error: str, outcome: str
) -> None:
    program = """
with victims.exit_stopped() as victim:
    load()
    result = kill(victim.pid, timeout=0.05)
    victim.wait_exit_stop()
    victim.resume()
    report([result.outcome, result.errno, kill(victim.pid).outcome, is_supported()])
"""
    answer = filtered(program, f"ERRNO(errno.{error})", "process_mrelease")
    assert answer == [outcome, getattr(errno, error), "exited", False]


@seccomp
@pytest.mark.parametrize("action", ["ERRNO(errno.EPERM)", "KILL_PROCESS"])
@pytest.mark.parametrize("call", ["pidfd_open", "process_mrelease"])
def test_the_probe_survives_a_filter_and_names_it(action: str, call: str) -> None:
    program = "load(); report([probe(), is_supported()])"
    found, supported = filtered(program, action, call)
    assert (found[call], supported) == ("seccomp", False)
    assert found["pidfd_open"] in (True, "seccomp")


@seccomp
def test_a_filter_that_kills_takes_the_caller_after_the_kill() -> None:
    program = """
with victims.exit_stopped() as victim, Pidfd.open(victim.pid) as pidfd:
    child = os.fork()
    if child == 0:
        load()
        kill_and_release(pidfd.fileno())
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    victim.wait_exit_stop()
    report(status)
"""
    status = filtered(program, "KILL_PROCESS", "process_mrelease")
    assert status == -signal.SIGSYS


@seccomp
@pytest.mark.parametrize("error", ["EPERM", "ENOSYS", "EINVAL"])
def test_where_scheduling_is_filtered_the_kill_works(error: str) -> None:
    program = """
with victims.exit_stopped(threads=3) as one, victims.exit_stopped() as two:
    load()
    report([kill(one.pid).outcome, *(r.outcome for r in kill_all([one.pid, two.pid]))])
"""
    calls = (
        "sched_setaffinity",
        "sched_getaffinity",
        "sched_setscheduler",
        "setpriority",
    )
    assert filtered(program, f"ERRNO(errno.{error})", *calls) == ["released"] * 3
