"""What /proc says of a process: read as bytes, because a process names itself.

No kill may fail because /proc cannot be read, be it for want of a descriptor: what is
said of threads and memory then is that none was seen. Nor may it be believed where it
is the /proc of another pid namespace, whose numbers mean other processes.
"""

from __future__ import annotations

import os
from errno import EMFILE, ENFILE

NO_DESCRIPTOR = (EMFILE, ENFILE)

# /proc/PID/stat, field 9 (proc_pid_stat(5)); the values are in the kernel's
# include/linux/sched.h and have not changed in 5.10 to 7.3.
_PF_EXITING = 0x4
_PF_SIGNALED = 0x400
_PF_KTHREAD = 0x200000
_SIGKILL_PENDING = 1 << 8

_FIRST_USER_NAMESPACE = "user:[4026531837]"  # PROC_USER_INIT_INO of the kernel


def is_ours() -> bool:
    """Whether /proc is there, and its pids are those that system calls take.

    Told by this process's own pid, which only by chance is the same in two namespaces.
    """
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:  # none is mounted, or one that does not know this process
        return False


def in_first_user_namespace() -> bool:
    """Whether the caller's capabilities are those of the machine, not of a part."""
    try:
        return os.readlink("/proc/self/ns/user") == _FIRST_USER_NAMESPACE
    except FileNotFoundError:  # a kernel without user namespaces
        return True


def capabilities() -> int:
    """The caller's effective capabilities, a bit for each: see capabilities(7)."""
    return int(fields("/proc/self/status")[b"CapEff"], 16)


def read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def fields(path: str) -> dict[bytes, bytes]:
    """The ``Name: value`` lines of a file such as /proc/PID/status."""
    lines = [line.partition(b":") for line in read(path).split(b"\n")]
    return {name: value.strip() for name, _, value in lines}


def name(pid: int) -> str:
    """The name of a process, at most 15 bytes; "?" where it cannot be read."""
    try:
        comm = read(f"/proc/{pid}/comm") if is_ours() else b"?"
    except OSError:  # the module says why
        return "?"
    return comm.removesuffix(b"\n").decode(errors="backslashreplace")


def leader(tid: int) -> int | None:
    """The pid of the process that a thread belongs to; None if there is none here."""
    try:
        return int(fields(f"/proc/{tid}/status")[b"Tgid"]) if is_ours() else None
    except (FileNotFoundError, ProcessLookupError):
        return None


def threads(pid: int) -> list[int]:
    """The ids of a process's threads; none where they cannot be read."""
    try:
        return (
            [int(tid) for tid in os.listdir(f"/proc/{pid}/task")] if is_ours() else []
        )
    except OSError:  # the module says why
        return []


def anonymous(pid: int) -> int | None:
    """Bytes of anonymous memory and swap; None without an address space to read."""
    if not is_ours():
        return None
    try:
        return _anonymous(f"/proc/{pid}/status")
    except (OSError, IndexError):  # the module says why
        pass
    # A leader that has exited before its threads shows none: ask the next one.
    for tid in threads(pid):
        try:
            return _anonymous(f"/proc/{pid}/task/{tid}/status")
        except (OSError, IndexError):
            continue
    return None


def _anonymous(path: str) -> int:
    # Not by fields(), which takes ten times as long: a group's are all read.
    status = read(path)
    parts = [status.split(name, 1)[1] for name in (b"\nRssAnon:", b"\nVmSwap:")]
    return sum(1024 * int(part.split(b" kB", 1)[0]) for part in parts)


def run_time(pid: int) -> float:
    """Seconds that a process's main thread has run; 0 where they cannot be read."""
    try:
        return int(read(f"/proc/{pid}/schedstat").split()[0]) / 1e9 if is_ours() else 0
    except (OSError, IndexError):  # gone, or a kernel that does not count
        return 0


def parent(pid: int) -> int | None:
    """The pid of a process's parent; None where it cannot be read."""
    found = _process(pid)
    return found and found[0]


def started(pid: int) -> int | None:
    """When a process started, in clock ticks after boot; None where it cannot be read.

    With the pid it tells one process from another that got its pid later.
    """
    found = _process(pid)
    return found and found[1]


def running_since(pid: int) -> int | None:
    """As started(), of a process whose main thread is not in its exit; None else."""
    stat = _stat_if_readable(pid)
    return int(stat[19]) if stat and not int(stat[6]) & _PF_EXITING else None


def stack(pid: int) -> int | None:
    """Where a process's stack begins; 0 if that may not be seen, None if unknown."""
    stat = _stat_if_readable(pid)
    return int(stat[25]) if stat else None


def processes() -> dict[int, tuple[int, int]]:
    """The parent's pid and the start time of every process that can be seen."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return {pid: found for pid in pids if (found := _process(pid))}


def stopped(pid: int, *, traced: bool = False) -> bool:
    """Whether every thread is stopped, or has ended; traced: or stopped by a tracer."""
    return all(state in (b"TtZX" if traced else b"TZX") for state in _states(pid))


def stuck(pid: int) -> bool:
    """Whether a thread is in uninterruptible sleep, state D, or frozen."""
    return b"D" in _states(pid)


def dying(pid: int) -> bool | None:
    """Whether every thread of a process is killed or exiting; None if none is seen."""
    tids = threads(pid)
    return (
        all(_thread_dying(f"/proc/{pid}/task/{tid}") for tid in tids) if tids else None
    )


def is_kernel_thread(pid: int) -> bool:
    """Whether a process is one of the kernel's; False where it cannot be read."""
    try:
        return is_ours() and bool(_flags(f"/proc/{pid}") & _PF_KTHREAD)
    except OSError:  # the module says why
        return False


def _thread_dying(task: str) -> bool:
    try:
        # In this order: a thread drops the pending signal just before it is flagged.
        pending = int(fields(f"{task}/status")[b"SigPnd"], 16)
        flags = _flags(task)
    except OSError:  # the thread has ended, or the module says why
        return True
    return bool(flags & (_PF_EXITING | _PF_SIGNALED) or pending & _SIGKILL_PENDING)


def _stat_if_readable(pid: int) -> list[bytes] | None:
    try:
        return _stat(f"/proc/{pid}") if is_ours() else None
    except OSError:  # gone, or the module says why
        return None


def _process(pid: int) -> tuple[int, int] | None:
    """A process's parent and start time."""
    try:
        if not is_ours():
            return None
        stat = _stat(f"/proc/{pid}")
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:  # not that there is no such process
            raise
        return None
    return int(stat[1]), int(stat[19])


def _states(pid: int) -> list[bytes]:
    """The letters of its threads' states; none where they cannot be read."""
    states: list[bytes] = []
    for tid in threads(pid):
        try:
            states.append(_stat(f"/proc/{pid}/task/{tid}")[0])
        except OSError:  # the thread has ended, or the module says why
            continue
    return states


def _flags(task: str) -> int:
    return int(_stat(task)[6])


def _stat(task: str) -> list[bytes]:
    """The fields of /proc/PID/stat from the third, the state, on."""
    # The name, in parentheses, may hold anything, parentheses too.
    return read(f"{task}/stat").rpartition(b")")[2].split()
