"""A Python thread's progress while memory is released by another thread.

    python -m benchmarks.gil [--quick] [--runs N] [--size MiB]

A thread counts as fast as it can while another one releases a victim that stands still
at its exit; then while a C program does the same release in a process of its own; then
while nobody does. All in turn; ratios are to the C program.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic, sleep

import mrelease
import victims

from . import lab
from .lab import Options
from .report import Report, Table, Target

PROGRESS = 0.95  # of that beside the C program, at least
C, THREAD = "a C program releases", "a thread releases"
Way = Callable[[int], AbstractContextManager[Callable[[], object]]]


def run(options: Options) -> Report:
    lab.need(victims.why_not_two_cpus())
    size = options.size or options.choose(2048, 512)
    report = Report(
        "gil",
        "a thread's progress during a release in another",
        f"{size} MiB are released; million rounds a second: median [lowest-highest].",
    )
    table = Table("progress", "million/s", ["rounds"], scale=1e-6)
    report.tables.append(table)
    for _ in range(options.repeats(15, 3)):
        table.add(C, progress(size, by_c))
        table.add(THREAD, progress(size, by_thread))
        table.add("nobody releases", progress(1, nobody))
    report.targets = [
        Target(
            "progress beside a thread that releases, to beside a C program",
            table.ratio(THREAD, C),
            at_least=PROGRESS,
        )
    ]
    return report


def progress(mib: int, way: Way) -> float:
    """Rounds a second while a victim is released; verifies that it was."""
    done = False
    begin = threading.Barrier(2, timeout=lab.LIMIT)

    def work() -> None:
        nonlocal done
        with way(victim.pid) as release:
            begin.wait()
            try:
                release()
            finally:
                done = True

    with lab.exit_stopped(mib) as victim:
        thread = threading.Thread(target=work)
        thread.start()
        rounds = 0
        begin.wait()
        start = monotonic()
        while not done or not rounds:
            for _ in range(1000):
                pass
            rounds += 1000
        end = monotonic()
        thread.join()
        left = lab.anonymous(victim.pid)
        if way is not nobody and left > mib << 14:  # 1/64
            raise RuntimeError(f"{left} bytes were not released")
    return rounds / (end - start)


@contextmanager
def nobody(pid: int) -> Iterator[Callable[[], object]]:
    yield lambda: sleep(0.1)


@contextmanager
def by_thread(pid: int) -> Iterator[Callable[[], object]]:
    pidfd = mrelease.pidfd_open(pid)
    try:
        yield lambda: mrelease.process_mrelease(pidfd)
    finally:
        os.close(pidfd)


@contextmanager
def by_c(pid: int) -> Iterator[Callable[[], object]]:
    with lab.process(lab.peer("killer"), "nolock", pid) as killer:

        def release() -> None:
            killer.tell()
            killer.line()

        yield release


if __name__ == "__main__":
    from .__main__ import main

    raise SystemExit(main(["gil", *sys.argv[1:]]))
