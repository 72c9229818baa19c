"""Scheduling: keep a victim off the caller's CPU, then hurry it through its exit.

Every step is best effort: what the kernel refuses is left as it is, for want of
privilege (CAP_SYS_NICE, or the same user) or because the thread has ended.
"""

from __future__ import annotations

import os

from ._proc import threads

# The kernel drops the bits of CPUs that a machine or cpuset lacks.
_EVERY_CPU = range(1024)


def bar(pid: int, cpu: int) -> dict[int, set[int]]:
    """Bar every thread of a process from a CPU, if it may run on another one.

    Returns the CPUs that each thread changed could run on before, for unbar().
    """
    before: dict[int, set[int]] = {}
    for tid in threads(pid):
        try:
            allowed = os.sched_getaffinity(tid)
            if cpu in allowed:
                others = allowed - {cpu} or set(_EVERY_CPU) - {cpu}
                os.sched_setaffinity(tid, others)
                before[tid] = allowed
        except OSError:  # the module says why
            continue
    return before


def unbar(before: dict[int, set[int]]) -> None:
    """Undo bar()."""
    for tid, allowed in before.items():
        try:
            os.sched_setaffinity(tid, allowed)
        except OSError:  # the module says why
            continue


def boost(pid: int) -> None:
    """Give every thread of a dying process every CPU and the best priority allowed."""
    nice = -20
    for tid in threads(pid):
        try:
            os.sched_setaffinity(tid, _EVERY_CPU)
            nice = _lower_nice(tid, nice)
            _leave_idle(tid)
        except OSError:  # the module says why
            continue


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
