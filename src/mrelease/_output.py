"""What the command says to whom, and its exit statuses."""

from __future__ import annotations

import os
import sys
from errno import ENOSYS, EOPNOTSUPP
from io import TextIOWrapper

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

# Exit statuses; of several targets the highest counts.
OK = 0
LATE = 1
USAGE = 2
NO_PROCESS = 3
NOT_PERMITTED = 4
NOT_SUPPORTED = 5
INTERRUPTED = 130  # as a shell says of SIGINT


def prepare_streams() -> None:
    """Make standard output and error safe to write to, whatever the caller closed."""
    # A closed one would be the next descriptor opened: a pidfd, or a file of /proc.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            # closefd: nobody closes these, and none warns of it.
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):
            # A process chooses its own name: it must not be what cannot be printed.
            stream.reconfigure(errors="backslashreplace")


def complain(text: str) -> None:
    try:
        print(f"mrelease: {text}", file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)  # nobody to tell


def discard(stream: TextIO) -> None:
    """Send what is still to be written, at exit too, to nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class Output:
    """Lines to standard output; if that fails, the kills go on and the end tells.

    as_json: whether they are to be JSON, and fields() is used.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.error: OSError | None = None
        if as_json:
            # Now: after a kill there may be no descriptor left to load it with.
            from json import dumps

            self._dumps = dumps

    def fields(self, fields: dict[str, object]) -> None:
        self.line(self._dumps(fields))

    def line(self, text: str) -> None:
        try:
            print(text, flush=True)
        except OSError as error:
            self.error = error
            discard(sys.stdout)

    def status(self) -> int:
        # Whoever reads no further has seen what he wanted.
        if self.error is None or isinstance(self.error, BrokenPipeError):
            return OK
        complain(f"standard output: {self.error.strerror}")
        return LATE


def message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error)


def status_of_error(error: Exception) -> int:
    if isinstance(error, (ValueError, NotADirectoryError)):
        return USAGE
    if isinstance(error, (ProcessLookupError, FileNotFoundError)):
        return NO_PROCESS
    if isinstance(error, PermissionError):
        return NOT_PERMITTED
    unsupported = isinstance(error, OSError) and error.errno in (ENOSYS, EOPNOTSUPP)
    return NOT_SUPPORTED if unsupported else LATE
