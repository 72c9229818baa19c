"""A real Dask cluster whose workers have to die; test_integrations_dask.py runs it.

    python dask_cluster.py NAME

It prints one line of JSON. Apart, because multiprocessing leaves a helper process with
whoever has started others.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, Nanny

from mrelease.integrations.dask import TOPIC, ReleasePlugin

MIB = 2**20
LIMIT = 384  # MiB of a worker, of which it needs a third
HOG = 384  # MiB that one task takes
TIMEOUT = 40  # seconds for what takes one or two


def hog(first: str) -> str:
    """Swallow memory until killed; when it is run again, by a new worker, answer."""
    try:
        with open(first, "x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return "done"
    area = mmap.mmap(-1, HOG * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[:: mmap.PAGESIZE] = b"x" * (len(area) // mmap.PAGESIZE)
    time.sleep(TIMEOUT)
    return "never killed"


def stop() -> None:
    """Stop this worker, so that it cannot obey when it is told to close."""
    os.kill(os.getpid(), signal.SIGSTOP)


def square(number: int) -> int:
    return number * number


@contextmanager
def cluster(*plugins: ReleasePlugin) -> Iterator[tuple[Any, Any, Nanny]]:
    with (
        dask.config.set({"distributed.worker.memory.spill": False}),
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=True,
            memory_limit=LIMIT * MIB,
            dashboard_address=None,
        ) as local,
        Client(local, timeout=TIMEOUT) as client,
    ):
        for plugin in plugins:
            client.register_plugin(plugin)
        yield local, client, local.workers[0]


def new_pid(local: Any, client: Any, nanny: Nanny, old: int) -> int:
    """Wait until a nanny has another worker."""
    end = time.monotonic() + TIMEOUT
    while nanny.pid in (None, old) or not client.scheduler_info()["workers"]:
        if time.monotonic() > end:
            raise TimeoutError("no new worker")
        time.sleep(0.05)
    return int(nanny.pid)


def events(client: Any) -> list[dict[str, object]]:
    return [event for _, event in client.get_events(TOPIC)]


def over_the_limit() -> dict[str, object]:
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster(ReleasePlugin(timeout=None)) as (local, client, nanny),
    ):
        first = Path(folder, "first")
        squares = client.map(square, range(20))
        answer = client.submit(hog, str(first)).result(TIMEOUT)
        return {
            "answer": answer,
            "sum": sum(client.gather(squares)),
            "victim": int(first.read_text()),
            "after": new_pid(local, client, nanny, int(first.read_text())),
            "events": events(client),
        }


def restarted() -> dict[str, object]:
    """Closed by force three times: what follows a restart is hooked again."""
    victims: list[int] = []
    with cluster(ReleasePlugin(timeout=None)) as (local, client, nanny):
        for _ in range(3):
            pid = new_pid(local, client, nanny, victims[-1] if victims else 0)
            victims.append(pid)
            client.submit(stop, pure=False)
            wait_stopped(pid)
            local.sync(nanny.kill, timeout=0.2)
        new_pid(local, client, nanny, victims[-1])
        answer = client.submit(square, 7).result(TIMEOUT)
        return {"victims": victims, "events": events(client), "answer": answer}


def closed() -> dict[str, object]:
    """Closed with the nanny: Dask tears a plugin down before it kills the worker."""
    with cluster(ReleasePlugin(timeout=None)) as (local, client, nanny):
        pid = int(nanny.pid)
        client.submit(stop)
        wait_stopped(pid)
        local.sync(nanny.close, timeout=0.2)
        return {"victim": pid, "descriptors": pidfds()}


def unregistered() -> dict[str, object]:
    """Without the plugin Dask kills as before."""
    with cluster(ReleasePlugin()) as (local, client, nanny):
        process: Any = nanny.process.process  # type: ignore[union-attr, unused-ignore]
        hooked = "kill" in vars(process)
        client.unregister_worker_plugin(TOPIC, nanny=True)
        left = [name for name in ("kill", "terminate") if name in vars(process)]
        pid = int(nanny.pid)
        client.submit(stop)
        wait_stopped(pid)
        local.sync(nanny.kill, timeout=0.2)
        new_pid(local, client, nanny, pid)
        return {
            "hooked": hooked,
            "left": left,
            "events": events(client),
            "descriptors": pidfds(),
        }


def replaced() -> dict[str, object]:
    """Registered twice: each worker has one hook and one pidfd."""
    plugins = ReleasePlugin(), ReleasePlugin(timeout=None)
    with cluster(*plugins) as (local, client, nanny):
        pid = int(nanny.pid)
        descriptors = pidfds()
        client.submit(stop)
        wait_stopped(pid)
        local.sync(nanny.kill, timeout=0.2)
        new_pid(local, client, nanny, pid)
        return {"descriptors": descriptors, "events": events(client)}


def wait_stopped(pid: int) -> None:
    end = time.monotonic() + TIMEOUT
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        if time.monotonic() > end:
            raise TimeoutError("not stopped")
        time.sleep(0.01)


def pidfds() -> int:
    """How many pidfds are open in this process."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += "pidfd" in os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the one that listed them
    return count


SCENES = {
    scene.__name__: scene
    for scene in (over_the_limit, restarted, closed, unregistered, replaced)
}

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    print(json.dumps(SCENES[sys.argv[1]]()))
