"""Debian's earlyoom, driven to kill one victim: `measure()`.

It would kill whoever is largest on the machine. So it runs in a pid namespace where
there is nobody but the victim, and is told that memory is short once a hundredth of it
is used, as another process makes sure. It says what it is about to do right before it
does it: that is the decision.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from . import lab

NAME = "earlyoom"

# The victim would not outlive the pipe that it reads from, nor anybody the namespace.
_INSIDE = """
{ echo; exec sleep 1000; } | "$1" "$2" 1 small &
echo 1000 > /proc/$!/oom_score_adj
read told
exec earlyoom -m 99,99 -s 99,99 -r 0 2>&1
"""


def lack() -> str | None:
    """What is missing for it."""
    for command in ("earlyoom", "unshare"):
        if not shutil.which(command):
            return command
    return None if os.geteuid() == 0 else f"{NAME}: root, for a pid namespace"


def version() -> str:
    return subprocess.run(
        ["earlyoom", "-v"], check=True, text=True, stderr=subprocess.PIPE
    ).stderr.strip()


def measure(
    memory: lab.Memory,
    mib: int,
    prepare: Callable[[int], object] = lambda pid: None,
    limit: float = lab.LIMIT,
) -> lab.Seen:
    """A victim that earlyoom kills, after it has been prepared by its pid."""
    total = int(Path("/proc/meminfo").read_text().split()[1]) >> 10
    before = memory.held()
    with lab.victim(total * 2 // 100), _namespace(memory, mib) as process:
        [pid] = _find(process.pid, "victim")
        prepare(pid)

        def kill() -> float:
            process.tell()
            while "sending SIGKILL" not in (line := process.line()):
                pass
            start = monotonic()
            if '"victim"' not in line:
                raise RuntimeError(f"{NAME} killed another one: {line}")
            return start

        return lab.watch(memory, before, [pid], kill, limit)


@contextmanager
def _namespace(memory: lab.Memory, mib: int) -> Iterator[lab.Process]:
    join = [f"echo 0 > '{cgroup}/cgroup.procs'" for cgroup in memory.join]
    unshare = ["unshare", "-pf", "--kill-child", "--mount-proc", "sh", "-ec"]
    script = "\n".join([*join, _INSIDE])
    with lab.process(*unshare, script, "sh", lab.peer("victim"), mib) as process:
        yield process


def _find(pid: int, name: str) -> list[int]:
    """The descendants of this name."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if Path(f"/proc/{child}/comm").read_text().strip() == name:
            found.append(int(child))
        found += _find(int(child), name)
    return found
