"""Dask's workers, killed by the plugin: real clusters, each in a Python of its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import victims
from calls import TESTS, run_python
from mrelease import aio

needs_dask = pytest.mark.needs("dask")


def scene(name: str) -> tuple[dict[str, Any], str]:
    """What a scene of dask_cluster.py found, and what was logged."""
    result = subprocess.run(
        [sys.executable, str(TESTS / "dask_cluster.py"), name],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found, result.stderr


@needs_dask
@pytest.mark.needs("release")
def test_a_worker_over_its_limit_is_killed_and_the_computation_ends_right() -> None:
    found, _ = scene("over_the_limit")
    assert found["answer"] == "done"
    assert found["sum"] == sum(number**2 for number in range(20))
    (event,) = found["events"]
    assert event["pid"] == found["victim"] != found["after"]
    assert event["signal"] == 9
    assert event["released"]
    assert event["freed"] > 256 << 20  # of the 384 that it may have


@needs_dask
@pytest.mark.needs("release")
def test_each_worker_of_a_nanny_is_released_when_it_is_closed_by_force() -> None:
    found, _ = scene("restarted")
    assert [event["pid"] for event in found["events"]] == found["victims"]
    assert len(set(found["victims"])) == 3
    assert all(event["released"] for event in found["events"])
    assert found["answer"] == 49


@needs_dask
def test_a_nanny_that_closes_by_force_still_has_the_plugin() -> None:
    found, logged = scene("closed")
    assert f"mrelease.integrations.dask: worker: pid {found['victim']} " in logged
    assert found["descriptors"] == 0


@needs_dask
def test_without_the_plugin_all_is_as_before() -> None:
    found, logged = scene("unregistered")
    assert found == {"hooked": True, "left": [], "events": [], "descriptors": 0}
    assert "mrelease.integrations.dask" not in logged


@pytest.fixture
def _close_pool() -> Iterator[None]:
    """End the threads that all loops share."""
    yield
    while aio._pools:
        aio._pools.pop().close(wait=True)


class Process:
    """As much of Dask's as the hook needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.kill: Callable[[], asyncio.Future[None]]
        self.terminate: Callable[[], asyncio.Future[None]]

    def is_alive(self) -> bool:
        return True


@needs_dask
@pytest.mark.needs("fuse")
@pytest.mark.usefixtures("_close_pool")
def test_a_release_that_blocks_does_not_block_the_loop() -> None:
    from mrelease.integrations import dask

    async def kill(pid: int) -> list[dict[str, object]]:
        told: list[dict[str, object]] = []
        process = Process(pid)
        process.kill = process.terminate = asyncio.Future
        hook = dask._Hook(process, {"timeout": 0.2}, told.append)
        await process.terminate()  # which the loop could not end were it blocked
        await process.kill()  # the second is the first, and is over
        hook.remove()
        return told

    with victims.stuck_writer() as victim:
        (event,) = asyncio.run(kill(victim.pid))
        assert not event["released"]
        assert not victim.exited()
        victim.unstick()  # or the thread of the release would not end
        victim.wait_exit()


@needs_dask
@pytest.mark.long
def test_a_second_plugin_takes_the_place_of_the_first() -> None:
    found, _ = scene("replaced")
    assert found["descriptors"] == 1
    assert [event["released"] for event in found["events"]] == [True]


@needs_dask
@pytest.mark.parametrize("options", [{"timeout": -1}, {"settle": "1"}])
def test_a_bad_option_is_refused_where_the_plugin_is_made(options: Any) -> None:
    from mrelease.integrations.dask import ReleasePlugin

    with pytest.raises((TypeError, ValueError), match=r"timeout|settle"):
        ReleasePlugin(**options)


def test_without_dask_the_error_names_the_extra() -> None:
    result = run_python(
        "import sys; sys.modules['distributed'] = None\n"
        "import mrelease.integrations.dask"
    )
    assert "ImportError: " in result.stderr
    assert "pip install 'mrelease[dask]'" in result.stderr.splitlines()[-1]


def test_nothing_is_loaded_that_nobody_has_asked_for() -> None:
    result = run_python(
        "import sys, mrelease.integrations\n"
        "assert not {'distributed', 'tornado', 'asyncio'} & sys.modules.keys()"
    )
    assert (result.returncode, result.stderr) == (0, "")
