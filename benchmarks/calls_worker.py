"""Times the calls of one way, under pyperf: a process of `benchmarks.calls`."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from time import perf_counter

import pyperf

Call = Callable[[int], object]
BATCH = 256  # pidfds open at once


def calls(way: str, modules: str) -> tuple[Call, Call, Call]:
    """process_mrelease, kill_and_release, pidfd_open."""
    if way == "mrelease":
        import mrelease

        return mrelease.process_mrelease, mrelease.kill_and_release, mrelease.pidfd_open
    if way == "ctypes":
        from .ways import Ctypes

        theirs = Ctypes()
        return theirs.process_mrelease, theirs.kill_and_release, theirs.pidfd_open
    sys.path.append(modules)
    from _mrelease_cffi import ffi, lib

    def checked(function: Call) -> Call:
        def call(argument: int) -> object:
            answer = function(argument)
            if answer == -1:
                raise OSError(ffi.errno, os.strerror(ffi.errno))
            return answer

        return call

    return checked(lib.release), checked(lib.kill_release), checked(lib.open_pidfd)


def time_calls(loops: int, call: Call, argument: int) -> float:
    span = range(loops)
    start = perf_counter()
    for _ in span:
        call(argument)
    return perf_counter() - start


def time_opening(loops: int, call: Callable[[int], int], pid: int) -> float:
    total = 0.0
    while loops > 0:
        span = range(min(BATCH, loops))
        loops -= len(span)
        start = perf_counter()
        pidfds = [call(pid) for _ in span]
        total += perf_counter() - start
        for pidfd in pidfds:
            os.close(pidfd)
    return total


def add_arguments(command: list[str], options: Namespace) -> None:
    command += [f"--way={options.way}", f"--pid={options.pid}"]
    command += [f"--modules={options.modules}"]


def main() -> None:
    runner = pyperf.Runner(
        program_args=("-m", "benchmarks.calls_worker"), add_cmdline_args=add_arguments
    )
    runner.argparser.add_argument("--way")
    runner.argparser.add_argument("--pid", type=int)
    runner.argparser.add_argument("--modules")
    options = runner.parse_args()
    release, both, opening = calls(options.way, options.modules)
    pidfd = os.pidfd_open(options.pid)
    # Not timed: they must succeed, or the figures would be those of errors.
    release(pidfd)
    if both(pidfd):
        raise RuntimeError(f"{options.way}: the release failed")
    runner.bench_time_func("process_mrelease", time_calls, release, pidfd)
    runner.bench_time_func("kill_and_release", time_calls, both, pidfd)
    runner.bench_time_func("pidfd_open", time_opening, opening, options.pid)


if __name__ == "__main__":
    main()
