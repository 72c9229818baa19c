"""Scheduling: idle CPUs, a victim hurried through its exit, the caller prepared.

Every step is best effort: what the kernel refuses is left as it is, for want of
privilege (CAP_SYS_NICE, or the same user) or because the thread has ended.
"""

from __future__ import annotations

import os
from _operator import index
from time import sleep

from ._mrelease import MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT, mlockall
from ._proc import capabilities, in_first_user_namespace, read, threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ._pidfd import Pidfd

_CAP_IPC_LOCK = 14

# CPU_SETSIZE: where there are more, no thread has been barred. The kernel drops what it
# lacks. Python's own count may be that of the caller (musl, PYTHON_CPU_COUNT).
_EVERY_CPU = range(1024)

_SAMPLE = 64
_NAP = 5e-5  # seconds


def harden(
    *, mlock: bool = True, nice: int | None = -20, oom_score_adj: int | None = -1000
) -> dict[str, OSError | None]:
    """Prepare the calling process to kill when memory and CPU time are short.

    mlock: lock its memory into RAM, so that no kill waits for a page to come back from
        swap or disk: what is mapped now is brought in at once; what is mapped later is
        locked as it is touched, where no limit (RLIMIT_MEMLOCK without CAP_IPC_LOCK)
        could make later allocations fail.
    nice: the priority of all its threads, -20 to 19; without /proc that of the calling
        thread.
    oom_score_adj: how soon the kernel's OOM killer takes it, -1000 (never) to 1000.

    mlock=False and None leave something as it is; nothing else is changed.

    Returns, for each that was asked for, None if it took effect, or the OSError with
    which it was refused: CAP_IPC_LOCK, CAP_SYS_NICE and CAP_SYS_RESOURCE allow all of
    it. Raises ValueError for a number out of range. Children inherit nice and
    oom_score_adj, but no locks. Call it once privileges have been dropped and limits
    set, as what is locked later counts against RLIMIT_MEMLOCK from then on; once all is
    imported that is used later; and before other threads are started, as their stacks,
    8 MiB each, would be brought in.
    Linux 4.4. Thread-safe. See mlockall(2) and proc_pid_oom_score_adj(5).
    """
    steps: dict[str, Callable[[], None]] = {}
    if mlock:
        steps["mlock"] = _lock_memory
    if nice is not None:
        priority = check_nice(nice)
        steps["nice"] = lambda: _set_nice(priority)
    if oom_score_adj is not None:
        adjustment = _check_range("oom_score_adj", oom_score_adj, -1000, 1000)
        steps["oom_score_adj"] = lambda: _set_oom_score_adj(adjustment)
    return {name: _refusal(step) for name, step in steps.items()}


def check_nice(nice: int) -> int:
    return _check_range("nice", nice, -20, 19)


def _check_range(name: str, value: int, lowest: int, highest: int) -> int:
    number = index(value)
    if not lowest <= number <= highest:
        raise ValueError(f"{name} must be from {lowest} to {highest}, not {number}")
    return number


def _refusal(step: Callable[[], None]) -> OSError | None:
    try:
        step()
    except OSError as error:
        return error
    return None


def _lock_memory() -> None:
    mlockall(MCL_CURRENT)
    if _may_lock_all():
        # Without MCL_ONFAULT every thread's stack, 8 MiB, would come in as a whole.
        mlockall(MCL_FUTURE | MCL_ONFAULT)


def _may_lock_all() -> bool:
    from resource import RLIM_INFINITY, RLIMIT_MEMLOCK, getrlimit

    if getrlimit(RLIMIT_MEMLOCK)[0] == RLIM_INFINITY:
        return True
    try:
        # Root of another user namespace has the capability, but not for this.
        return in_first_user_namespace() and bool(capabilities() >> _CAP_IPC_LOCK & 1)
    except OSError:  # no /proc to tell: then as if there were a limit
        return False


def _set_nice(nice: int) -> None:
    # Linux keeps one for each thread; without /proc the caller's own has to do.
    for tid in threads(os.getpid()) or [0]:
        try:
            os.setpriority(os.PRIO_PROCESS, tid, nice)
        except ProcessLookupError:  # the thread has ended
            continue


def _set_oom_score_adj(adjustment: int) -> None:
    with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
        file.write(b"%d" % adjustment)


def has_idle_cpu(pids: list[int]) -> bool:
    """Whether less is running than there are CPUs for each of these to run on.

    What else runs may be on other CPUs, or its cgroup's quota may keep a process off
    them (cpu.max): then the answer is wrong, to the side of False in the first case.
    Of very many, some stand for all.
    """
    pids = pids[:: len(pids) // _SAMPLE + 1]
    try:
        most = min(map(_allowed, pids), default=0)
        running = _running()
        if most <= running < 2 * most:
            # Since Linux 6.12 who has just gone to sleep counts until its CPU looks for
            # somebody else to run, as ours does now.
            sleep(_NAP)
            running = _running()
        return running < most
    # Then all are taken for busy; OverflowError is what Python makes of EINVAL.
    except (OSError, ValueError, IndexError, OverflowError):
        return False


def _running() -> int:
    """How many threads run or want to, this one among them."""
    # Such as b"0.20 0.18 0.12 1/80 11206": one of 80.
    return int(read("/proc/loadavg").split()[3].partition(b"/")[0])


def _allowed(pid: int) -> float:
    """How many CPUs a process may run on; any number if it has gone."""
    try:
        return len(os.sched_getaffinity(pid))
    except ProcessLookupError:
        return float("inf")


def cpus() -> int:
    """How many CPUs the caller may use; all, where a filter forbids to ask."""
    try:
        return len(os.sched_getaffinity(0))
    except (OSError, OverflowError):  # as above
        return os.cpu_count() or 1


def boost(pidfd: Pidfd) -> None:
    """Give every thread of a dying process every CPU and the best priority allowed."""
    nice = -20
    for tid in _threads(pidfd):
        try:
            os.sched_setaffinity(tid, _EVERY_CPU)
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
