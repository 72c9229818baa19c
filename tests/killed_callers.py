"""Callers that are killed at any moment; test_hostile.py runs it apart.

strace kills a caller at its first system call, at its second, and so on to the last:
nobody that it had stopped may stay stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import cgroups
import faults
import victims
from mrelease import _proc, kill_cgroup, kill_tree

TREE = """
def below():
    say("below", os.getpid())
    wait()

def inner():
    child(below)
    say("inner", os.getpid())
    wait()

child(inner)
wait()
"""

# Whoever forks all the time is stopped by kill_cgroup(), where it cannot use
# cgroup.kill, before it is killed.
SPAWNER = """
import time

def spawn():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if os.fork() == 0:
            time.sleep(0.02)
            os._exit(0)
        time.sleep(0.001)

for _ in range(2):
    child(spawn)
say("ready")
wait()
"""

Prey = tuple[victims.Family, Callable[[], object]]


@contextmanager
def tree() -> Iterator[Prey]:
    with victims.family(TREE, "below", "inner") as family:
        yield family, lambda: kill_tree(family.root, wait=True, timeout=None)


@contextmanager
def group() -> Iterator[Prey]:
    with (
        cgroups.cgroup("v1") as path,
        victims.family(SPAWNER, "ready", join=[path]) as family,
    ):
        yield family, lambda: kill_cgroup(path, wait=True, timeout=None)


def run(prey: Callable[[], AbstractContextManager[Prey]], step: int) -> int:
    """Kill callers at every step-th of their calls; return how many were killed."""
    for killed in itertools.count():
        with prey() as (family, call):
            when = 1 + killed * step
            # All but what the caller asks whether it is traced already.
            fault = f"!{faults.MARK}:signal=KILL:when={when}"
            outcome = faults.injected(call, fault)
            assert outcome.status in (0, -9), outcome
            if outcome.status == 0:
                assert outcome.raised is None, outcome
                return killed
            victims._until(lambda: not stopped(family), f"all to go on, {when}")
    raise AssertionError


def stopped(family: victims.Family) -> dict[int, str]:
    """Those that are stopped and have not been killed."""
    return {
        pid: state
        for pid, state in family.running().items()
        if state in "Tt" and not _proc.dying(pid)
    }
