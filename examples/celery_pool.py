"""Celery: a task over its hard time limit, or revoked by SIGKILL, is released.

CELERY_CUSTOM_WORKER_POOL=celery_pool:ReleasingPool celery -A app worker --pool custom

A pool of one's own is Celery's documented extension; this is the prefork pool, whose
processes billiard keeps, with the two methods of billiard's that kill put behind two
that release. billiard's own then find nobody left to kill, and do the rest.
"""

from __future__ import annotations

import logging
from signal import SIGKILL
from typing import Any

from billiard.pool import Pool, TimeoutHandler
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.prefork import TaskPool

from mrelease import kill

logger = logging.getLogger(__name__)


def release(process: Any) -> None:
    if process is not None:
        try:
            # Short: the worker's loop waits. The kill stands whatever the outcome.
            logger.warning("worker: %s", kill(process, timeout=0.2))
        except OSError as error:
            logger.warning("worker %s is left to billiard: %s", process.pid, error)


class Timeouts(TimeoutHandler):
    def _trywaitkill(self, worker: Any) -> None:
        release(worker)
        super()._trywaitkill(worker)


class Releasing:
    TimeoutHandler = Timeouts
    _process_by_pid: Any

    def terminate_job(self, pid: int, sig: int | None = None) -> None:
        if sig == SIGKILL:  # revoke(..., terminate=True, signal="SIGKILL")
            release(self._process_by_pid(pid)[0])
        super().terminate_job(pid, sig)  # type: ignore[misc]


class EventPool(Releasing, AsynPool):
    """For brokers that Celery talks to in an event loop, such as RabbitMQ and Redis."""


class ThreadPool(Releasing, Pool):
    """For the others."""


class ReleasingPool(TaskPool):
    Pool = EventPool
    BlockingPool = ThreadPool
