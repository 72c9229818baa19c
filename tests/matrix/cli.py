"""The command: runs the cells it is given, one line each, and writes the report."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from matrix import (
    guard,
    kernels,
    long,
    machines,
    musl,
    nohang,
    project,
    pythons,
    report,
    sanitizers,
)
from matrix.base import CACHE, Failure, Job, Skip, job

HERE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cell:
    run: Callable[[Job], None]
    about: str
    minutes: int  # on two cores without KVM, once everything is fetched


CELLS = {
    # Has no process_mrelease(2).
    "kernel-5.10": Cell(
        partial(kernels.run, suite="bullseye", release="5.10", releases=False),
        "the suite as root and as nobody on Linux 5.10",
        30,
    ),
    "kernel-6.1": Cell(
        partial(kernels.run, suite="bookworm", release="6.1"),
        "the suite as root and as nobody on Linux 6.1",
        60,
    ),
    "kernel-6.12": Cell(
        partial(kernels.run, suite="trixie", release="6.12"),
        "the suite as root and as nobody on Linux 6.12",
        60,
    ),
    "kernel-6.18": Cell(
        partial(kernels.run, suite="trixie-backports", release="6.18"),
        "the suite as root and as nobody on Linux 6.18",
        60,
    ),
    "kernel-newest": Cell(
        partial(kernels.run, suite="trixie-backports", release=""),
        "the suite as root and as nobody on the newest of Debian's backports",
        60,
    ),
    **{
        f"python-{version}": Cell(
            partial(pythons.plain, version=version),
            f"the suite on Python {version}, with the wheel of Python 3.11",
            2,
        )
        for version in ("3.11", "3.12", "3.13", "3.14", "3.15")
    },
    **{
        f"python-{version}t": Cell(
            partial(pythons.free_threaded, version=version),
            f"the suite on Python {version} without its GIL; compiled, the first time",
            8,
        )
        for version in ("3.13", "3.14", "3.15")
    },
    **{
        f"python-{version}d": Cell(
            partial(pythons.debug, version=version),
            f"the suite on a debug build of Python {version}",
            3,
        )
        for version in ("3.11", "3.14")
    },
    "musl": Cell(
        musl.run,
        "the suite on a Python of the C library musl; compiled, the first time",
        6,
    ),
    "guard": Cell(
        guard.run,
        "examples/guard.py in guests of 512 MiB that run out of it, with PSI and not",
        6,
    ),
    "nohang": Cell(
        nohang.run,
        "Debian's nohang as it is and with mrelease's kill, in a guest of 512 MiB",
        4,
    ),
    "fuzz": Cell(
        long.fuzz,
        "100 000 calls with arguments of every kind, 2000 sequences of calls",
        12,
    ),
    "faults": Cell(
        long.faults,
        "each errno at each system call, each allocation failing, signals, forks",
        40,
    ),
    "endurance": Cell(long.endurance, "50 000 kills in one process", 2),
    "sanitize-asan": Cell(
        sanitizers.asan, "the suite, the extension under ASan and UBSan; this kernel", 5
    ),
    "sanitize-tsan": Cell(
        sanitizers.tsan,
        "many threads under ThreadSanitizer; compiles a Python with it, the first time",
        7,
    ),
    "analyse": Cell(
        sanitizers.analyse,
        "clang-tidy, cppcheck and gcc's analyser on the extension",
        1,
    ),
    "arch-i686": Cell(
        machines.i686, "the suite on 32-bit x86, compiled there; this kernel", 3
    ),
    **{
        f"arch-{name}": Cell(
            partial(machines.emulated, name=name),
            f"a cross-built wheel and the tests of the system calls on {name}",
            8,
        )
        for name in machines.ARCHITECTURES
    },
}


def one(name: str, source: Path, args: list[str], wheels: Path | None) -> bool:
    """Run a cell, print its line, keep its result; whether it has not failed."""
    print(f"{name:15}", end=" ", flush=True)
    start, commit = time.monotonic(), project.commit(source)
    date = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    why = ""
    with job(name, source, args, wheels) as this:
        try:
            CELLS[name].run(this)
            state = "ok"
        except Skip as skip:
            state, why = "SKIPPED", str(skip)
        except Failure as failure:
            state, why = "FAILED", str(failure)
        except Exception as error:
            state, why = "FAILED", f"{type(error).__name__}: {error}"
            this.say(traceback.format_exc())
    seconds = round(time.monotonic() - start)
    runs = "; ".join(map(str, this.runs))
    figures = ", ".join(f"{number} {name}" for name, number in this.figures.items())
    print(*filter(None, (runs, figures, f"{seconds} s", state, why)), flush=True)
    if state == "FAILED":
        print(f"{'':15} {this.log.name}")
    if not args:  # a part of the tests is no result
        folder = CACHE / "results"
        folder.mkdir(exist_ok=True)
        result = {
            "commit": commit,
            "date": date,
            "state": state,
            "why": why,
            "on": this.on,
            "runs": [asdict(run) for run in this.runs],
            "figures": this.figures,
            "seconds": seconds,
        }
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return state != "FAILED"


def _stop(*_: object) -> None:
    """End, but clean up; a second signal, as timeout(1) sends, is not to stop that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def main() -> int:
    ours, args = sys.argv[1:], []
    if "--" in ours:
        at = ours.index("--")
        ours, args = ours[:at], ours[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="tests/matrix/run",
        usage="%(prog)s [--list | --json] [--report] [--source DIR]"
        " [--wheels DIR] [NAME... | all] [-- ARGS]",
        description="Run the tests where this machine is not, one line a cell; needs"
        " root on Debian. ARGS are pytest's, in place of the whole suite. What is"
        " fetched or made, and the logs, are in $MRELEASE_CACHE.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="list the cells")
    parser.add_argument(
        "--json", action="store_true", help="their names, for a workflow"
    )
    parser.add_argument(
        "--report", action="store_true", help="keep results, write docs/testing.md"
    )
    parser.add_argument("--source", type=Path, default=HERE, help="another checkout")
    parser.add_argument(
        "--wheels",
        type=Path,
        metavar="DIR",
        help="test the wheels there, of .ci/cross, in emulated machines",
    )
    options = parser.parse_intermixed_args(ours)
    names = list(CELLS) if options.names == ["all"] else options.names
    if unknown := set(names) - CELLS.keys():
        parser.error(f"no such cell: {', '.join(sorted(unknown))}")
    if options.json:
        print(json.dumps(list(CELLS)))
        return 0
    if options.list or not (names or options.report):
        for name, cell in CELLS.items():
            print(f"{name:15} {cell.minutes:3} min  {cell.about}")
        return 0
    signal.signal(signal.SIGTERM, _stop)
    source = options.source.resolve()
    wheels = options.wheels.resolve() if options.wheels else None
    good = [one(name, source, args, wheels) for name in names]
    if options.report:
        kept = source / "tests/matrix/results"
        report.keep(CACHE / "results", kept)
        report.write(CELLS, kept, source / "docs/testing.md")
    return 0 if all(good) else 1
