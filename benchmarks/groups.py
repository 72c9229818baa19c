"""Many victims back: kill_cgroup and kill_all against cgroup.kill and a loop in C.

    python -m benchmarks.groups [--quick] [--runs N] [--size MiB]

Eight victims on a quiet machine; four at nice 19 beside two spinners on each CPU; a
thousand small ones; and what a process costs in crowds of ten to three thousand. All
ways are run in turn; ratios are to cgroup.kill. The C program and kill_all() have their
pidfds open before the decision. Needs root and a cgroup v2.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic

import cgroups
import mrelease
import victims

from . import lab
from .lab import MissingError, Options
from .report import Report, Table, Target

QUIET, STARVED = 1.2, 5  # of the better of theirs at most; times sooner at least
FLAT = 1.2  # the cost of a process in the largest crowd to that in the smallest
VICTIMS, STARVED_VICTIMS = 8, 4
CGROUP_KILL, LOOP = "cgroup.kill", "C program"
KILL_CGROUP, KILL_ALL = "kill_cgroup", "kill_all"
Kill = Callable[[], float | None]


@contextmanager
def by_cgroup_kill(cgroup: Path, pids: list[int]) -> Iterator[Kill]:
    def kill() -> None:
        (cgroup / "cgroup.kill").write_text("1")

    yield kill


@contextmanager
def by_loop(cgroup: Path, pids: list[int]) -> Iterator[Kill]:
    with lab.process(lab.peer("killer"), "nolock", *pids) as killer:

        def kill() -> float:
            start = monotonic()
            killer.tell()
            killer.line()
            return start

        yield kill


@contextmanager
def by_kill_cgroup(cgroup: Path, pids: list[int]) -> Iterator[Kill]:
    kill_cgroup = mrelease.kill_cgroup  # loaded now, as the C program is

    def kill() -> None:
        kill_cgroup(cgroup, timeout=lab.LIMIT)

    yield kill


@contextmanager
def by_kill_all(cgroup: Path, pids: list[int]) -> Iterator[Kill]:
    kill_all = mrelease.kill_all
    with ExitStack() as stack:
        pidfds = [stack.enter_context(mrelease.Pidfd.open(pid)) for pid in pids]

        def kill() -> None:
            kill_all(pidfds, timeout=lab.LIMIT)

        yield kill


WAYS = {
    CGROUP_KILL: by_cgroup_kill,
    LOOP: by_loop,
    KILL_CGROUP: by_kill_cgroup,
    KILL_ALL: by_kill_all,
}


def run(options: Options) -> Report:
    check()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = Report(
        "groups",
        "many victims at once",
        "Milliseconds from the decision until 95 % of the memory is back, and until "
        "the last has exited: median [lowest-highest].",
    )
    size = options.size or options.choose(128, 32)
    runs = options.repeats(7, 1)
    with lab.memory() as memory:
        quiet = Table(f"{VICTIMS} of {size} MiB", "ms", ["back", "exit"], scale=1000)
        large = options.size or 256
        title = f"{STARVED_VICTIMS} of {large} MiB at nice 19"
        starved = Table(title, "ms", ["back", "exit"], scale=1000)
        for _ in range(runs):
            for name in WAYS:
                add(quiet, name, kill_large(name, memory, VICTIMS, size))
        for _ in range(options.repeats(5, 3)):
            for name in WAYS:
                seen = kill_large(name, memory, STARVED_VICTIMS, large, nice=19)
                add(starved, name, seen)
        crowds = options.choose([10, 100, 1000, 3000], [10, 100])
        many = options.choose(1000, 100)
        small = Table(f"{many} small ones", "ms", ["exit"], scale=1000)
        cost = Table("a process of a crowd", "us", ["cost"], scale=1e6)
        for _ in range(runs):
            for name in WAYS:
                small.add(name, kill_crowd(name, memory, many), limit=lab.LIMIT)
            for number in crowds:
                seconds = kill_crowd(KILL_CGROUP, memory, number)
                cost.add(f"of {number}", (seconds or lab.LIMIT) / number)
    report.tables += [quiet, starved, small, cost]
    for ours in (KILL_CGROUP, KILL_ALL):
        for table in (quiet, small):
            theirs = min(table.median(CGROUP_KILL), table.median(LOOP))
            what = f"{table.title}: {ours} to the better of theirs"
            ratio = table.median(ours) / theirs
            report.targets.append(Target(what, ratio, at_most=QUIET))
        what = f"{starved.title}: {CGROUP_KILL} to {ours}"
        ratio = starved.ratio(CGROUP_KILL, ours)
        report.targets.append(Target(what, ratio, at_least=STARVED))
    largest, smallest = f"of {crowds[-1]}", f"of {crowds[0]}"
    report.targets.append(
        Target(
            f"cost of a process, {largest} to {smallest}",
            cost.ratio(largest, smallest),
            at_most=FLAT,
        )
    )
    return report


def add(table: Table, name: str, seen: lab.Seen) -> None:
    table.add(name, seen.back, seen.exit, limit=lab.LIMIT)


def kill_large(
    name: str, memory: lab.Memory, number: int, mib: int, nice: int = 0
) -> lab.Seen:
    """Some victims, killed one way."""
    with ExitStack() as stack:
        cgroup = stack.enter_context(cgroups.cgroup())
        before = memory.held()
        pids = []
        for _ in range(number):
            victim = lab.victim(mib, join=[cgroup, *memory.join])
            pids.append(stack.enter_context(victim).pid)
        kill = stack.enter_context(WAYS[name](cgroup, pids))
        if nice:
            stack.enter_context(lab.spinners())
            for pid in pids:
                os.setpriority(os.PRIO_PROCESS, pid, nice)
        return lab.watch(memory, before, pids, kill)


def kill_crowd(name: str, memory: lab.Memory, number: int) -> float | None:
    """Seconds until the last of many small ones had exited."""
    with cgroups.cgroup() as cgroup:
        before = memory.held()
        with victims.crowd(number, cgroup, *memory.join):
            pids = cgroups.pids(cgroup)
            if len(pids) != number:
                raise RuntimeError(f"{len(pids)} of {number} are there")
            with WAYS[name](cgroup, pids) as kill:
                return lab.watch(memory, before, pids, kill, smallest=0).exit


def check() -> None:
    """Raise for what this machine lacks."""
    lab.need(victims.why_not_root())
    if not mrelease.is_supported():
        raise MissingError("process_mrelease(2): mrelease doctor says why")
    lab.need(cgroups.why_no_cgroup2())
    with cgroups.cgroup() as cgroup:
        if not (cgroup / "cgroup.kill").exists():
            raise MissingError("cgroup.kill of Linux 5.14")


if __name__ == "__main__":
    from .__main__ import main

    raise SystemExit(main(["groups", *sys.argv[1:]]))
