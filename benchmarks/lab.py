"""What is measured with: victims, spinners, and memory as it comes back.

A victim's own figures vanish long before its memory is back, so what it holds is read
from a memory cgroup that it is born into, or else from the machine's AnonPages, against
their value before. A small C program watches, lest the watcher holds up the killer.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import cgroups
import victims

T = TypeVar("T")
Kind = Literal["small", "huge", "shared"]

PEERS = Path(__file__).parent / "peers"
LIMIT = 60.0  # seconds until a way is given up


class MissingError(Exception):
    """What this machine lacks for a benchmark."""


def need(lack: str | None) -> None:
    """Raise for what one of the tests' looks says that this machine lacks."""
    if lack:
        raise MissingError(lack.removeprefix("needs "))


def wait_for(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {LIMIT:.0f} s for {what}")
        time.sleep(0.01)


@dataclass
class Options:
    """What was asked for; None where a benchmark knows best."""

    runs: int | None = None
    size: int | None = None  # MiB
    quick: bool = False

    def choose(self, full: T, quick: T) -> T:
        return quick if self.quick else full

    def repeats(self, full: int, quick: int) -> int:
        return self.runs or self.choose(full, quick)


@dataclass
class Seen:
    """Seconds from the decision until 95 % was back and until the last exit.

    None for what had not happened at the limit.
    """

    back: float | None
    exit: float | None


def compiler() -> str:
    found = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if found is None:
        raise MissingError("a C compiler")
    return found


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="mrelease-benchmarks-")
    os.chmod(folder.name, 0o755)  # for ordinary users, too
    return folder


def scratch() -> Path:
    """A folder that lasts as long as this process, for what is compiled."""
    return Path(_folder().name)


@functools.cache
def peer(name: str) -> Path:
    """A program of the peers, compiled."""
    program = scratch() / name
    source = PEERS / f"{name}.c"
    command = [compiler(), "-O2", "-pthread", "-o", str(program), str(source)]
    subprocess.run(command, check=True)
    return program


class Process:
    """A program that says that it is ready, can be told to go on, and answers."""

    def __init__(self, *command: object, uid: int | None = None) -> None:
        self.program = command[0]
        self.popen = subprocess.Popen(
            [str(part) for part in command],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
        )
        self.pid = self.popen.pid

    @property
    def returncode(self) -> int | None:
        """Not None once it has been reaped, for mrelease to see."""
        return self.popen.returncode

    def line(self) -> str:
        assert self.popen.stdout
        line = self.popen.stdout.readline().decode().strip()
        if not line:
            raise RuntimeError(f"{self.program} ended with {self.popen.wait()}")
        return line

    def tell(self) -> None:
        assert self.popen.stdin
        self.popen.stdin.write(b"\n")

    def close(self) -> None:
        self.popen.kill()
        self.popen.communicate()


@contextmanager
def process(
    *command: object,
    uid: int | None = None,
    begin: Callable[[int], object] | None = None,
) -> Iterator[Process]:
    """A program that is ready; it ends with the context.

    begin: what is due before it is told to begin, if it waits for that.
    """
    child = Process(*command, uid=uid)
    try:
        if begin:
            begin(child.pid)
            child.tell()
        line = child.line()
        if not line.startswith("ready"):
            raise RuntimeError(f"{command[0]} said {line}")
        yield child
    finally:
        child.close()


@contextmanager
def victim(
    mib: int,
    kind: Kind = "small",
    threads: int = 1,
    *,
    uid: int | None = None,
    join: Iterable[Path] = (),
) -> Iterator[Process]:
    """A sleeping process with memory; all of it counts in the cgroups that it joins."""
    command = [peer("victim"), mib, threads, kind]

    def begin(pid: int) -> None:
        for cgroup in join:
            cgroups.enter(cgroup, pid)

    with process(*command, uid=uid, begin=begin) as child:
        yield child


@contextmanager
def exit_stopped(mib: int) -> Iterator[Process]:
    """One that has been killed and stands still at its exit, its memory still whole."""
    with victim(mib) as child:
        options = victims.PTRACE_O_TRACEEXIT | victims.PTRACE_O_EXITKILL
        victims._ptrace(victims.PTRACE_SEIZE, child.pid, options)
        os.kill(child.pid, signal.SIGKILL)
        _, status = os.waitpid(child.pid, victims.WALL)
        if status >> 8 != victims.EXIT_STOP:
            raise RuntimeError(f"{child.pid} did not stop at its exit: {status:#x}")
        try:
            yield child
        finally:
            victims._ptrace(victims.PTRACE_CONT, child.pid)


def anonymous(pid: int) -> int:
    """Bytes of private memory of one that was released; 0 once it has let go of it."""
    text = Path(f"/proc/{pid}/status").read_text()
    words = text.partition("RssAnon:")[2].split()
    return int(words[0]) << 10 if words else 0


@contextmanager
def spinners(each: int = 2) -> Iterator[None]:
    """So many processes that never sleep on each CPU."""
    with ExitStack() as stack:
        for cpu in sorted(os.sched_getaffinity(0)):
            for _ in range(each):
                child = stack.enter_context(process(peer("spinner")))
                os.sched_setaffinity(child.pid, {cpu})
                child.tell()
                child.line()
        yield


@dataclass
class Memory:
    """Where the memory of victims is to be seen."""

    file: Path
    cgroup: Path | None

    @property
    def join(self) -> list[Path]:
        """What a victim has to be in, to be counted."""
        return [self.cgroup] if self.cgroup else []

    def held(self) -> int:
        text = self.file.read_text()
        if self.cgroup:
            return int(text)
        return int(text.partition("AnonPages:")[2].split()[0]) << 10


def _memory_mount() -> Path | None:
    for kind, options, path in cgroups.mounts():
        if kind == "cgroup" and "memory" in options:
            return path
    return cgroups.mount("memory")


@contextmanager
def memory() -> Iterator[Memory]:
    """A cgroup that counts memory, where one can be made; else the machine's figure."""
    mount = _memory_mount()
    if mount is None or not os.access(mount, os.W_OK):
        yield Memory(Path("/proc/meminfo"), None)
        return
    with cgroups.cgroup("memory", top=mount) as cgroup:
        names = ("memory.usage_in_bytes", "memory.current")
        file = next(path for name in names if (path := cgroup / name).exists())
        yield Memory(file, cgroup)


def watch(
    memory: Memory,
    before: int,
    pids: list[int],
    method: Callable[[], float | None],
    limit: float = LIMIT,
    smallest: int = 1 << 20,
) -> Seen:
    """Have victims killed and watch their memory come back.

    method returns when it took its decision, CLOCK_MONOTONIC, or None for when it was
    called. Raises RuntimeError if the victims hold less than the smallest that is
    to be seen.
    """
    size = memory.held() - before
    if size < smallest:
        raise RuntimeError(f"the victims hold {size} bytes only")
    command = [peer("watch"), memory.file, before, size, limit, *pids]
    with process(*command) as watcher:
        with suppress(PermissionError):  # then it is as the others are
            os.setpriority(os.PRIO_PROCESS, watcher.pid, -20)
        start = time.monotonic()
        start = method() or start
        back, exited, _ = map(float, watcher.line().split())
    return Seen(
        None if back < 0 else back - start, None if exited < 0 else exited - start
    )


def as_user(uid: int | None, function: Callable[[], T]) -> T:
    """Call a function, in a child that is another user if one is given."""
    return function() if uid is None else victims.apart(function, uid=uid)


def in_words() -> str:
    """The machine, in a line."""
    cpus = len(os.sched_getaffinity(0))
    return f"Linux {os.uname().release} {os.uname().machine}, {cpus} CPUs"
