"""The benchmarks: what they make of figures, and that they measure what they say.

No figure is tested: a tiny run of each has to verify its own work.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the benchmarks, of the source", allow_module_level=True)
sys.path.append(str(ROOT))

import mrelease  # noqa: E402
from benchmarks import imports, lab, quiet, race, reaper, threads, ways  # noqa: E402
from benchmarks.report import Report, Series, Table, Target, number  # noqa: E402

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="needs cc")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234")],
)
def test_a_number_has_three_digits_that_count(value: float, text: str) -> None:
    assert number(value) == text


def test_a_series_shows_its_median_and_its_spread() -> None:
    assert Series([3, 1, 2]).text() == "2.00 [1.00-3.00]"
    assert Series([0.5]).text(1000) == "500"


def test_what_was_cut_off_is_said() -> None:
    series = Series()
    for value in (1, None, None):
        series.add(value, 60)
    assert series.text() == "> 60.0 [1.00-> 60.0]"


def test_a_table_has_ratios_to_its_first_row() -> None:
    table = Table("victims", "ms", ["back"], scale=1000)
    for value in (0.001, 0.002, 0.003):
        table.add("theirs", value)
        table.add("ours", value / 2)
    assert table.ratio("ours", "theirs") == 0.5
    head, rule, theirs, ours = table.markdown().splitlines()
    assert "back, ms" in head
    assert set(rule) == set("| -:")
    assert theirs.split("|")[3].strip() == "1.00"
    assert ours.split("|")[2].strip() == "1.00 [0.500-1.50]"
    assert ours.split("|")[3].strip() == "0.500"
    assert len({len(line) for line in (head, rule, theirs, ours)}) == 1


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target("a", 1.0, at_most=1.0), True),
        (Target("a", 1.1, at_most=1.0), False),
        (Target("a", 20, at_least=20), True),
        (Target("a", 19.9, at_least=20), False),
    ],
)
def test_a_target_says_whether_it_was_met(target: Target, met: bool) -> None:
    assert target.met is met
    assert target.line().startswith("met: " if met else "MISSED: ")
    assert bool(Report("a", "a", targets=[target]).missed) is not met


def test_a_report_is_a_page_and_json() -> None:
    table = Table("victims", "ms", ["back"])
    table.add("ours", 1.5)
    report = Report("quiet", "memory", "What it is.", [table], missing=["psutil"])
    page = report.markdown(["quiet-1.svg"], "Today.")
    for part in (
        "## quiet: memory",
        "Today.",
        "What it is.",
        "(quiet-1.svg)",
        "psutil",
    ):
        assert part in page
    assert json.loads(json.dumps(report.as_dict()))["tables"][0]["rows"]["ours"]


def test_a_figure_is_drawn_alike_twice(tmp_path: Path) -> None:
    if not importlib.util.find_spec("matplotlib"):
        pytest.skip("needs matplotlib")
    # In a process of its own: matplotlib keeps its fonts open.
    program = """
import sys
from pathlib import Path
from benchmarks.report import Report, Table
table = Table("victims", "ms", ["back", "exit"])
for value in (1, 100):
    table.add(f"{value} ms", value, value)
for folder in map(Path, sys.argv[1:]):
    assert Report("quiet", "", tables=[table]).draw(folder) == ["quiet-1.svg"]
"""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    subprocess.run([sys.executable, "-c", program, *folders], check=True, cwd=ROOT)
    first, second = ((folder / "quiet-1.svg").read_bytes() for folder in folders)
    assert first == second
    assert b"<svg" in first


def test_a_percentile_is_a_value_that_was_seen() -> None:
    values = tuple(float(n) for n in range(1, 201))
    assert reaper.percentile(values, 99) == 198
    assert reaper.percentile((1.0,), 99) == 1


def test_the_command_refuses_what_it_does_not_know() -> None:
    command = [sys.executable, "-m", "benchmarks", "nothing"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "there is no benchmark nothing" in result.stderr


@contextmanager
def counted() -> Iterator[lab.Memory]:
    """Memory that is counted apart: else that of other processes might hide it."""
    with lab.memory() as memory:
        if memory.cgroup is None:
            pytest.skip("needs a memory cgroup that can be made")
        yield memory


@needs_compiler
@pytest.mark.needs("release")
class TestTinyRuns:
    @pytest.mark.parametrize("name", [ways.SIGKILL, ways.CTYPES, ways.C, ways.MRELEASE])
    def test_memory_is_seen_to_come_back(self, name: str) -> None:
        with counted() as memory:
            seen = quiet.measure(ways.WAYS[name], memory, 32)
        assert seen.back is not None
        assert seen.exit is not None

    def test_memory_that_is_not_there_is_not_measured(self) -> None:
        with (
            lab.memory() as memory,
            lab.victim(1) as victim,
            pytest.raises(RuntimeError, match="the victims hold"),
        ):
            # So much more is not there.
            lab.watch(memory, memory.held() + (1 << 30), [victim.pid], lambda: None)

    def test_who_is_not_killed_is_cut_off(self) -> None:
        with counted() as memory:
            before = memory.held()
            with lab.victim(32, join=memory.join) as victim:
                seen = lab.watch(memory, before, [victim.pid], lambda: None, 0.1)
        assert seen.exit is None

    def test_a_race_is_counted(self) -> None:
        won = race.race(1)
        assert set(won) == {ways.C, ways.CTYPES, race.PLAIN, race.BARRED}
        assert all(share in (0, 100) for shares in won.values() for share in shares)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_threads_release_one_victim(self, workers: int) -> None:
        seconds = threads.release(threads.at_its_exit, 16, workers)
        assert seconds is not None

    def test_everything_ends_with_its_context(self) -> None:
        with lab.victim(1) as victim, lab.spinners(1):
            pass
        assert victim.returncode is not None

    def test_a_way_through_a_reaper_is_timed(self) -> None:
        with counted() as memory, mrelease.Reaper() as through:
            seen = reaper.measure(
                lambda pidfd: through.kill(pidfd).result(), memory, 16, Event()
            )
        assert min(seen) > 0  # of memory and exit, either may be seen first

    def test_an_import_is_timed_and_the_first_kill_watched(self) -> None:
        assert imports.seconds("import mrelease") > 0
        assert imports.loaded_by_first_kill() == []

    def test_a_benchmark_says_what_it_found(self, tmp_path: Path) -> None:
        file = tmp_path / "found.json"
        command = [sys.executable, "-m", "benchmarks.gil", "--quick", "--runs=1"]
        command += ["--size=16", f"--json={file}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode in (0, 1), result.stderr
        [found] = json.loads(file.read_text())["benchmarks"]
        assert found["name"] == "gil"
        assert found["targets"]
        assert ("MISSED" in result.stdout) is (result.returncode == 1)
