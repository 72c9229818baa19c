"""Short of memory, in a rain of signals, forked or killed in the middle of it.

No crash, no descriptor and no child left, nobody left stopped, no wrong victim.
"""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pytest

import faults
import victims
from calls import apart, run_python
from faults import Checked
from mrelease import (
    Pidfd,
    Reaper,
    kill,
    kill_all,
    kill_and_release,
    kill_tree,
    pidfd_open,
    pidfd_send_signal,
    process_mrelease,
    release,
    terminate,
)

Record = Callable[[str, object], None]
needs_release = pytest.mark.needs("release")


# ---- Without memory


def _opened(pid: int) -> Any:
    os.close(pidfd_open(pid))
    return release(pid)


def _low_level(pid: int) -> Any:
    with Pidfd.open(pid) as pidfd:
        pidfd_send_signal(pidfd.fileno(), 0)
        with suppress(OSError):
            process_mrelease(pidfd.fileno())
        kill_and_release(pidfd.fileno())
        return release(pidfd)


# Not a Reaper's: threading.Condition, its lock, does not survive a failing allocation.
STARVED: dict[str, Callable[[int], Any]] = {
    "pidfd_open": _opened,
    "C": _low_level,
    "kill": lambda pid: kill(pid, timeout=0.05, measure=True),
    "terminate": lambda pid: terminate(pid, grace=0.001, timeout=0.05),
    "kill_all": lambda pid: kill_all([pid], timeout=0.05)[0],
    "kill_tree": lambda pid: kill_tree(pid, timeout=0.05)[-1],
}
MIDWAY = {"kill_tree", "terminate"}  # which send something before the kill


def starved(function: Callable[[int], Any], pid: int, start: int) -> Callable[[], Any]:
    """A call in which one allocation fails, the first being 0.

    If it makes fewer, it returns ENOUGH. (If all failed from one on, the interpreter
    itself would hang: it cannot even pass on the exception.)
    """
    import _testcapi  # type: ignore[import-not-found]

    def call() -> Any:
        enough = False
        try:
            _testcapi.set_nomemory(start, start + 1)
            result = function(pid)
            try:
                for _ in range(start + 1):
                    bytearray(1)
            except MemoryError:
                enough = True
        finally:
            _testcapi.remove_mem_hooks()
        return ENOUGH if enough else result

    return call


ENOUGH = "enough"
# Until 3.14 the interpreter needs memory to leave a with block by an exception, and a
# debug build ends by an assertion of its own if it has none (gh-134163).
ABORTS = hasattr(sys, "gettotalrefcount") and sys.version_info < (3, 14)
# From one that fails to the next, in the default run and in the long one: kill_tree()
# looks at every process, which takes thousands.
STRIDES = {"kill_tree": (4000, 5)}


@pytest.mark.needs("release", "testcapi")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", STARVED)
def test_whatever_allocation_fails(
    name: str, long: bool, record_property: Record
) -> None:
    function = STARVED[name]
    with ExitStack() as stack:
        # A small int needs no memory: descriptors beyond those are wanted.
        null = stack.enter_context(open("/dev/null"))
        for _ in range(260):
            stack.callback(os.close, os.dup(null.fileno()))
        checked = Checked(stack, holds=name not in MIDWAY)
        for start in itertools.count(0, STRIDES.get(name, (200, 1))[long]):
            outcome = faults.called(starved(function, checked.victim.pid, start))
            if outcome.value == ENOUGH:
                break
            if outcome.status == -signal.SIGABRT and ABORTS:
                continue
            checked.check(outcome, midway=name in MIDWAY)
            record_property("allocations", 1)


ROOMS = [0, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 3 << 20, 9 << 20, 20 << 20, 70 << 20]


# Not a Reaper's: the interpreter waits for ever for a thread that fails as it starts.
@needs_release
@pytest.mark.parametrize("name", ["kill", "kill_all", "kill_tree"])
def test_whatever_the_address_space_left(name: str, long: bool) -> None:
    function = STARVED[name]
    with ExitStack() as stack:
        checked = Checked(stack, holds=name not in MIDWAY)
        for room in ROOMS if long else ROOMS[::4]:
            outcome = faults.called(partial(limited, function, checked, room))
            checked.check(outcome, midway=name in MIDWAY)


def limited(function: Callable[[int], Any], checked: Checked, room: int) -> Any:
    """Call it with as many bytes of addresses left."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        return function(checked.victim.pid)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


# ---- In a rain of signals


class Drop(Exception):
    """What the handler raises."""


WAYS: dict[str, Callable[[int], Any]] = {
    "kill": lambda pid: kill(pid, timeout=None),
    "Pidfd": lambda pid: _with_pidfd(pid, lambda pidfd: pidfd.kill(timeout=None)),
    "copy": lambda pid: _with_pidfd(pid, _with_copy),
    "kill_all": lambda pid: kill_all([pid], timeout=None)[0],
    "terminate": lambda pid: terminate(pid, grace=0.001, timeout=None),
    "settle": lambda pid: kill(pid, settle=0.001, timeout=None),
}


def _with_pidfd(pid: int, use: Callable[[Pidfd], Any]) -> Any:
    with Pidfd.open(pid) as pidfd:
        return use(pidfd)


def _with_copy(pidfd: Pidfd) -> Any:
    with Pidfd.open(pidfd) as copy:
        return copy.kill(timeout=None)


def rained_on(pids: list[int], *, raises: bool) -> tuple[int, int]:
    """Kill all of them at 1000 signals a second; count the signals and the raised."""
    drops = raised = 0
    armed = False

    def handler(*_: object) -> None:
        # Once a kill: no Python code can close anything surely if each of its own
        # lines may raise, those that close after the first exception included.
        nonlocal armed, drops
        drops += 1
        if raises and armed:
            armed = False
            raise Drop

    # What is collected in the rain says that it is unclosed, and closes itself.
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, handler)
    # A kill takes less than 1 ms: the first drop falls early, and each time elsewhere.
    firsts = itertools.cycle(number * 7e-6 for number in range(1, 100))
    for pid, way in zip(pids, itertools.cycle(WAYS.values())):
        for tries in itertools.count(1):
            armed = True
            try:
                # Later from try to try, as a slow machine would never get to the end.
                signal.setitimer(signal.ITIMER_REAL, tries * next(firsts), 0.001)
                result = way(pid)
                armed = False
                break
            except Drop:
                raised += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        assert result.signal in (signal.SIGKILL, signal.SIGTERM), result
        assert result.released, result
    return drops, raised


@needs_release
@pytest.mark.timeout(600)
@pytest.mark.parametrize("raises", [False, True])
def test_signals_at_1_khz(raises: bool, long: bool, record_property: Record) -> None:
    for _ in range(20 if long else 1):
        with victims.crowd(201) as crowd, victims.victim(1) as bystander:
            pids = sorted(crowd.running().keys() - {crowd.root})
            outcome = faults.called(partial(rained_on, pids, raises=raises))
            assert outcome.raised is None, outcome
            assert (outcome.status, outcome.leaked, outcome.children) == (
                (0, set(), False)
            ), outcome
            drops, raised = outcome.value
            assert drops > 0
            record_property("signals", drops)
            record_property("raised", raised)
            # Who was released may still be on its way out.
            victims._until(lambda: len(crowd.running()) == 1, "the killed to be gone")
            assert (bystander.state(), crowd.running()) == ("S", {crowd.root: "S"})


# ---- Forked at any moment


def forked_while_killing(pids: list[int], forks: int) -> int:
    """Fork while threads kill; each child has to kill, too, and to make a Reaper."""
    warnings.simplefilter("ignore", DeprecationWarning)
    mine, theirs = pids[:forks], pids[forks:]
    stopping = threading.Event()
    results: list[Any] = []

    def work(use: Callable[[int], Any], part: list[int]) -> None:
        # When all are dead, the dead are killed.
        for number, pid in enumerate(itertools.cycle(part), 1):
            results.append(use(pid).outcome)
            if stopping.is_set() and number >= len(part):
                return

    with Reaper(2) as reaper:
        uses: list[Callable[[int], Any]] = [
            lambda pid: kill(pid, boost=False, timeout=None),
            lambda pid: reaper.kill(pid, timeout=None).result(60),
            lambda pid: kill_all([pid], timeout=None)[0],
        ]
        threads = [
            threading.Thread(target=work, args=(use, theirs[number::3]))
            for number, use in enumerate(uses)
        ]
        for thread in threads:
            thread.start()
        try:
            for pid in mine:
                _check_child(reaper, pid)
        finally:
            stopping.set()
            for thread in threads:
                thread.join()
    assert set(results) <= {"released", "exited"}
    return len(results)


def _check_child(reaper: Reaper, pid: int) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)  # which kills, if it hangs
            code = _use_in_child(reaper, pid)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _use_in_child(reaper: Reaper, pid: int) -> int:
    try:
        reaper.kill(pid)
    except RuntimeError:
        reaper.close()
    else:
        return 2
    if not kill(pid, timeout=None).released:
        return 3
    with Reaper(1) as own:
        return 0 if own.kill(pid, timeout=None).result(15).released else 4


@needs_release
@pytest.mark.timeout(300)
def test_a_child_that_is_forked_at_any_moment_kills(
    long: bool, record_property: Record
) -> None:
    forks = 1000 if long else 40
    with victims.crowd(forks + 301) as crowd:
        pids = sorted(crowd.running().keys() - {crowd.root})
        outcome = faults.called(partial(forked_while_killing, pids, forks))
        assert outcome.raised is None, outcome
        assert (outcome.status, outcome.leaked, outcome.children) == (
            (0, set(), False)
        ), outcome
        victims._until(lambda: len(crowd.running()) == 1, "the killed to be gone")
        assert crowd.running() == {crowd.root: "S"}
    record_property("forks", forks)


# ---- Killed at any moment


@pytest.mark.needs("strace")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "prey",
    [
        "tree",
        pytest.param(
            "group",
            marks=[pytest.mark.needs("root", "cgroup1"), pytest.mark.long],
        ),
    ],
)
def test_a_caller_that_is_killed_at_any_moment_leaves_nobody_stopped(
    prey: str, long: bool, record_property: Record
) -> None:
    step = 1 if long else 40
    program = f"import killed_callers as k; print(k.run(k.{prey}, {step}))"
    result = run_python(program, under=apart())
    assert (result.returncode, result.stderr) == (0, "")
    killed = int(result.stdout)
    assert killed > 3
    record_property("killed callers", killed)
