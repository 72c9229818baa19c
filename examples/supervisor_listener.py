"""Supervisor: an event listener that releases whatever supervisord kills.

    [eventlistener:mrelease]
    command=python /path/to/supervisor_listener.py
    events=PROCESS_STATE_RUNNING,PROCESS_STATE_STOPPING

A pidfd is opened when a program has started. When it is to stop, supervisord sends its
stopsignal, and SIGKILL after stopwaitsecs; the listener waits for its death, helps it
out of its memory, and sends no signal itself.
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


def release(pidfd: Pidfd) -> None:
    # Until it is killed, however long that takes; or until it has gone by itself.
    with pidfd:
        print(pidfd.release(timeout=None), file=sys.stderr, flush=True)


def main() -> None:
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
                Thread(target=release, args=(running.pop(name),), daemon=True).start()
        except OSError as error:  # it has gone: nothing is left to release
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        childutils.listener.ok()


if __name__ == "__main__":
    main()
