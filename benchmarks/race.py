"""Releases that come in time: a sleeping victim of one, eight and 32 threads.

    python -m benchmarks.race [--quick] [--runs N]

The victim's threads sleep on the killer's CPU and may run on any, the killer is an
ordinary user. A release is in time if its first call returns 0: the memory was still
there. What it costs to bar the threads from the CPU is timed apart.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import mrelease
import victims
from mrelease._mrelease import bar_kill_and_release

from . import lab, ways
from .lab import Options
from .report import Report, Series, Table, Target

IN_TIME = 99  # % at least
THREADS = (1, 8, 32)
PLAIN, BARRED = "kill(boost=False)", "kill()"
Kill = Callable[[lab.Process], bool]


def run(options: Options) -> Report:
    lab.need(victims.why_not_two_cpus())
    report = Report(
        "race",
        "releases in time for a sleeping victim",
        "Percent of the releases whose first call returned 0, by the victim's threads.",
    )
    runs = options.repeats(300, 30)
    for name in ("victim", "killer"):
        lab.peer(name)  # compiled before the user is changed
    # Who is ordinary already stays who it is.
    uid = victims.NOBODY if os.geteuid() == 0 else None
    won = lab.as_user(uid, lambda: race(runs))
    table = Table("in time", "%", [f"{threads} threads" for threads in THREADS])
    table.ratios = False
    for name, shares in won.items():
        table.add(name, *shares)
    barring = Table("cost of the barring", "us", ["time"], scale=1e6)
    cpus = os.sched_getaffinity(0)
    barring.rows = {
        f"{threads} threads": [Series([cost(threads, cpus) for _ in range(runs)])]
        for threads in THREADS
    }
    report.tables = [table, barring]
    report.notes.append(f"{runs} kills of each by uid {uid or os.geteuid()}")
    report.targets = [
        Target(
            f"{BARRED}, {threads} threads, in time",
            table.median(BARRED, column),
            at_least=IN_TIME,
            unit=" %",
        )
        for column, threads in enumerate(THREADS)
    ]
    return report


def race(runs: int) -> dict[str, list[float]]:
    """Shares in time of each way, by threads."""
    before = os.sched_getaffinity(0)
    cpu = min(before)
    kills: dict[str, Kill] = {
        ways.C: by_c,
        ways.CTYPES: by_ctypes,
        PLAIN: lambda victim: by_mrelease(victim, boost=False),
        BARRED: lambda victim: by_mrelease(victim, boost=True),
    }
    won: dict[str, list[list[bool]]] = {name: [[] for _ in THREADS] for name in kills}
    os.sched_setaffinity(0, {cpu})
    try:
        for _ in range(runs):
            for index, threads in enumerate(THREADS):
                for name, kill in kills.items():
                    with asleep_here(threads, before) as victim:
                        won[name][index].append(kill(victim))
                        with mrelease.Pidfd.open(victim) as pidfd:
                            if not pidfd.wait(lab.LIMIT):
                                raise TimeoutError(f"{victim.pid} did not exit")
    finally:
        os.sched_setaffinity(0, before)
    return {
        name: [100 * statistics.mean(answers) for answers in columns]
        for name, columns in won.items()
    }


@contextmanager
def asleep_here(threads: int, cpus: set[int]) -> Iterator[lab.Process]:
    """A victim whose threads fell asleep on this CPU, and may run on any."""
    with lab.victim(8, threads=threads) as victim:
        for tid in map(int, os.listdir(f"/proc/{victim.pid}/task")):
            os.sched_setaffinity(tid, cpus)
        yield victim


def by_c(victim: lab.Process) -> bool:
    with lab.process(lab.peer("killer"), "nolock", victim.pid) as killer:
        killer.tell()
        return killer.line().split()[2] == "0"


def by_ctypes(victim: lab.Process) -> bool:
    calls = ways.Ctypes()
    pidfd = calls.pidfd_open(victim.pid)
    try:
        return calls.kill_and_release(pidfd) == 0
    finally:
        os.close(pidfd)


def by_mrelease(victim: lab.Process, boost: bool) -> bool:
    result = mrelease.kill(victim, boost=boost, timeout=lab.LIMIT)
    return result.outcome == "released" and result.attempts == 1


def cost(threads: int, cpus: set[int]) -> float:
    """Seconds that the call takes longer with barring, on threads that are stopped."""
    with (
        victims.exit_stopped(1, threads=threads) as victim,
        mrelease.Pidfd.open(victim) as pidfd,
    ):
        fd = pidfd.fileno()
        # So that there is nothing left to release, and the calls' code is in the cache.
        mrelease.kill_and_release(fd)
        victim.wait_exit_stop()
        bar_kill_and_release(fd, victim.pid)
        for tid in victim.threads():
            os.sched_setaffinity(tid, cpus)
        start = perf_counter()
        mrelease.kill_and_release(fd)
        middle = perf_counter()
        bar_kill_and_release(fd, victim.pid)
        end = perf_counter()
    return (end - middle) - (middle - start)


if __name__ == "__main__":
    from .__main__ import main

    raise SystemExit(main(["race", *sys.argv[1:]]))
