"""Memory of a starved victim back, and its exit, by each way to kill.

    python -m benchmarks.starved [--quick] [--runs N] [--size MiB]

The victim is at nice 19, then at SCHED_IDLE, beside two spinners on each CPU. All ways
are run in turn; ratios are to SIGKILL alone, which is given up after half a minute. As
root, who may raise the victim's priority and its own, and as an ordinary user.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import mrelease
import victims

from . import earlyoom, lab, ways
from .lab import Options
from .report import Report, Table, Target

ROOT, USER = 100, 20  # times sooner at least
EXIT = 2  # of the time of the memory, at most
HARDENED = "mrelease.kill, hardened"
Policy = Literal["nice 19", "SCHED_IDLE"]


@contextmanager
def by_hardened(victim: lab.Process) -> Iterator[ways.Kill]:
    """By a process that is as a service would be: harden()'s priority, before."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    mrelease.harden(mlock=False, oom_score_adj=None)
    try:
        with ways.by_mrelease(victim) as kill:
            yield kill
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def run(options: Options) -> Report:
    root = os.geteuid() == 0
    report = Report(
        "starved",
        "memory back from a starved victim",
        "Seconds from the decision until 95 % of the victim's memory is back, and "
        "until it has exited: median [lowest-highest].",
    )
    if lack := earlyoom.lack():
        report.missing.append(lack)
    else:
        report.notes.append(f"with {earlyoom.version()}")
    users: list[int | None] = [None, victims.NOBODY] if root else [None]
    with lab.memory() as memory:
        for uid in users:
            privileged = root and uid is None
            for policy in ("nice 19", "SCHED_IDLE"):
                measure(report, options, memory, policy, uid, privileged)
    return report


def measure(
    report: Report,
    options: Options,
    memory: lab.Memory,
    policy: Policy,
    uid: int | None,
    privileged: bool,
) -> None:
    who = "root" if privileged else "an ordinary user"
    table = Table(f"{policy}, by {who}", "s", ["back", "exit"])
    names = dict(ways.here(ways.SIGKILL, ways.C, ways.MRELEASE))
    if privileged:
        names[HARDENED] = by_hardened
    size = options.size or 256
    limit = options.choose(30.0, 16.0)
    for _ in range(options.repeats(5, 1)):
        for name, way in names.items():
            seen = kill_one(way, memory, size, policy, uid, limit)
            table.add(name, seen.back, seen.exit, limit=limit)
        if privileged and not earlyoom.lack():
            with lab.spinners():
                seen = earlyoom.measure(
                    memory, size, lambda pid: starve(pid, policy), limit
                )
            table.add(earlyoom.NAME, seen.back, seen.exit, limit=limit)
    report.tables.append(table)
    ours = HARDENED if privileged else ways.MRELEASE
    report.targets.append(
        Target(
            f"{table.title}: SIGKILL alone to {ours}",
            table.ratio(ways.SIGKILL, ours),
            at_least=ROOT if privileged else USER,
        )
    )
    if privileged:
        report.targets.append(
            Target(
                f"{table.title}: exit of {ours} to memory back",
                table.median(ours, 1) / table.median(ours, 0),
                at_most=EXIT,
            )
        )


def kill_one(
    way: ways.Way,
    memory: lab.Memory,
    mib: int,
    policy: Policy,
    uid: int | None,
    limit: float,
) -> lab.Seen:
    """One starved victim, killed one way by a user."""
    before = memory.held()
    with lab.victim(mib, uid=uid, join=memory.join) as victim, lab.spinners():
        starve(victim.pid, policy)

        def kill() -> float | None:
            return lab.as_user(uid, lambda: ways.at_once(way, victim))

        return lab.watch(memory, before, [victim.pid], kill, limit)


def starve(pid: int, policy: Policy) -> None:
    if policy == "nice 19":
        os.setpriority(os.PRIO_PROCESS, pid, 19)
    else:
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    from .__main__ import main

    raise SystemExit(main(["starved", *sys.argv[1:]]))
