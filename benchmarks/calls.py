"""What a call costs over the bare system call in C: mrelease, ctypes, cffi.

    python -m benchmarks.calls [--quick] [--runs N]

The victim has been killed, stands still at its exit, and its memory has been released:
so every call succeeds and has nothing to do but itself. pyperf times the calls, each
way in a process of its own, all ways in turn. Loops are counted in for Python, the
close of a pidfd for nobody.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from . import lab
from .lab import MissingError, Options
from .report import Report, Table, Target

CALLS = ["process_mrelease", "kill_and_release", "pidfd_open"]
MORE_THAN_C = 120  # ns at most
LESS_THAN_CTYPES = 4  # times less added at least


def run(options: Options) -> Report:
    if not importlib.util.find_spec("pyperf"):
        raise MissingError("pyperf, of the bench extra")
    report = Report(
        "calls",
        "a call that succeeds",
        "Nanoseconds a call: median [lowest-highest].",
        [Table("", "ns", CALLS)],
    )
    [table] = report.tables
    python = ["mrelease", "ctypes"]
    if importlib.util.find_spec("cffi"):
        python.append("cffi")
        build_cffi()
    else:
        report.missing.append("cffi")
    loops = options.choose(50_000, 5_000)
    with lab.exit_stopped(1) as victim:
        for _ in range(options.repeats(15, 3)):
            table.add("C", *in_c(victim.pid, loops))
            for way in python:
                table.add(way, *in_python(way, victim.pid, loops))
    added = {
        way: [table.median(way, i) - table.median("C", i) for i in range(3)]
        for way in python
    }
    for index, call in enumerate(CALLS):
        ours, theirs = added["mrelease"][index], added["ctypes"][index]
        report.targets += [
            Target(f"{call}, added to C", ours, at_most=MORE_THAN_C, unit=" ns"),
            Target(
                f"{call}, added by ctypes to added by mrelease",
                theirs / max(ours, 1),  # ns, or noise would make it infinite
                at_least=LESS_THAN_CTYPES,
            ),
        ]
    return report


def in_c(pid: int, loops: int) -> list[float]:
    command = [str(lab.peer("calls")), str(pid), str(loops)]
    return [float(word) for word in subprocess.check_output(command).split()]


def in_python(way: str, pid: int, loops: int) -> list[float]:
    import pyperf

    file = lab.scratch() / "calls.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.calls_worker"]
    command += ["--processes=1", "--values=3", "--warmups=1", f"--loops={loops}"]
    command += ["--quiet", f"--output={file}"]
    command += [f"--way={way}", f"--pid={pid}", f"--modules={lab.scratch()}"]
    folder = Path(__file__).parent.parent
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    suite = pyperf.BenchmarkSuite.load(str(file))
    return [1e9 * suite.get_benchmark(call).median() for call in CALLS]


def build_cffi() -> None:
    """Compile the module that calls_worker imports."""
    from cffi import FFI

    ffi = FFI()
    ffi.cdef("int open_pidfd(int); int release(int); int kill_release(int);")
    ffi.set_source("_mrelease_cffi", (lab.PEERS / "cffi.c").read_text())
    ffi.compile(str(lab.scratch()))


if __name__ == "__main__":
    from .__main__ import main

    raise SystemExit(main(["calls", *sys.argv[1:]]))
