"""Many threads at once: each C function, one Pidfd, groups, a Reaper.

`tests/matrix/run sanitize-tsan` has ThreadSanitizer watch this, with the full numbers.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import pytest

import victims
from calls import C_FUNCTIONS, killed_next, opened, run_python
from mrelease import KillResult, Pidfd, Reaper, _mrelease, kill_all, kill_tree
from mrelease._mrelease import (
    bar_kill_and_release,
    getcpu,
    kill_and_release,
    kill_and_release_next,
    mlockall,
    pidfd_open,
    pidfd_send_signal,
    process_mrelease,
)

THREADS = 8
LIMIT = victims.TIMEOUT

T = TypeVar("T")
Way = tuple[Callable[[], object], object]

needs_release = pytest.mark.needs("release")
pytestmark = pytest.mark.timeout(300)  # a sanitizer takes its time


def together(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Run each in a thread of its own, begun at once; what they return, in order."""
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], T]) -> T:
        start.wait(LIMIT)
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


def members(crowd: victims.Family, stack: ExitStack) -> list[Pidfd]:
    """All of a crowd but the first, which reaps none of them: no pid is reused."""
    pids = sorted(crowd.running().keys() - {crowd.root})
    return [stack.enter_context(Pidfd.open(pid)) for pid in pids]


# ---- The C functions


def ways(pidfd: int, pid: int) -> dict[str, list[Way]]:
    """Calls of each C function, and what comes of them if this one is in its exit."""
    cpus, own, unused = os.sched_getaffinity(0), os.getpid(), 1 << 20
    wrong: Any = "1"
    return {
        "bar_kill_and_release": [
            (lambda: bar_kill_and_release(pidfd, pid), 0),
            (lambda: bar_kill_and_release(unused, pid), errno.EBADF),
            (lambda: bar_kill_and_release(pidfd, wrong), TypeError),
        ],
        "getcpu": [
            (lambda: getcpu() in cpus, True),
            (lambda: getcpu(*[0]), TypeError),
        ],
        "kill_and_release": [
            (lambda: kill_and_release(pidfd), 0),
            (lambda: kill_and_release(unused), errno.EBADF),
            (lambda: kill_and_release(wrong), TypeError),
        ],
        "kill_and_release_next": [
            (lambda: killed_next(pidfd), (pidfd, 1, 0)),
            (lambda: killed_next(unused), (unused, 0, errno.EBADF)),
            (lambda: killed_next(-1), (-1, 0, 0)),
            (lambda: kill_and_release_next(unused), errno.EBADF),
            (lambda: kill_and_release_next(wrong), TypeError),
        ],
        "mlockall": [
            (lambda: mlockall(0), errno.EINVAL),
            (lambda: mlockall(2**40), OverflowError),
        ],
        "pidfd_open": [
            (lambda: os.close(pidfd_open(own)), None),
            (lambda: os.close(pidfd_open(own, _mrelease.PIDFD_NONBLOCK)), None),
            (lambda: pidfd_open(-1), errno.EINVAL),
            (lambda: pidfd_open(own, -1), OverflowError),
        ],
        "pidfd_send_signal": [
            (lambda: pidfd_send_signal(pidfd, 0), None),
            (lambda: pidfd_send_signal(pidfd, signal.SIGKILL), None),
            (lambda: pidfd_send_signal(pidfd, 1000), errno.EINVAL),
            (lambda: pidfd_send_signal(unused, 0), errno.EBADF),
        ],
        "process_mrelease": [
            (lambda: process_mrelease(pidfd), None),
            (lambda: process_mrelease(pidfd, 1), errno.EINVAL),
            (lambda: process_mrelease(unused), errno.EBADF),
        ],
    }


def outcome(call: Callable[[], object]) -> object:
    """What it returns; the errno or the type of what it raises."""
    try:
        return call()
    except OSError as error:
        return error.errno
    except Exception as error:
        return type(error)


@needs_release
def test_every_c_function_at_once_on_the_same_and_on_own_pidfds(long: bool) -> None:
    rounds = 500 if long else 25

    with victims.exit_stopped(4) as victim, opened(victim.pid) as shared:

        def run(number: int) -> int:
            done = 0
            with opened(victim.pid) as own:
                for turn in range(rounds):
                    found = [ways(pidfd, victim.pid) for pidfd in (shared, own)]
                    # Each thread begins with another function, and goes on to the next.
                    for step in range(len(C_FUNCTIONS)):
                        name = C_FUNCTIONS[(number + turn + step) % len(C_FUNCTIONS)]
                        for call, expected in [*found[0][name], *found[1][name]]:
                            assert outcome(call) == expected, name
                            done += 1
            return done

        # The first kill of all is one of eight.
        kills = [lambda: kill_and_release(shared)] * THREADS
        assert together(kills) == [0] * THREADS
        victim.wait_exit_stop()
        done = together([partial(run, n) for n in range(THREADS)])
        assert set(done) == {rounds * sum(2 * len(way) for way in ways(0, 0).values())}


def test_every_name_is_first_asked_for_by_many_threads() -> None:
    program = f"""
import threading
start = threading.Barrier({THREADS})
found = []

def run(number):
    start.wait({LIMIT})
    import mrelease
    names = mrelease.__all__[number:] + mrelease.__all__[:number]
    found.append({{name: getattr(mrelease, name) for name in names}})

threads = [threading.Thread(target=run, args=(n,)) for n in range({THREADS})]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(found) == {THREADS}
for one in found:
    assert one == found[0]
    assert all(one[name] is found[0][name] for name in one)
"""
    result = run_python(program)
    assert (result.returncode, result.stderr) == (0, "")


# ---- Forks


def test_threads_that_fork_leave_the_warnings_as_they_were() -> None:
    program = f"""
import os, threading, warnings
from mrelease import is_supported
first_forks, second_forks, first_is_done = (threading.Event() for _ in range(3))

def before():
    # The second one may have to wait until the first is done.
    if threading.current_thread() is first:
        first_forks.set()
        second_forks.wait(1)
    else:
        second_forks.set()

def after():
    if threading.current_thread() is not first:
        first_is_done.wait(1)

def run():
    is_supported()
    first_is_done.set()

filters = list(warnings.filters)
os.register_at_fork(before=before, after_in_parent=after)
first = threading.Thread(target=run)
first.start()
assert first_forks.wait({LIMIT})
is_supported()
first.join()
assert warnings.filters == filters, warnings.filters
"""
    result = run_python(program)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_child_may_probe_though_a_thread_was_forking() -> None:
    program = f"""
import os, signal, threading, warnings
from mrelease import Pidfd, is_supported
forks, over = threading.Event(), threading.Event()

def before():
    if threading.current_thread() is not threading.main_thread():
        forks.set()
        over.wait({LIMIT})

os.register_at_fork(before=before)
thread = threading.Thread(target=is_supported)
thread.start()
assert forks.wait({LIMIT})
warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
if child == 0:
    os._exit(0 if isinstance(is_supported(), bool) else 1)
with Pidfd.open(child) as pidfd:
    pidfd.wait({LIMIT})
    os.kill(child, signal.SIGKILL)  # if it hangs
over.set()
thread.join()
assert os.waitpid(child, 0)[1] == 0
"""
    result = run_python(program)
    assert (result.returncode, result.stderr) == (0, "")


# ---- One Pidfd


def test_threads_kill_and_watch_through_one_pidfd(long: bool) -> None:
    def kill(pidfd: Pidfd) -> bool:
        return pidfd.kill(wait=True, timeout=None).exited

    def watch(pidfd: Pidfd) -> bool:
        while not pidfd.exited:
            pidfd.send_signal(0)
            assert pidfd.fileno() >= 0
            assert f"pid={pidfd.pid} " in repr(pidfd)
        return pidfd.wait(0)

    def wait(pidfd: Pidfd) -> bool:
        return pidfd.wait(LIMIT)

    with ExitStack() as stack:
        crowd = stack.enter_context(victims.crowd(101 if long else 11))
        for pidfd in members(crowd, stack):
            uses = [partial(use, pidfd) for use in (kill, watch, wait)]
            assert together(uses * 3) == [True] * 9


# ---- Groups


def test_threads_kill_the_same_processes_by_kill_all(long: bool) -> None:
    with ExitStack() as stack:
        crowd = stack.enter_context(victims.crowd(401 if long else 81))
        pidfds = members(crowd, stack)

        def kill(number: int) -> list[KillResult | OSError]:
            first = number * len(pidfds) // THREADS
            targets = pidfds[first:] + pidfds[:first]
            return kill_all(targets, wait=True, timeout=None)

        pids = {pidfd.pid for pidfd in pidfds}
        for results in together([partial(kill, n) for n in range(THREADS)]):
            assert len(results) == len(pids)
            exited = {
                one.pid for one in results if isinstance(one, KillResult) and one.exited
            }
            assert exited == pids, results


def test_threads_kill_the_same_tree(long: bool) -> None:
    def kill(root: Pidfd) -> list[KillResult]:
        try:
            return kill_tree(root, wait=True, timeout=None)
        except ProcessLookupError:  # killed and reaped before this one began
            return []

    for _ in range(10 if long else 2):
        with ExitStack() as stack:
            crowd = stack.enter_context(victims.crowd(41))
            pidfds = members(crowd, stack)
            root = stack.enter_context(Pidfd.open(crowd.root))
            found = list(filter(None, together([partial(kill, root)] * 4)))
            assert found
            for pidfd in [*pidfds, root]:
                assert pidfd.exited
            for results in found:
                assert all(result.exited for result in results)
                assert results[-1].pid == crowd.root


# ---- A Reaper


def test_threads_kill_and_cancel_until_one_of_them_closes_the_reaper(
    long: bool,
) -> None:
    for _ in range(10 if long else 1):
        with ExitStack() as stack:
            crowd = stack.enter_context(victims.crowd(20 * THREADS + 1))
            use_and_close(stack.enter_context(Reaper(2)), members(crowd, stack))


def use_and_close(reaper: Reaper, pidfds: list[Pidfd]) -> None:
    at_work = threading.Semaphore(0)

    def run(number: int) -> tuple[list[Future[KillResult]], list[Pidfd]]:
        """Kill a share, give up each third; return the other futures, all begun."""
        futures, begun = [], []
        for turn, pidfd in enumerate(pidfds[number::THREADS]):
            if turn == 5:
                at_work.release()
            if number == 0 and turn == 10:
                for _ in range(THREADS):
                    assert at_work.acquire(timeout=LIMIT)
                reaper.close()
            try:
                future = reaper.kill(pidfd, wait=True, timeout=None)
            except RuntimeError:  # closed meanwhile
                continue
            begun.append(pidfd)
            if turn % 3 or not future.cancel():
                futures.append(future)
        return futures, begun

    found = together([partial(run, n) for n in range(THREADS)])
    all_begun = {pidfd for _, begun in found for pidfd in begun}
    assert len(all_begun) >= 5 * THREADS
    for futures, _ in found:
        for future in futures:
            assert future.result(LIMIT).exited
    for pidfd in pidfds:
        # Whose result was given up is killed all the same, who was refused is not.
        assert pidfd.wait(LIMIT) if pidfd in all_begun else not pidfd.exited
