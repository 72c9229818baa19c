"""One big victim, released by one thread and by several.

    python -m benchmarks.threads [--quick] [--runs N] [--size MiB]

Each worker is a thread that calls process_mrelease() of the same victim. The victim
stands still at its exit; or it is frozen (cgroup v1, root); or starved: at SCHED_IDLE
beside two spinners on each CPU, the workers at nice -20 (root). All in turn; ratios are
to one worker.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from signal import SIGKILL
from threading import Barrier
from time import monotonic

import mrelease
import victims

from . import lab
from .lab import Options
from .report import Report, Table, Target

GAIN = 1.6  # times sooner with two workers, at least
WORKERS = (1, 2, 3)


def run(options: Options) -> Report:
    lab.need(victims.why_not_two_cpus())
    size = options.size or options.choose(4096, 256)
    report = Report(
        "threads",
        "one victim, several threads",
        f"A victim of {size} MiB; milliseconds from SIGKILL until the last call has "
        "returned: median [lowest-highest].",
    )
    states: dict[str, Callable[[int], AbstractContextManager[int]]] = {
        "at its exit": at_its_exit
    }
    if lack := victims.why_no_freezer():
        report.missing.append(f"frozen: {lack}")
    else:
        states["frozen"] = frozen
    if os.geteuid():
        report.missing.append("starved: needs root")
    else:
        states["starved"] = starved
    for state, victim in states.items():
        lost = 0
        table = Table(state, "ms", ["released"], scale=1000)
        for _ in range(options.repeats(5, 2)):
            for workers in WORKERS:
                name = f"{workers} worker{'s' if workers > 1 else ''}"
                seconds = None
                while seconds is None:
                    seconds = release(victim, size, workers)
                    lost += seconds is None
                table.add(name, seconds)
        report.tables.append(table)
        if lost:
            report.notes.append(f"{state}: {lost} victims let go of it first: again")
        report.targets.append(
            Target(
                f"{state}: one worker to two",
                table.ratio("1 worker", "2 workers"),
                at_least=GAIN,
            )
        )
    return report


def release(
    state: Callable[[int], AbstractContextManager[int]], mib: int, workers: int
) -> float | None:
    """Seconds that so many threads take; verifies that the memory has come back.

    None if the victim had let go of it before: then it is nobody's to release.
    """

    start = 0.0

    def kill() -> None:
        nonlocal start
        start = monotonic()
        os.kill(pid, SIGKILL)

    barrier = Barrier(workers, action=kill, timeout=lab.LIMIT)

    def work() -> float:
        pidfd = mrelease.pidfd_open(pid)
        try:
            barrier.wait()
            mrelease.process_mrelease(pidfd)
            return monotonic()
        finally:
            os.close(pidfd)

    with state(mib) as pid, ThreadPoolExecutor(workers) as pool:
        ends = [pool.submit(work) for _ in range(workers)]
        try:
            last = max(end.result() for end in ends)
        except ProcessLookupError:
            return None
        left = lab.anonymous(pid)
        if left > mib << 14:  # 1/64
            raise RuntimeError(f"{left} bytes were not released")
    return last - start


@contextmanager
def at_its_exit(mib: int) -> Iterator[int]:
    with lab.exit_stopped(mib) as victim:
        yield victim.pid


@contextmanager
def frozen(mib: int) -> Iterator[int]:
    """In a frozen cgroup, which it does not leave when it is killed."""
    with victims._freezer_cgroup() as cgroup, lab.victim(mib, join=[cgroup]) as victim:
        state = cgroup / "freezer.state"
        state.write_text("FROZEN")
        try:
            lab.wait_for(lambda: state.read_text() == "FROZEN\n", "the frost")
            yield victim.pid
        finally:
            state.write_text("THAWED")
            victim.close()  # it has to leave before the cgroup can


@contextmanager
def starved(mib: int) -> Iterator[int]:
    """It has no CPU time, and the caller's priority is the highest."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with lab.victim(mib) as victim, lab.spinners():
        os.sched_setscheduler(victim.pid, os.SCHED_IDLE, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, -20)
        try:
            yield victim.pid
        finally:
            os.setpriority(os.PRIO_PROCESS, 0, before)


if __name__ == "__main__":
    from .__main__ import main

    raise SystemExit(main(["threads", *sys.argv[1:]]))
