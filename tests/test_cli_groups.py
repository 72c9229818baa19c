"""The command on trees and cgroups."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import victims
from cgroups import cgroup, enter
from test_cli import on_terminal, run

TREE = """
def parent():
    child(lambda: (say("grandchild", os.getpid()), wait()))
    say("child", os.getpid())
    wait()

child(parent)
say("ready")
wait()
"""
OBEDIENT = "ready", "child", "grandchild"


@contextmanager
def tree(*join: Path) -> Iterator[victims.Family]:
    with victims.family(TREE, *OBEDIENT, join=join) as found:
        yield found


def lines(text: str) -> tuple[list[int], str]:
    """The pids of the lines, and the last line, which has the total."""
    *rest, total = text.splitlines()
    return [int(line.split()[0]) for line in rest], total


def test_a_tree_has_a_line_a_process_its_root_last_and_a_total() -> None:
    with tree() as family:
        everybody = set(family.running())
        result = run("kill", "--tree", "--wait", family.root)
        assert (result.returncode, result.stderr) == (0, "")
        pids, total = lines(result.stdout)
        assert (set(pids), pids[-1]) == (everybody, family.root)
        found = re.fullmatch(r" +total 3 processes +3 back +(.*) MiB +(.*) ms", total)
        assert found
        assert float(found[1]) > 1
        assert family.running() == {}


def test_a_dry_run_of_a_tree_lists_it_and_touches_nothing() -> None:
    with tree() as family:
        before = family.running()
        result = run("kill", "--tree", "-n", family.root)
        pids, total = lines(result.stdout)
        assert (set(pids), pids[-1]) == (set(before), family.root)
        assert "total 3 processes     would kill" in total
        assert set(family.running()) == set(before)
        assert "T" not in family.running().values()
        *rest, last = map(
            json.loads,
            run("kill", "--tree", "-n", "--json", family.root).stdout.splitlines(),
        )
        assert [found["pid"] for found in rest] == pids
        assert last["total"] == 3
        assert last["bytes"] == sum(found["anonymous"] for found in rest)


@pytest.mark.parametrize("ignoring", [False, True])
def test_term_asks_a_whole_tree_first(ignoring: bool) -> None:
    ignore = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    program = (ignore if ignoring else "") + TREE
    with victims.family(program, *OBEDIENT) as family:
        grace = 0.1 if ignoring else 60
        result = run(
            "kill", "--tree", "--json", "--wait", f"--term={grace}", family.root
        )
        *rest, _ = map(json.loads, result.stdout.splitlines())
        assert {found["signal"] for found in rest} == {9 if ignoring else 15}
        assert len(rest) == 3
        assert family.running() == {}


def test_the_tree_of_the_command_itself_is_refused() -> None:
    result = run("kill", "--tree", os.getpid())
    assert result.returncode == 2
    assert "the caller is in it" in result.stderr


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("v2", marks=pytest.mark.needs("cgroup2")),
        pytest.param("v1", marks=pytest.mark.needs("root", "cgroup1")),
    ],
)
@pytest.mark.parametrize("term", [False, True])
def test_a_cgroup_has_a_line_a_process_and_a_total(kind: str, term: bool) -> None:
    with cgroup(kind) as path, tree(path) as family:  # type: ignore[arg-type]
        everybody = set(family.running())
        listed, total = lines(run("kill", "--cgroup", "-n", path).stdout)
        assert (set(listed), "would kill" in total) == (everybody, True)
        assert set(family.running()) == everybody
        options = ["--term=60"] if term else []
        result = run("kill", "--cgroup", "--wait", *options, path)
        assert (result.returncode, result.stderr) == (0, "")
        pids, total = lines(result.stdout)
        assert (set(pids), "3 back" in total) == (everybody, True)
        assert family.running() == {}


def test_what_is_no_cgroup_is_refused_by_its_path(tmp_path: Path) -> None:
    result = run("kill", "--cgroup", tmp_path)
    assert (result.returncode, str(tmp_path) in result.stderr) == (2, True)
    result = run("kill", "--cgroup", tmp_path / "missing")
    assert (result.returncode, str(tmp_path / "missing") in result.stderr) == (3, True)


def test_a_tree_and_a_cgroup_at_once_are_wrong_usage() -> None:
    assert run("kill", "--tree", "--cgroup", "1").returncode == 2


@pytest.mark.needs("release", "cgroup2")
def test_on_a_terminal_a_bar_shows_how_much_is_back() -> None:
    with (
        cgroup("v2") as path,
        victims.exit_stopped(16) as one,
        victims.exit_stopped(16, sharer="clone") as two,
    ):
        for victim in (one, two):
            enter(path, victim.pid)
        status, output = on_terminal("kill", "--cgroup", "-t", "0.7", path)
        assert status == 1
        # The memory of one is back, that of the other is shared with a living process.
        assert re.search(r"2 processes: 0\.\d s \[#+ +\] [\d.]+ MiB held", output)
        assert "total 2 processes" in output
