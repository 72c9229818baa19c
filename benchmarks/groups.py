"""Memory of four starved victims back: kill_cgroup and kill_all against what is usual.

The victims are at nice 19, in a cgroup, beside two spinners on each CPU. A whole cgroup
is killed by kill_cgroup and by writing to cgroup.kill alone, a list by kill_all and by
SIGKILL to each alone. All ways are run in turn; the figures are the seconds until 95 %
of the memory is back and until the last victim has exited, median [lowest-highest].

    python -m benchmarks.groups [--size MiB] [--runs N]

Needs root and a cgroup v2 that can be written to. The exit status is 1 if either pair
misses the target, and 2 if something that it needs is missing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import SIGKILL
from threading import Thread
from time import monotonic, sleep

from mrelease import Pidfd, _demo, is_supported, kill_all, kill_cgroup

TARGET = 5  # times sooner, of the medians
LIMIT = 60.0  # seconds until a way is given up
VICTIMS = 4
SPINNERS = 2  # on each CPU


def by_cgroup_kill(cgroup: Path, victims: list[Pidfd]) -> None:
    (cgroup / "cgroup.kill").write_text("1")


def by_kill_cgroup(cgroup: Path, victims: list[Pidfd]) -> None:
    kill_cgroup(cgroup, timeout=LIMIT)


def by_sigkill(cgroup: Path, victims: list[Pidfd]) -> None:
    for victim in victims:
        victim.send_signal(SIGKILL)


def by_kill_all(cgroup: Path, victims: list[Pidfd]) -> None:
    kill_all(victims, timeout=LIMIT)


Method = Callable[[Path, list[Pidfd]], None]
PAIRS: list[dict[str, Method]] = [
    {"cgroup.kill": by_cgroup_kill, "kill_cgroup": by_kill_cgroup},
    {"SIGKILL to all": by_sigkill, "kill_all": by_kill_all},
]


def measure(size: int, method: Method, mount: Path) -> _demo.Run:
    """Kill four victims and watch their memory come back.

    Their own figures vanish long before the memory is back: what they hold is read from
    the machine's AnonPages, against its value before they were born.
    """
    with _demo._children() as spawn, new_cgroup(mount) as cgroup, ExitStack() as stack:
        spinners = [
            (spawn(_demo._SPINNER, os.getpid()), cpu)
            for cpu in os.sched_getaffinity(0)
            for _ in range(SPINNERS)
        ]
        before = _demo._anonymous_pages()
        victims = []
        for _ in range(VICTIMS):
            child = spawn(_demo._VICTIM, size)
            os.setpriority(os.PRIO_PROCESS, child.pid, 19)
            (cgroup / "cgroup.procs").write_text(str(child.pid))
            victims.append(stack.enter_context(Pidfd.open(child)))
        for spinner, cpu in spinners:
            os.sched_setaffinity(spinner.pid, {cpu})
            _demo._start_spinning(spinner)
        return watch(VICTIMS * size, method, cgroup, victims, before)


def watch(
    size: int, method: Method, cgroup: Path, victims: list[Pidfd], before: int
) -> _demo.Run:
    failed: list[Exception] = []

    def kill() -> None:
        try:
            method(cgroup, victims)
        except Exception as error:  # raised again where it is expected
            failed.append(error)

    thread = Thread(target=kill)
    run = _demo.Run(size)
    thread.start()
    while run.exit is None and run.elapsed < LIMIT and not failed:
        exited = all(victim.exited for victim in victims)
        run.look(exited, _demo._anonymous_pages() - before)
        # Often at first, to see milliseconds, then seldom.
        sleep(min(0.05, 0.002 + run.elapsed / 50))
    thread.join()
    if failed:
        raise failed[0]
    return run


@contextmanager
def new_cgroup(mount: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="mrelease-benchmark-", dir=mount))
    try:
        yield path
    finally:
        # Those who are still in it are starved: out of it, they end with the children.
        for pid in (path / "cgroup.procs").read_text().split():
            (mount / "cgroup.procs").write_text(pid)
        end = monotonic() + LIMIT
        while True:
            try:
                path.rmdir()
                break
            except OSError:
                if monotonic() > end:
                    raise
                sleep(0.01)


def missing() -> str | None:
    """What this machine lacks for the benchmark."""
    if os.geteuid() != 0:
        return "root"
    if not is_supported():
        return "process_mrelease(2): mrelease doctor says why"
    mount = find_mount()
    if mount is None or not os.access(mount, os.W_OK):
        return "a cgroup v2 that can be written to"
    with new_cgroup(mount) as path:
        if not (path / "cgroup.kill").exists():
            return "cgroup.kill of Linux 5.14"
    return None


def find_mount() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            # A space in the path is written as \040.
            return Path(line.split(" ")[4].encode().decode("unicode_escape"))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Four starved victims: time until memory is back."
    )
    parser.add_argument("--size", type=int, default=256, help="MiB (default: 256)")
    parser.add_argument("--runs", type=int, default=5, help="of each (default: 5)")
    options = parser.parse_args()
    mount = find_mount()
    if (lack := missing()) or mount is None:
        print(f"benchmarks.groups: needs {lack}", file=sys.stderr)
        return 2
    print(
        f"{VICTIMS} victims of {options.size} MiB at nice 19, beside {SPINNERS} "
        f"spinners on each of {len(os.sched_getaffinity(0))} CPUs, "
        f"Linux {os.uname().release}, {options.runs} runs"
    )
    seen: dict[str, list[_demo.Run]] = {name: [] for pair in PAIRS for name in pair}
    for _ in range(options.runs):
        for pair in PAIRS:
            for name, method in pair.items():
                seen[name].append(measure(options.size << 20, method, mount))
    status = 0
    for pair in PAIRS:
        of_pair = {name: seen[name] for name in pair}
        print(f"\n{_demo.table(of_pair, LIMIT)}")
        slow, fast = (
            statistics.median(LIMIT if run.back is None else run.back for run in runs)
            for runs in of_pair.values()
        )
        met = slow / fast >= TARGET
        status |= not met
        print(
            f"target: memory back {TARGET} times sooner: {'met' if met else 'MISSED'}"
        )
    return status


if __name__ == "__main__":
    raise SystemExit(main())
