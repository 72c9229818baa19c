"""aio: kills awaited, with the loop never blocked, on asyncio's loop and uvloop's."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pytest

import victims
from calls import run_python
from mrelease import Pidfd, aio
from victims import _until

LIMIT = victims.TIMEOUT
RELEASED_OR_EXITED = ("released", "exited")

needs_release = pytest.mark.needs("release")

T = TypeVar("T")
Run: TypeAlias = Callable[[Coroutine[Any, Any, T]], T]


def _run_asyncio(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(main, LIMIT))


def _run_uvloop(main: Coroutine[Any, Any, T]) -> T:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(main, LIMIT))


@pytest.fixture(
    params=[
        pytest.param(_run_asyncio, id="asyncio"),
        pytest.param(_run_uvloop, id="uvloop", marks=pytest.mark.needs("uvloop")),
    ]
)
def run(request: pytest.FixtureRequest) -> Any:
    """What runs a coroutine on a new loop."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _open_what_uvloop_keeps() -> None:
    """libuv opens a pipe with its first loop, and keeps it."""
    try:
        import uvloop
    except ImportError:
        return
    uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def _close_pool() -> Iterator[None]:
    """End the threads that loops share; they must not be needed any more."""
    before = threads()
    yield
    while aio._pools:
        aio._pools.pop().close(wait=True)
    _until(lambda: threads() <= before, "the threads to end")


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def infos() -> dict[int, str]:
    """What the kernel says of each of this process's descriptors."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = Path(f"/proc/self/fdinfo/{name}").read_text()
        except FileNotFoundError:
            continue
    return found


def pidfds() -> int:
    return sum("\nPid:\t" in text for text in infos().values())


def readers() -> int:
    """How many descriptors the epoll instances of this process watch."""
    return sum(text.count("tfd:") for text in infos().values())


def reported(program: str, *under: str) -> list[str]:
    """What a program prints, word by word."""
    options = ("-W", "ignore::DeprecationWarning")  # of a fork beside threads
    result = run_python(program, under=under, options=options)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.split()


# ---- kill


@needs_release
def test_a_victim_in_its_exit_is_released(run: Run[Any]) -> None:
    with victims.exit_stopped(16) as victim:
        result = run(aio.kill(victim.process, measure=True))
        assert (result.pid, result.outcome) == (victim.pid, "released")
        assert (result.signal, result.attempts) == (signal.SIGKILL, 1)
        assert result.freed is not None
        assert result.freed >= 16 << 20
        assert victim.anon() == 0


def test_a_sleeping_victim_is_gone_with_wait(run: Run[Any]) -> None:
    with victims.victim() as victim, Pidfd.open(victim.pid) as pidfd:
        result = run(aio.kill(pidfd, wait=True, timeout=None))
        assert result.outcome in RELEASED_OR_EXITED
        assert (result.exited, result.signal) == (True, signal.SIGKILL)
        assert pidfd.exited


@needs_release
def test_memory_shared_with_a_living_process_is_busy_at_the_timeout(
    run: Run[Any],
) -> None:
    with victims.exit_stopped(sharer="clone") as victim:
        result = run(aio.kill(victim.pid, timeout=0.5))
        assert (result.outcome, result.errno) == ("busy", errno.EINVAL)


def test_errors_are_those_of_kill(run: Run[Any]) -> None:
    reaped = subprocess.Popen(["true"])
    reaped.wait()

    async def refused(call: Callable[..., Any], target: Any, **options: Any) -> str:
        try:
            await call(target, **options)
        except Exception as error:
            return type(error).__name__
        return "none"

    async def main() -> None:
        for call in (aio.kill, aio.terminate, aio.wait):
            assert await refused(call, reaped) == "ProcessLookupError"
            assert await refused(call, 0) == "ValueError"
            assert await refused(call, "1") == "TypeError"
            assert await refused(call, victim.pid, timeout=-1) == "ValueError"
            assert await refused(call, victim.pid, timeout="1") == "TypeError"
            assert await refused(call, victim.pid, tiemout=1) == "TypeError"
        for call in (aio.kill, aio.terminate):
            assert await refused(call, os.getpid()) == "ValueError"
            assert await refused(call, 1) == "ValueError"
        assert await refused(aio.terminate, victim.pid, signal=0) == "ValueError"
        assert await refused(aio.terminate, victim.pid, grace=-1) == "ValueError"
        assert await refused(aio.terminate, victim.pid, signal="TERM") == "TypeError"
        assert pidfds() == 0

    with victims.victim(1) as victim:
        run(main())
        assert victim.state() == "S"


@pytest.mark.needs("root")
def test_whom_the_caller_may_not_kill_lives() -> None:
    def attempt() -> list[int]:
        async def main() -> list[int]:
            return [
                await _errno(aio.kill(victim.pid)),
                await _errno(aio.terminate(victim.pid)),
            ]

        return _run_asyncio(main())

    with victims.victim(1) as victim:
        answer = victims.apart(attempt, uid=victims.NOBODY)
        assert answer == [errno.EPERM, errno.EPERM]
        assert victim.state() == "S"


async def _errno(call: Coroutine[Any, Any, object]) -> int:
    try:
        await call
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.parametrize("function", [aio.kill, aio.terminate, aio.wait])
@pytest.mark.parametrize("spare", [0, 1])
def test_without_descriptors_nothing_is_sent(function: Any, spare: int) -> None:
    # With one to spare, either the pidfd or what wakes the threads is to be had.
    def attempt() -> int:
        async def main() -> int:
            free = os.dup(0)
            os.close(free)
            limits = free + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            return await _errno(function(victim.pid))

        return _run_asyncio(main())

    with victims.victim(1) as victim:
        assert victims.apart(attempt) == errno.EMFILE
        assert victim.state() == "S"


# ---- Many at once


def test_hundreds_are_awaited_by_a_few_threads(run: Run[Any]) -> None:
    with victims.crowd(301) as crowd:
        pids = [pid for pid in crowd.running() if pid != crowd.root]

        async def main() -> list[Any]:
            before = threads()
            kills = [
                asyncio.ensure_future(aio.kill(pid, wait=True, timeout=None))
                for pid in pids
            ]
            most = 0
            while not all(kill.done() for kill in kills):
                most = max(most, len(threads() - before))
                await asyncio.sleep(0)
            assert 0 < most <= 3
            return [kill.result() for kill in kills]

        results = run(main())
        assert [result.pid for result in results] == pids
        assert all(result.exited for result in results)


def test_hundreds_of_waits_take_no_thread_each(run: Run[Any]) -> None:
    with victims.crowd(201) as crowd:
        pids = [pid for pid in crowd.running() if pid != crowd.root]

        async def main() -> list[bool]:
            before = threads()
            waits = [asyncio.ensure_future(aio.wait(pid)) for pid in pids]
            await asyncio.sleep(0.01)
            assert len(threads() - before) <= 3
            assert not any(wait.done() for wait in waits)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            return await asyncio.gather(*waits)

        assert run(main()) == [True] * len(pids)


def test_loops_in_several_threads_kill_at_once(run: Run[Any]) -> None:
    with victims.crowd(61) as crowd:
        pids = [pid for pid in crowd.running() if pid != crowd.root]
        exited: list[bool] = []
        start = threading.Barrier(4)

        async def main(pids: list[int]) -> None:
            kills = [aio.kill(pid, wait=True, timeout=None) for pid in pids]
            exited.extend(result.exited for result in await asyncio.gather(*kills))

        def loop(number: int) -> None:
            start.wait()
            run(main(pids[number::4]))

        running = [threading.Thread(target=loop, args=(n,)) for n in range(4)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert exited == [True] * len(pids)


# ---- The loop is never blocked


@pytest.mark.needs("fuse", "release")
def test_while_releases_are_blocked_the_loop_goes_on_and_so_do_kills(
    run: Run[Any],
) -> None:
    async def main() -> None:
        # As many as may run at once, and one that has to wait for those.
        kills = [
            asyncio.ensure_future(aio.kill(one.pid, timeout=None))
            for one in (first, second, third)
        ]
        for _ in range(50):  # a heartbeat
            await asyncio.sleep(0.002)
        result = await aio.kill(victim.pid, wait=True, timeout=None)
        assert (result.outcome, result.signal) == ("exited", signal.SIGKILL)
        late = await aio.kill(staying.pid, timeout=0.05)
        assert (late.outcome, late.released) == ("exiting", False)
        assert not any(kill.done() for kill in kills)
        for one in (first, second, third):
            one.unstick()
        for kill in kills:
            assert (await kill).released

    with (
        victims.stuck_writer(1) as first,
        victims.stuck_writer(1) as second,
        victims.stuck_writer(1) as third,
        victims.victim(1) as victim,
        victims.exit_stopped(1) as staying,
    ):
        try:
            run(main())
        finally:
            for one in (first, second, third):
                one.unstick()


@pytest.mark.needs("fuse", "release")
def test_a_blocked_kill_returns_at_its_timeout(run: Run[Any]) -> None:
    with victims.stuck_writer(1) as victim:
        try:
            result = run(aio.kill(victim.pid, timeout=0.1))
        finally:
            victim.unstick()
        assert (result.outcome, result.released) == ("exiting", False)
        assert (result.signal, result.errno) == (signal.SIGKILL, 0)


# ---- Cancelling


def test_a_cancelled_kill_comes_and_leaks_nothing(run: Run[Any]) -> None:
    async def main() -> None:
        killing = asyncio.ensure_future(aio.kill(victim.pid, timeout=None))
        await asyncio.sleep(0)
        killing.cancel()
        await asyncio.wait([killing])

    with victims.victim() as victim:
        run(main())
        victim.wait_exit()
        _until(lambda: pidfds() == 0, "the descriptor to be closed")


@needs_release
def test_cancelling_a_kill_that_waits_closes_its_descriptor(run: Run[Any]) -> None:
    async def main() -> None:
        await asyncio.sleep(0.01)  # in which the loop begins to watch what it needs
        watched = readers()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await aio.kill(victim.pid, wait=True, timeout=None)
        while pidfds():
            await asyncio.sleep(0.001)
        assert readers() == watched

    with victims.exit_stopped() as victim:
        run(main())
        victim.wait_exit_stop()


def test_of_a_crowd_cancelled_at_random_nobody_lives(run: Run[Any]) -> None:
    chance = random.Random(3)

    async def main() -> None:
        kills = []
        for pid in pids:
            call = aio.kill(pid, wait=chance.random() < 0.5, timeout=None)
            kills.append(asyncio.ensure_future(call))
            if chance.random() < 0.5:
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                begun = chance.choice(kills)
                # One that has not run at all yet would not begin.
                if begun is not kills[-1]:
                    begun.cancel()
        await asyncio.sleep(0)
        await asyncio.gather(*kills, return_exceptions=True)

    with victims.crowd(121) as crowd:
        pids = [pid for pid in crowd.running() if pid != crowd.root]
        run(main())
        _until(lambda: pidfds() == 0, "the descriptors to be closed")


# ---- terminate


def test_whoever_obeys_is_not_killed(run: Run[Any]) -> None:
    with victims.victim(16, sigterm="exit") as victim:
        result = run(aio.terminate(victim.pid, grace=60, measure=True))
        assert (result.outcome, result.signal) == ("exited", signal.SIGTERM)
        assert (result.attempts, result.errno) == (0, 0)
        assert result.freed is not None
        assert result.freed >= 16 << 20
        victim.reap()
        assert victim.process.returncode == 0


@pytest.mark.parametrize("settle", [0, 0.01])
def test_whoever_ignores_sigterm_is_killed_after_the_grace(
    run: Run[Any], settle: float
) -> None:
    with victims.victim(sigterm="ignore") as victim:
        result = run(
            aio.terminate(victim.pid, grace=0.1, settle=settle, wait=True, timeout=None)
        )
        assert result.outcome in RELEASED_OR_EXITED
        assert (result.signal, result.exited) == (signal.SIGKILL, True)
        assert result.elapsed >= 0.1
        victim.reap()
        assert victim.process.returncode == -signal.SIGKILL


@needs_release
def test_after_the_grace_the_memory_is_released(run: Run[Any]) -> None:
    with victims.exit_stopped() as victim:
        os.kill(victim.pid, signal.SIGSTOP)  # so that it cannot obey
        result = run(aio.terminate(victim.pid, grace=0.05, timeout=None))
        assert (result.outcome, result.signal) == ("released", signal.SIGKILL)
        assert victim.anon() == 0


def test_another_signal_may_ask(run: Run[Any]) -> None:
    with victims.victim(sigterm="ignore") as victim:
        call = aio.terminate(victim.pid, signal=signal.SIGINT, grace=60)
        result = run(call)
        assert (result.outcome, result.signal) == ("exited", signal.SIGINT)


def test_the_kill_comes_after_a_grace_in_which_it_was_cancelled(run: Run[Any]) -> None:
    async def main() -> None:
        terminating = asyncio.ensure_future(aio.terminate(victim.pid, grace=1))
        await asyncio.sleep(0.01)
        terminating.cancel()
        await asyncio.wait([terminating])
        assert terminating.cancelled()

    with victims.victim(sigterm="ignore") as victim:
        run(main())
        victim.wait_exit()
        victim.reap()
        assert victim.process.returncode == -signal.SIGKILL
        _until(lambda: pidfds() == 0, "the descriptor to be closed")


def test_whoever_obeys_after_it_was_cancelled_is_not_killed(run: Run[Any]) -> None:
    async def main() -> None:
        terminating = asyncio.ensure_future(aio.terminate(victim.pid, grace=60))
        await asyncio.sleep(0.01)
        terminating.cancel()
        await asyncio.wait([terminating])

    with victims.victim(sigterm="exit") as victim:
        run(main())
        victim.wait_exit()
        victim.reap()
        assert victim.process.returncode == 0
        # Its descriptor does not wait for the end of the grace.
        _until(lambda: pidfds() == 0, "the descriptor to be closed")


# ---- wait


def test_wait_says_whether_the_exit_has_come(run: Run[Any]) -> None:
    async def main() -> None:
        for timeout in (0, 0.02):
            assert not await aio.wait(victim.pid, timeout)
        waiting = asyncio.ensure_future(aio.wait(victim.process))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        victim.kill()
        assert await waiting
        # It does not reap, and a zombie has exited.
        assert await aio.wait(victim.pid, 0)
        assert victim.exited()

    with victims.victim(1) as victim:
        run(main())


def test_every_length_of_time_can_be_waited(run: Run[Any]) -> None:
    async def main() -> None:
        times = (60, 1e9, 1e300, float("inf"), None)
        waits = [asyncio.ensure_future(aio.wait(victim.pid, time)) for time in times]
        await asyncio.sleep(0.01)
        assert not any(wait.done() for wait in waits)
        victim.kill()
        assert await asyncio.gather(*waits) == [True] * len(times)

    with victims.victim(1) as victim:
        run(main())


def test_two_may_wait_on_one_pidfd_and_it_stays_as_it_is(run: Run[Any]) -> None:
    async def main() -> None:
        first, second = (asyncio.ensure_future(aio.wait(pidfd)) for _ in range(2))
        assert not await aio.wait(pidfd, 0.01)
        first.cancel()
        await asyncio.wait([first])
        assert not second.done()
        victim.kill()
        assert await second

    with victims.victim(1) as victim, Pidfd.open(victim.pid) as pidfd:
        assert os.get_blocking(pidfd.fileno())
        run(main())
        assert os.get_blocking(pidfd.fileno())
        assert pidfd.exited


def test_a_cancelled_wait_leaves_no_descriptor_and_no_reader(run: Run[Any]) -> None:
    async def main() -> None:
        await asyncio.sleep(0.01)  # in which the loop begins to watch what it needs
        watched = readers()
        waiting = asyncio.ensure_future(aio.wait(victim.pid))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        assert not await aio.wait(victim.pid, 0.01)
        while pidfds():
            await asyncio.sleep(0.001)
        assert readers() == watched

    with victims.victim(1) as victim:
        run(main())
        assert victim.state() == "S"


# ---- After a fork, and at the interpreter's exit

LOOPS = {"asyncio": "asyncio.new_event_loop", "uvloop": "uvloop.new_event_loop"}


@pytest.mark.parametrize(
    "loop",
    ["asyncio", pytest.param("uvloop", marks=pytest.mark.needs("uvloop"))],
)
@pytest.mark.parametrize("held", [False, True])
def test_a_forked_child_kills_with_a_loop_of_its_own(loop: str, held: bool) -> None:
    with (
        victims.victim(1) as first,
        victims.victim(1) as second,
        victims.victim(1) as third,
        victims.victim(1) as waited,
    ):
        program = f"""
import asyncio, os, sys, threading, time
import {loop}
from mrelease import aio

def run(call):
    with asyncio.Runner(loop_factory={LOOPS[loop]}) as runner:
        return runner.run(call)

async def with_a_wait():
    waiting = asyncio.ensure_future(aio.wait({waited.pid}))
    await asyncio.sleep(0.01)
    return (await aio.kill({first.pid}, wait=True, timeout=None)).exited

print(run(with_a_wait()))

# Another thread may be about to start a kill of its own when this one forks.
held, over = threading.Event(), threading.Event()

def hold():
    with aio._lock:
        held.set()
        over.wait()

if {held}:
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
sys.stdout.flush()
child = os.fork()
if child == 0:
    print(run(aio.kill({second.pid}, wait=True, timeout=None)).exited)
    sys.exit(7)
end = time.monotonic() + 10
while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
    if time.monotonic() > end:
        os.kill(child, 9)
    time.sleep(0.001)
over.set()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
# The parent's threads go on.
print(run(aio.kill({third.pid}, wait=True, timeout=None)).exited)
"""
        assert reported(program) == ["True", "True", "7", "True"]
        assert waited.state() == "S"


@needs_release
def test_a_forked_child_holds_none_of_the_parents_descriptors(run: Run[Any]) -> None:
    def child() -> tuple[int, int]:
        return pidfds(), sum("eventfd-count" in text for text in infos().values())

    async def main() -> None:
        killing = asyncio.ensure_future(aio.kill(victim.pid, wait=True, timeout=None))
        while victim.anon():
            await asyncio.sleep(0.001)
        ours = child()
        assert ours[0] == 1
        theirs = victims.apart(child)
        # Of the loop's own descriptors it may have any number.
        assert theirs[0] == 0
        assert theirs[1] == ours[1] - 1
        killing.cancel()

    with victims.exit_stopped() as victim:
        run(main())


def test_at_exit_every_kill_begun_is_sent() -> None:
    with victims.crowd(61) as crowd:
        pids = [pid for pid in crowd.running() if pid != crowd.root]
        program = f"""
import asyncio
from mrelease import aio

async def main():
    for pid in {pids}:
        asyncio.ensure_future(aio.kill(pid, wait=True))
    await asyncio.sleep(0)

asyncio.run(main())
"""
        assert reported(program) == []
        _until(lambda: set(crowd.running()) == {crowd.root}, "the crowd to die")
