#!/usr/bin/env python3
"""Kill the largest process when memory runs short, before the kernel has to.

What oomd and Android's lmkd do, with process_mrelease(2): wait until the kernel reports
that processes stall for want of memory (PSI), or until little is left; kill one; judge
again when its memory is back, so that no other dies for the same shortage. A line of
JSON tells of each kill. SIGTERM ends it. Linux 5.15; root, or the victims' user.
"""

import argparse
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import EINVAL
from pathlib import Path
from select import POLLPRI, poll
from typing import IO, NamedTuple

from mrelease import Pidfd, Reaper, cgroup_pidfds, harden

LOOK = 0.1  # seconds between looks at what is left; PSI wakes us by itself
PATIENCE = 30.0  # seconds for memory to come back, until its holder is given up
REST = 1.0  # seconds after a judgement that has killed nobody
ENDS = {signal.SIGTERM, signal.SIGINT}


class Process(NamedTuple):
    pid: int
    started: int  # in clock ticks after boot: tells it from a later one with its pid
    uid: int
    name: str
    anonymous: int  # bytes of memory and swap that die with it
    oom_score_adj: int


def look(pid: int) -> Process | None:
    """What /proc says; None of kernel threads, and of what has gone or is hidden."""
    # No other files: cmdline would wait for the lock that a stuck process may hold.
    proc = Path(f"/proc/{pid}")
    try:
        status = fields(proc / "status")
        started = int((proc / "stat").read_bytes().rpartition(b")")[2].split()[19])
        anonymous = kib(status["RssAnon"]) + kib(status["VmSwap"])
        adjustment = int((proc / "oom_score_adj").read_bytes())
    except (FileNotFoundError, ProcessLookupError, PermissionError, KeyError):
        return None
    uid = int(status["Uid"].split()[0])
    return Process(pid, started, uid, status["Name"], anonymous, adjustment)


def fields(path: Path) -> dict[str, str]:
    lines = path.read_text(errors="replace").split("\n")  # a name may have the others
    return {name: rest.strip() for name, _, rest in (x.partition(":") for x in lines)}


def kib(text: str) -> int:
    return int(text.split()[0]) * 1024


def memory() -> tuple[int, int]:
    """Bytes of memory and swap: what is left, and all."""
    size = fields(Path("/proc/meminfo"))
    left = kib(size["MemAvailable"]) + kib(size["SwapFree"])
    return left, kib(size["MemTotal"]) + kib(size["SwapTotal"])


def candidates(cgroup: Path | None) -> set[int]:
    if cgroup is None:
        return {int(name) for name in os.listdir("/proc") if name.isdigit()}
    pids = set()
    for pidfd in cgroup_pidfds(cgroup):
        with pidfd:
            pids.add(pidfd.pid)
    return pids


def choose(pids: set[int], spare: Callable[[Process], bool]) -> Process | None:
    """Who holds most; oom_score_adj adds thousandths of all memory, -1000 spares."""
    _, total = memory()

    def weight(one: Process) -> float:
        return one.anonymous + one.oom_score_adj * total / 1000

    found = [one for one in map(look, pids - {1, os.getpid()}) if one and one.anonymous]
    able = [one for one in found if one.oom_score_adj > -1000 and not spare(one)]
    return max(able, key=weight, default=None)


def kill(reaper: Reaper, victim: Process) -> dict[str, object]:
    """Kill it and wait until its memory is back; what came of it, for the log."""

    def is_victim(pid: int) -> bool:
        now = look(pid)
        return now is not None and now[:3] == victim[:3]

    try:
        with Pidfd.open(victim.pid, verify=is_victim) as pidfd:
            future = reaper.kill(pidfd, timeout=PATIENCE, measure=True)
        return future.result().as_dict()
    except OSError as error:  # it has gone meanwhile, or is not ours to kill
        return {"released": False, "error": str(error)}


@contextmanager
def armed(pressure: Path, trigger: str) -> Iterator[IO[bytes]]:
    """Have the kernel tell of stalls from now on: those of before do not count."""
    with open(pressure, "r+b", buffering=0) as file:
        file.write(trigger.encode() + b"\0")
        yield file


def shortage(pressure: Path, trigger: str, least: float) -> str:
    """Wait until memory is short; say what tells of it, nothing if we are to end."""
    with ExitStack() as stack:
        poller = poll()
        with suppress(OSError):  # as was said at the start
            poller.register(stack.enter_context(armed(pressure, trigger)), POLLPRI)
        while not signal.sigtimedwait(ENDS, 0):
            if poller.poll(LOOK * 1000):
                return "pressure"
            left, total = memory()
            if left < total * least / 100:
                return "left"
    return ""


def log(event: str, details: dict[str, object]) -> None:
    line = {"time": round(time.time(), 3), "event": event, **details}
    print(json.dumps(line), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # A process names itself: --avoid is for friends, oom_score_adj for the others.
    add("--avoid", metavar="REGEX", action="append", default=[], help="spare by name")
    add("--cgroup", metavar="DIR", type=Path, help="watch and kill in this one alone")
    add("--left", metavar="PERCENT", type=float, default=10, help="of memory and swap")
    add("--trigger", default="some 200000 2000000", help="of PSI, in microseconds")
    add("--dry-run", action="store_true", help="say who would die, kill nobody")
    options = parser.parse_args()
    if not 0 <= options.left <= 100:
        parser.error(f"--left must be from 0 to 100, not {options.left}")
    try:
        options.avoid = [re.compile(text) for text in options.avoid]
    except re.error as error:
        parser.error(f"--avoid {error.pattern!r}: {error}")
    return options


def main() -> None:
    options = arguments()
    cgroup: Path | None = options.cgroup
    candidates(cgroup)
    pressure = cgroup / "memory.pressure" if cgroup else Path("/proc/pressure/memory")
    try:
        with armed(pressure, options.trigger):
            watched = str(pressure)
    except OSError as error:  # no PSI: what is left has to do
        if error.errno == EINVAL:
            trigger = repr(options.trigger)
            raise ValueError(f"the kernel does not take --trigger {trigger}") from None
        watched = str(error)
    spent: set[tuple[int, int]] = set()  # those whose memory has not come back

    def spare(one: Process) -> bool:
        given_up = (one.pid, one.started) in spent
        return given_up or any(regex.search(one.name) for regex in options.avoid)

    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # looked for between kills
    refused = {name: str(error) for name, error in harden().items() if error}
    log("start", {"pressure": watched, "refused": refused})
    with Reaper() as reaper:
        while reason := shortage(pressure, options.trigger, options.left):
            victim = choose(candidates(cgroup), spare)
            seen = {"reason": reason, "left": memory()[0]}
            seen |= victim._asdict() if victim else {}
            if victim and not options.dry_run:
                result = kill(reaper, victim)
                log("kill", seen | result)
                if not result["released"]:
                    spent.add((victim.pid, victim.started))
            else:
                log("dry run" if victim else "nobody", seen)
                time.sleep(REST)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # of the cgroup, which may be removed
        raise SystemExit(f"guard: {error}") from None
