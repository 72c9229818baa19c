"""examples/guard.py on any machine: whom it chooses, and what it says.

Where memory does run out is tests/exhaust_guard.py, in a guest. Here it kills in a pid
namespace of its own only, where nobody else can be the largest.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cgroups
import victims
from calls import apart, run_python
from mrelease import _proc

ROOT = Path(__file__).parent.parent
GUARD = ROOT / "examples/guard.py"

pytestmark = pytest.mark.skipif(
    not GUARD.exists(), reason="needs the source's examples"
)


@pytest.fixture(scope="module")
def guard() -> ModuleType:
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("guard", GUARD)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def choose(
    guard: ModuleType,
    pids: Iterable[int],
    spare: Callable[[Any], bool] = lambda process: False,
) -> int | None:
    """The pid of whom it would kill of these."""
    found = guard.choose(set(pids), spare)
    return None if found is None else int(found.pid)


def adjust(pid: int, adjustment: int) -> None:
    Path(f"/proc/{pid}/oom_score_adj").write_text(str(adjustment))


def test_the_largest_is_chosen(guard: ModuleType) -> None:
    with victims.victim(16) as small, victims.victim(48) as large:
        assert choose(guard, [small.pid, large.pid]) == large.pid
        assert choose(guard, [small.pid]) == small.pid


def test_shared_memory_does_not_count(guard: ModuleType) -> None:
    with victims.victim(16, shared_mib=64) as sharing, victims.victim(48) as large:
        assert choose(guard, [sharing.pid, large.pid]) == large.pid


def test_oom_score_adj_adds(guard: ModuleType) -> None:
    with victims.victim(8) as small, victims.victim(32) as large:
        adjust(small.pid, 1000)
        assert choose(guard, [small.pid, large.pid]) == small.pid


@pytest.mark.needs("root")
def test_oom_score_adj_takes_away_and_at_last_excludes(guard: ModuleType) -> None:
    with victims.victim(8) as small, victims.victim(32) as large:
        try:
            adjust(large.pid, -999)
        except PermissionError:
            pytest.skip("needs CAP_SYS_RESOURCE")
        assert choose(guard, [small.pid, large.pid]) == small.pid
        assert choose(guard, [large.pid]) == large.pid
        adjust(large.pid, -1000)
        assert choose(guard, [large.pid]) is None


def test_it_never_chooses_itself_or_the_first_process(guard: ModuleType) -> None:
    assert choose(guard, [1, os.getpid()]) is None


def test_whom_it_is_to_spare_it_spares(guard: ModuleType) -> None:
    with victims.victim(8) as small, victims.victim(32) as large:
        pids = [small.pid, large.pid]
        assert choose(guard, pids, lambda one: one.pid == large.pid) == small.pid
        assert choose(guard, pids, lambda one: True) is None


@pytest.mark.needs("root")
def test_kernel_threads_are_none(guard: ModuleType) -> None:
    if Path("/proc/2/comm").read_text() != "kthreadd\n":
        pytest.skip("needs the first pid namespace")
    assert guard.look(2) is None


def test_who_has_died_is_none(guard: ModuleType) -> None:
    with victims.zombie() as dead:
        assert guard.look(dead.pid) is None
    assert guard.look(victims.reaped_pid()) is None


def test_a_name_cannot_pass_for_a_line(guard: ModuleType) -> None:
    name = "a)\x1cx\x85Uid: 5\n"  # at most 15 bytes
    program = (
        f"open('/proc/self/comm', 'w').write({name!r})\n"
        "import sys\nprint('ready', flush=True)\nsys.stdin.read()"
    )
    with closing(victims.Child(program)) as one:
        one.wait_ready()
        found = guard.look(one.pid)
        assert found.uid == os.getuid()
        assert found.name == "a)\x1cx\x85Uid: 5\\n"


def test_who_has_anothers_pid_is_not_killed(guard: ModuleType) -> None:
    with victims.victim() as one, guard.Reaper() as reaper:
        seen = guard.look(one.pid)
        for another in ({"started": seen.started + 1}, {"uid": seen.uid + 1}):
            said = guard.kill(reaper, seen._replace(**another))
            assert said["released"] is False
            assert "is not the one meant" in said["error"]
        assert not one.exited()
        assert guard.kill(reaper, seen)["released"] is True
        one.wait_exit()


# ---- As a command


class Command:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], victims.TIMEOUT)[0]
        read: dict[str, Any] = json.loads(self.process.stdout.readline())
        return read


@contextmanager
def command(
    *options: str, under: tuple[str, ...] = (), stderr: int | None = None
) -> Iterator[Command]:
    with subprocess.Popen(
        [*under, sys.executable, str(GUARD), *options],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    ) as process:
        try:
            yield Command(process)
        finally:
            process.kill()


def refused(*options: str) -> str:
    result = subprocess.run(
        [sys.executable, str(GUARD), "--dry-run", *options],
        capture_output=True,
        text=True,
    )
    assert result.returncode in (1, 2)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    assert "'(': missing )" in refused("--avoid", "(")
    assert "--left" in refused("--left", "101")
    assert "--left" in refused("--left", "nan")
    assert "--left" in refused("--left", "some")
    assert "is not a cgroup directory" in refused("--cgroup", str(tmp_path))
    assert "No such file" in refused("--cgroup", str(tmp_path / "none"))


@pytest.mark.needs("root")
def test_a_trigger_that_the_kernel_does_not_take_is_refused() -> None:
    if not os.path.exists("/proc/pressure/memory"):
        pytest.skip("needs PSI")
    assert "'some nonsense'" in refused("--trigger", "some nonsense")


def test_a_dry_run_names_the_victim_and_kills_nobody() -> None:
    with victims.victim(64) as one:
        adjust(one.pid, 1000)
        with command("--dry-run", "--left", "100") as guard:
            assert guard.line()["event"] == "start"
            line = guard.line()
            guard.process.send_signal(signal.SIGTERM)
            assert guard.process.wait(50) == 0
        assert line["event"] == "dry run"
        assert line["reason"] == "left"
        # Whoever else has 1000 thousandths may be larger.
        assert line["oom_score_adj"] == 1000
        assert not one.exited()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(number: signal.Signals) -> None:
    with command("--left", "0", "--dry-run") as guard:
        assert guard.line()["event"] == "start"
        guard.process.send_signal(number)
        assert guard.process.wait(50) == 0
        assert guard.process.stdout is not None
        assert guard.process.stdout.read() == ""


@pytest.mark.needs("root", "cgroup2")
def test_in_a_cgroup_it_sees_that_alone_and_ends_with_it() -> None:
    with victims.victim(64), victims.victim(16) as inside, cgroups.cgroup() as path:
        cgroups.enter(path, inside.pid)
        under = ["--cgroup", str(path), "--left", "100", "--dry-run"]
        with command(*under, stderr=subprocess.PIPE) as guard:
            assert guard.line()["event"] == "start"
            assert guard.line()["pid"] == inside.pid
            cgroups.destroy(path)
            assert guard.process.wait(50) == 1
            assert guard.process.stderr is not None
            assert "No such file or directory" in guard.process.stderr.read()


@pytest.mark.needs("root", "cgroup2", "fuse", "release")
def test_told_to_end_amid_a_kill_it_tells_of_that_first() -> None:
    with cgroups.cgroup() as path, victims.stuck_writer(16) as one:
        cgroups.enter(path, one.pid)
        with command("--cgroup", str(path), "--left", "100") as guard:
            assert guard.line()["event"] == "start"
            while not _proc.dying(one.pid):
                time.sleep(0.01)
            guard.process.send_signal(signal.SIGTERM)
            # Its memory is back after this only.
            one.unstick()
            line = guard.line()
            assert guard.process.wait(50) == 0
        assert (line["event"], line["pid"]) == ("kill", one.pid)
        assert line["released"]


# What hides PSI, in a mount namespace of its own.
NO_PSI = ("sh", "-c", 'mount -t tmpfs none /proc/pressure && exec "$@"', "sh")


@pytest.mark.needs("root", "unshare", "mount")
def test_without_psi_what_is_left_has_to_do() -> None:
    if not os.path.exists("/proc/pressure"):
        under: tuple[str, ...] = ()
    else:
        under = ("unshare", "--mount", *NO_PSI)
    with command("--dry-run", "--left", "100", under=under) as guard:
        assert "No such file" in guard.line()["pressure"]
        assert guard.line()["reason"] == "left"
        guard.process.send_signal(signal.SIGTERM)
        assert guard.process.wait(50) == 0


# In a pid namespace, so that the guard sees nobody else. The program itself, its shell
# and the worker are spared by their names.
NAMESPACE = f"""
import json, signal, subprocess, sys
import exhaust

with (
    exhaust.hog(32) as small,
    exhaust.hog(64) as large,
    exhaust.workers(1) as (worker,),
):
    for hog in (small, large):
        while hog.words() != ["grown"]:
            pass
    guard = subprocess.Popen(
        [sys.executable, {str(GUARD)!r}, "--left", "100", "--avoid", "^(?!hog$)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [json.loads(guard.stdout.readline()) for _ in range(4)]
    guard.send_signal(signal.SIGTERM)
    guard.communicate()
    print(json.dumps(dict(
        lines=lines[1:], small=small.pid, large=large.pid, status=guard.returncode,
        exited=[child.exited() for child in (small, large, worker)],
    )))
"""


@pytest.mark.needs("release")
def test_it_kills_the_largest_first_and_then_finds_nobody() -> None:
    under = apart()
    if not under:
        pytest.skip("needs a pid namespace: it would kill whoever is largest")
    result = run_python(NAMESPACE, under=under)
    assert result.stderr == ""
    said = json.loads(result.stdout)
    first, second, third = said["lines"]
    assert [first["pid"], second["pid"]] == [said["large"], said["small"]]
    for line in (first, second):
        assert line["event"] == "kill"
        assert line["released"]
        assert line["freed"] > 0
    assert third["event"] == "nobody"
    assert said["status"] == 0
    assert said["exited"] == [True, True, False]
