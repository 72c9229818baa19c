"""Reaper: kills in the background that never queue, whatever becomes of its threads."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import victims
from calls import QUICK_STRACE, errno_of, run_python
from mrelease import KillResult, Pidfd, Reaper
from mrelease._kill import Sequence
from victims import _until

LIMIT = victims.TIMEOUT
PROCESS_MRELEASE = "448"  # of all architectures that the tests run on
RELEASED_OR_EXITED = ("released", "exited")

needs_release = pytest.mark.needs("release")
needs_blocked = pytest.mark.needs("fuse", "release")

Futures = list[Future[KillResult]]


def threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def blocked_threads() -> int:
    """How many threads are in a release."""
    found = 0
    for tid in threads():
        try:
            call = Path(f"/proc/self/task/{tid}/syscall").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += call[0] == PROCESS_MRELEASE
    return found


def pidfds(pid: int) -> list[int]:
    """The descriptors of this process that refer to a process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            info = Path(f"/proc/self/fdinfo/{name}").read_text()
        except FileNotFoundError:
            continue
        if f"Pid:\t{pid}\n" in info:
            found.append(int(name))
    return found


@contextmanager
def blocked(
    workers: int = 1, **options: Any
) -> Iterator[tuple[Reaper, list[victims.Stuck], Futures]]:
    """A Reaper with every worker blocked in a release."""
    with ExitStack() as stack:
        stuck = [stack.enter_context(victims.stuck_writer(1)) for _ in range(workers)]
        reaper = Reaper(workers)
        try:
            futures = [reaper.kill(victim.pid, **options) for victim in stuck]
            _until(lambda: blocked_threads() == workers, "the workers to be blocked")
            yield reaper, stuck, futures
        finally:
            for victim in stuck:
                victim.unstick()
            reaper.close()


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = threads()
    yield
    _until(lambda: threads() <= before, "the threads to end")


PRELUDE = """
import json, os, signal, sys, threading, time
import victims
from mrelease import *

LIMIT = victims.TIMEOUT

def report(*values):
    os.write(1, json.dumps(values).encode())
    os._exit(0)  # whatever hangs

def pidfds(pid):
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            with open(f"/proc/self/fdinfo/{name}") as info:
                if f"Pid:\\t{pid}\\n" in info.read():
                    found.append(int(name))
        except FileNotFoundError:
            pass
    return found

def call(tid):
    # The number of the system call that a thread is in.
    with open(f"/proc/self/task/{tid}/syscall") as text:
        return text.read().split()[0]

def at_rest(pool):
    # A worker counts as idle until it takes the GIL with what it has been given.
    with pool._lock:
        return pool._idle and not (pool._handed or pool._looks or pool._queue)

def until(done):
    end = time.monotonic() + LIMIT
    while not done() and time.monotonic() < end:
        time.sleep(0.001)
    return done()
"""


def held_up(call: str, how: str) -> tuple[str, ...]:
    """strace, which delays a system call: see --inject of strace(1)."""
    inject = ("-e", f"inject={call}:{how}")
    return (*QUICK_STRACE, "-o/dev/null", f"-etrace={call}", *inject)


def reported(program: str, *under: str) -> Any:
    """Run a program in which a bug may leave threads that hang."""
    # Ignored: the warning of a fork beside threads, which is what is tested.
    options = ("-W", "ignore::DeprecationWarning")
    result = run_python(PRELUDE + program, under=under, options=options)
    said = [
        line
        for line in result.stderr.splitlines()
        # Of its own delays, when the kernel tells it of two things at once.
        if not line.startswith("strace: dispatch_event: ")
    ]
    assert (result.returncode, said) == (0, [])
    return json.loads(result.stdout)


# ---- A kill in the background is a kill


@needs_release
def test_a_victim_in_its_exit_is_released() -> None:
    with victims.exit_stopped(16) as victim, Reaper() as reaper:
        result = reaper.kill(victim.process, measure=True).result(LIMIT)
        assert (result.pid, result.outcome) == (victim.pid, "released")
        assert (result.released, result.exited) == (True, False)
        assert (result.signal, result.errno) == (signal.SIGKILL, 0)
        assert result.attempts == 1
        assert result.freed is not None
        assert result.freed >= 16 << 20
        assert victim.anon() == 0


@pytest.mark.parametrize("boost", [True, False])
def test_a_sleeping_victim_is_gone_with_wait(boost: bool) -> None:
    with victims.victim() as victim, Reaper(1) as reaper:
        future = reaper.kill(victim.pid, wait=True, timeout=None, boost=boost)
        result = future.result(LIMIT)
        assert result.outcome in RELEASED_OR_EXITED
        assert (result.exited, result.signal) == (True, signal.SIGKILL)


@needs_release
def test_with_wait_a_released_victim_that_stays_is_waited_for_until_the_timeout() -> (
    None
):
    with victims.exit_stopped() as victim, Reaper() as reaper:
        result = reaper.kill(victim.pid, wait=True, timeout=0.5).result(LIMIT)
        assert (result.outcome, result.exited) == ("released", False)
        assert result.elapsed >= 0.5


@needs_release
def test_memory_shared_with_a_living_process_is_tried_again() -> None:
    with victims.exit_stopped(sharer="clone") as victim, Reaper(1) as reaper:
        busy = reaper.kill(victim.pid, timeout=0.5).result(LIMIT)
        assert (busy.outcome, busy.errno) == ("busy", errno.EINVAL)
        # With pauses of 1, 2, 4, 8, 16, 32 ms, and then of 50, there are no more.
        assert 1 < busy.attempts <= 16
        future = reaper.kill(victim.pid, timeout=None)
        victim.wait_exit_stop()
        victim.kill_sharer()
        assert future.result(LIMIT).outcome == "released"


def test_a_victim_that_exits_while_it_settles_is_not_released() -> None:
    # More than one, as the exit may be seen before the signal's sender runs on.
    with ExitStack() as stack:
        reaper = stack.enter_context(Reaper())
        for _ in range(12):
            victim = stack.enter_context(victims.victim(1))
            result = reaper.kill(victim.pid, settle=60, timeout=None).result(LIMIT)
            assert (result.outcome, result.attempts) == ("exited", 0)
            assert (result.errno, result.signal) == (0, signal.SIGKILL)


@needs_release
@pytest.mark.parametrize("timeout", [1, None])
def test_a_victim_that_does_not_settle_is_released(timeout: float | None) -> None:
    with victims.exit_stopped() as victim, Reaper() as reaper:
        result = reaper.kill(victim.pid, settle=0.01, timeout=timeout).result(LIMIT)
        assert (result.outcome, result.attempts) == ("released", 1)


@needs_release
def test_a_victim_that_may_settle_beyond_the_timeout_is_not_released() -> None:
    with victims.exit_stopped() as victim, Reaper() as reaper:
        result = reaper.kill(victim.pid, settle=60, timeout=0.05).result(LIMIT)
        assert (result.outcome, result.attempts) == ("exiting", 0)
        assert victim.anon()


@pytest.mark.needs("cpus", "release", "strace")
def test_a_result_without_patience_says_that_it_was_killed_because_it_was() -> None:
    # The worker is held up on its way to the SIGKILL, beyond the timeout of 0.
    with victims.exit_stopped() as victim:
        program = f"""
from mrelease import _proc
result = Reaper(1).kill({victim.pid}, timeout=0).result(LIMIT)
report(result.signal, result.attempts, _proc.dying({victim.pid}))
"""
        strace = held_up("pidfd_send_signal", "delay_enter=300000:when=1")
        sent, attempts, dying = reported(program, *strace)
        assert (sent, dying) == (signal.SIGKILL, True)
        assert attempts <= 1


# ---- What it refuses


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"workers": 0}, ValueError),
        ({"workers": -1}, ValueError),
        ({"workers": "x"}, TypeError),
        ({"workers": 1.5}, TypeError),
        ({"nice": 20}, ValueError),
        ({"nice": -21}, ValueError),
        ({"nice": "x"}, TypeError),
        ({"cpus": set()}, OSError),
        ({"cpus": {1 << 20}}, (OSError, ValueError)),
        ({"cpus": "x"}, (TypeError, ValueError)),
        ({"cpus": {-1}}, ValueError),
        ({"cpus": 0}, TypeError),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing(options: Any, error: Any) -> None:
    with pytest.raises(error):
        Reaper(**options)


def test_a_target_that_cannot_be_opened_raises_in_the_caller() -> None:
    reaped = subprocess.Popen(["true"])
    reaped.wait()
    with Reaper(1) as reaper:
        for target in (reaped, reaped.pid):
            with pytest.raises(ProcessLookupError):
                reaper.kill(target)
        for wrong in (os.getpid(), 1, 0):
            with pytest.raises(ValueError, match=r"pid|calling"):
                reaper.kill(wrong)


def test_a_bad_option_is_refused_before_anything_is_done() -> None:
    with victims.victim(1) as victim, Reaper(1) as reaper:
        call: Any = reaper.kill
        with pytest.raises(TypeError):
            call(victim.pid, tiemout=1)
        with pytest.raises(ValueError, match="timeout"):
            call(victim.pid, timeout=-1)
        assert not pidfds(victim.pid)
        assert victim.state() == "S"


def test_without_descriptors_no_reaper_is_made() -> None:
    assert victims.apart(lambda: errno_of(Reaper), descriptors=3) == errno.EMFILE


def test_without_descriptors_the_caller_is_told_and_nothing_is_killed() -> None:
    def attempt() -> int:
        with Reaper(1) as reaper:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
            return errno_of(reaper.kill, victim.pid)

    with victims.victim(1) as victim:
        assert victims.apart(attempt) == errno.EMFILE
        assert victim.state() == "S"


@pytest.mark.needs("root")
def test_whom_the_caller_may_not_kill_lives() -> None:
    def attempt() -> bool:
        with Reaper(1) as reaper, pytest.raises(PermissionError):
            reaper.kill(victim.pid)
        return True

    with victims.victim(1) as victim:
        assert victims.apart(attempt, uid=victims.NOBODY)
        assert victim.state() == "S"


# ---- Its threads


def scheduling(tids: set[int]) -> tuple[list[int], list[str]]:
    """The nice values and the lists of CPUs of threads."""
    nices, cpus = [], []
    for tid in sorted(tids):
        stat = Path(f"/proc/self/task/{tid}/stat").read_text()
        nices.append(int(stat.rpartition(")")[2].split()[16]))
        status = Path(f"/proc/self/task/{tid}/status").read_text()
        cpus.append(status.partition("Cpus_allowed_list:")[2].split()[0])
    return nices, cpus


@pytest.mark.parametrize(
    "nice", [19, 5, pytest.param(-5, marks=pytest.mark.needs("root"))]
)
@pytest.mark.parametrize("workers", [1, 4])
def test_its_threads_have_the_priority_and_the_cpus_asked_for(
    nice: int, workers: int
) -> None:
    cpu = max(os.sched_getaffinity(0))
    before = threads()
    own = scheduling({threading.get_native_id()})
    with Reaper(workers, nice=nice, cpus=[cpu]):
        ours = threads() - before
        assert len(ours) == workers + 1
        assert scheduling(ours) == ([nice] * len(ours), [str(cpu)] * len(ours))
        assert scheduling({threading.get_native_id()}) == own


def test_unasked_its_threads_are_scheduled_as_the_caller() -> None:
    before = threads()
    nice, cpus = scheduling({threading.get_native_id()})
    with Reaper(2):
        assert scheduling(threads() - before) == (nice * 3, cpus * 3)


def test_a_priority_refused_raises_and_leaves_no_thread() -> None:
    def refused() -> tuple[bool, int, int]:
        before = len(os.listdir("/proc/self/fd"))
        try:
            Reaper(3, nice=-20)
        except PermissionError:
            _until(lambda: len(threads()) == 1, "the threads to end")
            return True, len(threads()), len(os.listdir("/proc/self/fd")) - before
        return False, 0, 0

    if os.geteuid() != 0 and resource.getrlimit(resource.RLIMIT_NICE)[0]:
        pytest.skip("needs a RLIMIT_NICE of 0")
    uid = victims.NOBODY if os.geteuid() == 0 else None
    assert victims.apart(refused, uid=uid) == (True, 1, 0)


@pytest.mark.needs("strace")
@pytest.mark.parametrize("started", [0, 1, 2])
def test_where_a_thread_cannot_be_started_none_is_left(started: int) -> None:
    program = """
before = len(os.listdir("/proc/self/fd"))
try:
    Reaper(2)
    error = None
except RuntimeError as caught:
    error = str(caught)
alone = until(lambda: len(os.listdir("/proc/self/task")) == 1)
report(error, alone, len(os.listdir("/proc/self/fd")) - before)
"""
    # Whichever of the two the C library uses for threads.
    fail = f"error=EAGAIN:when={started + 1}+"
    strace = [*QUICK_STRACE, "-o/dev/null", "-etrace=clone,clone3"]
    strace += [f"-einject=clone:{fail}", f"-einject=clone3:{fail}"]
    error, alone, left = reported(program, *strace)
    assert "thread" in error
    assert (alone, left) == (True, 0)


# ---- Every worker blocked


@needs_blocked
def test_with_every_worker_blocked_a_kill_still_comes_at_once() -> None:
    with (
        blocked(2, timeout=None) as (reaper, _, futures),
        victims.victim() as victim,
        victims.exit_stopped() as staying,
    ):
        result = reaper.kill(victim.pid, wait=True, timeout=None).result(LIMIT)
        assert (result.outcome, result.exited) == ("exited", True)
        assert (result.signal, result.attempts) == (signal.SIGKILL, 0)
        late = reaper.kill(staying.pid, timeout=0.05).result(LIMIT)
        assert (late.outcome, late.released) == ("exiting", False)
        assert (late.signal, late.attempts) == (signal.SIGKILL, 0)
        staying.wait_exit_stop()
        assert staying.anon()
        # All this while the workers were blocked.
        assert blocked_threads() == 2
        assert not any(future.done() for future in futures)


@needs_blocked
def test_a_kill_does_not_queue_though_a_handler_takes_the_worker() -> None:
    with (
        victims.stuck_writer(1) as stuck,
        victims.victim() as victim,
        Reaper(workers=1) as reaper,
    ):
        taken: Futures = []

        def interrupt(frame: FrameType, *_: object) -> None:
            # As a signal's handler may, when the worker has been seen to be free.
            if frame.f_code is Sequence.begin.__code__ and not taken:
                taken.append(reaper.kill(stuck.pid, timeout=None))

        _until(lambda: reaper._pool._idle == 1, "the worker to wait")
        sys.settrace(interrupt)
        try:
            future = reaper.kill(victim.pid, timeout=None)
        finally:
            sys.settrace(None)
        try:
            victim.wait_exit()
            _until(lambda: blocked_threads() == 1, "the worker to be blocked")
            assert taken
            assert not taken[0].done()
        finally:
            stuck.unstick()
        assert future.result(LIMIT).signal == signal.SIGKILL


@needs_blocked
def test_the_release_follows_when_a_worker_is_free() -> None:
    with (
        blocked(1, timeout=None) as (reaper, stuck, _),
        victims.exit_stopped() as waiting,
        victims.exit_stopped() as given_up,
    ):
        future = reaper.kill(waiting.pid, timeout=None)
        early = reaper.kill(given_up.pid, timeout=0).result(LIMIT)
        assert (early.outcome, early.attempts) == ("exiting", 0)
        given_up.wait_exit_stop()
        stuck[0].unstick()
        result = future.result(LIMIT)
        assert (result.outcome, result.attempts) == ("released", 1)
        # Nobody waits for this one any more; its memory comes back all the same.
        _until(lambda: given_up.anon() == 0, "the release")


@needs_blocked
def test_a_future_has_its_result_at_the_timeout_though_the_release_is_blocked() -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    # A Reaper for each, beside threads that want the GIL: the one that watches must
    # not miss a deadline, whichever thread runs first.
    spinners = [threading.Thread(target=spin) for _ in range(3)]
    with ExitStack() as stack:
        stuck = [stack.enter_context(victims.stuck_writer(1)) for _ in range(6)]
        reapers = [Reaper(1) for _ in stuck]
        for thread in spinners:
            thread.start()
        try:
            futures = [
                reaper.kill(victim.pid, timeout=0.05)
                for reaper, victim in zip(reapers, stuck, strict=True)
            ]
            done, _ = wait(futures, timeout=5)
        finally:
            stop.set()
            for thread in spinners:
                thread.join()
            for victim in stuck:
                victim.unstick()
            for reaper in reapers:
                reaper.close()
        assert len(done) == len(futures)
        for future in futures:
            result = future.result(0)
            assert (result.outcome, result.released) == ("exiting", False)
            assert (result.signal, result.errno) == (signal.SIGKILL, 0)
            # None yet if the worker has not come as far.
            assert result.attempts <= 1


@needs_blocked
def test_a_blocked_release_is_counted_as_an_attempt() -> None:
    with blocked(1, timeout=1) as (_, _, (future,)):
        if future.done():
            pytest.skip("the release was not begun within a second")
        result = future.result(LIMIT)
        assert (result.outcome, result.released) == ("exiting", False)
        assert (result.signal, result.attempts) == (signal.SIGKILL, 1)
        assert blocked_threads() == 1


@needs_blocked
def test_a_reaper_closes_while_a_release_is_blocked_and_ends_after_it() -> None:
    before = threads()
    with victims.stuck_writer(1) as victim:
        reaper = Reaper(2)
        reaper.kill(victim.pid, timeout=0.05)
        _until(lambda: blocked_threads() == 1, "the release")
        reaper.close()
        # The idle worker and the watcher have gone, the blocked one cannot.
        _until(lambda: len(threads() - before) == 1, "the other threads to end")
        assert blocked_threads() == 1
        assert pidfds(victim.pid)
        victim.unstick()
        _until(lambda: threads() == before, "the last thread to end")
        assert not pidfds(victim.pid)
        reaper.close()


@needs_blocked
def test_closing_does_not_wait_for_a_blocked_release_that_nobody_waits_for() -> None:
    with victims.stuck_writer(1) as victim:
        reaper = Reaper(1)
        future = reaper.kill(victim.pid, timeout=None)
        _until(lambda: blocked_threads() == 1, "the release")
        assert future.cancel()
        closing = threading.Thread(target=reaper.close)
        closing.start()
        closing.join(10)
        closed = not closing.is_alive()
        assert blocked_threads() == 1
        victim.unstick()
        closing.join(LIMIT)
        assert closed


# ---- Closing


def test_a_closed_reaper_takes_no_kill_and_leaves_the_target_alone() -> None:
    with victims.victim(1) as victim:
        with Reaper(1) as reaper:
            pass
        with pytest.raises(RuntimeError, match="closed"):
            reaper.kill(victim.pid)
        reaper.close()
        reaper.close(wait=False)
        assert not pidfds(victim.pid)
        assert victim.state() == "S"


@needs_release
def test_closing_waits_for_the_results() -> None:
    with victims.exit_stopped() as victim:
        reaper = Reaper(1)
        future = reaper.kill(victim.pid, wait=True, timeout=None)
        closing = threading.Thread(target=reaper.close)
        closing.start()
        victim.wait_exit_stop()
        closing.join(0.05)
        assert closing.is_alive()
        victim.resume()
        closing.join(LIMIT)
        assert not closing.is_alive()
        assert future.result(0).exited


@needs_release
def test_closing_without_waiting_leaves_the_kills_to_their_results() -> None:
    with victims.exit_stopped() as victim:
        reaper = Reaper(1)
        future = reaper.kill(victim.pid, wait=True, timeout=None)
        reaper.close(wait=False)
        victim.wait_exit_stop()
        assert not future.done()
        with pytest.raises(RuntimeError, match="closed"):
            reaper.kill(victim.pid)
        victim.resume()
        assert future.result(LIMIT).exited
        reaper.close()


@needs_release
def test_with_closing_the_release_is_tried_again_until_it_succeeds() -> None:
    with victims.exit_stopped(sharer="clone") as victim:
        reaper = Reaper(1)
        future = reaper.kill(victim.pid, timeout=None)
        reaper.close(wait=False)
        victim.wait_exit_stop()
        victim.kill_sharer()
        assert future.result(LIMIT).outcome == "released"


def test_what_has_ended_is_collected() -> None:
    before = threads()
    for waiting in (True, False):
        reaper = Reaper(1)
        pool = weakref.ref(reaper._pool)
        reaper.close(waiting)
        del reaper
        _until(lambda: threads() == before, "the threads to end")
        gc.collect()
        assert pool() is None


# ---- Cancelling


def test_a_cancelled_kill_comes_all_the_same() -> None:
    with victims.victim() as victim, Reaper(1) as reaper:
        reaper.kill(victim.pid, timeout=None).cancel()
        victim.wait_exit()


@needs_release
def test_cancelling_gives_up_the_result_and_the_descriptor() -> None:
    with victims.exit_stopped() as victim, Reaper(1) as reaper:
        future = reaper.kill(victim.pid, wait=True, timeout=None)
        victim.wait_exit_stop()
        assert future.cancel()
        # Whoever waits for it by wait() or as_completed() has to be told.
        assert wait([future], timeout=LIMIT).done == {future}
        _until(lambda: not pidfds(victim.pid), "the descriptor to be closed")


@needs_blocked
def test_a_cancelled_kill_that_waits_for_a_worker_is_released_all_the_same() -> None:
    with (
        blocked(1, timeout=None) as (reaper, stuck, futures),
        victims.exit_stopped() as victim,
    ):
        future = reaper.kill(victim.pid, timeout=None)
        assert future.cancel()
        assert futures[0].cancel()
        victim.wait_exit_stop()
        stuck[0].unstick()
        _until(lambda: victim.anon() == 0, "the release")
        assert wait([future, *futures], timeout=LIMIT).not_done == set()


@needs_release
def test_a_cancelled_kill_that_settles_is_released_all_the_same() -> None:
    with victims.exit_stopped() as victim, Reaper(1) as reaper:
        future = reaper.kill(victim.pid, settle=0.1, timeout=None)
        victim.wait_exit_stop()
        future.cancel()
        _until(lambda: victim.anon() == 0, "the release")


@pytest.mark.needs("release", "strace")
@pytest.mark.parametrize("closing", [False, True])
def test_what_is_cancelled_while_its_signal_is_sent_is_released(closing: bool) -> None:
    with victims.exit_stopped() as victim:
        program = f"""
from mrelease import _proc
reaper = Reaper(1)
assert reaper.kill({victim.pid}, settle=0.05, timeout=None).cancel()
if {closing}:
    reaper.close(wait=False)
until(lambda: _proc.anonymous({victim.pid}) == 0)
report(_proc.anonymous({victim.pid}))
"""
        # Its worker is held up on the way back from the SIGKILL.
        strace = held_up("pidfd_send_signal", "delay_exit=300000")
        assert reported(program, *strace) == [0]


def test_a_finished_kill_cannot_be_cancelled() -> None:
    with victims.victim() as victim, Reaper(1) as reaper:
        future = reaper.kill(victim.pid, wait=True, timeout=None)
        result = future.result(LIMIT)
        assert not future.cancel()
        assert future.result() == result


def test_of_a_crowd_cancelled_at_random_nobody_lives_and_nothing_leaks() -> None:
    chance = random.Random(1)
    with victims.crowd(121) as crowd, Reaper(2) as reaper:
        pids = [pid for pid in crowd.running() if pid != crowd.root]
        futures = []
        for pid in pids:
            waiting = chance.random() < 0.5
            futures.append(reaper.kill(pid, wait=waiting, timeout=None))
            if chance.random() < 0.5:
                chance.choice(futures).cancel()
        done = wait(futures, timeout=LIMIT).done
        assert len(done) == len(pids)
        for future in futures:
            assert future.cancelled() or future.result().signal == signal.SIGKILL
        _until(lambda: set(crowd.running()) == {crowd.root}, "the crowd to die")
        _until(lambda: not any(map(pidfds, pids[:3])), "the descriptors to be closed")


# ---- What goes wrong with one kill is told of that one alone


@pytest.mark.needs("seccomp", "release")
def test_an_error_reaches_its_own_future_alone() -> None:
    # A filter that refuses SIGKILL through one descriptor; the threads inherit it. The
    # Reaper's own three take the lowest numbers that are free, each kill the next, as
    # nothing is read in /proc without boost.
    program = """
from pyseccomp import ALLOW, EQ, ERRNO, Arg, SyscallFilter
with victims.exit_stopped() as refused, victims.exit_stopped() as killed:
    free = [os.dup(0) for _ in range(5)]
    for fd in free:
        os.close(fd)
    filter = SyscallFilter(ALLOW)
    rule = Arg(0, EQ, free[4]), Arg(1, EQ, signal.SIGKILL)
    filter.add_rule(ERRNO(1), "pidfd_send_signal", *rule)
    filter.load()
    reaper = Reaper(1)
    before = reaper.kill(killed.pid, wait=True, timeout=None, boost=False)
    try:
        error = reaper.kill(refused.pid, boost=False).exception(LIMIT)
    except PermissionError as raised:  # the worker was busy: it was for the caller
        error = raised
    left = pidfds(refused.pid)
    os.dup2(0, free[4])
    after = reaper.kill(killed.pid, timeout=None).result(LIMIT).outcome
    killed.wait_exit_stop()
    killed.resume()
    report(error.errno, left, before.result(LIMIT).exited, after)
"""
    assert reported(program) == [errno.EPERM, [], True, "released"]


@needs_release
@pytest.mark.parametrize(
    ("sharer", "spoil"),
    [
        # Waits for the exit.
        (None, "os.close(fd)"),
        # Tries again and again, and reads /proc then: what it opens there would get a
        # number that is free.
        ("clone", "os.dup2(os.pipe()[0], fd)"),
    ],
)
def test_a_descriptor_closed_by_somebody_else_spoils_its_own_kill_alone(
    sharer: str | None, spoil: str
) -> None:
    # That the third is cancelled wakes up the thread that watches.
    program = f"""
with (
    victims.exit_stopped(sharer={sharer!r}) as spoilt,
    victims.exit_stopped(1) as third,
    victims.victim() as other,
):
    reaper = Reaper(1)
    future = reaper.kill(spoilt.pid, wait=True, timeout=None)
    to_cancel = reaper.kill(third.pid, wait=True, timeout=None)
    spoilt.wait_exit_stop()
    third.wait_exit_stop()
    until(lambda: at_rest(reaper._pool))  # it reads /proc no more
    (fd,) = pidfds(spoilt.pid)
    {spoil}
    to_cancel.cancel()
    try:
        error = future.exception(LIMIT)
        code = error and error.errno
        os.dup2(0, fd)  # if its worker is still at it, it closes the number once more
        outcome = reaper.kill(other.pid, wait=True, timeout=None).result(LIMIT).exited
    except TimeoutError:
        report("no answer", False)
    reaper.close()
    report(code, outcome)
"""
    assert reported(program) == [errno.EBADF, True]


@pytest.mark.needs("strace", "release")
@pytest.mark.parametrize("boost", [True, False])
def test_a_descriptor_closed_during_its_release_costs_no_worker(boost: bool) -> None:
    with victims.exit_stopped() as victim, victims.exit_stopped() as other:
        program = f"""
from mrelease import _proc
reaper = Reaper(1)
future = reaper.kill({victim.pid}, timeout=None, boost={boost})
until(lambda: _proc.anonymous({victim.pid}) == 0)
(fd,) = pidfds({victim.pid})
os.close(fd)
try:
    error = future.exception(10)
    os.dup2(0, fd)  # if its worker is still at it, it closes the number once more
    outcome = reaper.kill({other.pid}, timeout=None).result(10).outcome
    report(error and error.errno, outcome)
except TimeoutError:
    report("no answer")
"""
        # The release is done, and its worker is held up on the way back from it.
        strace = held_up("process_mrelease", "delay_exit=2000000:when=1")
        assert reported(program, *strace) == [errno.EBADF, "released"]


@needs_release
@pytest.mark.parametrize("left", [4, 0])
def test_with_fewer_descriptors_allowed_than_kills_begun_they_go_on(left: int) -> None:
    # poll(2) refuses to look at more descriptors than the limit allows.
    program = """
import resource
from contextlib import ExitStack
with ExitStack() as stack:
    staying = [stack.enter_context(victims.exit_stopped(1)) for _ in range(6)]
    reaper = Reaper(1)
    futures = [reaper.kill(one.pid, wait=True, timeout=0.3) for one in staying]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (LEFT, hard))
    try:
        errors = [future.exception(10) for future in futures]
        report(*[
            error.errno if error else future.result().outcome
            for error, future in zip(errors, futures)
        ])
    except TimeoutError:
        report("no answer")
"""
    answer = reported(program.replace("LEFT", str(left)))
    # With none at all, they cannot be asked after either, and say so.
    assert set(answer) <= ({"released", "exiting"} if left else {errno.EINVAL})


@pytest.mark.needs("strace", "release")
@pytest.mark.parametrize("write", [1, 2])
def test_an_interrupted_call_of_kill_spoils_nothing(write: int) -> None:
    with victims.exit_stopped() as first, victims.exit_stopped() as second:
        program = f"""
class Interrupt(BaseException):
    pass

def handler(*args):
    global raising
    if raising:
        raising = False
        raise Interrupt

raising = False
signal.signal(signal.SIGUSR1, handler)
reaper = Reaper(1)
until(lambda: reaper._pool._idle == 1)  # or the writes would be others
raising = True
try:
    reaper.kill({first.pid}, wait=True, timeout=0.2)
    interrupted = False
except Interrupt:
    interrupted = True
try:
    outcome = reaper.kill({second.pid}, timeout=None).result(10).outcome
except TimeoutError:
    report(interrupted, "no answer", 0)
closed = until(lambda: not pidfds({first.pid}) + pidfds({second.pid}))
reaper.close()
report(interrupted, outcome, closed)
"""
        # With a write comes a signal, whose handler raises: with the one that hands the
        # kill to a worker, and with the one that wakes the watcher.
        strace = ("strace", "-f", "-qq", "-o/dev/null", "-etrace=write")
        inject = ("-e", f"inject=write:signal=SIGUSR1:when={write}")
        assert reported(program, *strace, *inject) == [True, "released", True]


@needs_release
@pytest.mark.parametrize("base", ["BaseException", "TimeoutError"])
def test_handlers_that_raise_at_any_moment_of_kill_leave_the_reaper_at_work(
    base: str,
) -> None:
    program = f"""
import random, sys, warnings

class Interrupt({base}):
    pass

def handler(*args):
    raise Interrupt

sys.unraisablehook = lambda error: None  # finalizers say that they were interrupted
# A file that was just opened when the handler raised is closed by its finalizer, which
# a debug build tells.
warnings.simplefilter("ignore", ResourceWarning)
signal.signal(signal.SIGALRM, handler)
chance = random.Random(1)
with victims.exit_stopped(1) as victim, Pidfd.open(victim.pid) as pidfd:
    reaper = Reaper(1)
    raised = 0
    for _ in range(1000):
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 2e-4))
            for _ in range(50):
                reaper.kill(chance.choice([pidfd, victim.pid]))
            time.sleep(0.001)
        except Interrupt:
            raised += 1
    try:
        outcome = reaper.kill(pidfd, timeout=None).result(LIMIT).outcome
    except TimeoutError:
        outcome = "no answer"
    report(outcome, raised, len(reaper._pool._threads))
"""
    outcome, raised, left = reported(program)
    assert outcome == "released"
    assert raised > 500
    assert left == 2


# ---- Many at once


@needs_release
def test_many_that_are_due_at_once_do_not_fill_up_the_pipe() -> None:
    program = """
import fcntl
with victims.exit_stopped(1, sharer="clone") as busy, Pidfd.open(busy.pid) as pidfd:
    reaper = Reaper(1)
    fcntl.fcntl(reaper._pool._inlet, fcntl.F_SETPIPE_SZ, 4096)
    options = {"settle": 0.1, "timeout": 0.3, "boost": False}
    futures = [reaper.kill(pidfd, **options) for _ in range(4000)]
    report({future.result(LIMIT).outcome for future in futures} <= {"busy", "exiting"})
"""
    assert reported(program) == [True]


def test_eight_threads_use_one_reaper() -> None:
    with ExitStack() as stack:
        crowd = stack.enter_context(victims.crowd(161))
        pids = [pid for pid in crowd.running() if pid != crowd.root]
        shared = [stack.enter_context(Pidfd.open(pid)) for pid in pids[-8:]]
        reaper = stack.enter_context(Reaper(2))
        start = threading.Barrier(8)
        futures: list[Futures] = [[] for _ in range(8)]

        def run(number: int) -> None:
            start.wait()
            targets: list[int | Pidfd] = [*pids[number:-8:8], *shared]
            for target in targets:
                futures[number].append(reaper.kill(target, wait=True, timeout=None))

        running = [threading.Thread(target=run, args=(n,)) for n in range(8)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert sum(map(len, futures)) == len(pids) - 8 + 8 * 8
        for future in chain(*futures):
            assert future.result(LIMIT).exited
        # The caller's own stay open.
        assert all(pidfd.exited for pidfd in shared)


def test_a_crowd_is_killed_by_a_few_threads() -> None:
    with victims.crowd(301) as crowd:
        before = threads()
        with Reaper(2) as reaper:
            pids = [pid for pid in crowd.running() if pid != crowd.root]
            futures = [reaper.kill(pid, wait=True, timeout=None) for pid in pids]
            assert len(threads() - before) == 3
            results = [future.result(LIMIT) for future in futures]
        assert [result.pid for result in results] == pids
        assert all(result.exited for result in results)


def test_reapers_are_opened_used_and_closed_at_random() -> None:
    chance = random.Random(2)
    with victims.crowd(121) as crowd:
        pids = [pid for pid in crowd.running() if pid != crowd.root]
        begun: Futures = []
        while pids:
            reaper = Reaper(chance.randint(1, 3))
            closing = threading.Thread(
                target=reaper.close, args=(chance.random() < 0.5,)
            )
            for number in range(chance.randint(1, 12)):
                if number == 6:
                    closing.start()
                if not pids:
                    break
                try:
                    begun.append(reaper.kill(pids[-1], wait=True, timeout=None))
                    pids.pop()
                except RuntimeError:  # closed meanwhile
                    break
            if closing.ident is None:
                closing.start()
            closing.join(LIMIT)
            assert not closing.is_alive()
        for future in begun:
            assert future.result(LIMIT).exited


# ---- Callbacks


@needs_release
def test_a_callback_may_kill() -> None:
    program = """
with victims.exit_stopped() as first, victims.exit_stopped() as second, \\
        victims.victim() as third:
    reaper = Reaper(1)
    results, done = [], threading.Event()

    def last(future):
        results.append(future.result().exited)
        done.set()

    def then(future):
        results.append(future.result().outcome)
        # The first comes from the worker, with no other one free.
        reaper.kill(third.pid, wait=True, timeout=None).add_done_callback(last)

    reaper.kill(first.pid).add_done_callback(then)
    answered = done.wait(10)
    if answered:
        reaper.close()
    report(answered, results)
"""
    assert reported(program) == [True, ["released", True]]


@needs_release
@pytest.mark.parametrize("error", ["SystemExit", "KeyboardInterrupt"])
@pytest.mark.parametrize("where", ["worker", "watcher"])
def test_what_a_callback_raises_ends_no_thread(where: str, error: str) -> None:
    program = f"""
raised = []
called = threading.Event()

def fail(future):
    # The main one, if the result was there before the callback: again, then.
    in_pool = threading.current_thread() is not threading.main_thread()
    raised.extend([True] * in_pool)
    called.set()
    if in_pool:
        raise {error}

seen = []
threading.excepthook = lambda args: seen.append(args.exc_type.__name__)
with Reaper(1) as reaper:
    before = len(threading.enumerate())
    while len(raised) < 2:
        called.clear()
        if {where == "worker"}:
            with victims.exit_stopped() as victim:
                future = reaper.kill(victim.pid)
                future.add_done_callback(fail)
                future.result(LIMIT)
        else:
            with victims.victim() as victim:
                future = reaper.kill(victim.pid, wait=True, timeout=None)
                future.add_done_callback(fail)
                future.result(LIMIT)
        called.wait()
    until(lambda: len(seen) == 2)
    report(seen, len(threading.enumerate()) == before)
"""
    assert reported(program) == [[error, error], True]


@needs_release
@pytest.mark.parametrize("waiting", [True, False])
@pytest.mark.parametrize("where", ["worker", "watcher"])
def test_a_callback_may_close_while_other_kills_go_on(
    where: str, waiting: bool
) -> None:
    # A release is told of by a worker, an exit by the thread that watches.
    program = f"""
with victims.exit_stopped() as staying, victims.exit_stopped() as victim:
    reaper = Reaper(1)
    other = reaper.kill(staying.pid, wait=True, timeout=0.3)
    done = threading.Event()

    def close(future):
        reaper.close({waiting})
        done.set()

    wait = {where == "watcher"}
    future = reaper.kill(victim.pid, wait=wait, timeout=None)
    future.add_done_callback(close)
    victim.wait_exit_stop()
    victim.resume()
    answered = done.wait(10)
    if answered:
        other.result(LIMIT)
        reaper.close()
    report(answered)
"""
    assert reported(program) == [True]


@needs_release
def test_two_callbacks_may_close_at_once() -> None:
    program = """
with victims.exit_stopped() as first, victims.exit_stopped() as second:
    reaper = Reaper(1)
    both = threading.Barrier(2)
    closed = []

    def close(future):
        both.wait(10)
        reaper.close()
        closed.append(1)

    # One in the thread that watches, at the timeout, and one in the worker.
    reaper.kill(first.pid, wait=True, timeout=0.2).add_done_callback(close)
    first.wait_exit_stop()
    reaper.kill(second.pid, timeout=None).add_done_callback(close)
    answered = until(lambda: len(closed) == 2)
    if answered:
        reaper.close()
    report(answered)
"""
    assert reported(program) == [True]


# ---- After a fork

FORK = """
def child_of(function):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = function()
        finally:
            os._exit(code)
    return child

def ended(child):
    # 0, the exit code, or why it was ended.
    end = time.monotonic() + 10
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hung"
"""


@needs_release
def test_a_forked_child_is_refused_and_may_close_and_make_its_own() -> None:
    program = """
with victims.exit_stopped() as held, victims.victim() as mine, \\
        victims.victim() as other:
    reaper = Reaper(1)
    future = reaper.kill(held.pid, wait=True, timeout=None)
    held.wait_exit_stop()

    def child():
        try:
            reaper.kill(mine.pid)
        except RuntimeError as error:
            assert "fork" in str(error)
            assert not pidfds(mine.pid)
        else:
            return 2
        reaper.close()
        reaper.close(wait=False)
        assert not pidfds(held.pid)
        with Reaper(1) as own:
            future = own.kill(mine.pid, wait=True, timeout=None)
            return 0 if future.result().exited else 3

    code = ended(child_of(child))
    # The parent's goes on as if nothing had been.
    unspoilt = not future.done()
    exited = reaper.kill(other.pid, wait=True, timeout=None).result(10).exited
    held.resume()
    exited = exited and future.result(10).exited
    reaper.close()
    report(code, unspoilt, exited)
"""
    assert reported(FORK + program) == [0, True, True]


def test_a_child_forked_while_a_thread_holds_the_lock_closes_and_ends() -> None:
    # A caller may hold it for the time of a kill, which no test can choose.
    program = """
reaper = Reaper(1)
held, over = threading.Event(), threading.Event()

def hold():
    with reaper._pool._lock:
        held.set()
        over.wait()

holder = threading.Thread(target=hold)
holder.start()
held.wait()

child = os.fork()
if child == 0:
    reaper.close()
    sys.exit(7)  # runs what was registered for the interpreter's exit
code = ended(child)
over.set()
holder.join()
reaper.close()
report(code)
"""
    assert reported(FORK + program) == [7]


# ---- At the interpreter's exit


def test_at_exit_every_kill_begun_is_sent() -> None:
    with victims.crowd(101) as crowd:
        pids = [pid for pid in crowd.running() if pid != crowd.root]
        program = f"""
from mrelease import Reaper
reaper = Reaper(1)
for pid in {pids}:
    reaper.kill(pid)
"""
        result = run_python(program)
        assert (result.returncode, result.stderr) == (0, "")
        _until(lambda: set(crowd.running()) == {crowd.root}, "the crowd to die")


def test_at_exit_a_kill_is_sent_that_is_begun_there() -> None:
    # What was registered first is called last, when the Reaper has seen to its own.
    for boost in (True, False) * 2:
        with victims.victim(1) as victim:
            program = f"""
import atexit
from mrelease import Reaper
atexit.register(lambda: reaper.kill({victim.pid}, boost={boost}))
reaper = Reaper(1)
"""
            result = run_python(program)
            assert (result.returncode, result.stderr) == (0, "")
            _until_exit(victim)


def _until_exit(victim: victims.Victim) -> None:
    """Wait for an exit that comes at once, or never."""
    end = time.monotonic() + LIMIT
    while not victim.exited() and time.monotonic() < end:
        time.sleep(0.01)
    assert victim.exited()


@pytest.mark.needs("strace")
def test_at_exit_a_kill_is_sent_though_its_worker_is_held_up_before_it() -> None:
    with victims.victim(1) as victim:
        program = f"from mrelease import Reaper; Reaper(1).kill({victim.pid})"
        # The first signal of the main thread is signal 0, that of the worker SIGKILL,
        # which the exit overtakes.
        strace = held_up("pidfd_send_signal", "delay_enter=500000:when=1")
        result = run_python(program, under=strace)
        assert result.returncode == 0
        _until_exit(victim)


@needs_blocked
def test_at_exit_a_blocked_release_holds_nobody_up() -> None:
    with victims.stuck_writer(1) as stuck, victims.victim(1) as other:
        program = f"""
reaper = Reaper(1)
reaper.kill({stuck.pid}, timeout=None)
blocked = until(lambda: "448" in map(call, os.listdir("/proc/self/task")))
reaper.kill({other.pid})
sys.exit(not blocked)
"""
        result = run_python(PRELUDE + program)
        assert (result.returncode, result.stderr) == (0, "")
        other.wait_exit()
        assert not stuck.exited()


@pytest.mark.parametrize("workers", [1, 3])
def test_at_exit_no_thread_is_in_python(workers: int) -> None:
    with victims.victim(1) as victim:
        program = f"""
import atexit, mrelease._reaper
mrelease._reaper._PATIENCE = LIMIT
told, exiting = threading.Event(), threading.Event()

def callback(future):
    told.set()
    exiting.wait()
    time.sleep(0.3)
    os.write(1, b"done")

reaper = Reaper({workers})
reaper.kill({victim.pid}, wait=True, timeout=None).add_done_callback(callback)
told.wait()
atexit.register(exiting.set)
"""
        result = run_python(PRELUDE + program)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "done"
