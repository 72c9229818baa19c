"""A cgroup directory, of v1 or v2, and the processes that are proven to be in it."""

from __future__ import annotations

import fcntl as fcntl  # Pidfd.cgroup_id() needs it, perhaps when files have run out
import os
from errno import ENODEV, ENOENT, ENOSYS, ENOTDIR, EOPNOTSUPP, EROFS
from stat import S_ISDIR
from sys import maxsize

from . import _proc
from ._pidfd import Pidfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = 1  # the inode number of every hierarchy's root since Linux 5.5
_INODE = 2**64 - 1 if maxsize > 2**32 else 2**32 - 1  # what stat(2) shows of an id


class Cgroup:
    """One cgroup: find() makes them."""

    __slots__ = ("_directory", "_id", "_name", "_options", "path")

    def __init__(
        self, path: str, directory: str, name: str, options: frozenset[str]
    ) -> None:
        self.path = path  # as the caller calls it
        self._directory = directory
        self._name = name  # as /proc/PID/cgroup calls it
        self._options = options  # of a v1 mount, its controllers among them; v2: none
        self._id = os.stat(directory).st_ino

    @property
    def is_root(self) -> bool:
        return self._id == _ROOT

    def walk(self) -> Iterator[Cgroup]:
        """This one and all below it; those that vanish meanwhile are left out."""
        found = [self]
        while found:
            cgroup = found.pop()
            yield cgroup
            found += cgroup._children()

    def pids(self) -> list[int]:
        """The pids that the kernel lists now, without those of other pid namespaces."""
        try:
            listed = _proc.read(f"{self._directory}/cgroup.procs").split()
        except FileNotFoundError:
            return []
        except OSError as error:
            # A threaded cgroup lists nobody: its processes are in the list of one
            # further up.
            if error.errno in (ENODEV, EOPNOTSUPP):
                return []
            raise
        return [pid for pid in dict.fromkeys(map(int, listed)) if pid > 0]

    def all_pids(self) -> list[int]:
        """The pids that are listed here and below."""
        return [pid for cgroup in self.walk() for pid in cgroup.pids()]

    def open(self, pid: int) -> Pidfd | None:
        """Open a process if it is a member, and still running."""
        try:
            pidfd = Pidfd.open(pid)
        except (ProcessLookupError, ValueError):  # gone; or the pid is a thread's now
            return None
        try:
            # In this order: what was read of the pid is true only of the living.
            proven = self._holds(pidfd) and not pidfd.exited
        except BaseException:
            pidfd.close()
            raise
        if proven:
            return pidfd
        pidfd.close()
        return None

    def open_kill(self) -> int | None:
        """A descriptor of cgroup.kill; None where that is missing or not permitted.

        v2 only, since Linux 5.14.
        """
        try:
            return os.open(f"{self._directory}/cgroup.kill", os.O_WRONLY)
        except (FileNotFoundError, PermissionError):
            return None
        except OSError as error:
            if error.errno in (ENODEV, EROFS):
                return None
            raise

    def _holds(self, pidfd: Pidfd) -> bool:
        if not self._options:
            try:
                if pidfd.cgroup_id() & _INODE == self._id:
                    return True
            except ProcessLookupError:
                return False
            except OSError:
                pass  # before Linux 6.13 only /proc tells
        # A leader that has exited before its threads is in v1's root cgroup.
        pid = pidfd.pid
        tasks = (f"/proc/{pid}/task/{tid}" for tid in _proc.threads(pid))
        return self._names(f"/proc/{pid}") or any(map(self._names, tasks))

    def _names(self, task: str) -> bool:
        """Whether /proc names this cgroup as a task's."""
        try:
            lines = os.fsdecode(_proc.read(f"{task}/cgroup")).split("\n")
        except (FileNotFoundError, ProcessLookupError):
            return False
        for line in filter(None, lines):
            _, controllers, name = line.split(":", 2)
            listed = set(filter(None, controllers.split(",")))
            if bool(listed) == bool(self._options) and listed <= self._options:
                return name == self._name or self._lists(name)
        return False

    def _lists(self, name: str) -> bool:
        """Whether another cgroup is a threaded one below this, whose list is here."""
        below = name.removeprefix(self._name.rstrip("/"))
        if self._options or below == name or not below.startswith("/"):
            return False
        try:
            return _proc.read(f"{self._directory}{below}/cgroup.type") == b"threaded\n"
        except OSError as error:
            if error.errno in (ENODEV, ENOENT):
                return False
            raise

    def _children(self) -> list[Cgroup]:
        children: list[Cgroup] = []
        try:
            with os.scandir(self._directory) as entries:
                names = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        for name in names:
            try:
                children.append(
                    Cgroup(
                        os.path.join(self.path, name),
                        f"{self._directory}/{name}",
                        f"{self._name.rstrip('/')}/{name}",
                        self._options,
                    )
                )
            except FileNotFoundError:
                continue
        return children


def find(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> Cgroup:
    """The cgroup of a directory.

    Raises the OSError of stat(2), NotADirectoryError, ValueError if it is no cgroup,
    and OSError with EOPNOTSUPP if it is a threaded one, with ENOSYS without the /proc
    of this pid namespace, each with the path.
    """
    path = os.fsdecode(path)
    directory = os.path.realpath(path)
    info = os.stat(path)
    if not S_ISDIR(info.st_mode):
        raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR), path)
    if not _proc.is_ours():
        what = "No /proc of this pid namespace, to prove who is in the cgroup"
        raise OSError(ENOSYS, what, path)
    name, options = _in_hierarchy(directory, info.st_dev)
    if name is None:
        raise ValueError(f"{path} is not a cgroup directory")
    cgroup = Cgroup(path, directory, name, options)
    if not os.path.samestat(info, os.stat(directory)):
        raise ValueError(f"{path} is in another mount namespace")
    try:
        _proc.read(f"{directory}/cgroup.procs")
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
    return cgroup


def _in_hierarchy(directory: str, device: int) -> tuple[str | None, frozenset[str]]:
    """What /proc/PID/cgroup calls a directory, and the options of its mount if v1."""
    found: tuple[str | None, str, frozenset[str]] = None, "", frozenset()
    for line in os.fsdecode(_proc.read("/proc/self/mountinfo")).split("\n")[:-1]:
        mount, _, kind = line.partition(" - ")
        _, _, number, root, point = map(_unescape, mount.split(" ")[:5])
        fstype, _, options = kind.split(" ", 2)
        if (
            fstype in ("cgroup", "cgroup2")
            and number == f"{os.major(device)}:{os.minor(device)}"
            and f"{directory}/".startswith(f"{point}/")
            and len(point) >= len(found[1])  # mounted on top of the others
        ):
            name = root.rstrip("/") + directory[len(point) :] or "/"
            v1 = options.split(",") if fstype == "cgroup" else []
            found = name, point, frozenset(v1)
    return found[0], found[2]


def _unescape(field: str) -> str:
    """A path of mountinfo: the kernel writes a space as \\040."""
    first, *rest = field.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)
