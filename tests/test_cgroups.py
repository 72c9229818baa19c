"""cgroup_pidfds and kill_cgroup: v1 and v2, what they refuse, that nobody survives."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import cgroups
import victims
from calls import run_python
from cgroups import Kind, cgroup, enter
from mrelease import (
    KillResult,
    Pidfd,
    _batch,
    _groups,
    _proc,
    cgroup_pidfds,
    kill,
    kill_cgroup,
)
from victims import NOBODY, apart

MIB = 1 << 20
BOMB = 600  # processes at most

both = pytest.mark.parametrize(
    "kind",
    [
        pytest.param("v2", marks=pytest.mark.needs("root", "cgroup2")),
        pytest.param("v1", marks=pytest.mark.needs("root", "cgroup1")),
    ],
)
needs_v2 = pytest.mark.needs("root", "cgroup2")
needs_release = pytest.mark.needs("release")


def pids_of(path: Any, **options: Any) -> list[int]:
    """The pids that cgroup_pidfds() yields, sorted; one pidfd is open at a time."""
    found = []
    for pidfd in cgroup_pidfds(path, **options):
        with pidfd:
            found.append(pidfd.pid)
    return sorted(found)


def exited(results: list[KillResult]) -> list[int]:
    """The pids of results, sorted; each must have exited."""
    for result in results:
        assert result.outcome in ("released", "exited")
        assert result.released
        assert result.exited
    return sorted(result.pid for result in results)


def killed(results: list[KillResult]) -> list[int]:
    """The pids of results, sorted; each must have exited of a SIGKILL."""
    assert all(result.signal == signal.SIGKILL for result in results)
    return exited(results)


def gone(path: Path) -> bool:
    """Whether no process is in a cgroup or in one below it."""
    return not any(cgroups.pids(below) for below in cgroups.subtree(path))


@contextmanager
def members(path: Path, number: int = 1, mib: int = 1) -> Iterator[list[int]]:
    """Sleeping processes in a cgroup."""
    with ExitStack() as stack:
        pids = []
        for _ in range(number):
            victim = stack.enter_context(victims.victim(mib))
            enter(path, victim.pid)
            pids.append(victim.pid)
        yield sorted(pids)


def make(path: Path, *names: str) -> list[Path]:
    """Cgroups below a cgroup."""
    for name in names:
        (path / name).mkdir(parents=True)
    return [path / name for name in names]


# ---- cgroup_pidfds: what it yields


@both
def test_the_members_are_yielded_each_with_a_pidfd_of_its_own(kind: Kind) -> None:
    with cgroup(kind) as path, members(path, 3) as pids:
        pidfds = list(cgroup_pidfds(path))
        with ExitStack() as stack:
            for pidfd in pidfds:
                stack.enter_context(pidfd)
                assert isinstance(pidfd, Pidfd)
                assert not pidfd.exited
            assert sorted(pidfd.pid for pidfd in pidfds) == pids
            assert len({pidfd.fileno() for pidfd in pidfds}) == 3


@both
def test_nested_cgroups_are_walked_unless_told_otherwise(kind: Kind) -> None:
    with cgroup(kind) as path, members(path) as top:
        child, grandchild, _ = make(path, "a", "a/b", "empty")
        with members(child, 2) as middle, members(grandchild) as bottom:
            assert pids_of(path) == sorted(top + middle + bottom)
            assert pids_of(path, recursive=True) == sorted(top + middle + bottom)
            assert pids_of(path, recursive=False) == top
            assert pids_of(child) == sorted(middle + bottom)
            assert pids_of(path / "empty") == []


@both
def test_every_way_to_name_a_cgroup_works(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cgroup(kind) as path, members(path) as pids:
        link = tmp_path / "link"
        link.symlink_to(path)
        monkeypatch.chdir(path.parent)
        for name in (
            path,
            str(path),
            os.fsencode(path),
            f"{path}/",
            f"{path}/.",
            path.name,
            os.fsencode(path.name),
            link,
            f"./{path.name}/../{path.name}",
        ):
            assert pids_of(name) == pids


def test_the_callers_own_cgroup_may_be_listed() -> None:
    for path in own_cgroups():
        assert os.getpid() in pids_of(path, recursive=False)


@both
def test_the_root_cgroup_may_be_listed(kind: Kind) -> None:
    root = cgroups.mount(kind)
    with cgroup(kind) as path, members(path) as pids:
        assert set(pids_of(root)) >= set(pids)


def test_the_root_cgroup_may_be_listed_by_anybody() -> None:
    path = cgroups.mount("v2") or cgroups.mount("v1")
    if path is None:
        pytest.skip("needs a cgroup mount")
    assert os.getpid() in pids_of(path)


@both
def test_between_two_members_it_holds_no_descriptor(kind: Kind) -> None:
    with cgroup(kind) as path, members(path, 2):
        before = os.listdir("/proc/self/fd")
        pidfds = cgroup_pidfds(path)
        next(pidfds).close()
        assert os.listdir("/proc/self/fd") == before


@both
def test_whoever_has_exited_meanwhile_is_not_yielded(kind: Kind) -> None:
    with cgroup(kind) as path, ExitStack() as stack:
        processes = [stack.enter_context(victims.victim(1)) for _ in range(3)]
        for process in processes:
            enter(path, process.pid)
        pidfds = cgroup_pidfds(path)
        with next(pidfds) as first:
            rest = [process for process in processes if process.pid != first.pid]
        for process in rest:
            process.kill()
            process.reap()
        assert list(pidfds) == []


@both
def test_whoever_has_been_moved_out_meanwhile_is_not_yielded(kind: Kind) -> None:
    with cgroup(kind) as path, cgroup(kind) as other, members(path, 3) as pids:
        pidfds = cgroup_pidfds(path)
        with next(pidfds) as first:
            for pid in {*pids} - {first.pid}:
                enter(other, pid)
        assert list(pidfds) == []


@both
def test_one_moved_below_meanwhile_is_no_member_where_only_the_top_is_asked_for(
    kind: Kind,
) -> None:
    with cgroup(kind) as path, members(path, 2) as pids:
        (below,) = make(path, "below")
        pidfds = cgroup_pidfds(path, recursive=False)
        with next(pidfds) as first:
            for pid in {*pids} - {first.pid}:
                enter(below, pid)
        assert list(pidfds) == []


@both
def test_a_directory_that_vanishes_ends_the_iteration(kind: Kind) -> None:
    with cgroup(kind) as path:
        pidfds = cgroup_pidfds(path)
        path.rmdir()
        assert list(pidfds) == []


@both
def test_directories_that_vanish_on_the_way_are_passed_over(kind: Kind) -> None:
    with cgroup(kind) as path, members(path) as pids:
        below = make(path, "a", "a/b", "c")
        pidfds = cgroup_pidfds(path)
        with next(pidfds) as pidfd:
            assert [pidfd.pid] == pids
            for child in reversed(below):
                child.rmdir()
        assert list(pidfds) == []


@both
def test_a_leader_that_has_exited_before_its_threads_is_a_member(kind: Kind) -> None:
    with cgroup(kind) as path, victims.family_of_a_dead_leader(path) as family:
        assert cgroups.pids(path) == [family.root]
        assert pids_of(path) == [family.root]


@both
@pytest.mark.timeout(120)
def test_more_processes_than_descriptors_are_listed(kind: Kind) -> None:
    with cgroup(kind) as path, victims.crowd(400, path):
        expected = cgroups.pids(path)
        assert len(expected) == 400
        assert apart(lambda: pids_of(path), descriptors=64) == expected


# ---- cgroup_pidfds and kill_cgroup: what is no cgroup

functions = pytest.mark.parametrize(
    "function", [cgroup_pidfds, kill_cgroup], ids=lambda function: function.__name__
)


@functions
def test_a_path_that_is_not_there_is_named(function: Any, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for path in (missing, str(missing), os.fsencode(missing)):
        with pytest.raises(FileNotFoundError) as caught:
            function(path)
        assert os.fsencode(caught.value.filename) == os.fsencode(missing)


@functions
def test_a_path_that_is_no_directory_is_named(function: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(NotADirectoryError) as caught:
            function(path)
        assert os.fspath(caught.value.filename) == str(path)


@functions
def test_a_directory_that_is_no_cgroup_is_refused(
    function: Any, tmp_path: Path
) -> None:
    lookalike = tmp_path / "lookalike"
    lookalike.mkdir()
    (lookalike / "cgroup.procs").write_text(f"{os.getpid()}\n")
    link = tmp_path / "link"
    link.symlink_to(lookalike)
    for path in (tmp_path, lookalike, link, Path("/"), Path("/proc"), Path("/sys")):
        with pytest.raises(ValueError, match=rf"{path}(?!\w)"):
            function(path)
    with pytest.raises(ValueError, match="lookalike"):
        function(os.fsencode(lookalike))


@functions
@pytest.mark.parametrize("path", [None, 0, 1.5, ["/"]])
def test_what_is_no_path_is_refused(function: Any, path: Any) -> None:
    with pytest.raises(TypeError):
        function(path)


@functions
def test_an_empty_path_and_one_with_a_null_are_refused(function: Any) -> None:
    with pytest.raises(FileNotFoundError):
        function("")
    with pytest.raises(ValueError, match="null"):
        function("/sys\0")


@needs_v2
def test_a_threaded_cgroup_cannot_be_listed_and_its_domain_lists_it() -> None:
    with cgroup("v2") as path, victims.victim(1, threads=2) as victim:
        enter(path, victim.pid)
        threaded, other = make(path, "threaded", "other")
        (threaded / "cgroup.type").write_text("threaded")
        (other / "cgroup.type").write_text("threaded")
        (tid,) = set(victim.threads()) - {victim.pid}
        (threaded / "cgroup.threads").write_text(str(tid))
        for function in (pids_of, kill_cgroup):
            with pytest.raises(OSError, match="threaded") as caught:
                function(threaded)
            assert caught.value.errno == errno.EOPNOTSUPP
            assert os.fspath(caught.value.filename) == str(threaded)
        assert victim.state() == "S"
        assert pids_of(path) == [victim.pid]
        # Its leader, too, may be in the threaded one.
        (other / "cgroup.threads").write_text(str(victim.pid))
        assert pids_of(path) == [victim.pid]
        assert killed(kill_cgroup(path, wait=True, timeout=None)) == [victim.pid]


# ---- kill_cgroup: what it refuses, with nothing killed


def own_cgroups() -> list[Path]:
    """The caller's cgroups in every hierarchy mounted."""
    paths = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, below = line.split(":", 2)
        for version, options, mount in cgroups.mounts():
            v2 = version == "cgroup2" and not names
            if v2 or (names and set(names.split(",")) <= options):
                paths.append(mount / below.lstrip("/"))
    return [path for path in paths if path.is_dir()]


def test_the_root_cgroup_is_not_killed() -> None:
    # By a user who may kill nobody here, for the case that it is tried.
    if not (roots := {mount for _, _, mount in cgroups.mounts()}):
        pytest.skip("needs a cgroup mount")
    for path in roots:

        def refused(path: Path = path) -> None:
            with pytest.raises(ValueError, match=rf"{path}(?!\w)"):
                kill_cgroup(path)

        if os.geteuid() == 0:
            apart(refused, uid=NOBODY)
        elif path not in own_cgroups():
            refused()


@both
def test_the_callers_own_cgroup_and_those_above_are_not_killed(kind: Kind) -> None:
    with cgroup(kind) as path, members(path) as pids:
        middle, own, beside = make(path, "a", "a/b", "a/c")

        def refused() -> None:
            for above in (path, middle, own):
                with pytest.raises(ValueError, match=rf"{above}(?!\w)"):
                    kill_cgroup(above)
            for name in (own / "../b", Path(f"/proc/self/root/{own}")):
                with pytest.raises(ValueError, match=rf"{name}(?!\w)"):
                    kill_cgroup(name)

        with members(beside) as others:
            apart(refused, join=own)
            assert cgroups.pids(path) == pids
            assert cgroups.pids(beside) == others
            # One beside its own is not the caller's.
            results = apart(lambda: kill_cgroup(beside, wait=True), join=own)
            assert killed(results) == others
            assert cgroups.pids(path) == pids


@pytest.mark.needs("root", "unshare")
@both
def test_a_cgroup_that_holds_pid_1_is_not_killed(kind: Kind) -> None:
    # Pid 1 of a pid namespace of its own.
    program = """
import os
from cgroups import Path, enter
from mrelease import kill_cgroup
path = Path(PARENT)
enter(path / "below", os.getpid())
child = os.fork()
if child == 0:
    enter(path.parent, os.getpid())
    for name in (path, path / "below"):
        try:
            kill_cgroup(name)
        except ValueError as error:
            assert str(name) in str(error), error
        else:
            os._exit(1)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    with cgroup(kind) as top:
        path, _ = make(top, "a", "a/below")
        program = program.replace("PARENT", repr(str(path)))
        result = run_python(program, under=("unshare", "-pf", "--mount-proc"))
        assert (result.returncode, result.stderr) == (0, "")


@both
@pytest.mark.parametrize(
    "options", [{"timeout": -1}, {"settle": "1"}, {"tiemout": 1}, {"timeout": "1"}]
)
def test_bad_options_are_refused_before_anything_is_done(
    kind: Kind, options: Any
) -> None:
    with cgroup(kind) as path, members(path) as pids:
        with pytest.raises((TypeError, ValueError)):
            kill_cgroup(path, **options)
        assert cgroups.pids(path) == pids


# ---- kill_cgroup: nobody survives


@both
def test_an_empty_cgroup_has_no_results(kind: Kind) -> None:
    with cgroup(kind) as path:
        make(path, "a", "a/b")
        assert kill_cgroup(path) == []


@pytest.mark.usefixtures("idle")
@both
def test_a_whole_subtree_is_killed_and_what_is_beside_it_lives(kind: Kind) -> None:
    with cgroup(kind) as top, members(top) as above:
        path, child, grandchild, beside = make(top, "a", "a/b", "a/b/c", "d")
        with (
            members(path, 2) as first,
            members(child, 2) as second,
            members(grandchild, 2, mib=16) as third,
            members(beside) as others,
        ):
            results = kill_cgroup(path, wait=True, timeout=None)
            assert killed(results) == sorted(first + second + third)
            assert gone(path)
            assert (cgroups.pids(top), cgroups.pids(beside)) == (above, others)


@both
def test_every_option_of_kill_is_taken(kind: Kind) -> None:
    with cgroup(kind) as path, members(path, 2, mib=16) as pids:
        results = kill_cgroup(
            path, timeout=None, wait=True, boost=False, settle=60, measure=True
        )
        assert killed(results) == pids
        for result in results:
            assert (result.outcome, result.attempts) == ("exited", 0)
            assert result.freed is not None
            assert result.freed >= 16 * MIB


@both
def test_one_that_is_moved_out_meanwhile_is_alive_and_not_said_to_have_exited(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = _groups._check_cgroup
    with (
        cgroup(kind) as path,
        cgroup(kind) as other,
        victims.victim(1) as moved,
        victims.victim(1) as staying,
    ):

        def move(top: Any, caller: int) -> Any:
            members = check(top, caller)
            enter(other, moved.pid)
            return members

        enter(path, moved.pid)
        enter(path, staying.pid)
        monkeypatch.setattr(_groups, "_check_cgroup", move)
        results = {one.pid: one for one in kill_cgroup(path, wait=True, timeout=None)}
        assert not moved.exited()
        result = results.pop(moved.pid)
        assert (result.outcome, result.errno, result.signal) == ("alive", 0, None)
        assert not result.released
        assert [one.exited for one in results.values()] == [True]


@needs_v2
@needs_release
def test_who_is_not_listed_any_more_and_still_there_is_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As the kernel does with a process whose first thread has gone, while its last one
    # frees the memory.
    real = _groups._list
    listed: list[dict[int, Any]] = []

    def once(top: Any) -> dict[int, Any]:
        listed.append({} if listed else real(top))
        return listed[-1]

    with cgroup("v2") as path, victims.exit_stopped(8) as victim:
        if not (path / "cgroup.kill").exists():
            pytest.skip("needs cgroup.kill of Linux 5.14")
        enter(path, victim.pid)
        monkeypatch.setattr(_groups, "has_idle_cpu", lambda pids: True)
        monkeypatch.setattr(_groups, "_list", once)
        (result,) = kill_cgroup(path, timeout=60)
        assert (result.outcome, result.attempts) == ("released", 1)
        assert victim.anon() == 0


@pytest.mark.needs("root")
@pytest.mark.usefixtures("idle")
@both
def test_a_kernel_thread_is_left_as_it_is(kind: Kind) -> None:
    with cgroup(kind) as path, members(path) as pids, kernel_thread(path) as thread:
        cpus = os.sched_getaffinity(thread)
        nice = os.getpriority(os.PRIO_PROCESS, thread)
        results = kill_cgroup(path, wait=True, timeout=60)
        (left,) = [result for result in results if result.pid == thread]
        results.remove(left)
        assert killed(results) == pids
        assert (left.outcome, left.signal, left.errno) == ("alive", None, errno.EPERM)
        assert os.sched_getaffinity(thread) == cpus
        assert os.getpriority(os.PRIO_PROCESS, thread) == nice


@contextmanager
def kernel_thread(path: Path) -> Iterator[int]:
    """One that the kernel lets move into a cgroup, and back when all is done."""
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        if not _proc.is_kernel_thread(pid):
            continue
        try:
            enter(path, pid)
        except OSError:  # it is bound to its cgroup
            continue
        try:
            yield pid
        finally:
            enter(path.parent, pid)
        return
    pytest.skip("needs a kernel thread that may be moved")


@needs_release
@pytest.mark.usefixtures("idle")
@both
def test_before_they_have_settled_none_is_released(kind: Kind) -> None:
    with cgroup(kind) as path, victims.exit_stopped(8) as victim:
        enter(path, victim.pid)
        (result,) = kill_cgroup(path, settle=60, timeout=0)
        assert (result.outcome, result.attempts) == ("exiting", 0)
        (result,) = kill_cgroup(path, settle=0.01, timeout=60)
        assert (result.outcome, result.attempts) == ("released", 1)


@both
def test_it_is_found_by_every_name(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cgroup(kind) as path:
        link = tmp_path / "link"
        link.symlink_to(path)
        monkeypatch.chdir(path.parent)
        for name in (link, str(link), os.fsencode(path), path.name, f"{path}/"):
            with members(path) as pids:
                assert killed(kill_cgroup(name, wait=True, timeout=None)) == pids


@pytest.mark.usefixtures("idle")
@both
@needs_release
def test_whoever_cannot_exit_is_released(kind: Kind) -> None:
    with (
        cgroup(kind) as path,
        victims.exit_stopped(16) as stays,
        victims.victim(16) as goes,
    ):
        enter(path, stays.pid)
        enter(path, goes.pid)
        results = kill_cgroup(path, wait=True, timeout=0.5)
        found = {result.pid: result for result in results}
        assert found.keys() == {stays.pid, goes.pid}
        assert (found[stays.pid].outcome, found[stays.pid].exited) == (
            "released",
            False,
        )
        assert stays.anon() == 0
        goes.wait_exit()


@pytest.mark.usefixtures("idle")
@both
def test_stopped_members_are_killed(kind: Kind) -> None:
    with cgroup(kind) as path, victims.victim() as victim:
        enter(path, victim.pid)
        victim.stop()
        assert killed(kill_cgroup(path, wait=True, timeout=None)) == [victim.pid]


# cgroup.kill passes it by.
@pytest.mark.usefixtures("idle")
@both
def test_a_leader_that_has_exited_before_its_threads_is_killed(kind: Kind) -> None:
    with cgroup(kind) as path, victims.family_of_a_dead_leader(path) as family:
        results = kill_cgroup(path, wait=True, timeout=None)
        assert killed(results) == [family.root]
        assert family.running() == {}


@needs_v2
def test_whoever_seemed_to_survive_cgroup_kill_was_killed_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wait_until_gone(pidfd: Pidfd) -> None:
        with suppress(ProcessLookupError):
            while True:
                pidfd.send_signal(0)

    with cgroup("v2") as path, victims.family("wait()", "root", join=[path]) as family:
        if not (path / "cgroup.kill").exists():
            pytest.skip("needs cgroup.kill of Linux 5.14")
        for module in (_batch, _groups):
            monkeypatch.setattr(module, "has_idle_cpu", lambda pids: True)
        # A dying thread drops the signal a moment before it is flagged.
        monkeypatch.setattr(_proc, "dying", lambda pid: False)
        monkeypatch.setattr(_batch, "check_victim", wait_until_gone)
        assert killed(kill_cgroup(path, wait=True, timeout=None)) == [family.root]


@both
def test_only_zombies_are_nobody(kind: Kind) -> None:
    with cgroup(kind) as path, victims.victim(1) as victim:
        enter(path, victim.pid)
        victim.kill()
        victim.wait_exit()
        assert kill_cgroup(path) == []


@pytest.mark.usefixtures("idle")
@needs_v2
def test_frozen_processes_are_killed() -> None:
    with cgroup("v2") as path, members(path, 2) as pids:
        if not (path / "cgroup.freeze").exists():
            pytest.skip("needs cgroup.freeze of Linux 5.2")
        freeze(path)
        assert killed(kill_cgroup(path, wait=True, timeout=None)) == pids
        assert gone(path)


def freeze(path: Path) -> None:
    (path / "cgroup.freeze").write_text("1")
    end = time.monotonic() + cgroups.TIMEOUT
    while "frozen 1" not in (path / "cgroup.events").read_text():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.usefixtures("idle")
@needs_release
@pytest.mark.needs("freezer")
def test_what_a_v1_freezer_holds_is_released_and_does_not_hold_up_the_caller() -> None:
    with victims.frozen(16) as victim:
        assert victim.cgroup is not None
        (result,) = kill_cgroup(victim.cgroup, wait=True, timeout=0.3)
        assert (result.pid, result.outcome, result.exited) == (
            victim.pid,
            "released",
            False,
        )
        assert victim.anon() == 0


# Every process forks, and ends or, three times of four, goes on.
BOMB_PROGRAM = """
pause = fork_pause()
say("bomb")
while True:
    try:
        if os.fork() and os.urandom(1)[0] < 64:
            os._exit(0)
    except OSError:
        time.sleep(pause)
"""


@contextmanager
def bomb(path: Path, *join: Path) -> Iterator[victims.Family]:
    """A fork bomb at the limit of its pids cgroup, in others as well."""
    with victims.family(BOMB_PROGRAM, "bomb", join=(path, *join)) as family:
        end = time.monotonic() + cgroups.TIMEOUT
        while int((path / "pids.current").read_text()) < BOMB * 0.9:
            assert time.monotonic() < end
            time.sleep(0.01)
        yield family


@pytest.mark.needs("root", "pids")
def test_a_fork_bomb_in_a_limited_cgroup_is_killed_to_the_last() -> None:
    with cgroup("pids", pids=BOMB) as path, bomb(path) as family:
        results = kill_cgroup(path, wait=True, timeout=None)
        assert gone(path)
        assert family.running() == {}
        assert len(exited(results)) >= BOMB // 2


@needs_v2
@pytest.mark.needs("pids")
def test_a_fork_bomb_is_killed_by_cgroup_kill() -> None:
    with ExitStack() as stack:
        path = limit = stack.enter_context(cgroup("pids", pids=BOMB))
        if not (limit / "cgroup.type").exists():  # of v1: it limits, and is not killed
            path = stack.enter_context(cgroup("v2"))
        family = stack.enter_context(bomb(limit, path))
        (path / "below").mkdir()
        results = kill_cgroup(path, wait=True, timeout=None)
        assert gone(path)
        assert family.running() == {}
        assert len(exited(results)) >= BOMB // 2


@both
def test_one_that_forks_all_the_time_is_killed(kind: Kind) -> None:
    program = """
say("ready")
while True:
    child(lambda: os._exit(0))
    os.wait()
"""
    for _ in range(5):
        with (
            cgroup(kind) as path,
            victims.family(program, "ready", join=[path]) as family,
        ):
            results = kill_cgroup(path, wait=True, timeout=None)
            assert gone(path)
            assert family.running() == {}
            assert family.root in exited(results)


HOPPER = """
#include <sys/wait.h>
#include <signal.h>
#include <unistd.h>

int main(void)
{
    signal(SIGCHLD, SIG_IGN);
    while (fork() == 0)
        continue;
    return 0;
}
"""


@pytest.mark.needs("root", "cgroup1", "cc")
def test_one_that_forks_and_exits_all_the_time_is_killed(tmp_path: Path) -> None:
    # Each lives for a moment only, and is gone when it is to be killed.
    (tmp_path / "hopper.c").write_text(HOPPER)
    subprocess.run(["cc", "-o", "hopper", "hopper.c"], cwd=tmp_path, check=True)
    for _ in range(10):
        with cgroup("v1") as path:
            subprocess.run(
                [tmp_path / "hopper"], preexec_fn=lambda: enter(path, os.getpid())
            )
            kill_cgroup(path, wait=True, timeout=None)
            assert gone(path)


@needs_v2
def test_whoever_joins_after_the_write_to_cgroup_kill_is_killed_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(killer: int) -> None:
        real(killer)
        writes.append(killer)
        if len(writes) == 1:
            enter(path, joiner.pid)

    real = _groups._write_kill
    writes: list[int] = []
    monkeypatch.setattr(_groups, "_write_kill", write)
    with cgroup("v2") as path, members(path), victims.victim(1) as joiner:
        if not (path / "cgroup.kill").exists():
            pytest.skip("needs cgroup.kill of Linux 5.14")
        results = kill_cgroup(path, wait=True, timeout=None)
        assert joiner.pid in exited(results)
        assert len(writes) == 2


@both
def test_a_directory_that_vanishes_when_it_is_empty_is_no_error(kind: Kind) -> None:
    # The remover waits for each cgroup to be empty, and the killer looks at them until
    # they are. Whichever is first, who was in them has been killed.
    remover = """
say("ready")
while True:
    for path in PATHS:
        try:
            os.rmdir(path)
        except OSError:
            pass
    if not os.path.exists(path):
        wait()
"""
    for _ in range(5):
        with cgroup(kind) as path:
            below, child = make(path, "a", "a/b")
            program = remover.replace("PATHS", repr([str(child), str(below)]))
            with members(child) as pids, victims.family(program, "ready"):
                assert killed(kill_cgroup(below, wait=True, timeout=None)) == pids


# ---- kill_cgroup: many, and few descriptors


@needs_v2
@pytest.mark.timeout(180)
def test_3000_processes_are_killed_with_256_descriptors() -> None:
    with cgroup("v2") as path, victims.crowd(3000, path) as family:
        expected = cgroups.pids(path)
        assert len(expected) == 3000
        kill_it = lambda: kill_cgroup(path, wait=True, timeout=None)  # noqa: E731
        results = apart(kill_it, descriptors=256)
        assert sorted(result.pid for result in results) == expected
        # Some results may come early, before the memory is back.
        assert {result.signal for result in results} == {signal.SIGKILL}
        victims._until(lambda: not family.running(), "the killed to be gone")
        assert gone(path)


@pytest.mark.needs("root", "cgroup1")
@pytest.mark.timeout(180)
def test_more_processes_than_descriptors_are_killed_in_a_v1_cgroup() -> None:
    with cgroup("v1") as path, victims.crowd(700, path) as family:
        expected = cgroups.pids(path)
        results = apart(
            lambda: kill_cgroup(path, wait=True, timeout=None), descriptors=64
        )
        # Some pidfds are closed before the exit, to open others.
        assert sorted(result.pid for result in results) == expected
        assert all(result.released for result in results)
        victims._until(lambda: not family.running(), "the killed to be gone")
        assert gone(path)


@needs_v2
def test_with_no_descriptor_left_cgroup_kill_still_kills() -> None:
    with cgroup("v2") as path, victims.crowd(50, path) as family:
        if not (path / "cgroup.kill").exists():
            pytest.skip("needs cgroup.kill of Linux 5.14")
        expected = cgroups.pids(path)
        # Not in a fork of this process: uvloop's handler aborts in a child of a child
        # that has no descriptor.
        program = f"""
import json, resource
from mrelease import kill_cgroup
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
print(json.dumps([result.as_dict() for result in kill_cgroup({str(path)!r})]))
"""
        results = json.loads(run_python(program).stdout)
        assert sorted(result["pid"] for result in results) == expected
        for result in results:
            assert (result["outcome"], result["released"]) == ("exiting", False)
            assert (result["errno"], result["attempts"]) == (errno.EMFILE, 0)
        victims._until(lambda: not family.running(), "the killed to be gone")
        assert gone(path)


# ---- kill_cgroup: without the right to kill

MIXED = """
def own():
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    say("own", os.getpid())
    wait()

def other():
    say("other", os.getpid())
    wait()

child(own)
child(other)
wait()
""".replace("NOBODY", str(NOBODY))


@both
@pytest.mark.needs("root")
def test_those_that_may_not_be_signalled_are_alive(kind: Kind) -> None:
    with (
        cgroup(kind) as path,
        victims.family(MIXED, "own", "other", join=[path]) as family,
    ):
        own, other = family.pids["own"], family.pids["other"]
        results = apart(lambda: kill_cgroup(path, wait=True), uid=NOBODY)
        found = {result.pid: result for result in results}
        assert found.keys() == {own, other, family.root}
        assert found[own].exited
        for pid in (other, family.root):
            assert (found[pid].outcome, found[pid].signal) == ("alive", None)
            assert (found[pid].errno, found[pid].attempts) == (errno.EPERM, 0)
            assert not found[pid].released
        assert family.running() == {other: "S", family.root: "S"}


@both
@pytest.mark.needs("root")
def test_where_nobody_may_be_signalled_it_is_a_permission_error(kind: Kind) -> None:
    with cgroup(kind) as path, members(path, 2) as pids:
        with pytest.raises(PermissionError) as caught:
            apart(lambda: kill_cgroup(path), uid=NOBODY)
        assert os.fspath(caught.value.filename) == str(path)
        assert cgroups.pids(path) == pids


# ---- The memory controller of v2


def current(path: Path) -> int:
    return int((path / "memory.current").read_text())


@needs_release
@pytest.mark.needs("root", "memcg")
def test_the_memory_of_frozen_processes_comes_back() -> None:
    with cgroup("memory") as path, born_in(path, 32) as pids:
        before = current(path)
        assert before >= 64 * MIB
        freeze(path)
        results = kill_cgroup(path, wait=True, timeout=None, measure=True)
        assert killed(results) == pids
        assert current(path) <= before - 60 * MIB


@needs_release
@pytest.mark.needs("root", "memcg", "cpus", "policies")
def test_the_memory_of_starved_processes_comes_back() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    with cgroup("memory") as path, born_in(path, 32) as pids, victims.spinners(cpus):
        for pid in pids:
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        before = current(path)
        results = kill_cgroup(path, wait=True, timeout=None)
        assert sorted(result.pid for result in results) == pids
        assert all(result.released for result in results)
        assert current(path) <= before // 2


@pytest.mark.needs("root", "memcg")
def test_a_cgroup_that_is_killed_as_a_whole_when_short_of_memory_is_killed() -> None:
    with cgroup("memory") as path, born_in(path, 16) as pids:
        (path / "memory.oom.group").write_text("1")
        assert killed(kill_cgroup(path, wait=True, timeout=None)) == pids
        assert "oom_kill 0" in (path / "memory.events").read_text()


@pytest.mark.needs("root", "memcg")
def test_what_the_kernel_kills_as_a_whole_meanwhile_has_exited() -> None:
    hog = """
say("ready")
area = bytearray()
while True:
    area += bytearray(64 << 20)
"""
    with cgroup("memory") as path:
        (path / "memory.oom.group").write_text("1")
        (path / "memory.max").write_text(str(64 * MIB))
        if (path / "memory.swap.max").exists():
            (path / "memory.swap.max").write_text("0")
        with (
            victims.family("say('ready')\nwait()", "ready", join=[path]) as other,
            victims.family(hog, "ready", join=[path]) as family,
        ):
            results = kill_cgroup(path, wait=True, timeout=None)
            assert all(result.exited for result in results)
            assert gone(path)
            assert (family.running(), other.running()) == ({}, {})


@contextmanager
def born_in(path: Path, mib: int) -> Iterator[list[int]]:
    """Two processes whose memory is counted by this cgroup."""
    # Memory is counted where it is touched first, so they are born there.
    program = f"""
import mmap
def victim(name):
    area = mmap.mmap(-1, {mib} << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[:: mmap.PAGESIZE] = b"x" * (len(area) // mmap.PAGESIZE)
    say(name, os.getpid())
    wait()
child(victim, "first")
victim("second")
"""
    with victims.family(program, "first", "second", join=[path]) as family:
        yield sorted([family.pids["first"], family.root])


# ---- kill() beside it


@needs_v2
def test_what_is_yielded_can_be_killed_through_it() -> None:
    with cgroup("v2") as path, members(path, 3) as pids:
        results = []
        for pidfd in cgroup_pidfds(path):
            with pidfd:
                results.append(kill(pidfd, wait=True, timeout=None))
        assert killed(results) == pids
        assert gone(path)
