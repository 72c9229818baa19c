"""JupyterHub: a user's server that does not stop in time is killed and released.

In jupyterhub_config.py:

    from jupyterhub_spawner import ReleasingSpawner
    c.JupyterHub.spawner_class = ReleasingSpawner

stop() of a Spawner is what JupyterHub asks its authors to write. This one goes the way
of LocalProcessSpawner: SIGINT, SIGTERM, SIGKILL, each after its own time.
"""

from __future__ import annotations

from signal import SIGINT

from jupyterhub.spawner import LocalProcessSpawner

from mrelease import Pidfd, aio


class ReleasingSpawner(LocalProcessSpawner):
    async def stop(self, now: bool = False) -> None:
        if await self.poll() is not None:
            return
        try:
            # After a restart of the hub there is only the pid, looked at just now.
            pidfd = Pidfd.open(self.proc or self.pid)
        except ProcessLookupError:
            return  # it has gone by itself
        with pidfd:
            if not now:
                pidfd.send_signal(SIGINT)
                await aio.wait(pidfd, self.interrupt_timeout)
            result = await aio.terminate(
                pidfd, grace=self.term_timeout, timeout=self.kill_timeout, wait=True
            )
        self.log.info("server: %s", result)
        if await self.poll() is None:
            self.log.warning("process %i is still there", self.pid)
