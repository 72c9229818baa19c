"""Nothing leaks: of every C function, each way to return and to raise, many times over.

Each call gets objects of its own, so that a reference that is not given back keeps a
block of memory; a debug build counts the references as well.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

import victims
from calls import C_FUNCTIONS, killed_next, opened
from mrelease import _mrelease
from mrelease._mrelease import (
    bar_kill_and_release,
    getcpu,
    kill_and_release,
    kill_and_release_next,
    mlockall,
    pidfd_open,
    pidfd_send_signal,
    process_mrelease,
)

WARM_UP, CALLS = 300, 1000
# One lost a call would be a thousand; caches of the interpreter fill up, or empty, too.
MOST = CALLS // 10


class Failed(Exception):
    """What an __index__() raises."""


ERRORS = (OSError, OverflowError, TypeError, ValueError, Failed)


class Number:
    """An int by __index__(), which may raise."""

    def __init__(self, value: int | None) -> None:
        self.value = value

    def __index__(self) -> int:
        if self.value is None:
            raise Failed(object())
        return int(self.value)


def wrong(function: Callable[..., object], number: int) -> list[Callable[[], object]]:
    """Calls that fail on their arguments, for a function that takes as many."""
    calls: list[Callable[[], object]] = [
        lambda: function(*[Number(1)] * (number + 3)),
        lambda: function(*[Number(1)] * number, keyword=object()),
    ]
    for place in range(number):
        for value in (2**40, -(2**70), 1.5, None, str):
            first = [Number(1)] * place
            rest = [Number(0)] * (number - place - 1)
            calls.append(
                lambda first=first, value=value, rest=rest: function(  # type: ignore[misc]
                    *first, value() if value is str else value, *rest
                )
            )
        calls.append(
            lambda place=place: function(  # type: ignore[misc]
                *[Number(1)] * place, Number(None), *[Number(0)] * (number - place - 1)
            )
        )
    return calls


def calls_of(name: str, pidfd: int, pid: int) -> list[Callable[[], object]]:
    """All the ways to call a C function: what it returns, and what it raises."""
    gone = victims.reaped_pid()
    null = 1 << 20  # no descriptor
    ways: dict[str, list[Callable[[], object]]] = {
        "pidfd_open": [
            lambda: os.close(pidfd_open(Number(os.getpid()))),
            lambda: os.close(pidfd_open(os.getpid(), Number(os.O_NONBLOCK))),
            lambda: pidfd_open(gone),
            lambda: pidfd_open(Number(-1)),
            lambda: pidfd_open(os.getpid(), Number(2**31)),
            *wrong(pidfd_open, 2),
        ],
        "pidfd_send_signal": [
            lambda: pidfd_send_signal(Number(pidfd), Number(0)),
            lambda: pidfd_send_signal(pidfd, 0, Number(0)),
            lambda: pidfd_send_signal(Number(null), 0),
            lambda: pidfd_send_signal(pidfd, Number(1000)),
            lambda: pidfd_send_signal(pidfd, 0, Number(2**31)),
            *wrong(pidfd_send_signal, 3),
        ],
        "process_mrelease": [
            lambda: process_mrelease(Number(pidfd)),
            lambda: process_mrelease(pidfd, Number(0)),
            lambda: process_mrelease(Number(null)),
            lambda: process_mrelease(pidfd, Number(1)),
            *wrong(process_mrelease, 2),
        ],
        "kill_and_release": [
            lambda: kill_and_release(Number(pidfd)),
            lambda: kill_and_release(Number(null)),
            *wrong(kill_and_release, 1),
        ],
        "bar_kill_and_release": [
            lambda: bar_kill_and_release(Number(pidfd), Number(pid)),
            lambda: bar_kill_and_release(Number(pidfd), Number(gone)),
            lambda: bar_kill_and_release(Number(null), 0),
            *wrong(bar_kill_and_release, 2),
        ],
        "kill_and_release_next": [
            lambda: killed_next(pidfd),
            lambda: killed_next(null),
            lambda: killed_next(-1),
            lambda: kill_and_release_next(Number(null)),
            *wrong(kill_and_release_next, 1),
        ],
        "getcpu": [getcpu, *wrong(getcpu, 0)],
        "mlockall": [
            lambda: mlockall(Number(_mrelease.MCL_CURRENT | _mrelease.MCL_ONFAULT)),
            lambda: mlockall(Number(1 << 20)),
            *wrong(mlockall, 1),
        ],
    }
    return ways[name]


def held() -> dict[str, int]:
    gc.collect()  # what others have left would go meanwhile, and hide what stays
    references = getattr(sys, "gettotalrefcount", lambda: 0)()
    return {
        "references": references,
        "blocks": sys.getallocatedblocks(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def grown(calls: list[Callable[[], object]]) -> list[dict[str, int]]:
    """What two phases leave behind that make each call many times."""
    found = []
    repeat(calls, WARM_UP)
    for _ in range(2):
        before = held()
        repeat(calls, CALLS)
        after = held()
        found.append({name: after[name] - before[name] for name in before})
    return found


def repeat(calls: list[Callable[[], object]], times: int) -> None:
    for call in calls:
        for _ in range(times):
            with suppress(*ERRORS):
                call()


def measured(name: str) -> list[dict[str, int]]:
    """A child may lock its memory, and is in nobody's way."""
    # Stopped in its exit, it can be killed and released again and again.
    with victims.exit_stopped(1) as victim, opened(victim.pid) as pidfd:
        victim_calls = calls_of(name, pidfd, victim.pid)
        return victims.apart(lambda: grown(victim_calls))


@pytest.mark.timeout(300)  # for emulated machines
@pytest.mark.parametrize("name", C_FUNCTIONS)
def test_no_call_leaves_anything(name: str) -> None:
    first, second = measured(name)
    for growth in (first, second):
        assert growth["descriptors"] == 0, growth
        assert max(growth["references"], growth["blocks"]) < MOST, growth


def test_a_leak_would_be_seen() -> None:
    kept: list[Any] = []
    for growth in victims.apart(lambda: grown([lambda: kept.append(Number(1))])):
        assert growth["blocks"] > MOST


@pytest.mark.needs("debug")
def test_a_lost_reference_would_be_seen() -> None:
    kept: list[Any] = []
    mortal = object()  # of str, for one, newer Pythons count none
    for growth in victims.apart(lambda: grown([lambda: kept.append(mortal)])):
        assert growth["references"] >= CALLS
