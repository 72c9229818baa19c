"""Gunicorn: workers that are killed, for their timeout or at a stop, are released.

gunicorn -c gunicorn_conf.py app:app

A worker that hangs gets SIGABRT after ``timeout`` seconds, and SIGKILL a second later.
Gunicorn has no hook for that; its hook ``when_ready`` has the master, whose own
``kill_worker`` is put behind one that releases. No class is changed.
"""

from __future__ import annotations

from signal import SIGKILL
from typing import Any

from mrelease import kill

timeout = 30


def when_ready(server: Any) -> None:
    gunicorns = server.kill_worker

    def kill_worker(pid: int, sig: int) -> None:
        if sig == SIGKILL:
            try:
                # Only the master's main thread reaps, and that is here: the pid is its.
                server.log.info("worker: %s", kill(pid))
            except OSError as error:
                server.log.warning("worker %s: %s", pid, error)
        gunicorns(pid, sig)  # the count of the killed, and whatever else it does

    server.kill_worker = kill_worker
