"""Supervisor: an event listener that kills, and releases, who does not stop in time.

    [eventlistener:mrelease]
    command=python /path/to/supervisor_listener.py 9
    events=PROCESS_STATE_RUNNING,PROCESS_STATE_STOPPING

A pidfd is opened when a program has started. When it is to stop, supervisord sends its
stopsignal; after so many seconds, less than its stopwaitsecs, the listener kills it.
supervisord, whose own SIGKILL is then not needed, sees it end.
"""

from __future__ import annotations

import os
import sys
from threading import Thread

from supervisor import childutils

from mrelease import Pidfd


def ours(pid: int) -> bool:
    """Whether it is supervisord's child, as this is."""
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1]) == os.getppid()


def end(pidfd: Pidfd, grace: float) -> None:
    with pidfd:
        if not pidfd.wait(grace):
            print(pidfd.kill(), file=sys.stderr, flush=True)


def main() -> None:
    grace = float(sys.argv[1])
    running: dict[str, Pidfd] = {}
    while True:
        headers, payload = childutils.listener.wait()
        event = childutils.get_headers(payload)
        name = f"{event['groupname']}:{event['processname']}"
        try:
            if headers["eventname"] == "PROCESS_STATE_RUNNING":
                if name in running:  # it had ended by itself
                    running.pop(name).close()
                running[name] = Pidfd.open(int(event["pid"]), verify=ours)
            elif name in running:
                # A thread, as supervisord waits for the answer.
                Thread(target=end, args=(running.pop(name), grace), daemon=True).start()
        except OSError as error:  # it has gone: nothing is left to release
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        childutils.listener.ok()


if __name__ == "__main__":
    main()
