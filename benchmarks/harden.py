"""A killer whose own pages were swapped out: hardened, plain, and the same in C.

    python -m benchmarks.harden [--quick] [--runs N]

A process that has mrelease loaded and a victim's Pidfd open has all its pages paged
out, as far as the kernel lets go of them, to a zram device made for the time of the
benchmark; then it is told to kill. So has a C program, with mlockall and without. All
are run in turn: milliseconds from the trigger to SIGKILL, as the kernel traces it, and
to the victim's exit; major faults; KiB that were swapped. Files that other processes
have mapped stay in memory, so it is the interpreter's data that comes back.

Needs root, zram, tracefs, and process_madvise(2) of Linux 5.10.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mrelease import Pidfd

from . import lab
from .lab import MissingError, Options
from .report import Report, Table, Target

CONTROL = Path("/sys/class/zram-control")
PROCESS_MADVISE = 440  # but for Alpha and MIPS
MADV_PAGEOUT = 21
LIMIT = 60.0  # seconds for what takes milliseconds
ZRAM = 512 << 20  # bytes
OF_C = 2  # times what the C program with mlockall takes, at most
HARDENED, LOCKED = "hardened", "C program, mlockall"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

KILLER = """
import os, sys
from mrelease import Pidfd, harden, kill
pidfd = Pidfd.open(int(sys.argv[1]))
refused = None
if sys.argv[2] == "hardened":
    refused = harden(nice=None, oom_score_adj=None)["mlock"]
os.write(1, f"mlock refused: {refused}\\n".encode() if refused else b"ready\\n")
os.read(0, 1)
os.write(1, f"{kill(pidfd)}\\n".encode())
os.read(0, 1)
"""


def run(options: Options) -> Report:
    report = Report(
        "harden", "a killer that was swapped out", "Median [lowest-highest]."
    )
    table = Table("", "", ["SIGKILL, ms", "exit, ms", "faults", "KiB"], ratios=False)
    report.tables.append(table)
    ways: dict[str, Callable[[int], list[object]]] = {
        "plain": lambda pid: _python(pid, "plain"),
        HARDENED: lambda pid: _python(pid, "hardened"),
        "C program": lambda pid: [lab.peer("killer"), "nolock", pid],
        LOCKED: lambda pid: [lab.peer("killer"), "lock", pid],
    }
    with _traced_signals() as sigkill, _zram(ZRAM):
        for _ in range(options.repeats(20, 3)):
            for name, command in ways.items():
                table.add(name, *_kill_once(command, sigkill))
    if not table.median("plain", 3):
        raise MissingError("a kernel that pages out")
    report.targets.append(
        Target(
            f"SIGKILL, {HARDENED} to {LOCKED}",
            table.ratio(HARDENED, LOCKED),
            at_most=OF_C,
        )
    )
    return report


def _python(pid: int, way: str) -> list[object]:
    program = f"import sys; sys.path[:] = {sys.path!r}\n{KILLER}"
    return [sys.executable, "-c", program, pid, way]


def _kill_once(
    command: Callable[[int], list[object]], sigkill: Callable[[int], float]
) -> tuple[float, float, float, float]:
    """Milliseconds until SIGKILL and until exit, major faults, KiB swapped."""
    with (
        lab.victim(1) as victim,
        Pidfd.open(victim) as exit_of_victim,
        lab.process(*command(victim.pid)) as killer,
        Pidfd.open(killer) as pidfd,
    ):
        _page_out(pidfd)
        swapped = _swapped(killer.pid)
        faults = _major_faults(killer.pid)
        trigger = time.monotonic()
        killer.tell()
        if not exit_of_victim.wait(LIMIT):
            raise TimeoutError(f"the victim did not exit within {LIMIT} s")
        exited = time.monotonic()
        killer.line()
        return (
            1000 * (sigkill(victim.pid) - trigger),
            1000 * (exited - trigger),
            _major_faults(killer.pid) - faults,
            swapped,
        )


@contextmanager
def _traced_signals() -> Iterator[Callable[[int], float]]:
    """What tells when SIGKILL was sent to a process, by the monotonic clock."""
    with ExitStack() as stack:
        tracefs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _mount("mount", "-t", "tracefs", "tracefs", tracefs)
        stack.callback(_mount, "umount", tracefs)
        # Others' traces are left alone.
        trace = tracefs / "instances" / f"mrelease-{os.getpid()}"
        trace.mkdir()
        stack.callback(trace.rmdir)
        event = trace / "events" / "signal" / "signal_generate"
        (trace / "trace_clock").write_text("mono")
        (event / "filter").write_text("sig == 9")
        (event / "enable").write_text("1")
        stack.callback((event / "enable").write_text, "0")

        def sigkill(pid: int) -> float:
            found = re.findall(
                rf"([0-9.]+): signal_generate: .* pid={pid} ",
                (trace / "trace").read_text(errors="replace"),
            )
            return float(found[-1])

        yield sigkill


def _mount(*command: str | Path) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise MissingError(f"tracefs: {error.stderr.strip()}") from None


def _major_faults(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
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
        raise MissingError("root")
    if not (CONTROL / "hot_add").exists():
        raise MissingError("zram (modprobe zram)")
    with ExitStack() as stack:
        try:
            number = int((CONTROL / "hot_add").read_text())
        except OSError as error:
            raise MissingError(f"a zram device: {error}") from None
        stack.callback(_retried, (CONTROL / "hot_remove").write_text, str(number))
        device = f"/dev/zram{number}"
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size))
        _make_swap(device, size)
        if _libc.swapon(device.encode(), 0):
            raise MissingError(f"swapon(2): {os.strerror(ctypes.get_errno())}")
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
    from .__main__ import main

    raise SystemExit(main(["harden", *sys.argv[1:]]))
