"""What this machine supports, asked of the kernel itself."""

from __future__ import annotations

import errno
import os
from signal import SIGSYS

from . import _proc
from ._child import run
from ._mrelease import process_mrelease
from ._pidfd import Pidfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def probe() -> dict[str, object]:
    """Ask what works here: {"kernel": release, feature: True or why not, ...}.

    The features: "pidfd_open" with pidfd_send_signal (Linux 5.3), "process_mrelease"
    (5.15), "pidfd_info" (6.13) and "cgroup_kill" (5.14). Each system call is tried in a
    forked child, so that a seccomp filter which kills cannot take the caller. Costs a
    few milliseconds.

    Raises OSError if no child can be forked, RuntimeError in a subinterpreter that may
    not fork. Thread-safe, but in that moment DeprecationWarning is ignored everywhere.
    """
    return {
        "kernel": os.uname().release,
        "pidfd_open": ask(_try_pidfd_open, "5.3"),
        "process_mrelease": ask(_try_process_mrelease, "5.15"),
        "pidfd_info": ask(_try_pidfd_info, "6.13"),
        "cgroup_kill": _cgroup_kill(),
    }


def is_supported() -> bool:
    """Whether kill() can free memory here: pidfd_open(2) and process_mrelease(2) work.

    Costs and raises as probe(). Thread-safe.
    """
    return (
        ask(_try_pidfd_open, "5.3") is True
        and ask(_try_process_mrelease, "5.15") is True
    )


def _try_pidfd_open() -> None:
    with Pidfd.open(os.getpid()) as pidfd:
        pidfd.send_signal(0)


def _try_process_mrelease() -> None:
    try:
        process_mrelease(-1)
    except OSError as error:
        # What a kernel says that knows the call.
        if error.errno != errno.EBADF:
            raise


def _try_pidfd_info() -> None:
    with Pidfd.open(os.getpid()) as pidfd:
        pidfd.cgroup_id()


def ask(attempt: Callable[[], None], since: str = "0.0") -> bool | str:
    """Try something that Linux has since a version in a child; say True, or why not."""
    code = _in_child(attempt)
    if code == 0:
        return True
    # Kernels without an ioctl say ENOTTY; 6.11 and 6.12, with other ones, EINVAL.
    unknown = (errno.ENOSYS, errno.ENOTTY, errno.EINVAL)
    if code in unknown and _kernel_before(since):
        return f"kernel older than {since}"
    if code in (-SIGSYS, errno.ENOSYS, errno.EPERM, errno.EACCES):
        return "seccomp"
    return os.strerror(code) if code > 0 else f"killed by signal {-code}"


def _in_child(attempt: Callable[[], None]) -> int:
    """Run attempt in a forked child; return 0, its errno, or minus what killed it."""
    answer, killed = run(lambda: bytes([_errno_of(attempt)]))
    return answer[0] if answer else -killed or errno.EIO


def _errno_of(attempt: Callable[[], None]) -> int:
    try:
        attempt()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _cgroup_kill() -> bool | str:
    # Every cgroup but the root has the file, so there may be none to look at.
    if _kernel_before("5.14"):
        return "kernel older than 5.14"
    try:
        mounts = _proc.read("/proc/self/mountinfo").split(b"\n")
    except FileNotFoundError:
        return "no /proc"
    return any(b" - cgroup2 " in mount for mount in mounts) or "no cgroup v2 mounted"


def _kernel_before(version: str) -> bool:
    return _numbers(os.uname().release) < _numbers(version)


def _numbers(release: str) -> tuple[int, int]:
    major, minor, *_ = release.split("-")[0].split(".")
    return int(major), int("".join(filter(str.isdigit, minor)))
