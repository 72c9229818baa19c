"""A killer whose own pages were swapped out: hardened, against plain.

A process that has mrelease loaded and a victim's Pidfd open has all its pages paged
out, as far as the kernel lets go of them, to a zram device made for the time of the
benchmark; then it is told to kill. Both ways are run in turn, and the figures are
printed as median [lowest-highest]: milliseconds from the trigger to the return of
kill() and to the victim's exit, and major faults. Files that other processes have
mapped stay in memory, so it is the interpreter's data that comes back.

    python -m benchmarks.harden [--runs N] [--size MiB]

Needs root, zram, and process_madvise(2) of Linux 5.10.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

from mrelease import Pidfd

CONTROL = Path("/sys/class/zram-control")
PROCESS_MADVISE = 440  # but for Alpha and MIPS
MADV_PAGEOUT = 21
LIMIT = 60.0  # seconds for what takes milliseconds

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

VICTIM = """
import os, sys
memory = bytearray(int(sys.argv[1])) + b"x"
os.write(1, b"ready\\n")
os.read(0, 1)
"""

KILLER = """
import os, sys, time
from mrelease import Pidfd, harden, kill
pidfd = Pidfd.open(int(sys.argv[1]))
refused = ""
if sys.argv[2] == "hardened":
    error = harden(nice=None, oom_score_adj=None)["mlock"]
    refused = f"mlock refused: {error}" if error else ""
os.write(1, (refused or "ready").encode() + b"\\n")
os.read(0, 1)
result = kill(pidfd)
os.write(1, f"{time.monotonic()} {result}\\n".encode())
os.read(0, 1)
"""


class Run(NamedTuple):
    """One kill: seconds from the trigger, and the killer's faults and swapped KiB."""

    returned: float
    exited: float
    faults: int
    swapped: int


class SkippedError(Exception):
    """What is missing here."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="A killer that was swapped out: hardened, against plain."
    )
    parser.add_argument("--runs", type=int, default=10, help="of each (default: 10)")
    parser.add_argument(
        "--size", type=int, default=512, help="MiB of the zram device (default: 512)"
    )
    options = parser.parse_args()
    # So that the device is removed in this case, too.
    signal.signal(signal.SIGTERM, _exit)
    runs: dict[str, list[Run]] = {"plain": [], "hardened": []}
    try:
        with _zram(options.size << 20):
            for _ in range(options.runs):
                for way, done in runs.items():
                    done.append(_run(way))
    except SkippedError as missing:
        print(f"skipped: {missing}")
        return 0
    print(
        f"Python {sys.version.split()[0]}, Linux {os.uname().release}, "
        f"{options.runs} runs, {os.cpu_count()} CPUs"
    )
    print(
        f"{'':<10} {'kill() returned, ms':>24} {'victim exited, ms':>24} "
        f"{'major faults':>18} {'swapped, KiB':>16}"
    )
    for way, done in runs.items():
        print(
            f"{way:<10} {_spread([1000 * run.returned for run in done], 2):>24} "
            f"{_spread([1000 * run.exited for run in done], 2):>24} "
            f"{_spread([run.faults for run in done]):>18} "
            f"{_spread([run.swapped for run in done]):>16}"
        )
    for name in ("returned", "exited"):
        plain, hardened = (
            statistics.median(getattr(run, name) for run in done)
            for done in runs.values()
        )
        print(f"plain to hardened, {name}: {plain / hardened:.2f}")
    return 0


def _exit(*_: object) -> NoReturn:
    raise SystemExit(1)


def _spread(values: list[float] | list[int], digits: int = 0) -> str:
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} [{low:.{digits}f}-{high:.{digits}f}]"


def _run(way: str) -> Run:
    with (
        _python(VICTIM, str(1 << 20)) as victim,
        Pidfd.open(victim) as exit_of_victim,
        _python(KILLER, str(victim.pid), way) as killer,
        Pidfd.open(killer) as pidfd,
    ):
        _page_out(pidfd)
        swapped = _swapped(killer.pid)
        if way == "plain" and not swapped:
            raise SkippedError("nothing of the killer could be paged out")
        faults = _major_faults(killer.pid)
        trigger = time.monotonic()
        _write(killer, b"!")
        if not exit_of_victim.wait(LIMIT):
            raise TimeoutError(f"the victim did not exit within {LIMIT} s")
        exited = time.monotonic()
        returned, _, result = _line(killer).partition(" ")
        if "signal 9" not in result:
            raise RuntimeError(f"not killed: {result}")
        return Run(
            float(returned) - trigger,
            exited - trigger,
            _major_faults(killer.pid) - faults,
            swapped,
        )


@contextmanager
def _python(program: str, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has said that it is ready."""
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", program, *args],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    with process:
        try:
            line = _line(process)
            if line != "ready":
                raise SkippedError(line or "a process did not start")
            yield process
        finally:
            process.kill()


def _line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout
    return process.stdout.readline().decode().strip()


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin
    process.stdin.write(data)


def _major_faults(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[9])


def _swapped(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmSwap:")[2].split()[0])


def _page_out(pidfd: Pidfd) -> None:
    """Page out every mapping that may be: none that is locked, or the kernel's."""
    for line in Path(f"/proc/{pidfd.pid}/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        vector = struct.pack("@PN", start, end - start)
        args = (pidfd.fileno(), vector, 1, MADV_PAGEOUT, 0)
        _libc.syscall(ctypes.c_long(PROCESS_MADVISE), *args)


@contextmanager
def _zram(size: int) -> Iterator[None]:
    """A new zram device, which is swapped to; nothing of it is left."""
    if os.geteuid() != 0:
        raise SkippedError("needs root")
    if not (CONTROL / "hot_add").exists():
        raise SkippedError("needs zram (modprobe zram)")
    with ExitStack() as stack:
        try:
            number = int((CONTROL / "hot_add").read_text())
        except OSError as error:
            raise SkippedError(f"no zram device: {error}") from None
        stack.callback(_retried, (CONTROL / "hot_remove").write_text, str(number))
        device = f"/dev/zram{number}"
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size))
        _make_swap(device, size)
        if _libc.swapon(device.encode(), 0):
            raise SkippedError(f"swapon: {os.strerror(ctypes.get_errno())}")
        stack.callback(_swapoff, device)
        yield


def _make_swap(device: str, size: int) -> None:
    """Write the header of a swap area: version 1, its last page, no bad pages."""
    header = bytearray(mmap.PAGESIZE)
    struct.pack_into("=III", header, 1024, 1, size // mmap.PAGESIZE - 1, 0)
    header[-10:] = b"SWAPSPACE2"
    with open(device, "r+b", buffering=0) as file:
        file.write(header)
        os.fsync(file.fileno())


def _swapoff(device: str) -> None:
    if _libc.swapoff(device.encode()):
        raise OSError(ctypes.get_errno(), f"swapoff {device}")


def _retried(write: object, text: str) -> None:
    """Write, as long as somebody who looks at every new device keeps it busy."""
    assert callable(write)
    end = time.monotonic() + LIMIT
    while True:
        try:
            write(text)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return


if __name__ == "__main__":
    raise SystemExit(main())
