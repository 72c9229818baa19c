"""Kill a process on Linux and get its memory back at once.

SIGKILL only marks a process: its memory comes back when it next gets to run, which a
starved, frozen or stuck process may not do for minutes. ``kill()`` sends SIGKILL and
frees the memory itself, with process_mrelease(2) of Linux 5.15, and says what came
of it. Where the kernel lacks the call the kill stands, and the result says so.
"""

from ._mrelease import PIDFD_NONBLOCK as PIDFD_NONBLOCK
from ._mrelease import PIDFD_THREAD as PIDFD_THREAD
from ._mrelease import kill_and_release as kill_and_release
from ._mrelease import pidfd_open as pidfd_open
from ._mrelease import pidfd_send_signal as pidfd_send_signal
from ._mrelease import process_mrelease as process_mrelease

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import aio as aio
    from ._batch import kill_all as kill_all
    from ._groups import cgroup_pidfds as cgroup_pidfds
    from ._groups import kill_cgroup as kill_cgroup
    from ._groups import kill_tree as kill_tree
    from ._kill import KillResult as KillResult
    from ._kill import kill as kill
    from ._kill import release as release
    from ._kill import terminate as terminate
    from ._pidfd import Pidfd as Pidfd
    from ._probe import is_supported as is_supported
    from ._probe import probe as probe
    from ._reaper import Reaper as Reaper
    from ._sched import harden as harden
    from ._types import Target as Target

__version__ = "0.1.0"

__all__ = [
    "PIDFD_NONBLOCK",
    "PIDFD_THREAD",
    "KillResult",
    "Pidfd",
    "Reaper",
    "Target",
    "cgroup_pidfds",
    "harden",
    "is_supported",
    "kill",
    "kill_all",
    "kill_and_release",
    "kill_cgroup",
    "kill_tree",
    "pidfd_open",
    "pidfd_send_signal",
    "probe",
    "process_mrelease",
    "release",
    "terminate",
]

# Where the names live that are loaded when first asked for (PEP 562). Any of the kill's
# loads the whole way of a kill, so that ``from mrelease import kill`` at start-up
# leaves nothing to load when memory is short.
_LAZY = {
    "KillResult": "_kill",
    "Pidfd": "_kill",
    "Reaper": "_reaper",
    "Target": "_types",
    "cgroup_pidfds": "_groups",
    "harden": "_sched",
    "is_supported": "_probe",
    "kill": "_kill",
    "kill_all": "_batch",
    "kill_cgroup": "_groups",
    "kill_tree": "_groups",
    "probe": "_probe",
    "release": "_kill",
    "terminate": "_kill",
}


def __getattr__(name: str) -> object:
    if name == "aio":
        return __import__(f"{__name__}.aio", fromlist=["aio"])
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = __import__(f"{__name__}.{_LAZY[name]}", fromlist=[name])
    value: object = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "aio"})
