"""Memory of a starved victim back: mrelease.kill against SIGKILL alone.

The victim is at SCHED_IDLE beside one spinner a CPU. Both ways are run in turn, and
the figures are printed as median [lowest-highest].

    python -m benchmarks.starved [--size MiB] [--runs N]
"""

from __future__ import annotations

import argparse
import os
import statistics

from mrelease import _demo

TARGET = 20  # times sooner, of the medians
LIMIT = 60.0  # seconds until SIGKILL alone is given up


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Starved victims: time until memory is back."
    )
    parser.add_argument("--size", type=int, default=256, help="MiB (default: 256)")
    parser.add_argument("--runs", type=int, default=5, help="of each (default: 5)")
    options = parser.parse_args()
    print(
        f"{options.size} MiB, starved beside a spinner on each of "
        f"{len(os.sched_getaffinity(0))} CPUs, Linux {os.uname().release}, "
        f"uid {os.geteuid()}, {options.runs} runs"
    )
    seen = _demo.compare(options.size << 20, options.runs, LIMIT)
    print(_demo.table(seen, LIMIT))
    slow, fast = (
        statistics.median(LIMIT if run.back is None else run.back for run in runs)
        for runs in seen.values()
    )
    met = slow / fast >= TARGET
    print(f"target: memory back {TARGET} times sooner: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
