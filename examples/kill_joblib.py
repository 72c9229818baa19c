"""Kill the workers of joblib, whose processes are loky's.

python examples/kill_joblib.py
"""

from __future__ import annotations

import multiprocessing
import time
from threading import Thread

from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from mrelease import kill_all


def main() -> None:
    # joblib keeps its workers for the next call: after this one they are there.
    Parallel(n_jobs=2)(delayed(time.sleep)(0) for _ in range(2))
    workers = multiprocessing.active_children()
    killer = Thread(target=kill_all, args=(workers,), kwargs={"timeout": None})
    try:
        killer.start()
        Parallel(n_jobs=2)(delayed(time.sleep)(1000) for _ in range(2))
    except TerminatedWorkerError:
        print("terminated workers")
    killer.join()
    # The next call has new workers.
    print("answers", Parallel(n_jobs=2)(delayed(abs)(-n) for n in range(2)))
    get_reusable_executor().shutdown()
    print("exit codes", {worker.exitcode for worker in workers})


if __name__ == "__main__":
    main()
