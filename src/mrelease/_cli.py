"""The command: ``mrelease kill``, ``mrelease doctor`` and ``mrelease demo``."""

from __future__ import annotations

import argparse
import json
import sys
from errno import ENOSYS
from time import monotonic

from . import __version__, _proc
from ._kill import KillResult, kill, terminate
from ._pidfd import Pidfd, seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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

_EPILOG = """\
exit status: 0 all released or gone, 1 some not in time, 2 usage, 3 no such process,
4 not permitted, 5 not supported; of several targets the highest counts
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except KeyboardInterrupt:
        print("mrelease: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mrelease",
        description="Kill processes and get their memory back at once.",
    )
    parser.add_argument(
        "--version", action="version", version=f"mrelease {__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_kill(commands.add_parser("kill", help="kill processes", epilog=_EPILOG))
    _add_doctor(commands.add_parser("doctor", help="say what works on this machine"))
    _add_demo(commands.add_parser("demo", help="show it on starved victims of its own"))
    return parser


def _add_kill(parser: argparse.ArgumentParser) -> None:
    parser.description = "Send SIGKILL and free the memory at once; a line a process."
    add = parser.add_argument
    add("targets", metavar="TARGET", type=_pid, nargs="+", help="a pid")
    add(
        "-t",
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=1.0,
        help="how long to wait for the memory (default: 1)",
    )
    add("--wait", action="store_true", help="wait for the exit, too")
    add(
        "--term",
        metavar="GRACE",
        type=_seconds,
        nargs="?",
        const=10.0,
        help="send SIGTERM first and wait GRACE seconds (default: 10)",
    )
    add("--no-boost", action="store_true", help="leave the victim's scheduling alone")
    add(
        "--settle",
        metavar="S",
        type=_seconds,
        default=0.0,
        help="seconds to exit by itself before the release (default: 0)",
    )
    add("--json", action="store_true", help="a JSON object a line")
    add("-n", "--dry-run", action="store_true", help="only say what would be killed")
    parser.set_defaults(run=_kill)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what kernel, privileges and filters allow, and what to do."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=_doctor)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Starve victims of its own, kill one by SIGKILL alone and one by mrelease, and "
        "show how their memory comes back."
    )
    parser.add_argument(
        "--size",
        metavar="MiB",
        type=_positive,
        help="memory of a victim (default: 1024, or a quarter of what is available)",
    )
    parser.add_argument(
        "--runs",
        metavar="N",
        type=_positive,
        default=1,
        help="runs of each (default: 1)",
    )
    parser.set_defaults(run=_demo)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"not a positive whole number: {text!r}")
    return int(text)


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"not a pid: {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return seconds("it", float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number of seconds: {text!r}") from None


def _kill(options: argparse.Namespace) -> int:
    return max(_kill_one(pid, options) for pid in options.targets)


def _kill_one(pid: int, options: argparse.Namespace) -> int:
    try:
        with Pidfd.open(pid) as pidfd:
            name = _proc.name(pid)
            if options.dry_run:
                return _dry_run(pidfd, name, options)
            result = _with_progress(pidfd, lambda: _run(pidfd, options))
    except (OSError, ValueError) as error:
        print(f"mrelease: {pid}: {_message(error)}", file=sys.stderr)
        return _status_of_error(error)
    _report(name, result, options)
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
    thread.start()
    start = monotonic()
    shown = False
    while thread.is_alive():
        thread.join(_PROGRESS_PAUSE)
        if thread.is_alive():
            held = (_proc.anonymous(pidfd.pid) or 0) / _MIB
            waited = monotonic() - start
            line = f"\r{pidfd.pid}: {waited:.1f} s, {held:.1f} MiB held\x1b[K"
            print(line, end="", file=sys.stderr, flush=True)
            shown = True
    if shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if isinstance(ended[0], Exception):
        raise ended[0]
    return ended[0]


def _dry_run(pidfd: Pidfd, name: str, options: argparse.Namespace) -> int:
    pidfd.send_signal(0)
    held = _proc.anonymous(pidfd.pid) or 0
    if options.json:
        print(json.dumps({"pid": pidfd.pid, "name": name, "anonymous": held}))
    else:
        print(_line(pidfd.pid, name, "would kill", held))
    return OK


def _report(name: str, result: KillResult, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps({"name": name, **result.as_dict()}))
    else:
        line = _line(result.pid, name, result.outcome, result.freed)
        print(f"{line} {result.elapsed * 1000:9.1f} ms")


def _line(pid: int, name: str, outcome: str, size: int | None) -> str:
    # A process chooses its own name: no control characters to the terminal.
    safe = "".join(char if char.isprintable() else "?" for char in name)
    mib = "?" if size is None else f"{size / _MIB:.1f}"
    return f"{pid:>7} {safe:<15} {outcome:<11} {mib:>9} MiB"


def _status(result: KillResult, options: argparse.Namespace) -> int:
    if result.exited or (result.released and not options.wait):
        return OK
    if result.outcome in ("unsupported", "blocked"):
        return NOT_SUPPORTED
    return LATE


def _message(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _status_of_error(error: OSError | ValueError) -> int:
    if isinstance(error, ValueError):
        return USAGE
    if isinstance(error, ProcessLookupError):
        return NO_PROCESS
    if isinstance(error, PermissionError):
        return NOT_PERMITTED
    return NOT_SUPPORTED if error.errno == ENOSYS else LATE


def _doctor(options: argparse.Namespace) -> int:
    from . import _doctor

    report, advice = _doctor.examine()
    if options.json:
        print(json.dumps({**report, "advice": advice}))
    else:
        print(_doctor.text(report, advice))
    return OK if report["process_mrelease"] is True else NOT_SUPPORTED


def _demo(options: argparse.Namespace) -> int:
    from . import _demo

    return _demo.run(options.size and options.size * _MIB, options.runs)
