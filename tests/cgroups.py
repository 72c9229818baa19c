"""Cgroups of the tests' own, v1 and v2: made, filled, and gone whatever happens.

As a program, `cgroups.py PATH` waits for the end of its standard input and then
destroys the cgroup: so ends what is in it, be it a fork bomb, when the test process is
killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENODEV, ENOENT, EOPNOTSUPP
from pathlib import Path
from typing import Literal

TIMEOUT = 120  # seconds for what takes one at most: emulated machines are slow

# A v2 cgroup, a v1 cgroup of whatever hierarchy there is, or one of either version with
# this controller.
Kind = Literal["v2", "v1", "pids", "memory"]


def mounts() -> Iterator[tuple[str, set[str], Path]]:
    """Type, options and mount point of what is mounted of cgroups."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            # A space in the path is written as \040.
            path = fields.split(" ")[4].encode().decode("unicode_escape")
            yield kind, set(options.split(",")), Path(path)


def mount(kind: Kind) -> Path | None:
    """Where cgroups of this kind can be made; None if nowhere."""
    v2 = [path for version, _, path in mounts() if version == "cgroup2"]
    v1 = {
        name: path
        for version, options, path in mounts()
        if version == "cgroup"
        for name in options
    }
    if kind == "v2":
        return v2[0] if v2 else None
    if kind == "v1":
        # Not cpuset: no process may enter one that has no CPUs yet.
        names = ["pids", "freezer", "devices", "cpuacct", "name=systemd"]
        return next((v1[name] for name in names if name in v1), None)
    if kind == "pids" and "pids" in v1:
        return v1["pids"]
    has = [path for path in v2 if kind in _controllers(path)]
    return has[0] if has else None


def _controllers(cgroup: Path) -> list[str]:
    return (cgroup / "cgroup.controllers").read_text().split()


@contextmanager
def cgroup(
    kind: Kind = "v2", *, pids: int = 0, top: Path | None = None
) -> Iterator[Path]:
    """A new cgroup, in which at most `pids` processes may live if that is given.

    It is made in `top`, if that is given. At the end all that is in it, and in cgroups
    below it, is killed and removed.
    """
    top = top or mount(kind)
    if top is None:
        raise RuntimeError(f"no cgroups of kind {kind}")
    with _enabled(top, kind):
        path = Path(tempfile.mkdtemp(prefix="mrelease-test-", dir=top))
        try:
            path.chmod(0o755)
            with _guarded(path):
                if pids:
                    (path / "pids.max").write_text(str(pids))
                yield path
        finally:
            destroy(path)


@contextmanager
def _enabled(top: Path, kind: Kind) -> Iterator[None]:
    """Give the children of a v2 cgroup a controller, and take it back at the end."""
    control = top / "cgroup.subtree_control"
    if not control.exists() or kind in ("v1", "v2", *control.read_text().split()):
        yield
        return
    control.write_text(f"+{kind}")
    try:
        yield
    finally:
        control.write_text(f"-{kind}")


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Have the cgroup destroyed when this process is killed."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, path],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for the guard
    )
    with guard:
        assert guard.stdin is not None
        assert guard.stdout is not None
        try:
            if guard.stdout.readline() != b"ready\n":
                raise RuntimeError(f"no guard for {path}")
            yield
        finally:
            destroy(path)
            guard.stdin.close()


def enter(cgroup: Path, pid: int) -> None:
    """Move a process into a cgroup; what it forks from now on is born there."""
    (cgroup / "cgroup.procs").write_text(str(pid))


def pids(cgroup: Path) -> list[int]:
    """The processes in a cgroup, sorted; none if it is gone or threaded."""
    try:
        text = (cgroup / "cgroup.procs").read_text()
    except OSError as error:
        if error.errno in (ENOENT, ENODEV, EOPNOTSUPP):
            return []
        raise
    return sorted({int(pid) for pid in text.split()})


def subtree(cgroup: Path) -> list[Path]:
    """The cgroup and all below it, the deepest first; none if it is gone."""
    try:
        below = [entry for entry in cgroup.iterdir() if entry.is_dir()]
    except FileNotFoundError:
        return []
    return [path for child in below for path in subtree(child)] + [cgroup]


def destroy(cgroup: Path) -> None:
    """Kill all that is in a cgroup or below it, and remove it, unless it is gone."""
    end = time.monotonic() + TIMEOUT
    while paths := subtree(cgroup):
        kill(cgroup)
        for path in paths:
            with suppress(OSError):  # busy until all in it are on their way out
                path.rmdir()
        if cgroup.exists():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {TIMEOUT} s for {cgroup} to be empty")
            time.sleep(0.002)


def kill(cgroup: Path) -> None:
    """Kill all that is seen in a cgroup and below it, and let nobody be born there."""
    for path in reversed(subtree(cgroup)):
        _kill(path)


def _kill(cgroup: Path) -> None:
    # Nobody is born, nobody is held. What the cgroup does not have is not written.
    for name, value in {
        "pids.max": "0",
        "cgroup.kill": "1",
        "cgroup.freeze": "0",
        "freezer.state": "THAWED",
    }.items():
        with suppress(OSError):
            (cgroup / name).write_text(value)
    for pid in pids(cgroup):
        with suppress(ProcessLookupError):
            _kill_member(cgroup, pid)


def _kill_member(cgroup: Path, pid: int) -> None:
    """SIGKILL, unless the pid has come to mean a process that is not in the cgroup."""
    pidfd = os.pidfd_open(pid)
    try:
        if pid in pids(cgroup):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


def why_no_cgroup2() -> str | None:
    return _why_not("v2", "a cgroup v2 mount")


def why_no_cgroup1() -> str | None:
    return _why_not("v1", "a v1 hierarchy")


def why_no_pids() -> str | None:
    return _why_not("pids", "a pids controller")


def why_no_memcg() -> str | None:
    return _why_not("memory", "the memory controller of cgroup v2")


def _why_not(kind: Kind, what: str) -> str | None:
    """Find out by making one; a mount may be read-only, or not ours."""
    if mount(kind) is None:
        return f"needs {what}"
    try:
        with cgroup(kind):
            return None
    except OSError as error:
        return f"needs {what} to write to: {error.strerror}"


def _main() -> None:
    print("ready", flush=True)
    sys.stdin.read()
    destroy(Path(sys.argv[1]))


if __name__ == "__main__":
    _main()
