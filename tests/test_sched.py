"""Barring and boosting a victim's threads."""

from __future__ import annotations

import os
import resource

import pytest

import victims
from calls import opened
from mrelease import _sched, kill, kill_and_release


def affinities(victim: victims.Victim) -> list[set[int]]:
    return [os.sched_getaffinity(tid) for tid in victim.threads()]


@pytest.mark.needs("cpus")
def test_every_thread_is_barred_from_the_cpu_and_let_back() -> None:
    cpus = os.sched_getaffinity(0)
    cpu = min(cpus)
    with victims.victim(1, threads=3) as victim:
        before = _sched.bar(victim.pid, cpu)
        assert affinities(victim) == [cpus - {cpu}] * 3
        assert before == dict.fromkeys(victim.threads(), cpus)
        _sched.unbar(before)
        assert affinities(victim) == [cpus] * 3


@pytest.mark.needs("cpus")
def test_a_thread_that_may_not_run_on_the_cpu_is_left_alone() -> None:
    cpu, other = sorted(os.sched_getaffinity(0))[:2]
    with victims.victim(1) as victim:
        os.sched_setaffinity(victim.pid, {other})
        assert _sched.bar(victim.pid, cpu) == {}
        assert affinities(victim) == [{other}]


@pytest.mark.needs("cpus")
def test_a_victim_pinned_to_the_cpu_gets_another() -> None:
    cpu = min(os.sched_getaffinity(0))
    with victims.victim(1) as victim:
        os.sched_setaffinity(victim.pid, {cpu})
        assert _sched.bar(victim.pid, cpu) == {victim.pid: {cpu}}
        (affinity,) = affinities(victim)
        assert affinity
        assert cpu not in affinity


def test_whoever_has_gone_is_left_alone() -> None:
    pid = victims.reaped_pid()
    assert _sched.bar(pid, 0) == {}
    _sched.unbar({pid: {0}})
    _sched.boost(pid)


@pytest.mark.needs("release", "cpus")
@pytest.mark.parametrize("policy", [os.SCHED_OTHER, os.SCHED_IDLE, os.SCHED_BATCH])
@pytest.mark.parametrize("settle", [0, 0.001])
def test_a_kill_leaves_every_thread_with_every_cpu_and_the_best_priority(
    policy: int, settle: float
) -> None:
    cpus = os.sched_getaffinity(0)
    with victims.exit_stopped(threads=3) as victim:
        for tid in victim.threads():
            os.sched_setaffinity(tid, {min(cpus)})
            os.setpriority(os.PRIO_PROCESS, tid, 10)
            os.sched_setscheduler(tid, policy, os.sched_param(0))
        assert kill(victim.pid, settle=settle).outcome == "released"
        for tid in victim.threads():
            assert os.sched_getaffinity(tid) >= cpus
            if os.geteuid() == 0:
                assert os.getpriority(os.PRIO_PROCESS, tid) == -20
                assert os.sched_getscheduler(tid) == os.SCHED_OTHER


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
    with victims.exit_stopped() as victim, opened(victim.pid) as fd:
        _, hard = resource.prlimit(victim.pid, resource.RLIMIT_NICE)
        if os.geteuid() != 0 and hard == 0:
            pytest.skip("needs root, or a RLIMIT_NICE above 0")
        kill_and_release(fd)
        _sched.boost(victim.pid)
        lowest = -20 if os.geteuid() == 0 else 20 - hard
        assert os.getpriority(os.PRIO_PROCESS, victim.pid) == lowest
