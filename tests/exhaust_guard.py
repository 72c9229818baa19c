"""examples/guard.py where memory does run out: in a guest of tests/matrix/guard.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cgroups
import exhaust

GUARD = Path(__file__).parent.parent / "examples/guard.py"
# What the guest was booted with decides which of the two the guard has to go by.
HAS_PSI = os.path.exists("/proc/pressure/memory")
HOGS = 3
# All but hogs: for where the guard is to find memory short whatever there is.
ONLY_HOGS = ("--avoid", "^(?!hog$)", "--left", "100")

needs_psi = pytest.mark.skipif(not HAS_PSI, reason="the guest was booted without PSI")

exhaust.check_machine()


class Guard:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> dict[str, Any]:
        """Its next line; waits for it."""
        assert self.process.stdout is not None
        read: dict[str, Any] = json.loads(self.process.stdout.readline())
        print(read)
        return read


@contextmanager
def guard(*options: object, program: Path | str = GUARD) -> Iterator[Guard]:
    """A guard at work; it must end well when it is told to."""
    how = ["-c", program] if isinstance(program, str) else [program]
    with subprocess.Popen(
        [sys.executable, *map(str, [*how, *options])],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            this = Guard(process)
            start = this.line()
            assert start["event"] == "start"
            assert start["refused"] == {}
            yield this
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def check_kill(line: dict[str, Any], pid: int, reason: str) -> None:
    assert line["event"] == "kill"
    assert (line["pid"], line["name"]) == (pid, "hog")
    assert line["reason"] == reason
    assert line["released"]
    assert line["signal"] == signal.SIGKILL


def test_hogs_are_killed_before_the_kernel_wakes_and_innocents_live() -> None:
    reason = "pressure" if HAS_PSI else "left"
    # With PSI nothing else may be the reason.
    options = ["--left", 0] if HAS_PSI else ["--left", 10]
    with (
        exhaust.kernel_asleep(),
        exhaust.workers(3) as innocents,
        guard(*options) as this,
    ):
        for _ in range(HOGS):
            with exhaust.hog() as hog:
                line = this.line()
                hog.wait_exit()
                check_kill(line, hog.pid, reason)
        assert not any(worker.exited() for worker in innocents)


def test_of_two_hogs_that_grow_at_once_each_is_killed_once() -> None:
    with (
        exhaust.kernel_asleep(),
        exhaust.workers(3) as innocents,
        guard() as this,
        exhaust.hog() as one,
        exhaust.hog() as other,
    ):
        lines = [this.line(), this.line()]
        one.wait_exit()
        other.wait_exit()
        assert {line["pid"] for line in lines} == {one.pid, other.pid}
        assert all(line["released"] for line in lines)
        assert not any(worker.exited() for worker in innocents)


@needs_psi
def test_in_a_cgroup_that_is_throttled_its_largest_is_killed_and_no_other() -> None:
    with (
        cgroups.cgroup("memory") as path,
        exhaust.hog(64) as outside,
        guard("--cgroup", path, "--left", 0) as this,
        exhaust.hog() as inside,
    ):
        # What is allocated above it is reclaimed at once, or waited for.
        (path / "memory.high").write_text(str(32 * exhaust.MIB))
        cgroups.enter(path, inside.pid)
        line = this.line()
        inside.wait_exit()
        check_kill(line, inside.pid, "pressure")
        assert not outside.exited()


# The same guard, but for the kill: what it would be without mrelease.
ALONE = f"""
import os, sys, time
sys.path.insert(0, {str(GUARD.parent)!r})
import guard

def kill(reaper, victim):
    begin = time.monotonic()
    os.kill(victim.pid, 9)
    end = begin + {exhaust.LIMIT}
    while guard.look(victim.pid) and time.monotonic() < end:
        time.sleep(0.01)
    return {{"released": True, "elapsed": time.monotonic() - begin}}

guard.kill = kill
guard.main()
"""
WAYS: dict[str, Path | str] = {"SIGKILL alone": ALONE, "mrelease": GUARD}


@needs_psi  # of the two guests one is enough
@pytest.mark.parametrize("way", WAYS)
def test_time_until_the_memory_of_a_starved_hog_is_back(
    way: str, record_property: Callable[[str, object], None]
) -> None:
    with exhaust.starved_hog(96) as hog, exhaust.Watch(hog) as watch:
        with guard(*ONLY_HOGS, program=WAYS[way]) as this:
            line = this.line()
        seconds = watch.seconds(line["time"] - line["elapsed"])
    record_property(f"ms until memory was back by {way}", round(seconds * 1000))
