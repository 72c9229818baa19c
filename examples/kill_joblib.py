"""Kill the workers of joblib, whose processes are loky's.

python examples/kill_joblib.py
"""

from __future__ import annotations

import multiprocessing
import time

from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from mrelease import kill_all


def main() -> None:
    # One that has ended shows that the workers are there.
    results = Parallel(n_jobs=2, batch_size=1, return_as="generator_unordered")(
        delayed(time.sleep)(seconds) for seconds in (0, 1000, 1000)
    )
    next(results)
    workers = multiprocessing.active_children()
    kill_all(workers, timeout=None)
    try:
        next(results)
    except TerminatedWorkerError:
        print("terminated workers")
    # The next call has new workers.
    print("answers", Parallel(n_jobs=2)(delayed(abs)(-n) for n in range(2)))
    get_reusable_executor().shutdown()
    print("exit codes", {worker.exitcode for worker in workers})


if __name__ == "__main__":
    main()
