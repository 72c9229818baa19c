"""Kill the workers of a concurrent.futures.ProcessPoolExecutor.

python examples/kill_futures.py
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from mrelease import kill_all


def main() -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context) as executor:
        # One that has ended shows that the workers are there.
        futures = [executor.submit(time.sleep, seconds) for seconds in (0, 1000, 1000)]
        futures[0].result()
        # All children that multiprocessing has started; who has others of that kind
        # leaves them out. Since Python 3.14 the executor has a kill_workers(), too.
        workers = multiprocessing.active_children()
        kill_all(workers, timeout=None)
        for future in futures[1:]:
            try:
                future.result()
            except BrokenProcessPool:
                print("broken pool")
    # With the first of them dead, the executor sends SIGTERM to those that are left.
    print("killed", -9 in [worker.exitcode for worker in workers])


if __name__ == "__main__":
    main()
