"""kill(), terminate() and the wait for an exit, awaited: for asyncio and its like.

The event loop is never blocked: three threads, which all loops share, release and watch
for exits, however many kills are awaited at once.
"""

from __future__ import annotations

import os
from asyncio import wrap_future
from threading import Lock

from ._kill import SIGTERM, KillResult, Options, Sequence, check_asking
from ._locks import locked
from ._pidfd import Pidfd
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
    mrelease.terminate(). Linux 5.15 for the release. Thread-safe.
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
    options = Options(timeout, wait=True)
    return (await _run(target, options, Sequence.watch)).exited


async def _run(
    target: Target, options: Options, begin: Callable[[Sequence], None]
) -> KillResult:
    pool = locked(_lock, _pool)  # first, as it may not be to be had
    pidfd = Pidfd.open(target)
    sequence = Sequence(pidfd, options)
    try:
        begin(sequence)
    except BaseException:
        pidfd.close()
        raise
    return await wrap_future(pool.start(sequence))


def _pool() -> Pool:
    if not _pools:
        _pools.append(Pool(_WORKERS))
    return _pools[0]


def _forget() -> None:
    """In a forked child, where the threads are not."""
    global _lock
    _lock = Lock()  # that of the parent may be held, for ever
    while _pools:
        _pools.pop().close(wait=False)


os.register_at_fork(after_in_child=_forget)
