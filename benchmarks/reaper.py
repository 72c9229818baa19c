"""A decision's way through a Reaper, while four Python threads are busy.

    python -m benchmarks.reaper [--quick] [--runs N] [--size MiB]

From the decision to when the victim's memory is back, and to its exit, as a program in
C sees it: for Reaper.kill(), for kill() in the calling thread, and for os.kill(), which
never gives up the GIL; each beside busy threads and beside none, all in turn, one kill
each. What the hand-over costs is what Reaper.kill() takes longer than os.kill().
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic

import mrelease

from . import lab
from .lab import Options
from .report import Report, Table, Target

BUSY = 4  # threads
HAND_OVER = 0.002  # seconds at the 99th percentile, at most
BUSY_SUFFIX = f", {BUSY} busy threads"
REAPER, KILL, SIGNAL = "Reaper.kill()", "kill()", "os.kill()"


def run(options: Options) -> Report:
    size = options.size or 32
    report = Report(
        "reaper",
        "a decision's way through a Reaper",
        f"Victims of {size} MiB; milliseconds from the decision.",
    )
    runs = options.repeats(200, 20)
    seen: dict[str, list[tuple[float, float]]] = {
        name + suffix: []
        for suffix in ("", BUSY_SUFFIX)
        for name in (SIGNAL, KILL, REAPER)
    }
    with lab.memory() as memory, busy_threads() as busy, mrelease.Reaper() as reaper:

        def by_reaper(pidfd: mrelease.Pidfd) -> None:
            reaper.kill(pidfd, timeout=lab.LIMIT)

        def by_kill(pidfd: mrelease.Pidfd) -> None:
            mrelease.kill(pidfd, timeout=lab.LIMIT)

        def by_signal(pidfd: mrelease.Pidfd) -> None:
            os.kill(pidfd.pid, signal.SIGKILL)

        methods = {REAPER: by_reaper, KILL: by_kill, SIGNAL: by_signal}
        for _ in range(runs):
            for name, ways in seen.items():
                method = methods[name.removesuffix(BUSY_SUFFIX)]
                is_busy = busy if name.endswith(BUSY_SUFFIX) else Event()
                ways.append(measure(method, memory, size, is_busy))
    table = Table(
        "",
        "ms",
        ["back, median", "back, 99 %", "exit, median", "exit, 99 %"],
        scale=1000,
        ratios=False,
    )
    for name, both in seen.items():
        back, exited = zip(*both, strict=True)
        table.add(
            name,
            statistics.median(back),
            percentile(back, 99),
            statistics.median(exited),
            percentile(exited, 99),
        )
    report.tables.append(table)
    report.notes.append(f"{runs} kills of each")
    ours = table.median(REAPER + BUSY_SUFFIX, 1)
    report.targets.append(
        Target(
            f"{REAPER} less {SIGNAL}{BUSY_SUFFIX}: back, 99 %",
            1000 * (ours - table.median(SIGNAL + BUSY_SUFFIX, 1)),
            at_most=1000 * HAND_OVER,
            unit=" ms",
        )
    )
    return report


def percentile(values: tuple[float, ...], percent: int) -> float:
    """The value that so many percent are not above."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def measure(
    method: Callable[[mrelease.Pidfd], object],
    memory: lab.Memory,
    mib: int,
    busy: Event,
) -> tuple[float, float]:
    """Seconds until memory was back, and until the exit."""
    before = memory.held()
    with (
        lab.victim(mib, join=memory.join) as victim,
        mrelease.Pidfd.open(victim) as pidfd,
    ):

        def kill() -> float:
            busy.set()
            start = monotonic()
            try:
                method(pidfd)
                pidfd.wait(lab.LIMIT)
            finally:
                busy.clear()
            return start

        seen = lab.watch(memory, before, [victim.pid], kill)
    if seen.back is None or seen.exit is None:
        raise RuntimeError(f"{victim.pid} was not killed: {seen}")
    return seen.back, seen.exit


@contextmanager
def busy_threads() -> Iterator[Event]:
    """Threads that are busy with Python while an event is set."""
    busy, end = Event(), Event()

    def work() -> None:
        while not end.is_set():
            busy.wait()
            for _ in range(10_000):
                pass

    threads = [Thread(target=work) for _ in range(BUSY)]
    try:
        for thread in threads:
            thread.start()
        yield busy
    finally:
        end.set()
        busy.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    from .__main__ import main

    raise SystemExit(main(["reaper", *sys.argv[1:]]))
