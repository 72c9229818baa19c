"""Barring and boosting a victim's threads, and whether a CPU is idle."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator

import pytest

import victims
from calls import QUICK_STRACE, errno_of, killed_next, run_python
from mrelease import Pidfd, _sched, kill, kill_and_release
from mrelease._mrelease import bar_kill_and_release


def kill_and_release_barred(pidfd: Pidfd) -> int:
    return bar_kill_and_release(pidfd.fileno(), pidfd.pid)


def kill_and_release_as_a_worker(pidfd: Pidfd) -> int:
    return killed_next(pidfd.fileno(), pidfd.pid)[2]


either = pytest.mark.parametrize(
    "kill_barred", [kill_and_release_barred, kill_and_release_as_a_worker]
)


@pytest.fixture
def cpu() -> Iterator[int]:
    """A CPU that the caller is pinned to."""
    before = os.sched_getaffinity(0)
    cpu = min(before)
    os.sched_setaffinity(0, {cpu})
    yield cpu
    os.sched_setaffinity(0, before)


@pytest.mark.needs("cpus", "release")
@either
def test_every_thread_is_barred_from_the_cpu(
    kill_barred: Callable[[Pidfd], int], cpu: int
) -> None:
    with (
        victims.exit_stopped(4, threads=80) as victim,
        Pidfd.open(victim.pid) as pidfd,
    ):
        for tid in victim.threads():
            os.sched_setaffinity(tid, range(1024))
        cpus = os.sched_getaffinity(victim.pid)
        # Else they end one by one while they are looked at.
        os.kill(victim.pid, signal.SIGSTOP)
        assert kill_barred(pidfd) == 0
        victim.wait_exit_stop()
        assert victim.affinities() == [cpus - {cpu}] * 80


@pytest.mark.needs("cpus", "release")
@either
def test_a_thread_that_may_not_run_on_the_cpu_is_left_alone(
    kill_barred: Callable[[Pidfd], int], cpu: int
) -> None:
    with victims.exit_stopped(4) as victim, Pidfd.open(victim.pid) as pidfd:
        os.sched_setaffinity(victim.pid, range(1024))
        other = max(os.sched_getaffinity(victim.pid))
        os.sched_setaffinity(victim.pid, {other})
        assert kill_barred(pidfd) == 0
        victim.wait_exit_stop()
        assert victim.affinities() == [{other}]


@pytest.mark.needs("cpus", "release")
@either
def test_a_victim_pinned_to_the_cpu_gets_another(
    kill_barred: Callable[[Pidfd], int], cpu: int
) -> None:
    with victims.exit_stopped(4) as victim, Pidfd.open(victim.pid) as pidfd:
        os.sched_setaffinity(victim.pid, {cpu})
        assert kill_barred(pidfd) == 0
        victim.wait_exit_stop()
        (affinity,) = victim.affinities()
        assert affinity
        assert cpu not in affinity


@pytest.mark.needs("cpus", "strace")
def test_where_the_signal_is_refused_every_thread_is_let_back() -> None:
    with victims.victim(1, threads=3) as victim:
        before = victim.affinities()
        # The first is the check, which sends no signal.
        inject = "inject=pidfd_send_signal:error=EPERM:when=2"
        calls = "-etrace=pidfd_send_signal,sched_setaffinity"
        strace = (*QUICK_STRACE, calls, "-e", inject)
        result = run_python(
            f"from calls import errno_of; from mrelease import kill\n"
            f"print(errno_of(kill, {victim.pid}))",
            under=strace,
        )
        assert result.stdout == f"{errno.EPERM}\n"
        assert result.stderr.count("sched_setaffinity") == 6  # barred, and let back
        assert victim.affinities() == before
        assert victim.state() == "S"


@pytest.mark.needs("cpus", "strace")
def test_a_handler_that_raises_before_the_kill_leaves_the_victim_as_it_was() -> None:
    with victims.victim(1, threads=3) as victim:
        before = victim.affinities()
        program = f"""
import signal
from mrelease import kill
def handler(*args):
    raise ZeroDivisionError
signal.signal(signal.SIGUSR1, handler)
try:
    kill({victim.pid})
except ZeroDivisionError:
    print("raised")
"""
        # The first is the check; the second has not sent the signal.
        inject = "inject=pidfd_send_signal:error=EINTR:signal=SIGUSR1:when=2"
        calls = "-etrace=pidfd_send_signal,sched_setaffinity"
        strace = ("strace", "-qq", calls, "-esignal=none", "-e", inject)
        result = run_python(program, under=strace)
        assert result.stdout == "raised\n"
        assert result.stderr.count("sched_setaffinity") == 6  # barred, and let back
        assert victim.affinities() == before
        assert victim.state() == "S"


@pytest.mark.needs("cpus")
def test_nobody_is_barred_through_the_descriptor_of_another(cpu: int) -> None:
    with victims.victim(1) as victim:
        os.sched_setaffinity(victim.pid, range(1024))
        before = victim.affinities()
        unused = 1 << 20
        assert killed_next(unused, victim.pid) == (unused, 0, errno.EBADF)
        assert errno_of(bar_kill_and_release, unused, victim.pid) == errno.EBADF
        with victims.zombie() as gone, Pidfd.open(gone.pid) as pidfd:
            assert bar_kill_and_release(pidfd.fileno(), victim.pid) != 0
        assert victim.affinities() == before
        assert victim.state() == "S"


def test_whoever_has_gone_is_not_boosted() -> None:
    with victims.victim(1) as victim, Pidfd.open(victim.pid) as pidfd:
        pidfd.send_signal(signal.SIGKILL)
        victim.reap()
        _sched.boost(pidfd)


def test_a_zombies_id_is_not_boosted() -> None:
    # Its pid may be another's as soon as it is reaped.
    with victims.zombie() as victim, Pidfd.open(victim.pid) as pidfd:
        os.setpriority(os.PRIO_PROCESS, victim.pid, 5)
        _sched.boost(pidfd)
        assert os.getpriority(os.PRIO_PROCESS, victim.pid) == 5


@pytest.mark.needs("cpus", "release", "strace")
def test_the_victim_is_barred_before_the_kill_and_boosted_after_the_release() -> None:
    calls = "sched_setaffinity,setpriority,pidfd_send_signal,process_mrelease"
    with victims.exit_stopped() as victim:
        program = f"from mrelease import kill; print(kill({victim.pid}).outcome)"
        strace = (*QUICK_STRACE, f"-etrace={calls}", "-esignal=none")
        result = run_python(program, under=strace)
    assert result.stdout == "released\n"
    made = [line.partition("(")[0] for line in result.stderr.splitlines()]
    check, bar, kill, release, *boost = made
    assert (check, bar) == ("pidfd_send_signal", "sched_setaffinity")
    assert (kill, release) == ("pidfd_send_signal", "process_mrelease")
    assert set(boost) == {"sched_setaffinity", "setpriority"}


needs_policies = pytest.mark.needs("policies")


@pytest.mark.needs("release", "cpus")
@pytest.mark.parametrize(
    "policy",
    [
        os.SCHED_OTHER,
        pytest.param(os.SCHED_IDLE, marks=needs_policies),
        pytest.param(os.SCHED_BATCH, marks=needs_policies),
    ],
)
@pytest.mark.parametrize("settle", [0, 0.001])
def test_a_kill_leaves_every_thread_with_every_cpu_and_the_best_priority(
    policy: int, settle: float
) -> None:
    cpus = os.sched_getaffinity(0)
    with victims.exit_stopped(threads=3) as victim:
        for tid in victim.threads():
            os.sched_setaffinity(tid, {min(cpus)})
            os.setpriority(os.PRIO_PROCESS, tid, 10)
            if policy != os.SCHED_OTHER:
                os.sched_setscheduler(tid, policy, os.sched_param(0))
        assert kill(victim.pid, settle=settle).outcome == "released"
        for tid in victim.threads():
            assert os.sched_getaffinity(tid) >= cpus
            if os.geteuid() == 0:
                assert os.getpriority(os.PRIO_PROCESS, tid) == -20
                if policy != os.SCHED_OTHER:
                    assert os.sched_getscheduler(tid) == os.SCHED_OTHER


@needs_policies
@pytest.mark.needs("root", "release")
def test_a_real_time_victim_is_not_made_an_ordinary_one() -> None:
    with victims.exit_stopped() as victim:
        os.sched_setscheduler(victim.pid, os.SCHED_RR, os.sched_param(1))
        assert kill(victim.pid).outcome == "released"
        assert os.sched_getscheduler(victim.pid) == os.SCHED_RR


@pytest.mark.needs("release", "cpus")
def test_without_boost_scheduling_is_left_alone() -> None:
    cpu = min(os.sched_getaffinity(0))
    with victims.exit_stopped(threads=2) as victim:
        os.sched_setaffinity(victim.pid, {cpu})
        nice = os.getpriority(os.PRIO_PROCESS, victim.pid)
        assert kill(victim.pid, boost=False).outcome == "released"
        assert os.sched_getaffinity(victim.pid) == {cpu}
        assert os.getpriority(os.PRIO_PROCESS, victim.pid) == nice


def test_the_nice_value_goes_as_low_as_the_victims_limit_allows() -> None:
    with victims.exit_stopped() as victim, Pidfd.open(victim.pid) as pidfd:
        _, hard = resource.prlimit(victim.pid, resource.RLIMIT_NICE)
        if os.geteuid() != 0 and hard == 0:
            pytest.skip("needs root, or a RLIMIT_NICE above 0")
        kill_and_release(pidfd.fileno())
        _sched.boost(pidfd)
        lowest = -20 if os.geteuid() == 0 else 20 - hard
        assert os.getpriority(os.PRIO_PROCESS, victim.pid) == lowest


# ---- Idle CPUs


def test_with_something_to_run_on_every_cpu_none_is_idle() -> None:
    cpus = os.sched_getaffinity(0)
    with victims.spinners(cpus), victims.victim(1) as victim:
        assert not _sched.has_idle_cpu([victim.pid])


def test_of_those_that_may_use_one_cpu_it_is_the_callers() -> None:
    with victims.victim(1) as victim:
        os.sched_setaffinity(victim.pid, {min(os.sched_getaffinity(0))})
        assert not _sched.has_idle_cpu([victim.pid])
        assert not _sched.has_idle_cpu([victims.reaped_pid(), victim.pid])
