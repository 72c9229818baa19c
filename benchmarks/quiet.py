"""Memory of one victim back on a quiet machine, by each way to kill.

    python -m benchmarks.quiet [--quick] [--runs N] [--size MiB]

Victims with small pages, huge pages, many threads and shared memory. All ways are run
in turn; ratios are to SIGKILL alone.
"""

from __future__ import annotations

import sys

from . import earlyoom, lab, ways
from .lab import Options
from .report import Report, Table, Target

GAIN = 0.7  # of the time of SIGKILL alone, with small pages
LOSS = 1.05  # at most, where nothing can be gained


def run(options: Options) -> Report:
    report = Report(
        "quiet",
        "memory back on a quiet machine",
        "Milliseconds from the decision until 95 % of the victim's memory is back, and "
        "until it has exited: median [lowest-highest].",
    )
    names = [ways.SIGKILL, ways.PSUTIL, ways.CTYPES, ways.C, ways.MRELEASE]
    report.missing += filter(None, map(ways.lacks, names))
    if lack := earlyoom.lack():
        report.missing.append(lack)
    else:
        report.notes.append(f"with {earlyoom.version()}")
    size = options.size or 256
    sizes = [options.size] if options.size else options.choose([256, 1024, 2048], [256])
    cases: list[tuple[str, int, lab.Kind, int]] = [
        (f"{mib} MiB", mib, "small", 1) for mib in sizes
    ]
    cases += [
        (f"{size} MiB, 16 threads", size, "small", 16),
        (f"{4 * size} MiB, huge pages", 4 * size, "huge", 1),
        (f"{size} MiB, shared memory", size, "shared", 1),
    ]
    with lab.memory() as memory:
        for title, mib, kind, threads in cases:
            # AnonPages does not count what is shared: then the exit alone tells.
            table = Table(title, "ms", ["back", "exit"], scale=1000)
            for _ in range(options.repeats(15, 3)):
                for name, way in ways.here(*names).items():
                    seen = measure(way, memory, mib, kind, threads)
                    table.add(name, seen.back, seen.exit, limit=lab.LIMIT)
                if kind == "small" and threads == 1 and not lack:
                    seen = earlyoom.measure(memory, mib)
                    table.add(earlyoom.NAME, seen.back, seen.exit, limit=lab.LIMIT)
            report.tables.append(table)
            can_gain = kind == "small" and threads == 1
            report.targets.append(
                Target(
                    f"{title}, back, to SIGKILL alone",
                    table.ratio(ways.MRELEASE, ways.SIGKILL),
                    at_most=GAIN if can_gain else LOSS,
                )
            )
    return report


def measure(
    way: ways.Way,
    memory: lab.Memory,
    mib: int,
    kind: lab.Kind = "small",
    threads: int = 1,
) -> lab.Seen:
    """One victim, killed one way."""
    before = memory.held()
    with (
        lab.victim(mib, kind, threads, join=memory.join) as victim,
        way(victim) as kill,
    ):
        return lab.watch(memory, before, [victim.pid], kill)


if __name__ == "__main__":
    from .__main__ import main

    raise SystemExit(main(["quiet", *sys.argv[1:]]))
