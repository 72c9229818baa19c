"""For tests that use up a machine's memory: hogs, and what the machine says of them.

No file named exhaust* is collected by itself: they are for guests of tests/matrix/run.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Self

import victims

MIB = 2**20
LARGEST = 1024 * MIB  # a machine of more is surely not meant
LIMIT = 60.0  # seconds until a kill by SIGKILL alone is no longer waited for
BACK = 0.95  # the part of a victim's memory that counts as all of it

# Says its name, by which it is chosen, and grows for ever; slowly, so that whoever
# watches has time: about 50 MiB/s.
_HOG = """
import time
with open("/proc/self/comm", "w") as comm:
    comm.write("hog")
say("ready")
held = []
while len(held) < int(rest[0]):
    held.append(touch(1, mmap.MAP_PRIVATE))
    time.sleep(0.02)
say("grown")
wait()
"""

# Does its work, for which it needs all its memory. Ends with the test process.
_WORKER = """
import select
with open("/proc/self/comm", "w") as comm:
    comm.write("worker")
say("ready")
while not select.select([0], [], [], 0.05)[0]:
    sum(memory[0][:: mmap.PAGESIZE])
"""


def meminfo(*names: str) -> int:
    """Sum of lines of /proc/meminfo, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    size = dict(line.split(":", 1) for line in lines)
    return sum(int(size[name].split()[0]) << 10 for name in names)


def anonymous() -> int:
    """Bytes of anonymous memory that all processes hold, swap included."""
    return meminfo("AnonPages", "SwapTotal") - meminfo("SwapFree")


@contextmanager
def kernel_asleep() -> Iterator[None]:
    """The kernel's OOM killer must not wake meanwhile, nor have before."""
    yield
    lines = Path("/proc/vmstat").read_text().splitlines()
    assert dict(line.split() for line in lines)["oom_kill"] == "0"
    kernel = subprocess.run(["dmesg"], capture_output=True, text=True, check=True)
    assert "Linux version" in kernel.stdout
    assert "invoked oom-killer" not in kernel.stdout


def check_machine() -> None:
    """Keep these tests off a machine that others may want to use."""
    total = meminfo("MemTotal")
    if total > LARGEST:
        raise RuntimeError(f"for a guest, not a machine of {total // MIB} MiB")


@contextmanager
def hog(mib: int = 1 << 20) -> Iterator[victims.Victim]:
    """Grows up to this size, by default until it is killed."""
    with closing(victims.Victim(_HOG, 0, mib)) as child:
        child.wait_ready()
        yield child


@contextmanager
def workers(number: int, mib: int = 8) -> Iterator[list[victims.Victim]]:
    """Innocents, busy with their memory."""
    with ExitStack() as stack:
        children = [
            stack.enter_context(closing(victims.Victim(_WORKER, mib)))
            for _ in range(number)
        ]
        for child in children:
            child.wait_ready()
        yield children


@contextmanager
def starved_hog(mib: int) -> Iterator[victims.Victim]:
    """Grown to its size, then starved beside a spinning process on each CPU."""
    with hog(mib) as child:
        while child.words() != ["grown"]:
            pass
        with victims.spinners(os.sched_getaffinity(0)):
            os.sched_setscheduler(child.pid, os.SCHED_IDLE, os.sched_param(0))
            yield child


class Watch:
    """Watches, in a thread, a victim's memory come back: `back` is the time().

    A victim's own figures vanish long before its memory is back, so this looks at the
    whole machine's, which fall from their highest by what the victim held.
    """

    def __init__(self, victim: victims.Victim) -> None:
        self.size = victim.anon()
        self.back: float | None = None
        self._stop = Event()
        self._thread = Thread(target=self._run)

    def _run(self) -> None:
        highest = 0
        while self.back is None and not self._stop.wait(0.005):
            now = anonymous()
            highest = max(highest, now)
            if highest - now >= BACK * self.size:
                self.back = time.time()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def seconds(self, decided: float) -> float:
        """Wait until it is back, at most LIMIT; how long it was from the decision."""
        self._thread.join(LIMIT)
        return LIMIT if self.back is None else self.back - decided

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
