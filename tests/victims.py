"""Victims: real processes in exactly known states, to make a test's outcome certain.

A plain "kill, release, assert 0" is a race on every kernel: the victim may let go of
its memory before the release looks at it. Each context manager here yields a process
that cannot, or that already has. On exit it is killed and reaped, with all its helpers,
whatever the test did. Should the test process itself be killed, its victims end too.

Start a victim in the thread that uses it: ptrace and PR_SET_PDEATHSIG go by thread.
Kill it with Victim.kill(), os.kill() or a pidfd: Popen.kill() polls first, and so could
take a ptrace stop for the exit.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Literal, TypeVar

import cgroups

TIMEOUT = 120  # seconds for what takes milliseconds: emulated machines are slow

PTRACE_CONT = 7
PTRACE_SEIZE = 0x4206
PTRACE_O_TRACEEXIT = 0x40
PTRACE_O_EXITKILL = 0x100000
EXIT_STOP = signal.SIGTRAP | 6 << 8  # status >> 8 of a thread in PTRACE_EVENT_EXIT
WALL = 0x40000000  # __WALL: also threads, and children without SIGCHLD

FUSE_LOOKUP, FUSE_FORGET, FUSE_OPEN, FUSE_READ, FUSE_INIT = 1, 2, 14, 15, 26
FUSE_ASYNC_READ = 1
FOPEN_DIRECT_IO = 1
CAP_SYS_ADMIN = 21

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, tid: int, data: int = 0) -> None:
    if _libc.ptrace(request, tid, None, data) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace({request:#x}, {tid}): {os.strerror(error)}")


def _until(done: Callable[[], bool], what: str) -> None:
    """Wait for what can only be polled."""
    end = time.monotonic() + TIMEOUT
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {TIMEOUT} s for {what}")
        time.sleep(0.0005)


# Programs that the children run. The interpreter's own modules only, for a quick start.

_DIE_WITH_PARENT = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = (ctypes.c_int,) + (ctypes.c_ulong,) * 4
libc.prctl.restype = ctypes.c_int
libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL: ends the stopped as well
"""

# Every victim begins with this, and goes on with one of the programs further down.
_BEGIN = """
import _thread, mmap, os, sys

mib, shared_mib, threads = map(int, sys.argv[1:4])
rest = sys.argv[4:]

def touch(mib, flags):
    if not mib:
        return None
    area = mmap.mmap(-1, mib << 20, flags=flags | mmap.MAP_ANONYMOUS)
    try:
        area.madvise(mmap.MADV_NOHUGEPAGE)
    except (AttributeError, OSError):
        pass  # no huge pages to refuse
    area[::mmap.PAGESIZE] = b"x" * (len(area) // mmap.PAGESIZE)
    return area

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def wait():
    os.read(0, 1)  # ends when the test process closes its end, or dies
    os._exit(0)

memory = touch(mib, mmap.MAP_PRIVATE), touch(shared_mib, mmap.MAP_SHARED)
for _ in range(threads - 1):
    _thread.start_new_thread(wait, ())
"""

_SLEEP = """
if rest[0] != "default":
    import signal
    exit = lambda *_: os._exit(0)
    signal.signal(signal.SIGTERM, exit if rest[0] == "exit" else signal.SIG_IGN)
say("ready")
wait()
"""

# The sharer runs no Python: its entry is libc's getchar(), unbuffered, so that it reads
# the same pipe as the victim and ends with it. CLONE_PARENT makes it the test's own
# child, which can be reaped. The caller of a vfork is held until the child ends: hence
# the thread, and CLONE_PARENT_SETTID, which tells the pid at once.
_SHARER = """
CLONE_VM, CLONE_VFORK, CLONE_PARENT, PARENT_SETTID = 0x100, 0x4000, 0x8000, 0x100000
flags = CLONE_VM | CLONE_PARENT | PARENT_SETTID | 17  # SIGCHLD, ignored by CLONE_PARENT
pointer = ctypes.c_void_p
libc.setvbuf.argtypes = (pointer, pointer, ctypes.c_int, ctypes.c_size_t)
libc.setvbuf.restype = ctypes.c_int
libc.setvbuf(pointer.in_dll(libc, "stdin"), None, 2, 0)  # _IONBF
libc.clone.argtypes = (pointer, pointer, ctypes.c_int) + (pointer,) * 4
libc.clone.restype = ctypes.c_int
stack = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
top = ctypes.addressof(ctypes.c_char.from_buffer(stack)) + len(stack)
sharer = ctypes.c_int(0)

def clone(flags):
    entry, told = ctypes.cast(libc.getchar, pointer), ctypes.addressof(sharer)
    sharer.value = libc.clone(entry, top, flags, None, told, None, None)

if rest[0] == "vfork":
    _thread.start_new_thread(clone, (flags | CLONE_VFORK,))
else:
    clone(flags)
while not sharer.value:
    os.sched_yield()
if sharer.value < 0:
    raise OSError("clone failed")
say("ready", sharer.value)
wait()
"""

# The exit system call ends one thread, the other goes on. pthread_exit() would need
# libgcc_s, which a small guest has not. The call has released the GIL and stays away.
_LEADER_EXITS = """
numbers = {"x86_64": 60, "aarch64": 93, "riscv64": 93, "loongarch64": 93}
number = numbers.get(os.uname().machine, 1) if sys.maxsize > 1 << 32 else 1
libc.syscall.argtypes = (ctypes.c_long,) * 2
libc.syscall.restype = ctypes.c_long
say("ready")
libc.syscall(number, 0)
"""

# A mount that is attached nowhere: nobody else sees it or trips over it, and it ends
# with the victim. These system calls have other numbers on Alpha and MIPS only.
_MOUNT = """
fuse = int(rest[0])
libc.syscall.argtypes = (ctypes.c_long,) * 3 + (ctypes.c_char_p,) * 2 + (ctypes.c_long,)
libc.syscall.restype = ctypes.c_long

def call(number, first, second, key=None, value=None):
    result = libc.syscall(number, first, second, key, value, 0)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

name = ctypes.create_string_buffer(b"fuse")
context = call(430, ctypes.addressof(name), 0)  # fsopen
ids = {"user_id": os.geteuid(), "group_id": os.getegid()}
for key, value in {"fd": fuse, "rootmode": 40000, **ids}.items():
    call(431, context, 1, key.encode(), str(value).encode())  # fsconfig, SET_STRING
call(431, context, 6)  # CMD_CREATE
root = call(432, context, 0)  # fsmount
os.close(fuse)  # the test process has the only one now
say("ready")
"""

_STAT = """
try:
    os.stat("file", dir_fd=root)
except OSError:
    pass  # unstuck
wait()
"""

# mmap() of a FUSE file opened for direct I/O first drops the inode's cached pages, with
# the mmap lock held for writing. Here it waits for a page that is being read, for ever.
_MMAP = """
cached = os.open("file", os.O_RDONLY, dir_fd=root)
direct = os.open("file", os.O_RDONLY, dir_fd=root)
os.posix_fadvise(cached, 0, mmap.PAGESIZE, os.POSIX_FADV_WILLNEED)
try:
    mapped = mmap.mmap(direct, mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ)
except OSError:
    pass  # unstuck
wait()
"""

_SPIN = """
import os, sys
parent = int(sys.argv[1])
os.write(1, b"ready\\n")
while os.getppid() == parent:
    pass
"""

# Thaws when the test process is killed: nothing else can end a frozen victim.
_FREEZER_GUARD = """
import os, sys, time
os.write(1, b"ready\\n")
os.read(0, 1)
with open(sys.argv[1] + "/freezer.state", "w") as state:
    state.write("THAWED")
for _ in range(1000):
    try:
        os.rmdir(sys.argv[1])
        break
    except OSError:
        time.sleep(0.01)  # the victim is still on its way out
"""

# Keeps a family: a process, made by the program given, and all that descend from it.
# Whoever loses its parent becomes this one's child, and so can always be found. Nobody
# dies with a parent, which would hide that a kill missed it: all end when the test
# process closes its end of the pipe, or dies.
_GUARD = """
import ctypes, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def wait():
    os.read(0, 1)
    os._exit(0)

def child(function, *args):
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
        finally:
            os._exit(1)
    return pid

def fork_pause():
    # Seconds for a thousand of a bomb to sleep where a fork fails, which costs as much
    # as one that does not: else they leave whoever kills them none of the CPUs.
    begin = time.monotonic()
    os.waitpid(child(lambda: os._exit(0)), 0)
    return max(1, 1000 * (time.monotonic() - begin))

def root():
    for cgroup in sys.argv[2:]:
        with open(cgroup + "/cgroup.procs", "w") as procs:
            procs.write("0")
    say("root", os.getpid())
    exec(sys.argv[1], globals())

child(root)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps for us
os.read(0, 1)

def parent(pid):
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return int(stat.read().rpartition(b")")[2].split()[1])

while True:
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if parent(pid) == os.getpid():
                os.kill(pid, signal.SIGKILL)
        except OSError:
            pass  # another's, and gone
    try:
        os.waitpid(-1, 0x40000000 | os.WNOHANG)  # __WALL
    except ChildProcessError:
        break
    time.sleep(0.001)
"""

# Forks a number of times and pauses, as do its children. In machine code, because a
# process of an interpreter's is fifty times as big and as slow to make.
_CROWD = {
    "x86_64": """
        bb{number}      # mov number, %ebx
        b839000000 0f05 # fork: mov 57, %eax; syscall
        85c0 7417       # test %eax, %eax; jz pause
        ffcb 75f1       # dec %ebx; jnz fork
        6a01 58 89c7    # push 1; pop %rax; mov %eax, %edi
        488d3510000000  # lea text(%rip), %rsi
        ba06000000 0f05 # mov 6, %edx; syscall: write(1, text, 6)
        b822000000 0f05 # pause: mov 34, %eax; syscall
        ebf7            # jmp pause
    """,
}

_JOIN_CROWD = """
binary = bytes.fromhex(BINARY)
if binary:
    file = os.memfd_create("crowd", 0)
    os.write(file, binary)
    readable = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    os.close(file)  # what can be written cannot be executed
    os.execve(readable, ["crowd"], {})
for _ in range(NUMBER):
    child(signal.pause)
say("ready")
signal.pause()
"""


class Child:
    """A process that we started, and reap ourselves: its pid is surely its own."""

    def __init__(
        self, program: str, *args: object, pass_fds: tuple[int, ...] = ()
    ) -> None:
        # What is preloaded for the tests (a sanitizer) has no business in a victim.
        env = {
            name: value for name, value in os.environ.items() if name != "LD_PRELOAD"
        }
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program, *map(str, args)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            pass_fds=pass_fds,
        )
        self.pid = self.process.pid

    def _pipes(self) -> list[IO[bytes]]:
        process = self.process
        return [
            pipe for pipe in (process.stdin, process.stdout, process.stderr) if pipe
        ]

    def wait_ready(self) -> list[str]:
        """Wait for the line "ready"; return the words after it."""
        word, *words = self.words()
        if word != "ready":
            raise RuntimeError(f"child said {word}")
        return words

    def words(self) -> list[str]:
        """Wait for a line; return its words."""
        stdin, stdout, stderr = self._pipes()
        poll = select.poll()
        poll.register(stdout, select.POLLIN)
        if not poll.poll(TIMEOUT * 1000):
            raise TimeoutError(f"waited {TIMEOUT} s for {self.pid} to be ready")
        words = stdout.readline().decode().split()
        if not words:
            stdin.close()  # ends whoever else could hold the other end of stderr
            raise RuntimeError(f"child did not start: {stderr.read().decode()}")
        return words

    def exited(self) -> bool:
        """Whether it has exited; it is left unreaped. ChildProcessError once reaped."""
        flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
        report = os.waitid(os.P_PID, self.pid, flags)
        # A traced child's stops are reported too, asked for or not.
        return report is not None and report.si_code != os.CLD_TRAPPED

    def wait_exit(self) -> None:
        """Wait until it is a zombie; leave it one."""
        _until(self.exited, f"{self.pid} to exit")

    def kill(self) -> None:
        """SIGKILL, unless it has been reaped and the pid may be somebody else's."""
        with suppress(ChildProcessError):
            self.exited()
            os.kill(self.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Wait for its end, and reap it, unless the test has."""
        with suppress(ChildProcessError):
            self.wait_exit()
            # Popen.poll() in a test may have taken a ptrace stop for the exit.
            self.process.returncode = None
        self.process.wait()

    def close(self) -> None:
        """Kill, reap, close the pipes. The test may have done some of it already."""
        with ExitStack() as last:
            for pipe in self._pipes():
                last.callback(pipe.close)
            self.kill()
            self.reap()


class Victim(Child):
    """A process with memory."""

    def __init__(
        self,
        program: str,
        mib: int,
        *args: object,
        shared_mib: int = 0,
        threads: int = 1,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        sizes = (mib, shared_mib, threads)
        super().__init__(
            _DIE_WITH_PARENT + _BEGIN + program, *sizes, *args, pass_fds=pass_fds
        )
        # The thread whose /proc files tell of the memory: a dead leader's do not.
        self.tid = self.pid

    def _status(self, *names: str) -> int:
        """Sum of these lines of /proc/PID/task/TID/status, in bytes.

        Older kernels count late: 6.1 shows some dozen pages too few for each thread.
        """
        try:
            text = Path(f"/proc/{self.pid}/task/{self.tid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return 0  # reaped: it has no memory
        lines = dict(line.split(":", 1) for line in text.splitlines())
        return sum(int(lines[name].split()[0]) << 10 for name in names if name in lines)

    def anon(self) -> int:
        """Bytes of private anonymous memory, swap included; 0 once it has let go."""
        return self._status("RssAnon", "VmSwap")

    def shared(self) -> int:
        """Bytes of shared memory mapped; 0 once it has let go."""
        return self._status("RssShmem")

    def state(self, tid: int = 0) -> str:
        """Letter of /proc/PID/stat, or of another thread's; empty once reaped."""
        try:
            text = Path(f"/proc/{self.pid}/task/{tid or self.pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return text.rpartition(")")[2].split()[0]

    def wait_state(self, letter: str) -> None:
        _until(lambda: self.state() == letter, f"state {letter} of {self.pid}")

    def wait_asleep(self) -> None:
        """Wait until every thread sleeps."""
        _until(
            lambda: all(self.state(tid) == "S" for tid in self.threads()),
            f"every thread of {self.pid} to sleep",
        )

    def threads(self) -> list[int]:
        return [int(name) for name in os.listdir(f"/proc/{self.pid}/task")]

    def affinities(self) -> list[set[int]]:
        """The CPUs of each thread."""
        return [os.sched_getaffinity(tid) for tid in self.threads()]

    def stop(self) -> None:
        """SIGSTOP, and wait until every thread has stopped. Not for a Tracee."""
        os.kill(self.pid, signal.SIGSTOP)
        flags = os.WSTOPPED | os.WEXITED | os.WNOWAIT
        report = os.waitid(os.P_PID, self.pid, flags)
        if report is None or report.si_code != os.CLD_STOPPED:
            raise RuntimeError(f"{self.pid} did not stop: {report}")


class Tracee(Victim):
    """A victim that will stop at its exit, with its memory whole, until resume()."""

    sharer_pid = 0  # the other process with the same memory, while it lives
    _seized: frozenset[int] = frozenset()

    def seize(self, tids: Iterable[int]) -> None:
        for tid in tids:
            _ptrace(PTRACE_SEIZE, tid, PTRACE_O_TRACEEXIT | PTRACE_O_EXITKILL)
            self._seized |= {tid}

    def wait_exit_stop(self) -> None:
        """Wait until every seized thread of the killed process has stopped."""
        for tid in sorted(self._seized):
            _until(partial(self._in_exit_stop, tid), f"exit stop of thread {tid}")

    def _in_exit_stop(self, tid: int) -> bool:
        found, status = os.waitpid(tid, WALL | os.WNOHANG)
        if not found:
            return False
        if not os.WIFSTOPPED(status):
            raise RuntimeError(
                f"thread {tid} is dead without an exit stop: {status:#x}"
            )
        if status >> 8 == EXIT_STOP:
            return True
        # Stopped on its way to another signal, which it shall have.
        _ptrace(PTRACE_CONT, tid, 0 if status >> 16 else os.WSTOPSIG(status))
        return False

    def resume(self) -> None:
        """Let the killed process exit; wait until it is a zombie. reap() is apart."""
        _until(self._passed_on, f"end of the traced process {self.pid}")

    def _passed_on(self) -> bool:
        """Push every thread on by one step; true when nothing but a zombie is left."""
        for tid in self._seized:
            with suppress(ProcessLookupError):  # not stopped: still on its way, or dead
                _ptrace(PTRACE_CONT, tid)
        for tid in self._seized - {self.pid}:
            # A traced thread holds up the end of its process until it is reaped.
            with suppress(ChildProcessError):  # reaped
                os.waitpid(tid, WALL | os.WNOHANG)
        return self.exited()

    def kill_sharer(self) -> None:
        """Kill the process that shares the memory, and wait until it has gone."""
        if self.sharer_pid:
            os.kill(self.sharer_pid, signal.SIGKILL)
            os.waitpid(self.sharer_pid, WALL)
            self.sharer_pid = 0

    def close(self) -> None:
        with ExitStack() as last:
            last.callback(super().close)
            self.kill_sharer()
            self.kill()
            with suppress(ChildProcessError):  # reaped by the test
                self.resume()


class Frozen(Victim):
    """A victim in a frozen cgroup: killed, it stays as it is until thaw()."""

    cgroup: Path | None = None

    def freeze(self, cgroup: Path) -> None:
        self.cgroup = cgroup
        (cgroup / "cgroup.procs").write_text(str(self.pid))
        (cgroup / "freezer.state").write_text("FROZEN")
        state = cgroup / "freezer.state"
        _until(lambda: state.read_text().strip() == "FROZEN", f"{cgroup} to be frozen")

    def thaw(self) -> None:
        if self.cgroup:
            (self.cgroup / "freezer.state").write_text("THAWED")

    def close(self) -> None:
        with ExitStack() as last:
            last.callback(super().close)
            self.thaw()


class Stuck(Victim):
    """A victim that waits for a FUSE daemon, this process, which never answers."""

    fuse = -1

    def unstick(self) -> None:
        """Give the daemon's descriptor up: the kernel fails all its requests."""
        if self.fuse >= 0:
            os.close(self.fuse)
            self.fuse = -1

    def close(self) -> None:
        with ExitStack() as last:
            last.callback(super().close)
            self.unstick()


class Family(Child):
    """A process and its descendants; those known by a name are in `pids`."""

    def __init__(self, program: str, *joined: Path) -> None:
        super().__init__(_GUARD, program, *joined)
        self.joined = joined
        self.pids: dict[str, int] = {}

    @property
    def root(self) -> int:
        return self.pids["root"]

    def wait_for(self, *names: str) -> None:
        """Wait until each of these has said its name, and, if it is one, its pid."""
        missing = {*names, "root"} - self.pids.keys()
        while missing:
            name, pid = [*self.words(), "0"][:2]
            self.pids[name] = int(pid)
            missing.discard(name)

    def running(self) -> dict[int, str]:
        """Every descendant that is not dead, as zombies are, with its state."""
        states: dict[int, str] = {}
        children: dict[int, list[int]] = {}
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with (
                suppress(FileNotFoundError, ProcessLookupError),
                # A Path interns its parts, which a free-threaded 3.13 keeps for ever.
                open(f"/proc/{pid}/stat", errors="replace") as stat,
            ):
                text = stat.read()
                state, parent, *rest = text.rpartition(")")[2].split()
                children.setdefault(int(parent), []).append(pid)
                # A leader that has exited before its threads looks like a zombie.
                if state not in "ZX" or int(rest[15]) > 1:
                    states[pid] = state
        found, parents = {}, [self.pid]
        while parents:
            for pid in children.get(parents.pop(), []):
                parents.append(pid)
                if pid in states:
                    found[pid] = states[pid]
        return found

    def wait_states(self, letter: str, *names: str) -> None:
        def reached() -> bool:
            running = self.running()
            return all(running.get(self.pids[name]) == letter for name in names)

        _until(reached, f"state {letter} of {', '.join(names)}")

    def close(self) -> None:
        with ExitStack() as last:
            last.callback(super().close)
            for path in self.joined:
                cgroups.kill(path)
            stdin, *_ = self._pipes()
            stdin.close()
            self.wait_exit()  # the guard has killed and reaped them all


V = TypeVar("V", bound=Child)


@contextmanager
def _closing(child: V) -> Iterator[V]:
    try:
        yield child
    finally:
        child.close()


@contextmanager
def victim(
    mib: int = 8,
    *,
    threads: int = 1,
    shared_mib: int = 0,
    sigterm: Literal["default", "ignore", "exit"] = "default",
) -> Iterator[Victim]:
    """A sleeping process; `threads` in all, main thread included."""
    with _closing(
        Victim(_SLEEP, mib, sigterm, shared_mib=shared_mib, threads=threads)
    ) as child:
        child.wait_ready()
        child.wait_asleep()
        yield child


@contextmanager
def exit_stopped(
    mib: int = 8,
    *,
    threads: int = 1,
    shared_mib: int = 0,
    sharer: Literal["clone", "vfork"] | None = None,
) -> Iterator[Tracee]:
    """Alive; once killed, every thread stops at its exit, with the memory still whole.

    With `sharer` a second process shares the memory; a vfork's caller is a thread more.
    """
    program, option = (_SHARER, sharer) if sharer else (_SLEEP, "default")
    with _closing(
        Tracee(program, mib, option, shared_mib=shared_mib, threads=threads)
    ) as child:
        words = child.wait_ready()
        child.sharer_pid = int(words[0]) if words else 0
        child.seize(child.threads())
        yield child


@contextmanager
def dead_leader(mib: int = 8) -> Iterator[Tracee]:
    """The main thread has exited; another one, `tid`, lives, and stops at its exit."""
    with _closing(Tracee(_LEADER_EXITS, mib, threads=2)) as child:
        child.wait_ready()
        child.wait_state("Z")
        (child.tid,) = set(child.threads()) - {child.pid}
        child.seize([child.tid])
        yield child


@contextmanager
def zombie() -> Iterator[Victim]:
    """Exited, not reaped."""
    with victim(1) as child:
        child.kill()
        child.wait_exit()
        yield child


@contextmanager
def family(program: str, *names: str, join: Sequence[Path] = ()) -> Iterator[Family]:
    """A process that runs a program, with descendants; all of them in these cgroups.

    The program has say(), child(function) and wait(); who is named says so and its pid.
    """
    with _closing(Family(program, *join)) as found:
        found.wait_for(*names)
        yield found


@contextmanager
def family_of_a_dead_leader(*join: Path) -> Iterator[Family]:
    """One process, whose main thread has exited; another one lives."""
    program = "import _thread\n_thread.start_new_thread(wait, ())\n" + _LEADER_EXITS
    with family(program, "ready", join=join) as found:
        found.wait_states("Z", "root")
        yield found


@contextmanager
def crowd(number: int, *join: Path) -> Iterator[Family]:
    """As many small processes, all children of the first; they do nothing."""
    code = _CROWD.get(os.uname().machine, "").format(
        number=(number - 1).to_bytes(4, "little").hex()
    )
    code = re.sub("#.*", "", code)
    binary = _elf(bytes.fromhex(code) + b"ready\n").hex() if code else ""
    program = _JOIN_CROWD.replace("NUMBER", str(number - 1))
    program = program.replace("BINARY", repr(binary))
    with family(program, "ready", join=join) as found:
        yield found


def _elf(code: bytes) -> bytes:
    """A 64-bit static x86-64 executable: two headers and the code, in one page."""
    base, headers = 0x400000, 64 + 56
    size = headers + len(code)
    return (
        struct.pack("<16sHHIQ", b"\x7fELF\2\1\1", 2, 62, 1, base + headers)
        + struct.pack("<QQIHHHHHH", 64, 0, 0, 64, 56, 1, 64, 0, 0)
        + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
        + code
    )


def reaped_pid() -> int:
    """The pid of a process that has just been reaped; no other process has it yet."""
    while True:
        with victim(1) as child:
            pid = child.pid
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return pid
        except PermissionError:
            pass  # taken again, by another user's process


@contextmanager
def spinners(cpus: Iterable[int]) -> Iterator[list[Child]]:
    """A process that never sleeps for each of these CPUs; one may be given twice."""
    with ExitStack() as stack:
        children = []
        for cpu in cpus:
            child = stack.enter_context(
                _closing(Child(_DIE_WITH_PARENT + _SPIN, os.getpid()))
            )
            children.append(child)
            child.wait_ready()
            os.sched_setaffinity(child.pid, {cpu})
        yield children


@contextmanager
def starved(
    mib: int = 64, policy: Literal["idle", "nice"] = "idle"
) -> Iterator[Victim]:
    """On a CPU with a spinner, at the lowest priority; the caller is on another."""
    before = os.sched_getaffinity(0)
    theirs, ours = sorted(before)[:2]
    with victim(mib) as child, spinners([theirs]):
        os.sched_setaffinity(0, {ours})
        try:
            os.sched_setaffinity(child.pid, {theirs})
            if policy == "idle":
                os.sched_setscheduler(child.pid, os.SCHED_IDLE, os.sched_param(0))
            else:
                os.setpriority(os.PRIO_PROCESS, child.pid, 19)
            yield child
        finally:
            os.sched_setaffinity(0, before)


@contextmanager
def _freezer_cgroup() -> Iterator[Path]:
    mount = _freezer_mount()
    if mount is None:
        raise RuntimeError("no v1 freezer is mounted")
    path = Path(tempfile.mkdtemp(prefix="mrelease-test-", dir=mount))
    try:
        with _closing(Child(_FREEZER_GUARD, path)) as guard:
            guard.wait_ready()
            yield path
    finally:
        path.rmdir()


@contextmanager
def frozen(mib: int = 8) -> Iterator[Frozen]:
    """In a v1 freezer cgroup of its own, which is FROZEN. Root only."""
    with (
        _freezer_cgroup() as cgroup,
        _closing(Frozen(_SLEEP, mib, "default")) as child,
    ):
        child.wait_ready()
        child.wait_asleep()
        child.freeze(cgroup)
        yield child


def _serve(fuse: int, *script: tuple[int, bytes | None]) -> None:
    """Be a FUSE daemon: give these answers in this order, until one is None."""
    poll = select.poll()
    poll.register(fuse, select.POLLIN)
    for expected, body in script:
        opcode = 0
        while opcode != expected:
            if not poll.poll(TIMEOUT * 1000):
                raise TimeoutError(f"waited {TIMEOUT} s for FUSE request {expected}")
            request = os.read(fuse, 1 << 17)
            opcode, unique = struct.unpack_from("=4xIQ", request)
            if opcode not in (expected, FUSE_FORGET):  # some security module's question
                os.write(fuse, struct.pack("=IiQ", 16, -38, unique))  # ENOSYS
        if body is not None:
            os.write(fuse, struct.pack("=IiQ", 16 + len(body), 0, unique) + body)


def _init_answer() -> bytes:
    """struct fuse_init_out, protocol 7.31."""
    return struct.pack(
        "=IIIIHHIIHH32x", 7, 31, 1 << 17, FUSE_ASYNC_READ, 0, 0, 4096, 1, 0, 0
    )


def _entry_answer() -> bytes:
    """struct fuse_entry_out: node 2, a regular file of 1 MiB, valid for an hour."""
    entry = struct.pack("=QQQQII", 2, 0, 3600, 3600, 0, 0)
    return entry + struct.pack("=QQQ24x12xIIII12x", 2, 1 << 20, 2048, 0o100444, 1, 0, 0)


def _open_answer(flags: int) -> bytes:
    """struct fuse_open_out."""
    return struct.pack("=QII", 0, flags, 0)


@contextmanager
def _stuck(program: str, mib: int) -> Iterator[Stuck]:
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        child = Stuck(_MOUNT + program, mib, fuse, pass_fds=(fuse,))
    except BaseException:
        os.close(fuse)
        raise
    child.fuse = fuse
    with _closing(child):
        child.wait_ready()
        yield child


@contextmanager
def stuck(mib: int = 8) -> Iterator[Stuck]:
    """In a stat() that no daemon answers: killed, it stays, in state D. Root only."""
    with _stuck(_STAT, mib) as child:
        # Only a request that the daemon has read cannot be given up by the killed.
        _serve(child.fuse, (FUSE_INIT, _init_answer()), (FUSE_LOOKUP, None))
        yield child


@contextmanager
def stuck_writer(mib: int = 8) -> Iterator[Stuck]:
    """In state D with its mmap lock held for writing. Root only.

    A release waits for unstick(), as does whatever else wants the lock: ps, for one.
    """
    with _stuck(_MMAP, mib) as child:
        _serve(
            child.fuse,
            (FUSE_INIT, _init_answer()),
            (FUSE_LOOKUP, _entry_answer()),
            (FUSE_OPEN, _open_answer(0)),
            (FUSE_OPEN, _open_answer(FOPEN_DIRECT_IO)),
            (FUSE_READ, None),
        )
        child.wait_state("D")
        yield child


T = TypeVar("T")
NOBODY = 65534


def apart(
    function: Callable[[], T],
    *,
    uid: int | None = None,
    descriptors: int | None = None,
    join: Path | None = None,
) -> T:
    """Call a function in a child that has changed what a process cannot change back.

    That is its user, its limit of descriptors (those that are open stay), its cgroup.
    """
    theirs, ours = os.pipe()
    with warnings.catch_warnings():
        # Of other threads, which may hold locks that the child would wait for.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            answer: T | BaseException
            try:
                _change(uid, descriptors, join)
                answer = function()
            except BaseException as error:
                answer = error
            with open(ours, "wb") as pipe:
                pipe.write(pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(ours)
    try:
        with open(theirs, "rb") as pipe:
            text = pipe.read()
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status or not text:
        raise RuntimeError(f"the child ended with {status}")
    answer = pickle.loads(text)
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _change(uid: int | None, descriptors: int | None, join: Path | None) -> None:
    if join is not None:
        cgroups.enter(join, os.getpid())
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        # Else its own files in /proc are root's, as they would not be after an exec.
        _libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
    if descriptors is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))


def _freezer_mount() -> Path | None:
    for kind, options, path in cgroups.mounts():
        if kind == "cgroup" and "freezer" in options:
            return path
    return None


def why_not_root() -> str | None:
    return None if os.geteuid() == 0 else "needs root"


def why_not_two_cpus() -> str | None:
    return None if len(os.sched_getaffinity(0)) > 1 else "needs two CPUs"


def why_no_freezer() -> str | None:
    mount = _freezer_mount()
    if mount is None:
        return "needs a v1 freezer, and none is mounted"
    return None if os.access(mount, os.W_OK) else f"needs to write to {mount}"


def why_no_fuse() -> str | None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"needs /dev/fuse: {error.strerror}"
    status = Path("/proc/self/status").read_text()
    capable = int(status.partition("CapEff:")[2].split()[0], 16) >> CAP_SYS_ADMIN & 1
    return None if capable else "needs CAP_SYS_ADMIN, to mount"
