"""Starved victims, killed by SIGKILL alone and by mrelease, and how they fare.

Shared by ``mrelease demo`` and the project's benchmarks.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from errno import ENOSYS
from threading import Thread
from time import monotonic, sleep
from typing import TypeAlias

from . import _proc
from ._kill import SIGKILL, kill
from ._pidfd import Pidfd
from ._probe import is_supported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator

Child: TypeAlias = subprocess.Popen[bytes]

_MIB = 2**20
_BACK = 0.95  # the part of a victim's memory that counts as all of it
_CUT_OFF = 15.0  # seconds
_SMALLEST = 16 * _MIB  # of less, the machine's other processes would be seen

# Both end with their parent, even if that is killed: the victim by the end of its
# standard input, a spinner by looking.
_VICTIM = """
import mmap, sys
size = int(sys.argv[1])
try:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
except OSError as error:
    sys.exit(print(error.strerror, flush=True))
try:
    memory.madvise(mmap.MADV_NOHUGEPAGE)
except OSError:
    pass  # a kernel without huge pages
for offset in range(0, size, mmap.PAGESIZE):
    memory[offset] = 1
print("ready", flush=True)
sys.stdin.read()
"""
_SPINNER = """
import os, sys
print("ready", flush=True)
told = sys.stdin.readline()
print("spinning", flush=True)
while told and os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


class Run:
    """One kill as it was seen: seconds until 95 % was back, and until exit."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = size
        self.start = monotonic()
        self.elapsed = 0.0
        self.back: float | None = None
        self.exit: float | None = None

    def look(self, exited: bool, held: int) -> None:
        """Take note of what is seen now."""
        self.held = 0 if exited else max(0, held)
        self.elapsed = monotonic() - self.start
        if self.back is None and self.held <= (1 - _BACK) * self.size:
            self.back = self.elapsed
        if exited:
            self.exit = self.elapsed


def by_sigkill(victim: Pidfd) -> None:
    """Kill as everybody does: the memory comes back when the victim gets to run."""
    victim.send_signal(SIGKILL)


def by_mrelease(victim: Pidfd) -> None:
    """Kill and release."""
    kill(victim, timeout=_CUT_OFF)


METHODS = {"SIGKILL alone": by_sigkill, "mrelease.kill": by_mrelease}


def compare(
    size: int,
    runs: int,
    display: Callable[[str], Callable[[Run], object]] = lambda name: id,
) -> dict[str, list[Run]]:
    """Measure every method in turn, runs times; display(name) shows one run."""
    seen: dict[str, list[Run]] = {name: [] for name in METHODS}
    for _ in range(runs):
        for name, method in METHODS.items():
            seen[name].append(measure(size, method, display(name)))
    return seen


def measure(
    size: int,
    method: Callable[[Pidfd], None],
    show: Callable[[Run], object],
) -> Run:
    """Kill a starved victim of its own and watch its memory come back.

    A victim's own figures vanish long before its memory is back, so what it holds is
    read from the machine's: AnonPages, against its value before the victim was born.
    """
    with _children() as spawn:
        spinners = [spawn(_SPINNER, os.getpid()) for _ in os.sched_getaffinity(0)]
        before = _anonymous_pages()
        victim = spawn(_VICTIM, size)
        _starve(victim.pid)
        for cpu, spinner in zip(os.sched_getaffinity(0), spinners, strict=True):
            os.sched_setaffinity(spinner.pid, {cpu})
            _start_spinning(spinner)
        with Pidfd.open(victim) as pidfd:
            failed: list[Exception] = []
            thread = Thread(target=_kill, args=(method, Pidfd.open(pidfd), failed))
            run = Run(size)
            thread.start()
            while run.exit is None and run.elapsed < _CUT_OFF and not failed:
                run.look(pidfd.exited, _anonymous_pages() - before)
                show(run)
                # Often at first, to see milliseconds, then seldom.
                sleep(min(0.05, 0.002 + run.elapsed / 50))
    thread.join()
    if failed:
        raise failed[0]
    return run


def _kill(
    method: Callable[[Pidfd], None], victim: Pidfd, failed: list[Exception]
) -> None:
    with victim:
        try:
            method(victim)
        except Exception as error:  # raised again where it is expected
            failed.append(error)


def _starve(pid: int) -> None:
    """Give a process the lowest priority there is."""
    try:
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    except OSError as error:
        if error.errno != ENOSYS:
            raise
        os.setpriority(os.PRIO_PROCESS, pid, 19)  # musl does not make the call


@contextmanager
def _children() -> Generator[Callable[[str, int], Child]]:
    """Gives a function that starts children, which all end with the context."""
    # All are killed before one is reaped: a starved one exits only when the spinners
    # are gone. Stacks, so that Ctrl-C in the midst of it skips none.
    with ExitStack() as reaping, ExitStack() as killing:

        def spawn(program: str, argument: int) -> Child:
            # In a process group of its own, so that Ctrl-C reaches the demo alone; but
            # not in a session of its own, which the scheduler may treat as one more
            # equal share.
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", program, str(argument)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # of what it says when the demo is killed
                process_group=0,
            )
            reaping.callback(child.communicate)
            killing.callback(child.kill)
            assert child.stdout is not None
            line = child.stdout.readline().decode().strip()
            if line != "ready":
                reason = line or f"it ended with {child.wait()}"
                raise RuntimeError(f"a child could not be made ready: {reason}")
            return child

        yield spawn


def _start_spinning(spinner: Child) -> None:
    assert spinner.stdin is not None
    assert spinner.stdout is not None
    spinner.stdin.write(b"go\n")
    spinner.stdin.flush()
    spinner.stdout.readline()


def _anonymous_pages() -> int:
    return _meminfo(b"AnonPages")


def _meminfo(name: bytes) -> int:
    """A figure of /proc/meminfo, in bytes."""
    return int(_proc.fields("/proc/meminfo")[name].split()[0]) * 1024


def _default_size() -> int:
    """The smaller of 1 GiB and a quarter of what is available, in whole MiB."""
    size = min(1024 * _MIB, _meminfo(b"MemAvailable") // 4)
    return size // _MIB * _MIB


def run(size: int | None, runs: int) -> int:
    """The command: the runs, live, then a table. Returns the exit status."""
    if not is_supported():
        raise OSError(ENOSYS, "not supported here; mrelease doctor says why")
    size = size or _default_size()
    available = _meminfo(b"MemAvailable")
    if not _SMALLEST <= size <= available:
        raise ValueError(
            f"--size must be from {_SMALLEST // _MIB} to {available // _MIB} MiB, "
            "what is available"
        )
    print(
        f"Linux {os.uname().release}, {len(os.sched_getaffinity(0))} CPUs\n"
        f"Victims of {size // _MIB} MiB, starved by a spinner on each CPU\n"
    )
    seen = compare(size, runs, display=lambda name: _Display(name).show)
    print(f"\n{table(seen)}")
    return 0


class _Display:
    """Shows a run: a bar that shrinks on a terminal, else a line a second."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.live = sys.stdout.isatty()
        self.next_line = 0.0
        self.was_back = False

    def show(self, run: Run) -> None:
        last = run.exit is not None or run.elapsed >= _CUT_OFF
        if self.live:
            width = 30
            filled = min(width, round(width * run.held / run.size))
            bar = "#" * filled + "." * (width - filled)
            end = "\n" if last else ""
            print(f"\r{self._line(run)}  {bar}\x1b[K", end=end, flush=True)
            return
        came_back = run.back is not None and not self.was_back
        if last or came_back or run.elapsed >= self.next_line:
            print(self._line(run).rstrip(), flush=True)
            self.next_line = run.elapsed + 1.0
        self.was_back = run.back is not None

    def _line(self, run: Run) -> str:
        state = "exited" if run.exit is not None else f"{run.held / _MIB:.0f} MiB held"
        return f"{self.name:<14} {run.elapsed:8.3f} s  {state:<14}"


def table(seen: dict[str, list[Run]]) -> str:
    """Seconds until 95 % is back and until exit, and how many times sooner the last."""
    lines = [f"{'seconds until':<14} {'95 % back':>22} {'exit':>22}"]
    for name, runs in seen.items():
        back = _spread([run.back for run in runs], _CUT_OFF)
        exit_ = _spread([run.exit for run in runs], _CUT_OFF)
        lines.append(f"{name:<14} {back:>22} {exit_:>22}")
    first, *_, last = seen.values()
    back = _ratio([run.back for run in first], [run.back for run in last], _CUT_OFF)
    exit_ = _ratio([run.exit for run in first], [run.exit for run in last], _CUT_OFF)
    lines.append(f"{'times sooner':<14} {back:>22} {exit_:>22}")
    for name, runs in seen.items():
        held = [run.held for run in runs if run.exit is None]
        if held:
            lines.append(
                f"{name}: cut off after {_CUT_OFF:.0f} s in {len(held)} of {len(runs)} "
                f"runs, {max(held) / _MIB:.0f} MiB still held"
            )
    return "\n".join(lines)


def _spread(times: list[float | None], limit: float) -> str:
    """The median, and the lowest and highest if there are several."""
    known = [limit if time is None else time for time in times]

    def text(time: float) -> str:
        return f"{time:.3f}" if time < limit else f"> {limit:.0f}"

    median = text(statistics.median_low(known))
    if len(known) == 1:
        return median
    return f"{median} [{text(min(known))}-{text(max(known))}]"


def _ratio(slow: list[float | None], fast: list[float | None], limit: float) -> str:
    """How often the median of fast goes into that of slow, at least if cut off."""
    above = statistics.median_low([limit if time is None else time for time in slow])
    below = statistics.median_low([limit if time is None else time for time in fast])
    if below == limit:
        return "-"
    ratio = above / below
    return f"{'> ' if above == limit else ''}{ratio:.{0 if ratio >= 10 else 1}f}"
