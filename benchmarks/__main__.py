"""``python -m benchmarks [NAME...]``: run, print tables, write pages and figures."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import signal
import sys
import time
from pathlib import Path

from .lab import MissingError, Options, in_words
from .report import Report

NAMES = [
    "calls",
    "imports",
    "quiet",
    "race",
    "starved",
    "threads",
    "groups",
    "gil",
    "harden",
    "reaper",
]


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 if a target was missed, 2 if nothing that was named can run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="mrelease against what people use."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--runs", type=_positive, help="repeats of each way")
    parser.add_argument("--size", type=_positive, help="MiB of a victim, where it can")
    parser.add_argument("--quick", action="store_true", help="small and few")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that was found")
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="JSON, tables and figures"
    )
    parser.add_argument(
        "--known",
        action="append",
        default=[],
        metavar="TEXT",
        help="misses with this in their line do not count for the exit status",
    )
    options = parser.parse_args(argv)
    if strange := set(options.names) - set(NAMES):
        parser.error(f"there is no benchmark {', '.join(sorted(strange))}")
    if options.write and not importlib.util.find_spec("matplotlib"):
        parser.error("--write needs matplotlib, of the bench extra")
    # So that all is cleaned up in this case, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = [name for name in NAMES if name in (options.names or NAMES)]
    print(f"{machine()}\n", flush=True)
    settings = Options(options.runs, options.size, options.quick)
    reports, lacking = _run(names, settings, options.write)
    if options.json:
        options.json.write_text(_json(reports, lacking))
    if options.names and not reports:
        return 2
    missed = [line for report in reports for line in report.missed]
    unknown = [line for line in missed if not any(t in line for t in options.known)]
    return 1 if unknown else 0


def machine() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return (
        f"{in_words()}, {model}, {memory:.0f} GiB, "
        f"{platform.python_implementation()} {platform.python_version()}"
    )


def write(folder: Path, report: Report) -> None:
    """Write a page, the figures that it shows, and all that was found, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    when = f"Measured on {time.strftime('%Y-%m-%d')}: {machine()}."
    page = report.markdown(report.draw(folder), when)
    (folder / f"{report.name}.md").write_text(page)
    (folder / f"{report.name}.json").write_text(_json([report], {}))


def _run(
    names: list[str], options: Options, folder: Path | None
) -> tuple[list[Report], dict[str, str]]:
    reports, lacking = [], {}
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        begin = time.monotonic()
        try:
            report: Report = module.run(options)
        except MissingError as missing:
            lacking[name] = str(missing)
            print(f"benchmarks.{name}: needs {missing}\n", file=sys.stderr, flush=True)
            continue
        reports.append(report)
        print(report.markdown())
        print(f"({time.monotonic() - begin:.0f} s)\n", flush=True)
        if folder:
            write(folder, report)
    return reports, lacking


def _json(reports: list[Report], lacking: dict[str, str]) -> str:
    found = {
        "machine": machine(),
        "not run": lacking,
        "benchmarks": [report.as_dict() for report in reports],
    }
    return json.dumps(found, indent=1) + "\n"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
