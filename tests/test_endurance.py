"""Thousands of kills in one process: descriptors, memory and threads stay flat.

50 000 with --long, in a fresh interpreter, in every way there is to kill. What is held
after the first tenth of them is compared with what is held at the end.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import victims
from calls import run_python
from mrelease import Pidfd, Reaper, aio, kill, kill_all, terminate

CROWD = 125  # processes that are made at a time
# What may have come upon it at the end: of 50 000 kills, an object lost in twenty of
# them, or 40 bytes in each, would be too much.
MOST = {"descriptors": 0, "threads": 0, "blocks": 2000, "KiB": 2000}


def kills(number: int) -> list[dict[str, int]]:
    """Kill so many; say what was held after a tenth of them, and at the end."""
    held = []
    with Reaper(2) as reaper, asyncio.Runner() as runner:
        ways: list[Callable[[list[int]], list[Any]]] = [_one, _by_pidfd, kill_all, _ask]
        ways += [_in_background(reaper), lambda pids: runner.run(_awaited(pids))]
        for done in range(CROWD, number + 1, CROWD):
            with victims.crowd(CROWD + 1) as crowd:
                pids = sorted(crowd.running().keys() - {crowd.root})
                results: list[Any] = []
                for turn, way in enumerate(ways):
                    results += way(pids[turn :: len(ways)])
                assert len(results) == CROWD
                assert all(result.released for result in results), results
            if done in (number // 10, number):
                held.append(_held())
    return held


def _one(pids: list[int]) -> list[Any]:
    return [kill(pid, measure=True, timeout=None) for pid in pids]


def _by_pidfd(pids: list[int]) -> list[Any]:
    """Each is killed twice."""
    results = []
    for pid in pids:
        with Pidfd.open(pid) as pidfd:
            pidfd.kill(timeout=None)
            results.append(pidfd.kill(wait=True, timeout=None))
    return results


def _ask(pids: list[int]) -> list[Any]:
    return [terminate(pid, timeout=None) for pid in pids]


def _in_background(reaper: Reaper) -> Callable[[list[int]], list[Any]]:
    def begin(pids: list[int]) -> list[Any]:
        futures = [reaper.kill(pid, timeout=None) for pid in pids]
        return [future.result(60) for future in futures]

    return begin


async def _awaited(pids: list[int]) -> list[Any]:
    return await asyncio.gather(*[aio.kill(pid, timeout=None) for pid in pids])


def _held() -> dict[str, int]:
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "blocks": sys.getallocatedblocks(),
        "KiB": int(status.partition("VmRSS:")[2].split()[0]),
    }


@pytest.mark.timeout(2000)
def test_nothing_grows_with_the_number_of_kills(
    long: bool, record_property: Callable[[str, object], None]
) -> None:
    number = 50_000 if long else 1250
    program = f"import json, test_endurance as e; print(json.dumps(e.kills({number})))"
    result = run_python(program)
    assert (result.returncode, result.stderr) == (0, "")
    first, last = json.loads(result.stdout)
    record_property("kills", number)
    for name, most in MOST.items():
        record_property(f"{name} at first", first[name])
        record_property(f"{name} at the end", last[name])
        assert last[name] - first[name] <= most, (first, last)
