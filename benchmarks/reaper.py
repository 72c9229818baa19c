"""A decision's way through a Reaper, while four Python threads are busy.

    python -m benchmarks.reaper [--quick] [--runs N] [--size MiB]

From the call of Reaper.kill() to when the kernel is asked to kill (SIGKILL and release
are one call), and to when the memory is back; the same for kill() in the calling thread
and for a Reaper whose process has nothing else to do. All in turn, one kill each.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic
from unittest.mock import patch

import mrelease
from mrelease import _kill

from . import lab
from .lab import Options
from .report import Report, Table, Target

BUSY = 4  # threads
HAND_OVER = 0.002  # seconds at the 99th percentile, at most
REAPER = f"Reaper.kill(), {BUSY} busy threads"


def run(options: Options) -> Report:
    size = options.size or 32
    report = Report(
        "reaper",
        "a decision's way through a Reaper",
        f"Victims of {size} MiB; milliseconds from the decision.",
    )
    runs = options.repeats(200, 20)
    seen: dict[str, list[tuple[float, float]]] = {
        "kill(), nothing busy": [],
        "Reaper.kill(), nothing busy": [],
        f"kill(), {BUSY} busy threads": [],
        REAPER: [],
    }
    with lab.memory() as memory, busy_threads() as busy, mrelease.Reaper() as reaper:

        def by_reaper(pidfd: mrelease.Pidfd) -> None:
            reaper.kill(pidfd, timeout=lab.LIMIT)

        def by_kill(pidfd: mrelease.Pidfd) -> None:
            mrelease.kill(pidfd, timeout=lab.LIMIT)

        for _ in range(runs):
            for name, ways in seen.items():
                method = by_reaper if name.startswith("Reaper") else by_kill
                is_busy = busy if "busy threads" in name else Event()
                ways.append(measure(method, memory, size, is_busy))
    table = Table(
        "",
        "ms",
        ["asked, median", "asked, 99 %", "back, median", "back, 99 %"],
        scale=1000,
        ratios=False,
    )
    for name, both in seen.items():
        asked, back = zip(*both, strict=True)
        table.add(
            name,
            statistics.median(asked),
            percentile(asked, 99),
            statistics.median(back),
            percentile(back, 99),
        )
    report.tables.append(table)
    report.notes.append(f"{runs} kills of each")
    report.targets.append(
        Target(
            f"{REAPER}: asked, 99 %",
            1000 * table.median(REAPER, 1),
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
    """Seconds until the kernel was asked, and until memory was back."""
    asked = 0.0

    def kill_and_release(pidfd: int) -> int:
        nonlocal asked
        asked = monotonic()
        return mrelease.kill_and_release(pidfd)

    before = memory.held()
    with (
        lab.victim(mib, join=memory.join) as victim,
        mrelease.Pidfd.open(victim) as pidfd,
    ):
        start = 0.0

        def kill() -> float:
            nonlocal start
            busy.set()
            start = monotonic()
            try:
                method(pidfd)
                pidfd.wait(lab.LIMIT)
            finally:
                busy.clear()
            return start

        # The way as it is, and a look at the clock on it.
        with patch.object(_kill, "kill_and_release", kill_and_release):
            seen = lab.watch(memory, before, [victim.pid], kill)
    if not asked or seen.back is None:
        raise RuntimeError(f"{victim.pid} was not killed: {seen}")
    return asked - start, seen.back


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
