"""kill_all; and that no kill of many ever hits somebody who got a member's pid."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

import victims
from calls import run_python
from mrelease import KillResult, Pidfd, kill_all
from mrelease._batch import Batch
from mrelease._kill import Options
from victims import NOBODY, apart

needs_release = pytest.mark.needs("release")
pytestmark = pytest.mark.usefixtures("idle")
MIB = 1 << 20


@contextmanager
def sleepers(*sizes: int) -> Iterator[list[victims.Victim]]:
    """A sleeping victim of each of these sizes, in MiB."""
    with ExitStack() as stack:
        yield [stack.enter_context(victims.victim(mib)) for mib in sizes]


def results_of(outcomes: list[KillResult | OSError]) -> list[KillResult]:
    """The same, if none of them is an exception."""
    results = [one for one in outcomes if isinstance(one, KillResult)]
    assert len(results) == len(outcomes), outcomes
    return results


# ---- kill_all: the results


def test_results_come_in_the_order_of_the_targets() -> None:
    with sleepers(1, 16, 4, 32, 1) as victims_:
        targets = [victim.pid for victim in victims_]
        results = results_of(kill_all(targets, wait=True, timeout=None))
        assert [result.pid for result in results] == targets
        for result, victim in zip(results, victims_, strict=True):
            assert result.outcome in ("released", "exited")
            assert (result.released, result.exited) == (True, True)
            assert result.signal == signal.SIGKILL
            assert victim.process.wait() == -signal.SIGKILL


def test_every_kind_of_target_may_be_among_them() -> None:
    with sleepers(1, 1, 1) as (one, two, three), Pidfd.open(two.pid) as pidfd:
        targets = iter((one.pid, pidfd, three.process))
        results = results_of(kill_all(targets, wait=True, timeout=None))
        assert [result.pid for result in results] == [one.pid, two.pid, three.pid]
        assert pidfd.exited  # and still open: it is the caller's


def test_of_no_target_there_is_no_result() -> None:
    assert kill_all([]) == []
    assert kill_all(iter(())) == []


def test_one_that_is_named_twice_is_killed_once() -> None:
    with sleepers(1) as (victim,):
        twice: list[Any] = [victim.pid, victim.process]
        results = results_of(kill_all(twice, wait=True, timeout=None))
        assert [result.pid for result in results] == [victim.pid] * 2
        assert all(result.exited for result in results)


def test_what_cannot_be_killed_gives_its_exception_and_the_rest_die() -> None:
    reaped = subprocess.Popen(["true"])
    reaped.wait()
    with sleepers(1, 1) as (first, last), victims.victim(1, threads=2) as threaded:
        (tid,) = set(threaded.threads()) - {threaded.pid}
        refused = [os.getpid(), 1, tid, 0, -1]
        targets: list[Any] = [
            first.pid,
            reaped,
            victims.reaped_pid(),
            *refused,
            last.process,
        ]
        found = kill_all(targets, wait=True, timeout=None)
        assert len(found) == len(targets)
        ends = results_of([found[0], found[-1]])
        assert [result.pid for result in ends] == [first.pid, last.pid]
        assert all(result.exited for result in ends)
        for gone in found[1:3]:
            assert isinstance(gone, ProcessLookupError)
        for target, error in zip(refused, found[3:-1], strict=True):
            assert isinstance(error, OSError)
            assert isinstance(error, ValueError)
            assert error.errno == errno.EINVAL
            assert str(target) in str(error)
        assert threaded.state() == "S"


@pytest.mark.needs("root")
def test_whom_the_caller_may_not_signal_is_a_permission_error_in_its_place() -> None:
    with sleepers(1, 1) as (one, two):
        found = apart(lambda: kill_all([one.pid, two.pid]), uid=NOBODY)
        assert [type(error) for error in found] == [PermissionError] * 2
        assert (one.state(), two.state()) == ("S", "S")


@pytest.mark.parametrize("target", ["1", 1.5, None, True, b"1", [1]])
def test_what_is_no_target_is_refused_before_anything_is_done(target: Any) -> None:
    with sleepers(1, 1) as (one, two):
        with pytest.raises(TypeError, match="a target must be"):
            kill_all([one.pid, target, two.pid])
        assert (one.state(), two.state()) == ("S", "S")


@pytest.mark.parametrize(
    "options",
    [{"timeout": -1}, {"timeout": "1"}, {"settle": float("nan")}, {"tiemout": 1}],
)
def test_bad_options_are_refused_before_anything_is_done(options: Any) -> None:
    with sleepers(1) as (victim,):
        with pytest.raises((TypeError, ValueError)):
            kill_all([victim.pid], **options)
        with pytest.raises((TypeError, ValueError)):
            kill_all([], **options)
        assert victim.state() == "S"


# ---- kill_all: the order of the kills

CALLS = "pidfd_open,pidfd_send_signal,process_mrelease"


@needs_release
@pytest.mark.needs("strace")
def test_the_largest_is_killed_first_and_each_released_before_the_next(
    idle: bool, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    sizes = [4, 64, 8, 32, 16]
    with ExitStack() as stack:
        pids = [stack.enter_context(victims.exit_stopped(mib)).pid for mib in sizes]
        program = f"""
from mrelease import _batch, kill_all
_batch.has_idle_cpu = lambda pids: {idle}
results = kill_all({pids})
assert [result.pid for result in results] == {pids}, results
assert all(result.outcome == "released" for result in results), results
"""
        strace = ("strace", "-qq", "-o", str(log), "-e", f"trace={CALLS}")
        result = run_python(program, under=strace)
        assert (result.returncode, result.stderr) == (0, "")
    opened: dict[str, int] = {}
    deeds = []
    for line in log.read_text().splitlines():
        if found := re.match(r"pidfd_open\((\d+), .*= (\d+)$", line):
            opened[found[2]] = int(found[1])
        elif found := re.match(r"pidfd_send_signal\((\d+), SIGKILL", line):
            deeds.append(("kill", opened[found[1]]))
        elif found := re.match(r"process_mrelease\((\d+), ", line):
            deeds.append(("release", opened[found[1]]))
    falling = sorted(pids, key=lambda pid: -sizes[pids.index(pid)])
    in_turn = [(deed, pid) for pid in falling for deed in ("kill", "release")]
    # With idle CPUs all are killed before the first is released.
    assert deeds == (sorted(in_turn, key=lambda deed: deed[0]) if idle else in_turn)


# ---- kill_all: the options, and those that take long


@needs_release
def test_of_one_that_somebody_else_has_killed_the_memory_is_measured_too() -> None:
    with victims.exit_stopped(8) as victim, Batch(Options(measure=True)) as batch:
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait_exit_stop()
        batch.add_dying(Pidfd.open(victim.pid), monotonic(), signal.SIGKILL)
        batch.finish()
        (result,) = batch.killed(batch.begun)
        assert result.outcome == "released"
        assert result.freed is not None
        assert result.freed >= 8 * MIB


@needs_release
def test_without_wait_it_does_not_wait_for_those_that_are_released() -> None:
    with victims.exit_stopped(16) as one, victims.exit_stopped(8) as two:
        results = results_of(kill_all([two.pid, one.pid], timeout=None))
        for result in results:
            assert (result.outcome, result.exited) == ("released", False)
            assert (result.attempts, result.errno) == (1, 0)
        assert (one.anon(), two.anon()) == (0, 0)


@needs_release
def test_with_wait_those_that_stay_are_waited_for_until_the_timeout() -> None:
    with victims.exit_stopped(16) as stays, sleepers(1, 32) as (one, two):
        targets = [one.pid, stays.pid, two.pid]
        results = results_of(kill_all(targets, wait=True, timeout=0.2))
        for victim in (one, two):
            victim.wait_exit()
        assert (results[1].outcome, results[1].exited) == ("released", False)
        assert all(result.released for result in results)
        assert results[1].elapsed >= 0.2


def test_measure_tells_what_each_has_given_back() -> None:
    with sleepers(16, 64, 32) as found:
        targets = [victim.process for victim in found]
        results = results_of(kill_all(targets, wait=True, timeout=None, measure=True))
        for result, mib in zip(results, (16, 64, 32), strict=True):
            assert result.freed is not None
            assert mib * MIB <= result.freed < 2 * mib * MIB + 16 * MIB


@needs_release
def test_settle_lets_them_exit_by_themselves() -> None:
    with victims.exit_stopped(8) as stays, sleepers(1) as (goes,):
        targets = [stays.pid, goes.pid]
        first, second = results_of(kill_all(targets, settle=0.3, timeout=60))
        assert (first.outcome, first.attempts) == ("released", 1)
        assert second.outcome in ("exited", "released")
    with sleepers(1, 1) as found:
        targets = [victim.pid for victim in found]
        for result in results_of(kill_all(targets, settle=60, timeout=None)):
            assert (result.outcome, result.attempts) == ("exited", 0)


@needs_release
def test_a_timeout_of_0_is_one_attempt_each() -> None:
    with (
        victims.exit_stopped(8, sharer="clone") as one,
        victims.exit_stopped(8, sharer="clone") as two,
    ):
        for result in results_of(kill_all([one.pid, two.pid], timeout=0)):
            assert (result.outcome, result.attempts) == ("busy", 1)


@needs_release
def test_one_that_is_busy_does_not_hold_up_the_rest() -> None:
    with victims.exit_stopped(32, sharer="clone") as busy, sleepers(1, 1) as rest:
        found: list[KillResult | OSError] = []
        targets = [busy.pid, *(victim.pid for victim in rest)]
        thread = threading.Thread(
            target=lambda: found.extend(kill_all(targets, timeout=None))
        )
        thread.start()
        # With no timeout, and the largest busy until its sharer is gone.
        for victim in rest:
            victim.wait_exit()
        busy.wait_exit_stop()
        busy.kill_sharer()
        thread.join()
        results = results_of(found)
        assert results[0].outcome == "released"
        assert all(result.released for result in results)


@needs_release
@pytest.mark.needs("fuse")
def test_one_stuck_in_the_kernel_does_not_keep_the_others_from_being_killed() -> None:
    with victims.stuck(32) as stuck, sleepers(1, 1) as rest:
        targets = [rest[0].pid, stuck.pid, rest[1].pid]
        results = results_of(kill_all(targets, wait=True, timeout=0.3))
        for victim in rest:
            victim.wait_exit()
        assert (results[1].outcome, results[1].exited) == ("released", False)
        assert all(result.released for result in results)


@needs_release
@pytest.mark.needs("fuse")
def test_a_release_that_blocks_does_not_keep_the_others_from_being_killed() -> None:
    # The largest holds its mmap lock: its release, or a look at its memory, blocks.
    with victims.stuck_writer(32) as stuck, sleepers(1, 1) as rest:
        found: list[KillResult | OSError] = []
        targets = [rest[0].pid, stuck.pid, rest[1].pid]
        thread = threading.Thread(
            target=lambda: found.extend(kill_all(targets, wait=True, timeout=60))
        )
        thread.start()
        try:
            for victim in rest:
                victim.wait_exit()
        finally:
            stuck.unstick()
            thread.join()
        assert all(result.exited for result in results_of(found))


@needs_release
@pytest.mark.needs("freezer")
def test_a_frozen_one_among_others_is_released() -> None:
    with victims.frozen(16) as frozen, sleepers(1, 32) as (one, two):
        targets = [one.pid, frozen.pid, two.pid]
        results = results_of(kill_all(targets, wait=True, timeout=0.3))
        for victim in (one, two):
            victim.wait_exit()
        assert (results[1].outcome, results[1].exited) == ("released", False)
        assert all(result.released for result in results)
        assert results[1].attempts == 1
        assert frozen.anon() == 0


# ---- kill_all: few descriptors


def test_more_targets_than_descriptors_are_killed() -> None:
    with victims.crowd(300) as family:
        pids = sorted(family.running())
        assert len(pids) == 300
        pids.remove(family.root)  # who would leave its children to be reaped at once
        found = apart(lambda: kill_all(pids, wait=True, timeout=None), descriptors=64)
        results = results_of(found)
        assert [result.pid for result in results] == pids
        assert {result.signal for result in results} == {signal.SIGKILL}
        # Some results may come early, before the memory is back.
        left = {family.root: "S"}
        victims._until(lambda: family.running() == left, "the killed to exit")


@needs_release
@pytest.mark.needs("fuse")
def test_beyond_the_room_of_a_batch_a_blocked_release_keeps_nobody_alive() -> None:
    # Room is for sixteen, and all stay: the oldest are given up before the last ones.
    with ExitStack() as stack:
        stuck = stack.enter_context(victims.stuck_writer(1))
        staying = [stack.enter_context(victims.exit_stopped(1)) for _ in range(36)]
        last = stack.enter_context(victims.victim(1))
        pids = [victim.pid for victim in (stuck, *staying, last)]
        program = f"""
import resource
from mrelease import kill_all
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
print(len(kill_all({pids}, wait=True, timeout=1)))
"""
        found: list[str] = []
        thread = threading.Thread(
            target=lambda: found.append(run_python(program).stdout)
        )
        thread.start()
        try:
            last.wait_exit()
        finally:
            stuck.unstick()
            thread.join()
        assert found == [f"{len(pids)}\n"]


def test_without_a_descriptor_nothing_is_killed_but_what_is_open() -> None:
    with sleepers(1, 1, 1) as found, Pidfd.open(found[1].pid) as pidfd:
        targets: list[Any] = [found[0].pid, pidfd, found[2].process]
        first, second, third = apart(
            lambda: kill_all(targets, wait=True, timeout=None), descriptors=3
        )
        assert isinstance(second, KillResult)
        assert second.exited
        for error in (first, third):
            assert isinstance(error, OSError)
            assert error.errno == errno.EMFILE
        assert (found[0].state(), found[2].state()) == ("S", "S")


def test_a_number_that_is_no_pid_keeps_nobody_else_alive() -> None:
    with sleepers(1) as (victim,):
        result, error = kill_all([victim.pid, 2**40], wait=True)
        assert isinstance(result, KillResult)
        assert isinstance(error, ValueError)
        assert victim.exited()
