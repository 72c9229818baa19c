"""What /proc says of a process: read as bytes, because a process names itself.

No kill may fail because /proc cannot be read, be it for want of a descriptor: what is
said of threads and memory then is that none was seen.
"""

from __future__ import annotations

import os

# /proc/PID/stat, field 9 (proc_pid_stat(5)); the values are in the kernel's
# include/linux/sched.h and have never changed.
_PF_EXITING = 0x4
_PF_SIGNALED = 0x400
_SIGKILL_PENDING = 1 << 8


def read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def fields(path: str) -> dict[bytes, bytes]:
    """The ``Name: value`` lines of a file such as /proc/PID/status."""
    lines = [line.partition(b":") for line in read(path).split(b"\n")]
    return {name: value.strip() for name, _, value in lines}


def name(pid: int) -> str:
    """The name of a process, at most 15 bytes; "?" once it has been reaped."""
    try:
        comm = read(f"/proc/{pid}/comm")
    except (FileNotFoundError, ProcessLookupError):
        return "?"
    return comm.removesuffix(b"\n").decode(errors="backslashreplace")


def threads(pid: int) -> list[int]:
    """The ids of a process's threads; none once it has been reaped, or unreadable."""
    try:
        return [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
    except OSError:  # the module says why
        return []


def anonymous(pid: int) -> int | None:
    """Bytes of anonymous memory and swap; None without an address space to read."""
    # A leader that has exited before its threads shows none: ask the next one.
    for tid in threads(pid):
        try:
            status = fields(f"/proc/{pid}/task/{tid}/status")
            sizes = [status[b"RssAnon"], status[b"VmSwap"]]  # such as b"1024 kB"
            return sum(1024 * int(size.split()[0]) for size in sizes)
        except (OSError, KeyError):  # the module says why
            continue
    return None


def dying(pid: int) -> bool:
    """Whether every thread of a process has been killed or is exiting."""
    return all(_thread_dying(f"/proc/{pid}/task/{tid}") for tid in threads(pid))


def _thread_dying(task: str) -> bool:
    try:
        # The name, in parentheses, may hold anything, parentheses too.
        flags = int(read(f"{task}/stat").rpartition(b")")[2].split()[6])
        pending = int(fields(f"{task}/status")[b"SigPnd"], 16)
    except OSError:  # the module says why
        return True
    return bool(flags & (_PF_EXITING | _PF_SIGNALED) or pending & _SIGKILL_PENDING)
