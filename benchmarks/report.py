"""What a benchmark found: medians and spread, ratios, targets, tables, figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Series:
    """What was measured of one way; of several that were cut off the last is true."""

    values: list[float] = field(default_factory=list)
    cut_off: int = 0  # how many of them are a limit that was reached

    def add(self, value: float | None, limit: float = 0) -> None:
        """Take a value, or the limit in place of one that was not seen."""
        self.values.append(limit if value is None else value)
        self.cut_off += value is None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, scale: float = 1) -> str:
        """The median, and lowest and highest if there are several."""
        above = "> " if 2 * self.cut_off > len(self.values) else ""
        median = f"{above}{number(self.median * scale)}"
        if len(self.values) == 1:
            return median
        low, high = number(min(self.values) * scale), number(max(self.values) * scale)
        return f"{median} [{low}-{'> ' if self.cut_off else ''}{high}]"


@dataclass
class Table:
    """Rows by name, each a series a column; ratios are to the first row of all."""

    title: str
    unit: str
    columns: list[str]
    scale: float = 1  # from what is measured to the unit
    ratios: bool = True
    rows: dict[str, list[Series]] = field(default_factory=dict)

    def add(self, name: str, *values: float | None, limit: float = 0) -> None:
        """Take a measurement of a row: a value a column."""
        row = self.rows.setdefault(name, [Series() for _ in self.columns])
        for series, value in zip(row, values, strict=True):
            series.add(value, limit)

    def median(self, name: str, column: int = 0) -> float:
        return self.rows[name][column].median

    def ratio(self, name: str, to: str, column: int = 0) -> float:
        """The median of one row in parts of another's."""
        return self.median(name, column) / self.median(to, column)

    def markdown(self) -> str:
        head = [self.title]
        for column in self.columns:
            head.append(f"{column}, {self.unit}" if self.unit else column)
            if self.ratios:
                head.append("ratio")
        first = next(iter(self.rows))
        lines = []
        for name, row in self.rows.items():
            cells = [name]
            for index, series in enumerate(row):
                cells.append(series.text(self.scale))
                if self.ratios:
                    has_ratio = self.median(first, index) > 0
                    ratio = self.ratio(name, first, index) if has_ratio else None
                    cells.append("-" if ratio is None else number(ratio))
            lines.append(cells)
        return markdown(head, lines)


@dataclass
class Target:
    """A figure that is to be reached, at most or at least."""

    what: str
    figure: float
    at_most: float | None = None
    at_least: float | None = None
    unit: str = ""

    @property
    def met(self) -> bool:
        if self.at_most is not None and self.figure > self.at_most:
            return False
        return self.at_least is None or self.figure >= self.at_least

    def line(self) -> str:
        bounds = [
            f"{words} {number(bound)}{self.unit}"
            for words, bound in (("at most", self.at_most), ("at least", self.at_least))
            if bound is not None
        ]
        verdict = "met" if self.met else "MISSED"
        figure = f"{number(self.figure)}{self.unit}"
        return f"{verdict}: {self.what}: {figure}, target {' and '.join(bounds)}"


@dataclass
class Report:
    """All that one benchmark has to say."""

    name: str
    title: str
    about: str = ""
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def missed(self) -> list[str]:
        return [target.line() for target in self.targets if not target.met]

    def as_dict(self) -> dict[str, object]:
        targets = [{**asdict(one), "met": one.met} for one in self.targets]
        return {**asdict(self), "targets": targets}

    def markdown(self, figures: Iterable[str] = (), when: str = "") -> str:
        """Everything as a section of a page, with the files of its figures."""
        parts = [f"## {self.name}: {self.title}", when, self.about]
        parts += [table.markdown() for table in self.tables]
        parts += [f"![{self.title}]({figure})" for figure in figures]
        parts.append(
            "\n".join(
                [f"- {target.line()}" for target in self.targets]
                + [f"- {note}" for note in self.notes]
                + [
                    f"- missing here, and so not measured: {one}"
                    for one in self.missing
                ]
            )
        )
        return "\n\n".join(part for part in parts if part) + "\n"

    def draw(self, folder: Path) -> list[str]:
        """Write a figure for each table; return the names of the files."""
        files = []
        for index, table in enumerate(self.tables, 1):
            file = f"{self.name}-{index}.svg"
            _draw(table, folder / file)
            files.append(file)
        return files


def number(value: float) -> str:
    """Three digits that count, and no more."""
    if value == 0:
        return "0"
    size = abs(value)
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:.{digits}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown that can be read as text, too."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def _draw(table: Table, file: Path) -> None:
    """Bars of the medians, lines from the lowest to the highest value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "mrelease"  # the same values, the same file
    names = list(table.rows)
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(names) * len(table.columns)))
    axes = figure.add_subplot()
    height = 0.8 / len(table.columns)
    for column, label in enumerate(table.columns):
        all_series = [table.rows[name][column] for name in names]
        medians = [series.median * table.scale for series in all_series]
        below = [series.median - min(series.values) for series in all_series]
        above = [max(series.values) - series.median for series in all_series]
        axes.barh(
            [index + column * height for index in range(len(names))],
            medians,
            height,
            label=label,
            xerr=[[one * table.scale for one in side] for side in (below, above)],
            error_kw={"linewidth": 1, "capsize": 2},
        )
    medians = [row.median for rows in table.rows.values() for row in rows]
    if table.unit != "%" and min(medians) > 0 and max(medians) > 20 * min(medians):
        axes.set_xscale("log")
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel(table.unit)
    axes.set_title(table.title)
    if len(table.columns) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # over no bar
    figure.tight_layout()
    figure.savefig(file, format="svg", metadata={"Date": None})
