"""kill(), terminate() and the wait for an exit, awaited: for asyncio and its like.

The event loop is never blocked: releases run in two threads that all loops share, and
however many kills are awaited at once, it takes no thread for each.
"""

from __future__ import annotations

import os
from asyncio import get_running_loop, wrap_future
from asyncio import wait as wait_for
from threading import Lock

from ._kill import SIGTERM, KillResult, Options, Sequence, check_asking
from ._pidfd import INFINITY, Pidfd, seconds
from ._reaper import Pool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from ._types import KillOptions, Target

__all__ = ["kill", "terminate", "wait"]

_WORKERS = 2

_pools: list[Pool] = []
_lock = Lock()


async def kill(target: Target, **options: Unpack[KillOptions]) -> KillResult:
    """Kill a process and free its memory: mrelease.kill(), awaited.

    It returns after timeout seconds at the latest, even if the release is blocked.
    Cancelling it stops the waiting, not the kill. Raises as mrelease.kill(). Linux 5.15
    for the release. Thread-safe, as is all here: any number of loops may use it.
    """
    return await _run(target, Options(**options), Sequence.check)


async def terminate(
    target: Target,
    *,
    grace: float = 10.0,
    signal: int = SIGTERM,
    **options: Unpack[KillOptions],
) -> KillResult:
    """Ask a process to end, and kill() it if it has not within grace seconds.

    mrelease.terminate(), awaited. Cancelling it stops the waiting, not the kill: that
    comes after grace seconds, if the interpreter runs as long. Raises as
    mrelease.terminate(). Thread-safe.
    """
    grace = check_asking(grace, signal)

    def ask(sequence: Sequence) -> None:
        sequence.check()
        sequence.ask(signal, grace)

    return await _run(target, Options(**options), ask)


async def wait(target: Target, timeout: float | None = None) -> bool:
    """Wait for a process's exit, at most timeout seconds; say whether it has come.

    Pidfd.wait(), awaited: it never reaps. timeout None: no limit. Raises as
    Pidfd.open(). Linux 5.3. Thread-safe.
    """
    limit = seconds("timeout", timeout, optional=True)
    loop = get_running_loop()
    exited = loop.create_future()

    def note() -> None:
        if not exited.done():
            exited.set_result(None)

    with Pidfd.open(target) as pidfd:
        loop.add_reader(pidfd.fileno(), note)
        try:
            await wait_for([exited], timeout=None if limit == INFINITY else limit)
        finally:
            loop.remove_reader(pidfd.fileno())
        return pidfd.exited


async def _run(
    target: Target, options: Options, begin: Callable[[Sequence], None]
) -> KillResult:
    pidfd = Pidfd.open(target)
    try:
        sequence = Sequence(pidfd, options)
        begin(sequence)
        future = _pool().start(sequence)
    except BaseException:
        pidfd.close()
        raise
    return await wrap_future(future)


def _pool() -> Pool:
    with _lock:
        # After a fork the parent's threads are not here.
        if not _pools or _pools[-1].pid != os.getpid():
            _pools[:] = [Pool(_WORKERS)]
        return _pools[-1]
