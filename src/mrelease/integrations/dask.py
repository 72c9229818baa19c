"""Dask: a worker over its memory limit, or closed by force, is killed and released.

    client.register_plugin(ReleasePlugin())

Needs distributed: the extra mrelease[dask].
"""

# Whoever checks the types may not have Dask.
# pyright: reportMissingImports=false, reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUntypedBaseClass=false

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Protocol

from .. import aio
from .._kill import Options
from .._pidfd import Pidfd

try:
    from distributed import NannyPlugin, Status
    from tornado.ioloop import PeriodicCallback
except ImportError as _error:
    raise ImportError(
        "mrelease.integrations.dask needs distributed: pip install 'mrelease[dask]'"
    ) from _error

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._types import KillOptions

__all__ = ["TOPIC", "ReleasePlugin"]

TOPIC = "mrelease"  # of the events, and the name of the plugin

_LOOK_PAUSE = 50  # milliseconds; a new worker takes longer than that to start

_logger = logging.getLogger(__name__)
_watches: dict[Any, _Watch] = {}  # by nanny, until it is let go of


class _Process(Protocol):
    """What is used of distributed's AsyncProcess."""

    kill: Callable[[], asyncio.Future[None]]
    terminate: Callable[[], asyncio.Future[None]]

    @property
    def pid(self) -> int | None: ...
    def is_alive(self) -> bool: ...


class ReleasePlugin(NannyPlugin):  # type: ignore[misc, unused-ignore]
    """A NannyPlugin by which a nanny kills its worker with mrelease.kill().

    That is a worker over the terminate fraction of its memory limit, and one that does
    not close in time, when the nanny closes or restarts it. The first is not asked
    first: Dask would send it SIGTERM, which runs no clean-up of a worker either. How
    and when a worker is to die stays Dask's to decide, as does all that comes after.

    timeout, settle: those of mrelease.kill(). The nanny waits for the memory, at most
        timeout seconds, before it waits for the exit.

    A worker's pidfd is opened at its start, and so means the worker and nobody else.
    The nanny's event loop is never blocked. Each result is logged, and while the nanny
    is running it is an event: ``client.get_events("mrelease")``.

    Dask has a hook for the start of a nanny, none for the kill of its worker. So the
    plugin looks every 50 ms for a new worker process (``nanny.process.process``), and
    puts its own kill() and terminate() over those of this one object; no class is
    changed. A worker that is killed before, or cannot be killed by mrelease, is killed
    by Dask's own. ``client.unregister_worker_plugin("mrelease", nanny=True)`` leaves
    all as it was.

    Raises TypeError and ValueError as mrelease.kill() for timeout and settle. Linux
    5.15 for the release, 5.3 for the kill; on older ones it is Dask's. Not thread-safe:
    Dask calls it in the nanny's loop.
    """

    name = TOPIC

    def __init__(self, *, timeout: float | None = 5.0, settle: float = 0.0) -> None:
        # The bytes that came back are part of the event.
        self.options: KillOptions = {
            "timeout": timeout,
            "settle": settle,
            "measure": True,
        }
        Options(**self.options)  # raises for what kill() would refuse

    def setup(self, nanny: Any) -> None:
        """Watch over a nanny's workers; called by Dask, in the nanny's loop."""
        # Dask does not tear down a plugin that another one of its name replaces.
        _stop_watching(nanny)
        watch = _watches[nanny] = _Watch(nanny, self.options)
        periodic = PeriodicCallback(watch.look, _LOOK_PAUSE)
        nanny.periodic_callbacks[TOPIC] = periodic
        periodic.start()  # the nanny starts its others only when it has a worker
        watch.look()

    def teardown(self, nanny: Any) -> None:
        """Let go of a nanny. One that closes keeps the hook: it kills after this."""
        _stop_watching(nanny)


class _Watch:
    """One nanny, and the hook of the worker that it has now."""

    def __init__(self, nanny: Any, options: KillOptions) -> None:
        # The nanny owns this, by way of its periodic callback.
        self._nanny = nanny
        self._options = options
        self._process: _Process | None = None
        self._hook: _Hook | None = None

    def look(self) -> None:
        """Hook the nanny's worker process, if that is a new one."""
        worker = self._nanny.process
        process: _Process | None = worker and worker.process
        if process is None or process.pid is None or process is self._process:
            return
        self._process = process
        try:
            self._hook = _Hook(process, self._options, self._tell)
        except OSError as error:  # it has gone, or no descriptor is left
            _logger.warning("worker %s is left to Dask: %s", process.pid, error)

    def stop(self) -> None:
        if self._hook and self._nanny.status not in (Status.closing, Status.closed):
            self._hook.remove()

    def _tell(self, event: dict[str, object]) -> None:
        if self._nanny.status == Status.running:  # else nobody might take it any more
            self._nanny.log_event(TOPIC, event)


def _stop_watching(nanny: Any) -> None:
    if nanny in _watches:
        nanny.periodic_callbacks.pop(TOPIC).stop()
        _watches.pop(nanny).stop()


class _Hook:
    """One worker process, whose kill() and terminate() are this one's until its exit.

    All of it runs in the nanny's loop.
    """

    def __init__(
        self,
        process: _Process,
        options: KillOptions,
        tell: Callable[[dict[str, object]], None],
    ) -> None:
        self._process = process
        self._options = options
        self._tell = tell
        self._task: asyncio.Task[None] | None = None
        self._removed = False
        self._loop = asyncio.get_running_loop()
        # As long as Dask has not reaped it the pid is its own.
        self._pidfd = Pidfd.open(process, verify=lambda pid: process.is_alive())
        self._loop.add_reader(self._pidfd.fileno(), self.remove)
        self._dasks_kill = process.kill
        process.kill = process.terminate = self._kill

    def remove(self) -> None:
        """Give the process its own methods back: it has exited, or is let go of."""
        if not self._removed:
            self._removed = True
            del self._process.kill, self._process.terminate
            self._loop.remove_reader(self._pidfd.fileno())
            self._pidfd.close()

    def _kill(self) -> asyncio.Future[None]:
        """Kill and release, once; a future of when the memory is back."""
        if self._task is None:
            try:
                # Of its own, as the exit closes the other one.
                pidfd = Pidfd.open(self._pidfd)
            except OSError as error:
                return self._leave_to_dask(error)
            self._task = self._loop.create_task(self._release(pidfd))
        # Whoever gives up waiting, as Dask's timeouts do, does not give up the kill.
        return asyncio.shield(self._task)

    async def _release(self, pidfd: Pidfd) -> None:
        try:
            with pidfd:
                result = await aio.kill(pidfd, **self._options)
        except ProcessLookupError:
            return  # it went by itself
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread to be had
            await self._leave_to_dask(error)
            return
        _logger.info("worker: %s", result)
        self._tell(result.as_dict())

    def _leave_to_dask(self, error: Exception) -> asyncio.Future[None]:
        _logger.warning("worker %s is left to Dask: %s", self._pidfd.pid, error)
        return self._dasks_kill()
