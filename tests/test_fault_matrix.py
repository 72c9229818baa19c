"""Each errno at each system call of each function, the first, the second, the nth.

Whatever the kernel says: no crash, no descriptor and no child left, nobody stopped, no
wrong victim; and what is returned or raised says what has happened. By default a few
of the faults; with --long all of them.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

import cgroups
import faults
import victims
from faults import Checked, Outcome
from mrelease import (
    KillResult,
    Pidfd,
    Reaper,
    _proc,
    aio,
    kill,
    kill_all,
    kill_cgroup,
    kill_tree,
    terminate,
)
from mrelease._reaper import Pool

Record = Callable[[str, object], None]

# What each call may be answered, by the kernel or by a filter. strace's names: those
# that an architecture lacks are passed over, as it has the other.
ERRNOS = {
    "pidfd_open": "EMFILE ENFILE ENOMEM ESRCH EINVAL ENOENT ENODEV ENOSYS EPERM",
    "pidfd_send_signal": "EPERM ESRCH EINVAL ENOSYS ENOMEM EAGAIN EINTR",
    "process_mrelease": "EAGAIN EINVAL ESRCH ENOSYS EPERM EACCES ENOMEM EINTR",
    "sched_getaffinity": "ESRCH EPERM EINVAL ENOSYS",
    "sched_setaffinity": "ESRCH EPERM EINVAL ENOMEM ENOSYS",
    "getpriority": "ESRCH EPERM ENOSYS",
    "setpriority": "EACCES EPERM ESRCH ENOSYS",
    "sched_getscheduler": "ESRCH EPERM ENOSYS",
    "poll": "EINTR ENOMEM",
    "openat": "EMFILE ENFILE ENOENT EACCES ENOMEM",
    "read": "ESRCH EINTR EIO",
    "readlink": "ENOENT EACCES",
    "getdents64": "ENOENT ESRCH",
    # Of more than one process
    "write": "ENODEV EPERM EINTR ENOMEM",
    "fork": "EAGAIN ENOMEM",
    "mmap": "ENOMEM",
    "eventfd2": "EMFILE ENFILE ENOMEM",
}
SPELLINGS = {
    "poll": ("poll", "ppoll"),
    "readlink": ("readlink", "readlinkat"),
    "fork": ("clone", "clone3", "fork", "vfork"),
}
SEQUENCE = [*itertools.takewhile(lambda call: call != "write", ERRNOS)]


@dataclass(frozen=True)
class Function:
    """One that is called, on what, and which calls of it are made to fail."""

    call: Callable[[Any], Any]
    calls: tuple[str, ...] = (*SEQUENCE,)
    threads: bool = False  # which fail as well
    midway: bool = False  # it sends something before the kill, and may fail after it


def _end(pool: Pool) -> None:
    """Close it and wait for its threads, else they would be taken for what it left."""
    pool.close(wait=True)
    while pool._threads:  # a slow release, which close() does not wait for
        time.sleep(0.001)


def _reaped(pid: int) -> KillResult:
    with Reaper(1) as reaper:
        try:
            return reaper.kill(pid, timeout=0.05).result(30)
        finally:
            _end(reaper._pool)


def _awaited(pid: int) -> KillResult:
    try:
        return asyncio.run(aio.kill(pid, timeout=0.05))
    finally:
        while aio._pools:
            _end(aio._pools.pop())


def _by_pidfd(pid: int) -> KillResult:
    with Pidfd.open(pid) as pidfd:
        return pidfd.kill(timeout=0.05)


MANY = (*SEQUENCE, "fork", "mmap")
ONE = {
    "kill": Function(lambda pid: kill(pid, timeout=0.05)),
    "settle": Function(lambda pid: kill(pid, timeout=0.05, settle=0.001)),
    "measure": Function(lambda pid: kill(pid, timeout=0.05, measure=True)),
    "Pidfd.kill": Function(_by_pidfd),
    "terminate": Function(
        lambda pid: terminate(pid, grace=0.001, timeout=0.05), midway=True
    ),
    "kill_all": Function(lambda pid: kill_all([pid], timeout=0.05)[0]),
    "kill_tree": Function(
        lambda pid: kill_tree(pid, timeout=0.05)[-1], MANY, midway=True
    ),
    "Reaper": Function(_reaped, (*SEQUENCE, "eventfd2", "fork"), threads=True),
    "aio": Function(_awaited, (*SEQUENCE, "eventfd2", "fork"), threads=True),
}
CASES = [(name, call) for name, function in ONE.items() for call in function.calls]
# Those of the default run. The rest is marked.
FEW = {("kill", call) for call in ("pidfd_open", "pidfd_send_signal", "openat", "poll")}
FEW |= {("kill_tree", "fork"), ("Reaper", "eventfd2")}

# Each time is too much for what the interpreter itself cannot do without.
NO_FILTER = {"mmap", "read", "fork"}
FILTERED = {("kill", "poll"), ("kill_all", "openat")}

needs = pytest.mark.needs("release", "strace")


def marked(cases: list[Any], few: set[Any]) -> list[Any]:
    return [
        case if case in few else pytest.param(*case, marks=pytest.mark.long)
        for case in cases
    ]


def answers(call: str, long: bool) -> list[str]:
    names = ERRNOS[call].split()
    return names if long else names[:1]


def fault(call: str, error: str, when: str) -> list[str]:
    spellings = SPELLINGS.get(call, (call,))
    return [f"?{name}:error={error}:when={when}" for name in spellings]


def each_occurrence(
    function: Callable[[], Any], call: str, error: str, long: bool, threads: bool
) -> Iterator[Outcome]:
    """Let the first fail, the second, until there are no more; at last, all."""
    for when in itertools.count(1):
        outcome = faults.injected(
            function, *fault(call, error, str(when)), follow=threads
        )
        yield outcome
        if not outcome.injected or (when == 2 and not long):
            break
    # EINTR is tried again, and would be for ever; without memory nobody could tell.
    if error != "EINTR" and call != "mmap":
        yield faults.injected(function, *fault(call, error, "1+"), follow=threads)


@needs
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "call"), marked(CASES, FEW))
def test_a_fault_anywhere_leaves_no_mess_and_is_told(
    name: str, call: str, long: bool, record_property: Record
) -> None:
    function = ONE[name]
    with ExitStack() as stack:
        checked = Checked(stack, holds=not function.midway)
        for error in answers(call, long):
            for outcome in each_occurrence(
                lambda: function.call(checked.victim.pid),
                call,
                error,
                long,
                function.threads,
            ):
                checked.check(outcome, call, error, midway=function.midway)
    record_property("faults", checked.count)


@pytest.mark.needs("release", "seccomp")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "call"),
    marked([case for case in CASES if case[1] not in NO_FILTER], FILTERED),
)
def test_a_filter_anywhere_leaves_no_mess_and_is_told(
    name: str, call: str, long: bool, record_property: Record
) -> None:
    function = ONE[name]
    with ExitStack() as stack:
        checked = Checked(stack, holds=not function.midway)
        for error in answers(call, long):
            if error == "EINTR":
                continue
            outcome = faults.filtered(
                lambda: function.call(checked.victim.pid),
                getattr(errno, error),
                *SPELLINGS.get(call, (call,)),
            )
            checked.check(outcome, call, error, midway=function.midway)
            record_property("filters", 1)


# ---- Many: cgroups

GROUP_CALLS = (*MANY, "write")
GROUP_FEW = {("v1", "pidfd_open"), ("v2", "pidfd_send_signal"), ("v2", "openat")}
GROUP_CASES = [(kind, call) for kind in ("v1", "v2") for call in GROUP_CALLS]


def _killed_in(path: Path) -> list[dict[str, object]]:
    return [result.as_dict() for result in kill_cgroup(path, timeout=0.05)]


@needs
@pytest.mark.needs("root", "cgroup1", "cgroup2")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "call"), marked(GROUP_CASES, GROUP_FEW))
def test_a_fault_anywhere_in_a_cgroup_leaves_no_mess_and_is_told(
    kind: Literal["v1", "v2"], call: str, long: bool, record_property: Record
) -> None:
    count = 0
    with cgroups.cgroup(kind) as path, ExitStack() as stack:
        bystander = stack.enter_context(victims.victim(1))
        living: list[victims.Victim] = []

        def function() -> Any:
            return _killed_in(path)

        for error in answers(call, long):
            occurrences = each_occurrence(function, call, error, long, threads=False)
            while True:
                while len(living) < 2:
                    living.append(stack.enter_context(victims.victim(1)))
                    cgroups.enter(path, living[-1].pid)
                outcome = next(occurrences, None)
                if outcome is None:
                    break
                count += outcome.injected > 0
                living = _check_group(outcome, living, call, error)
                assert bystander.state() == "S", (call, error, outcome)
    record_property("faults", count)


def _check_group(
    outcome: Outcome, members: list[victims.Victim], call: str, error: str
) -> list[victims.Victim]:
    """Everybody is dead or goes on, as the results say; return the living."""
    said = f"{call} {error}: {outcome}"
    assert (outcome.status, outcome.leaked) == (0, set()), said
    assert not outcome.children or call == "pidfd_send_signal", said
    living = [member for member in members if not _proc.dying(member.pid)]
    if outcome.raised:
        # Who cannot be opened, or proven to be a member, is as one not to be signalled.
        if not isinstance(outcome.raised, PermissionError):
            faults.check_error(outcome.raised, call, error, said)
    else:
        told = {result["pid"]: result for result in outcome.value}
        pids = {member.pid for member in members}
        if (call, error) == ("openat", "ENOENT"):
            # Of a cgroup that is said to have gone, who is in it cannot be told.
            assert told.keys() <= pids, said
        else:
            assert told.keys() == pids, said
        # ESRCH: the kernel says that it has gone, and is believed.
        for member in members if error != "ESRCH" else ():
            if member.pid in told or member in living:
                is_alive = told[member.pid]["outcome"] == "alive"
                assert is_alive == (member in living), said
    for member in living:
        member.wait_state("S")
    return living
