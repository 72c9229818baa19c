"""Types of the public functions; nothing that kills imports them at run time."""

from __future__ import annotations

from typing import Protocol, SupportsIndex, TypeAlias, TypedDict


class HasPid(Protocol):
    """subprocess.Popen, multiprocessing.Process, psutil.Process and their like."""

    @property
    def pid(self) -> int | None: ...


Target: TypeAlias = SupportsIndex | HasPid


class KillOptions(TypedDict, total=False):
    """The keyword arguments of kill()."""

    timeout: float | None
    wait: bool
    boost: bool
    settle: float
    measure: bool


class TerminateOptions(KillOptions, total=False):
    """The keyword arguments of terminate()."""

    grace: float
    signal: int
