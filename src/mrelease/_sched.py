"""Scheduling: keep a victim off the caller's CPU, then hurry it through its exit.

Every step is best effort: what the kernel refuses is left as it is, for want of
privilege (CAP_SYS_NICE, or the same user) or because the thread has ended.
"""

from __future__ import annotations

import os

from ._mrelease import getcpu
from ._pidfd import Pidfd
from ._proc import threads


def bar(pidfd: Pidfd, before: dict[int, set[int]]) -> None:
    """Bar every thread of a process from the caller's CPU, if it may run on another.

    before gets the CPUs that each thread could run on, for unbar(): ahead of the
    change, as an exception may come at any moment.
    """
    tids = _threads(pidfd)
    try:
        cpu = getcpu()  # late, as the caller may move whenever it gives up the GIL
    except OSError:
        return
    for tid in tids:
        try:
            allowed = os.sched_getaffinity(tid)
            if cpu in allowed:
                before[tid] = allowed
                os.sched_setaffinity(tid, allowed - {cpu} or _every_cpu() - {cpu})
        except OSError:  # the module says why
            continue


def unbar(before: dict[int, set[int]]) -> None:
    """Undo bar()."""
    for tid, allowed in before.items():
        try:
            os.sched_setaffinity(tid, allowed)
        except OSError:  # the module says why
            continue


def boost(pidfd: Pidfd) -> None:
    """Give every thread of a dying process every CPU and the best priority allowed."""
    cpus = _every_cpu()
    nice = -20
    for tid in _threads(pidfd):
        try:
            os.sched_setaffinity(tid, cpus)
        except OSError:  # the module says why
            pass
        try:
            nice = _lower_nice(tid, nice)
            _leave_idle(tid)
        except OSError:  # the module says why
            continue


def _threads(pidfd: Pidfd) -> list[int]:
    """The ids of a process's threads; none once it has exited."""
    tids = threads(pidfd.pid)
    # Once it has been reaped, the ids may be another's. Looked at after they were read,
    # so that only a reuse within the next microseconds could be mistaken.
    return [] if pidfd.exited else tids


def _every_cpu() -> set[int]:
    """CPU numbers, too many rather than too few: the kernel drops what it lacks.

    Where os.cpu_count() counts the CPUs that the caller may use (musl), it can be low.
    """
    return set(range(max(64, os.cpu_count() or 1)))


def _lower_nice(tid: int, lowest: int) -> int:
    """Lower a thread's nice value as far as allowed, not below lowest; return it."""
    current = os.getpriority(os.PRIO_PROCESS, tid)
    for nice in range(lowest, current):
        try:
            os.setpriority(os.PRIO_PROCESS, tid, nice)
        except PermissionError:  # RLIMIT_NICE of the victim may allow the next
            continue
        return nice
    return current


def _leave_idle(tid: int) -> None:
    # Real-time policies are left alone: SCHED_OTHER would be a step down.
    policy = os.sched_getscheduler(tid)
    reset = policy & os.SCHED_RESET_ON_FORK
    if policy & ~reset in (os.SCHED_IDLE, os.SCHED_BATCH):
        os.sched_setscheduler(tid, os.SCHED_OTHER | reset, os.sched_param(0))
