"""What the kernel cannot be made to say here: injected by strace, or filtered."""

from __future__ import annotations

import errno
import json
import signal
from typing import Any

import pytest

import victims
from calls import run_python

needs_release = pytest.mark.needs("release")
pytestmark = pytest.mark.timeout(120)

# A victim that any release succeeds on; what became of it goes to standard output.
PRELUDE = """
import errno, json, os, signal, sys
import victims
from mrelease import *

def report(value):
    json.dump(value, sys.stdout)
"""


def inject(program: str, *faults: str, prelude: str = PRELUDE) -> Any:
    """Run a program whose system calls fail as told; return what it reports."""
    calls = {fault.partition(":")[0] for fault in faults}
    strace = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={','.join(calls)}"]
    for fault in faults:
        strace += ["-e", f"inject={fault}"]
    result = run_python(prelude + program, under=tuple(strace))
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


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


KILL = """
with victims.exit_stopped() as victim:
    result = kill(victim.pid, timeout=OPTION)
    report([result.as_dict(), victim.anon(), victim.exited()])
"""

strace = pytest.mark.needs("strace", "release")
seccomp = pytest.mark.needs("seccomp", "release")


# ---- Passing errors are tried again


@strace
def test_eagain_is_tried_again() -> None:
    result, held, _ = inject(
        KILL.replace("OPTION", "None"), "process_mrelease:error=EAGAIN:when=1..3"
    )
    assert (result["outcome"], result["attempts"], result["errno"]) == (
        "released",
        4,
        0,
    )
    assert held == 0


@strace
def test_eagain_to_the_end_is_partial() -> None:
    result, held, _ = inject(
        KILL.replace("OPTION", "0.05"), "process_mrelease:error=EAGAIN"
    )
    assert (result["outcome"], result["released"]) == ("partial", False)
    assert (result["errno"], held > 0) == (errno.EAGAIN, True)


@strace
def test_einval_after_the_kill_is_tried_again() -> None:
    result, held, _ = inject(
        KILL.replace("OPTION", "None"), "process_mrelease:error=EINVAL:when=1..2"
    )
    assert (result["outcome"], result["attempts"], held) == ("released", 3, 0)


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
    result, held, _ = inject(
        KILL.replace("OPTION", "0.05"), f"process_mrelease:error={error}"
    )
    assert (result["outcome"], result["released"]) == (outcome, False)
    assert (result["signal"], result["attempts"]) == (signal.SIGKILL, 1)
    assert result["errno"] == getattr(errno, error)
    assert held > 0


@strace
@pytest.mark.parametrize("error", ["ENOSYS", "EPERM", "EAGAIN", "EINVAL"])
def test_whatever_the_errno_who_has_exited_has_exited(error: str) -> None:
    program = """
with victims.victim() as victim:
    report(kill(victim.pid, timeout=None).as_dict())
"""
    result = inject(program, f"process_mrelease:error={error}")
    assert (result["outcome"], result["released"]) == ("exited", True)
    assert result["errno"] in (getattr(errno, error), errno.ESRCH)


# ---- EINTR


INTERRUPTED = """
def handler(*args):
    calls.append(args[0])
    if RAISES:
        raise ZeroDivisionError

calls = []
signal.signal(signal.SIGUSR1, handler)
with victims.exit_stopped() as victim, Pidfd.open(victim.pid) as pidfd:
    try:
        outcome = CALL
    except ZeroDivisionError:
        outcome = "raised"
    victim.kill()
    victim.wait_exit_stop()
    report([outcome, len(calls), victim.anon()])
"""


RELEASES = [
    "kill_and_release(pidfd.fileno())",
    "(victim.kill(), process_mrelease(pidfd.fileno()))[1]",
    "kill(pidfd).errno",
]


@strace
@pytest.mark.parametrize("call", RELEASES)
def test_after_a_signal_the_handler_runs_and_the_release_goes_on(call: str) -> None:
    outcome, calls, held = inject(
        INTERRUPTED.replace("CALL", call).replace("RAISES", "False"),
        "process_mrelease:error=EINTR:signal=SIGUSR1:when=1",
    )
    assert (outcome, calls, held) == (0 if "process" not in call else None, 1, 0)


@strace
@pytest.mark.parametrize("call", [*RELEASES, "pidfd.release(timeout=1)"])
def test_after_a_signal_the_exception_of_its_handler_wins(call: str) -> None:
    outcome, calls, held = inject(
        INTERRUPTED.replace("CALL", call).replace("RAISES", "True"),
        "process_mrelease:error=EINTR:signal=SIGUSR1:when=1",
    )
    assert (outcome, calls) == ("raised", 1)
    assert held > 0


@strace
@pytest.mark.parametrize("call", ["pidfd_open", "pidfd_send_signal"])
def test_the_other_calls_go_on_after_a_signal_as_well(call: str) -> None:
    # The victim is not the program's own: from Python 3.15 on the import of subprocess
    # opens a pidfd too, and would be the first to do so.
    fault = f"{call}:error=EINTR:signal=SIGUSR1:when=1"
    with victims.exit_stopped() as victim:
        program = f"""
import json, signal
from mrelease import kill
calls = []
signal.signal(signal.SIGUSR1, lambda *args: calls.append(1))
print(json.dumps([kill({victim.pid}).outcome, len(calls)]))
"""
        assert inject(program, fault, prelude="") == ["released", 1]


@strace
def test_a_signal_that_was_sent_is_not_sent_again() -> None:
    program = """
signal.signal(signal.SIGUSR1, lambda *args: None)
with victims.exit_stopped() as victim, Pidfd.open(victim.pid) as pidfd:
    report(kill_and_release(pidfd.fileno()))
"""
    # Of two sendings the second would fail.
    assert (
        inject(
            program,
            "process_mrelease:error=EINTR:signal=SIGUSR1:when=1",
            "pidfd_send_signal:error=EPERM:when=2+",
        )
        == 0
    )


# ---- The kill itself fails


@strace
@pytest.mark.parametrize(
    ("function", "fault", "error"),
    [
        ("kill", "pidfd_open:error=EMFILE", "EMFILE"),
        ("kill", "pidfd_open:error=ENOSYS", "ENOSYS"),
        ("kill", "pidfd_send_signal:error=EPERM:when=1", "EPERM"),
        ("kill", "pidfd_send_signal:error=EPERM:when=2", "EPERM"),
        ("kill", "pidfd_send_signal:error=ESRCH:when=2", "ESRCH"),
        ("terminate", "pidfd_open:error=EPERM", "EPERM"),
        ("terminate", "pidfd_send_signal:error=EPERM:when=2", "EPERM"),
    ],
)
def test_where_nothing_can_be_sent_nothing_is_changed(
    function: str, fault: str, error: str
) -> None:
    program = f"""
with victims.victim(threads=3) as victim:
    def scheduling():
        return [[*os.sched_getaffinity(tid)] for tid in victim.threads()]
    before = scheduling()
    try:
        {function}(victim.pid)
    except OSError as error:
        report([error.errno, victim.state(), scheduling() == before])
"""
    assert inject(program, fault) == [getattr(errno, error), "S", True]


@strace
def test_where_a_reapers_worker_may_not_kill_the_threads_get_their_cpus_back() -> None:
    program = """
from calls import killed_next
with victims.victim(threads=3) as victim, Pidfd.open(victim.pid) as pidfd:
    def cpus():
        return [[*os.sched_getaffinity(tid)] for tid in victim.threads()]
    before = cpus()
    answer = killed_next(pidfd.fileno(), victim.pid)
    report([answer[1:], victim.state(), cpus() == before])
"""
    answer = inject(program, "pidfd_send_signal:error=EPERM")
    assert answer == [[0, errno.EPERM], "S", True]


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
