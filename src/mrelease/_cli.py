"""The command: ``mrelease kill``, ``mrelease doctor`` and ``mrelease demo``."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from functools import partial

from . import __version__, _kill_command
from ._output import (
    INTERRUPTED,
    LATE,
    NOT_SUPPORTED,
    OK,
    Output,
    complain,
    discard,
    message,
    prepare_streams,
    status_of_error,
)
from ._pidfd import seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


_STATUS = (
    "Exit status: 0 all released or gone, 1 some not in time, 2 usage, 3 no such "
    "process or cgroup, 4 not permitted, 5 not supported, 130 interrupted; of several "
    "targets the highest counts."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    prepare_streams()
    options = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        discard(sys.stdout)  # whoever read it wants no more
        return LATE
    except (OSError, RuntimeError, ValueError) as error:
        complain(message(error))
        return status_of_error(error)


def _parser() -> argparse.ArgumentParser:
    # argparse makes one for each argument, and left to itself asks shutil, which loads
    # all that can compress, for the terminal's width.
    formatter = partial(argparse.HelpFormatter, width=_columns() - 2)
    # No abbreviations: an option of a killer means what it says, now and later.
    parser = argparse.ArgumentParser(
        prog="mrelease",
        description="Kill processes and get their memory back at once.",
        epilog=_STATUS,
        allow_abbrev=False,
        formatter_class=formatter,
    )
    version = f"mrelease {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add, text in (
        ("kill", _add_kill, "kill processes"),
        ("doctor", _add_doctor, "say what works on this machine"),
        ("demo", _add_demo, "show it on starved victims of its own"),
    ):
        add(
            commands.add_parser(
                name,
                help=text,
                epilog=_STATUS,
                allow_abbrev=False,
                formatter_class=formatter,
            )
        )
    return parser


def _columns() -> int:
    """The terminal's width, as shutil.get_terminal_size() finds it."""
    columns = 0
    with suppress(KeyError, ValueError):
        columns = int(os.environ["COLUMNS"])
    if columns <= 0:
        with suppress(OSError):  # no terminal
            columns = os.get_terminal_size(1).columns
    return columns if columns > 0 else 80


def _add_kill(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Send SIGKILL and free the memory at once, the largest process first. Prints a "
        "line a process (pid, name, outcome, memory given back, time taken), and for "
        "trees and cgroups a total."
    )
    add = parser.add_argument
    add("targets", metavar="TARGET", nargs="+", help="a pid; with --cgroup a directory")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--tree", action="store_true", help="kill its descendants, too, and it last"
    )
    group.add_argument(
        "--cgroup",
        action="store_true",
        help="kill all processes in a cgroup directory and below it",
    )
    add(
        "-t",
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=1.0,
        help="how long to wait for memory after a kill; inf: no limit (default: 1)",
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
    parser.set_defaults(run=_kill, parser=parser)


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
    if not options.cgroup:
        try:
            options.targets = [_pid(target) for target in options.targets]
        except argparse.ArgumentTypeError as error:
            options.parser.error(f"argument TARGET: {error}")
    return _kill_command.run(_command(options), options.targets)


def _command(options: argparse.Namespace) -> _kill_command.Command:
    if not (options.cgroup or options.tree):
        return _kill_command.Command(options)
    # Most kill processes: those need not wait for it to be loaded.
    from ._group_command import Cgroups, Trees

    return Cgroups(options) if options.cgroup else Trees(options)


def _doctor(options: argparse.Namespace) -> int:
    from . import _doctor

    report, advice = _doctor.examine()
    output = Output(options.json)
    if options.json:
        output.fields({**report, "advice": advice})
    else:
        output.line(_doctor.text(report, advice))
    works = report["pidfd_open"] is True and report["process_mrelease"] is True
    return max(OK if works else NOT_SUPPORTED, output.status())


def _demo(options: argparse.Namespace) -> int:
    from . import _demo

    return _demo.run(options.size and options.size << 20, options.runs)
