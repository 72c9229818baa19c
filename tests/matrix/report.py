"""docs/testing.md: what was run where, from the results that the cells have left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HEAD = """\
# What was tested where

Made by `tests/matrix/run --report` of the results of its cells; not to be edited.
CONTRIBUTING.md tells how they are run. A commit with a plus sign had changes besides.

"""
COLUMNS = [
    *("cell", "result", "Python", "kernel", "user"),
    *("passed", "failed", "skipped", "commit"),
]


def _row(values: Iterable[object]) -> str:
    return "| " + " | ".join(str(value) for value in values) + " |\n"


def keep(found: Path, kept: Path) -> None:
    """Take this machine's results into the project, but for those it has newer ones of.

    No one machine runs all cells, and none is kept for ever.
    """
    kept.mkdir(exist_ok=True)
    for path in found.glob("*.json"):
        to = kept / path.name
        if not to.exists() or _date(to) < _date(path):
            shutil.copy(path, to)


def _date(path: Path) -> str:
    """When a cell was started, as text that sorts; the first results did not say it."""
    date: str = json.loads(path.read_text()).get("date", "")
    return date


def write(cells: Iterable[str], results: Path, to: Path) -> None:
    text = HEAD + _row(COLUMNS) + _row("---" for _ in COLUMNS)
    skips: dict[str, list[str]] = {}
    for cell in cells:
        try:
            result = json.loads((results / f"{cell}.json").read_text())
        except FileNotFoundError:
            text += _row([cell, "not run", *[""] * 7])
            continue
        text += _rows(cell, result)
        if result["state"] == "SKIPPED":
            skips.setdefault(result["why"], []).append(f"{cell}, the whole cell")
        for run in result["runs"]:
            for reason, count in run.get("reasons", {}).items():
                where = f"{cell} ({run['label']}) {count}"
                skips.setdefault(reason, []).append(where)
    text += "\n## What was skipped\n\n"
    text += "| reason | where, and how many tests |\n|---|---|\n"
    for reason in sorted(skips):
        text += _row([reason, ", ".join(skips[reason])])
    to.parent.mkdir(exist_ok=True)
    to.write_text(text)


def _rows(cell: str, result: dict[str, Any]) -> str:
    outcome = result["state"]
    if outcome != "SKIPPED":  # of which the other table tells why
        outcome = ": ".join(filter(None, (outcome, result["why"])))
    on = result["on"]
    runs = result["runs"] or [{}]  # a cell that ran nothing has a line as well
    counts = "label", "passed", "failed", "skipped"
    return "".join(
        _row(
            [cell, outcome, on.get("python", ""), on.get("kernel", "")]
            + [run.get(name, "") for name in counts]
            + [_short(result["commit"])]
        )
        for run in runs
    )


def _short(commit: str) -> str:
    """As git shows it, with the plus sign of one that had changes besides."""
    return commit[:7] + "+" * commit.endswith("+")
