"""Kill a multiprocessing.Process, then the workers of a multiprocessing.Pool.

python examples/kill_multiprocessing.py
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.synchronize import Semaphore

from mrelease import kill, kill_all


def begin(started: Semaphore) -> None:
    globals()["started"] = started


def work(seconds: float) -> None:
    globals()["started"].release()
    time.sleep(seconds)


def main() -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=time.sleep, args=(1000,))
    process.start()
    kill(process, timeout=None)
    process.join()
    print("exit code", process.exitcode)

    started = context.Semaphore(0)
    pool = context.Pool(2, begin, (started,))
    pool.map_async(work, [1000, 1000], chunksize=1)
    # A worker of a Pool that dies while it waits for a task, by whatever means, takes a
    # lock with it: wait until both are at work.
    for _ in range(2):
        started.acquire()
    workers = multiprocessing.active_children()
    kill_all(workers, timeout=None)
    # The Pool puts new workers in their place, which this ends; what the dead were
    # working on never gets an answer.
    pool.terminate()
    pool.join()
    print("exit codes", [worker.exitcode for worker in workers])


if __name__ == "__main__":
    main()
