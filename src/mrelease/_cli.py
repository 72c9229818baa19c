"""The command: ``mrelease kill``, ``mrelease doctor`` and ``mrelease demo``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from errno import ENOSYS
from io import TextIOWrapper
from time import monotonic

from . import __version__, _proc
from ._kill import KillResult, check_victim, kill, terminate
from ._pidfd import Pidfd, seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TextIO

    from ._types import KillOptions

# Exit statuses; of several targets the highest counts.
OK = 0
LATE = 1
USAGE = 2
NO_PROCESS = 3
NOT_PERMITTED = 4
NOT_SUPPORTED = 5
INTERRUPTED = 130  # as a shell says of SIGINT

_MIB = 2**20
_PROGRESS_PAUSE = 0.2  # seconds

_STATUS = (
    "Exit status: 0 all released or gone, 1 some not in time, 2 usage, 3 no such "
    "process, 4 not permitted, 5 not supported, 130 interrupted; of several targets "
    "the highest counts."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    _prepare_streams()
    options = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _discard(sys.stdout)  # whoever read it wants no more
        return LATE
    except (OSError, RuntimeError, ValueError) as error:
        _complain(_message(error))
        return _status_of_error(error)


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: an option of a killer means what it says, now and later.
    parser = argparse.ArgumentParser(
        prog="mrelease",
        description="Kill processes and get their memory back at once.",
        epilog=_STATUS,
        allow_abbrev=False,
    )
    version = f"mrelease {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add, text in (
        ("kill", _add_kill, "kill processes"),
        ("doctor", _add_doctor, "say what works on this machine"),
        ("demo", _add_demo, "show it on starved victims of its own"),
    ):
        add(commands.add_parser(name, help=text, epilog=_STATUS, allow_abbrev=False))
    return parser


def _add_kill(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Send SIGKILL and free the memory at once, one target after the other. Prints "
        "pid, name, outcome, memory given back and time taken, a line a process."
    )
    add = parser.add_argument
    add("targets", metavar="TARGET", type=_pid, nargs="+", help="a pid")
    add(
        "-t",
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=1.0,
        help="how long to wait for each target's memory; inf: no limit (default: 1)",
    )
    add("--wait", action="store_true", help="wait, as long, for the exit, too")
    add(
        "--term",
        metavar="GRACE",
        type=_seconds,
        nargs="?",
        const=10.0,
        help="send SIGTERM first, and SIGKILL after GRACE seconds (default: 10); write "
        "--term=GRACE, or --term after the targets",
    )
    add("--no-boost", action="store_true", help="leave the victim's scheduling alone")
    add(
        "--settle",
        metavar="SECONDS",
        type=_seconds,
        default=0.0,
        help="time to exit by itself before it is released, at most -t (default: 0)",
    )
    add("--json", action="store_true", help="print a JSON object a line")
    add("-n", "--dry-run", action="store_true", help="only say what would be killed")
    parser.set_defaults(run=_kill)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what the kernel, privileges and filters allow, and what to do for more."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_doctor)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Starve victims of its own, kill one by SIGKILL alone and one by mrelease, and "
        "show how their memory comes back: up to 15 seconds a run. What is shown as "
        "held is the machine's anonymous memory, so other processes show in it."
    )
    parser.add_argument(
        "--size",
        metavar="MiB",
        type=_positive,
        help="memory of a victim, 16 or more (default: 1024, or a quarter of what is "
        "available if that is less)",
    )
    parser.add_argument(
        "--runs", metavar="N", type=_positive, default=1, help="of each (default: 1)"
    )
    parser.set_defaults(run=_demo)


def _prepare_streams() -> None:
    """Make standard output and error safe to write to, whatever the caller closed."""
    # A closed one would be the next descriptor opened: a pidfd, or a file of /proc.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):
            # A process chooses its own name: it must not be what cannot be printed.
            stream.reconfigure(errors="backslashreplace")


def _complain(text: str) -> None:
    try:
        print(f"mrelease: {text}", file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)  # nobody to tell


def _discard(stream: TextIO) -> None:
    """Send what is still to be written, at exit too, to nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class _Output:
    """Lines to standard output; if that fails, the kills go on and the end tells."""

    def __init__(self) -> None:
        self.error: OSError | None = None

    def line(self, text: str) -> None:
        try:
            print(text, flush=True)
        except OSError as error:
            self.error = error
            _discard(sys.stdout)

    def status(self) -> int:
        # Whoever reads no further has seen what he wanted.
        if self.error is None or isinstance(self.error, BrokenPipeError):
            return OK
        _complain(f"standard output: {self.error.strerror}")
        return LATE


def _positive(text: str) -> int:
    return _number(text, "a positive whole number")


def _pid(text: str) -> int:
    return _number(text, "a pid")


def _number(text: str, what: str) -> int:
    if text.isascii() and text.isdigit() and len(text) < 11 and 0 < int(text) < 2**31:
        return int(text)
    raise argparse.ArgumentTypeError(f"not {what}: {text[:20]!r}")


def _seconds(text: str) -> float:
    try:
        return seconds("it", float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"not zero or more seconds: {text[:20]!r}"
        ) from None


def _kill(options: argparse.Namespace) -> int:
    output = _Output()
    status = OK
    for place, pid in enumerate(options.targets):
        try:
            status = max(status, _kill_one(pid, options, output))
        except KeyboardInterrupt:
            untouched = " ".join(map(str, options.targets[place + 1 :])) or "none"
            _complain(f"interrupted while {pid} was killed; untouched: {untouched}")
            return INTERRUPTED
    return max(status, output.status())


def _kill_one(pid: int, options: argparse.Namespace, output: _Output) -> int:
    try:
        with Pidfd.open(pid) as pidfd:
            name = _proc.name(pid)
            if options.dry_run:
                check_victim(pidfd)
                held = _proc.anonymous(pid) or 0
                output.line(_dry_line(pid, name, held, options))
                return OK
            result = _with_progress(pidfd, lambda: _run(pidfd, options))
    except (OSError, ValueError) as error:
        _complain(f"{pid}: {_message(error)}")
        return _status_of_error(error)
    output.line(_line(name, result, options))
    return _status(result, options)


def _run(pidfd: Pidfd, options: argparse.Namespace) -> KillResult:
    common: KillOptions = {
        "timeout": options.timeout,
        "wait": options.wait,
        "boost": not options.no_boost,
        "settle": options.settle,
        "measure": True,
    }
    if options.term is None:
        return kill(pidfd, **common)
    return terminate(pidfd, grace=options.term, **common)


def _with_progress(pidfd: Pidfd, run: Callable[[], KillResult]) -> KillResult:
    """Run a kill; on a terminal, say what it waits for while it does."""
    if not sys.stderr.isatty():
        return run()
    from threading import Thread

    ended: list[KillResult | Exception] = []

    def work() -> None:
        try:
            ended.append(run())
        except Exception as error:  # raised again below, where it is expected
            ended.append(error)

    # A daemon, so that Ctrl-C ends the command even while a release is blocked.
    thread = Thread(target=work, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads to be had: then without progress
        return run()
    start = monotonic()
    try:
        while True:
            thread.join(_PROGRESS_PAUSE)
            if not thread.is_alive():
                break
            held = (_proc.anonymous(pidfd.pid) or 0) / _MIB
            waited = monotonic() - start
            _show(f"{pidfd.pid}: {waited:.1f} s, {held:.1f} MiB held")
    finally:
        _show("")
    if isinstance(ended[0], Exception):
        raise ended[0]
    return ended[0]


def _show(text: str) -> None:
    """Replace the line of progress."""
    try:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)  # the terminal has gone, the kill has not


def _dry_line(pid: int, name: str, held: int, options: argparse.Namespace) -> str:
    if options.json:
        return json.dumps({"pid": pid, "name": name, "anonymous": held})
    return _columns(pid, name, "would kill", held)


def _line(name: str, result: KillResult, options: argparse.Namespace) -> str:
    if options.json:
        return json.dumps({"name": name, **result.as_dict()})
    columns = _columns(result.pid, name, result.outcome, result.freed)
    return f"{columns} {result.elapsed * 1000:9.1f} ms"


def _columns(pid: int, name: str, outcome: str, size: int | None) -> str:
    # No control characters to the terminal.
    safe = "".join(char if char.isprintable() else "?" for char in name)
    mib = "?" if size is None else f"{size / _MIB:.1f}"
    return f"{pid:>7} {safe:<15} {outcome:<11} {mib:>9} MiB"


def _status(result: KillResult, options: argparse.Namespace) -> int:
    if result.exited or (result.released and not options.wait):
        return OK
    if result.outcome in ("unsupported", "blocked"):
        return NOT_SUPPORTED
    return LATE


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error)


def _status_of_error(error: Exception) -> int:
    if isinstance(error, ValueError):
        return USAGE
    if isinstance(error, ProcessLookupError):
        return NO_PROCESS
    if isinstance(error, PermissionError):
        return NOT_PERMITTED
    unsupported = isinstance(error, OSError) and error.errno == ENOSYS
    return NOT_SUPPORTED if unsupported else LATE


def _doctor(options: argparse.Namespace) -> int:
    from . import _doctor

    report, advice = _doctor.examine()
    output = _Output()
    if options.json:
        output.line(json.dumps({**report, "advice": advice}))
    else:
        output.line(_doctor.text(report, advice))
    works = report["pidfd_open"] is True and report["process_mrelease"] is True
    return max(OK if works else NOT_SUPPORTED, output.status())


def _demo(options: argparse.Namespace) -> int:
    from . import _demo

    return _demo.run(options.size and options.size * _MIB, options.runs)
