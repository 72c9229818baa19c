"""Calls in every order on processes in every state; test_fuzz.py runs it apart.

A model says what each call has to answer: the table of errnos of process_mrelease(2)
and its like, and what the functions above them make of it. Processes that a sequence
has left as they were serve the next one.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from errno import EBADF, EINVAL, ESRCH
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import mrelease
import victims
from calls import errno_of
from mrelease import KillResult, Pidfd, Reaper, aio

SIGKILL, SIGTERM = signal.SIGKILL, signal.SIGTERM
MAKERS: dict[str, Callable[[], AbstractContextManager[victims.Victim]]] = {
    "obedient": partial(victims.victim, 1),
    "ignoring": partial(victims.victim, 1, sigterm="ignore"),
    "holding": partial(victims.exit_stopped, 1),
    "sharing": partial(victims.exit_stopped, 1, sharer="clone"),
    "leaderless": partial(victims.dead_leader, 1),
}


class Subject:
    """A process, and what the model knows of it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.maker = MAKERS[kind]()
        self.process: Any = self.maker.__enter__()
        self.pidfd = Pidfd.open(self.process.pid)
        # alive; held, which is dying and keeps its memory; zombie; reaped.
        self.state = "alive"
        self.stopped = False

    @property
    def traced(self) -> bool:
        return isinstance(self.process, victims.Tracee)

    @property
    def shared(self) -> bool:
        return self.traced and bool(self.process.sharer_pid)

    @property
    def untouched(self) -> bool:
        sharing = self.kind != "sharing" or self.shared
        return self.state == "alive" and not self.stopped and sharing

    def release_errno(self) -> int:
        """What process_mrelease(2) has to say."""
        if self.state in ("zombie", "reaped"):
            return ESRCH
        return 0 if self.state == "held" and not self.shared else EINVAL

    def killed(self) -> None:
        """A signal has been sent that it does not survive: go where that leads."""
        self.stopped = False
        if self.state != "alive":
            return
        if self.traced:
            self.process.wait_exit_stop()
            self.state = "held"
        else:
            self.process.wait_exit()
            self.state = "zombie"

    def check(self) -> None:
        """The process is as the model has it."""
        assert self.pidfd.exited == (self.state in ("zombie", "reaped"))
        if self.state == "reaped":
            with pytest.raises(ChildProcessError):
                self.process.exited()
        elif self.state == "alive":
            leader = "Z" if self.kind == "leaderless" else "T" if self.stopped else "S"
            # A signal that it ignores wakes it for a moment.
            self.process.wait_state(leader)

    def close(self) -> None:
        self.pidfd.close()
        self.maker.__exit__(None, None, None)


class World:
    """What outlives a sequence."""

    def __init__(self) -> None:
        self.free: dict[str, list[Subject]] = {kind: [] for kind in MAKERS}
        self.sequences = self.steps = 0
        self.bystander = Subject("obedient")
        self.reaper = Reaper(1)
        self.runner = asyncio.Runner()
        self.runner.run(aio.wait(self.bystander.pidfd, 0))
        self.descriptors = 0

    def take(self, kind: str) -> Subject:
        return self.free[kind].pop() if self.free[kind] else Subject(kind)

    def give_back(self, subject: Subject) -> None:
        if subject.untouched:
            self.free[subject.kind].append(subject)
        else:
            subject.close()

    def close(self) -> None:
        self.reaper.close()
        self.runner.close()
        for subjects in ([self.bystander], *self.free.values()):
            for subject in subjects:
                subject.close()


world: World

index = st.integers(0, 2)
# Those that are waited for without a limit are sure to exit, or to be released.
options = st.fixed_dictionaries(
    {"timeout": st.sampled_from([0, 0.02, None])},
    optional={
        "boost": st.booleans(),
        "measure": st.booleans(),
        "settle": st.sampled_from([0, 0.001]),
        "wait": st.booleans(),
    },
)
KILLS: dict[str, Callable[..., KillResult]] = {
    "kill": mrelease.kill,
    "Pidfd.kill": Pidfd.kill,
    "kill_all": lambda target, **options: _only(mrelease.kill_all([target], **options)),
    "kill_tree": lambda target, **options: _only(mrelease.kill_tree(target, **options)),
    "Reaper": lambda target, **options: world.reaper.kill(target, **options).result(60),
    "aio": lambda target, **options: world.runner.run(aio.kill(target, **options)),
}


def _only(results: list[Any]) -> KillResult:
    (one,) = results
    if isinstance(one, OSError):
        raise one
    return one  # type: ignore[no-any-return]


class Sequences(RuleBasedStateMachine):
    """Three processes at a time, of any kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.subjects: list[Subject] = []
        world.sequences += 1

    @initialize(kinds=st.lists(st.sampled_from([*MAKERS]), min_size=3, max_size=3))
    def begin(self, kinds: list[str]) -> None:
        self.subjects = [world.take(kind) for kind in kinds]

    def teardown(self) -> None:
        for subject in self.subjects:
            world.give_back(subject)

    # ---- What the processes do, or others with them

    @rule(at=index)
    def stop(self, at: int) -> None:
        one = self.subjects[at]
        if one.state == "alive" and not one.traced:
            os.kill(one.process.pid, signal.SIGSTOP)
            one.stopped = True

    @rule(at=index)
    def go_on(self, at: int) -> None:
        one = self.subjects[at]
        if one.stopped:
            mrelease.pidfd_send_signal(one.pidfd.fileno(), signal.SIGCONT)
            one.stopped = False

    @rule(at=index)
    def exit(self, at: int) -> None:
        one = self.subjects[at]
        if one.state == "held":
            if one.shared:
                one.process.kill_sharer()
            one.process.resume()
            one.state = "zombie"

    @rule(at=index)
    def end_the_sharer(self, at: int) -> None:
        one = self.subjects[at]
        if one.shared:
            one.process.kill_sharer()

    @rule(at=index)
    def reap(self, at: int) -> None:
        one = self.subjects[at]
        if one.state == "zombie":
            one.process.reap()
            one.state = "reaped"

    @rule(at=index, kind=st.sampled_from([*MAKERS]))
    def replace(self, at: int, kind: str) -> None:
        world.give_back(self.subjects[at])
        self.subjects[at] = world.take(kind)

    # ---- The system calls

    @rule(at=index, flags=st.sampled_from([0, mrelease.PIDFD_NONBLOCK]))
    def pidfd_open(self, at: int, flags: int) -> None:
        one = self.subjects[at]
        if one.state != "reaped":  # else the number may be somebody's
            fd = mrelease.pidfd_open(one.process.pid, flags)
            one.pidfd.close()
            one.pidfd = Pidfd(fd)
            assert one.pidfd.pid == one.process.pid

    @rule(at=index)
    def signal_0(self, at: int) -> None:
        one = self.subjects[at]
        expected = ESRCH if one.state == "reaped" else 0
        fd = one.pidfd.fileno()
        assert errno_of(mrelease.pidfd_send_signal, fd, 0) == expected

    @rule(at=index)
    def sigkill(self, at: int) -> None:
        one = self.subjects[at]
        expected = ESRCH if one.state == "reaped" else 0
        fd = one.pidfd.fileno()
        assert errno_of(mrelease.pidfd_send_signal, fd, SIGKILL) == expected
        one.killed()

    @rule(at=index)
    def process_mrelease(self, at: int) -> None:
        one = self.subjects[at]
        fd = one.pidfd.fileno()
        assert errno_of(mrelease.process_mrelease, fd) == one.release_errno()

    @rule(at=index)
    def kill_and_release(self, at: int) -> None:
        one = self.subjects[at]
        fd = one.pidfd.fileno()
        if one.state == "reaped":
            assert errno_of(mrelease.kill_and_release, fd) == ESRCH
            return
        was_alive = one.state == "alive"
        answer = mrelease.kill_and_release(fd)
        one.killed()
        if was_alive and not one.traced:
            assert answer in (0, ESRCH)  # it may have been quicker
        else:
            assert answer == one.release_errno()

    @rule(at=index, flags=st.integers(1, 2**32 - 1))
    def flags_of_process_mrelease(self, at: int, flags: int) -> None:
        fd = self.subjects[at].pidfd.fileno()
        assert errno_of(mrelease.process_mrelease, fd, flags) == EINVAL
        assert errno_of(mrelease.process_mrelease, -1, flags) == EINVAL

    @rule(flags=st.sampled_from([0, mrelease.PIDFD_NONBLOCK]))
    def no_pidfd(self, flags: int) -> None:
        with open("/dev/null") as file:
            for fd in (-1, file.fileno()):
                assert errno_of(mrelease.process_mrelease, fd) == EBADF
                assert errno_of(mrelease.pidfd_send_signal, fd, 0) == EBADF
                assert errno_of(mrelease.kill_and_release, fd) == EBADF
        assert errno_of(mrelease.pidfd_open, 0, flags) == EINVAL

    # ---- What is built on them

    @rule(at=index)
    def closed(self, at: int) -> None:
        pidfd = Pidfd.open(self.subjects[at].pidfd)
        pidfd.close()
        methods = pidfd.wait, pidfd.kill, pidfd.terminate, pidfd.release
        for method in (*methods, pidfd.cgroup_id, pidfd.fileno):
            with pytest.raises(ValueError, match="closed Pidfd"):
                method()
        with pytest.raises(ValueError, match="closed Pidfd"):
            Pidfd.open(pidfd)

    @rule(at=index, timeout=st.sampled_from([0, 0.002]))
    def wait(self, at: int, timeout: float) -> None:
        one = self.subjects[at]
        gone = one.state in ("zombie", "reaped")
        assert one.pidfd.wait(timeout) == gone
        assert world.runner.run(aio.wait(one.pidfd, timeout)) == gone

    @rule(at=index, timeout=st.sampled_from([0, 0.002]))
    def release(self, at: int, timeout: float) -> None:
        one = self.subjects[at]
        result = one.pidfd.release(timeout=timeout)
        outcomes = {"alive": "alive", "held": "busy" if one.shared else "released"}
        assert result.outcome == outcomes.get(one.state, "exited")
        assert (result.signal, result.errno) == (None, one.release_errno())
        assert result.attempts == 1 or result.errno == EINVAL

    @rule(at=index, how=st.sampled_from([*KILLS]), options=options)
    def kill(self, at: int, how: str, options: dict[str, Any]) -> None:
        one = self.subjects[at]
        if one.state == "reaped":
            with pytest.raises(ProcessLookupError):
                KILLS[how](one.pidfd, **options)
            return
        options = bounded(one, options)
        was_zombie = one.state == "zombie"
        result = KILLS[how](one.pidfd, **options)
        one.killed()
        in_background = how in ("Reaper", "aio")
        if in_background and was_zombie and result.signal is None:
            # The thread that watches for exits was quicker than the one that kills.
            assert (result.outcome, result.attempts) == ("exited", 0), result
        else:
            check_kill(one, result, options, in_background=in_background)

    @rule(at=index, awaited=st.booleans(), options=options)
    def terminate(self, at: int, awaited: bool, options: dict[str, Any]) -> None:
        one = self.subjects[at]
        before = one.state
        ignores = one.kind in ("ignoring", "leaderless") or one.stopped
        options = bounded(one, options)

        def call() -> KillResult:
            if awaited:
                coroutine = aio.terminate(one.pidfd, grace=0.002, **options)
                return world.runner.run(coroutine)
            return one.pidfd.terminate(grace=0.002, **options)

        if before == "reaped":
            with pytest.raises(ProcessLookupError):
                call()
            return
        result = call()
        one.killed()
        if before == "zombie":
            assert result.outcome == "exited", result
            # The grace may be over before the thread that watches has looked.
            assert result.signal == SIGTERM or awaited, result
        elif result.signal == SIGTERM:
            assert not ignores, result
            assert not one.traced, result
            assert (result.outcome, result.attempts) == ("exited", 0), result
        else:
            check_kill(one, result, options, in_background=awaited)

    @rule(options=options)
    def kill_them_all(self, options: dict[str, Any]) -> None:
        for one in self.subjects:
            options = bounded(one, options)
        targets = [one.pidfd for one in self.subjects]
        results = mrelease.kill_all(targets, **options)
        for one, result in zip(self.subjects, results, strict=True):
            if one.state == "reaped":
                assert isinstance(result, ProcessLookupError)
            else:
                assert isinstance(result, KillResult)
                one.killed()
                check_kill(one, result, options)

    # ---- After each step

    @precondition(lambda self: self.subjects)
    @invariant()
    def all_is_as_it_should_be(self) -> None:
        world.steps += 1
        for one in (*self.subjects, world.bystander):
            one.check()


def bounded(one: Subject, options: dict[str, Any]) -> dict[str, Any]:
    """The options with a limit where one that is held would be waited for for ever."""
    endless = options["timeout"] is None and one.traced and one.state != "zombie"
    if endless and (options.get("wait") or one.shared):
        return {**options, "timeout": 0.02}
    return options


def check_kill(
    one: Subject,
    result: KillResult,
    options: dict[str, Any],
    *,
    in_background: bool = False,
) -> None:
    """A kill's result is what the state that it led to allows."""
    assert (result.pid, result.signal) == (one.process.pid, SIGKILL), result
    settle = options.get("settle", 0)
    limited = options["timeout"] is not None
    if one.state == "held":
        if limited and settle > options["timeout"]:
            assert (result.outcome, result.attempts) == ("exiting", 0), result
        elif in_background and limited and result.outcome == "exiting":
            # The thread that sees to deadlines was quicker than the release.
            assert result.errno == 0, result
        else:
            outcome = "busy" if one.shared else "released"
            expected = outcome, one.release_errno()
            assert (result.outcome, result.errno) == expected, result
            assert result.attempts > 0, result
        assert not result.exited, result
        assert result.released == (result.outcome == "released")
    elif limited:
        assert result.outcome in ("released", "exited", "exiting"), result
    else:
        assert result.outcome in ("released", "exited"), result
        assert result.exited or not options.get("wait"), result
    assert result.released == (result.outcome in ("released", "exited")), result
    assert options.get("measure") or result.freed is None, result


@contextmanager
def _world() -> Iterator[World]:
    global world
    world = World()
    try:
        yield world
    finally:
        world.close()


def run(profile: settings) -> dict[str, int]:
    """Run sequences; say how many there were, and how many steps they had."""
    before = len(os.listdir("/proc/self/fd"))
    with _world() as this:
        # Which has no types.
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            Sequences, settings=profile
        )
        this.runner.close()
        counts = {"sequences": this.sequences, "steps": this.steps}
    aio._forget()  # its threads stay otherwise, and their descriptors
    with suppress(ChildProcessError):
        raise AssertionError(f"a child is left: {os.waitid(os.P_ALL, 0, FLAGS)}")
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    return counts


FLAGS = os.WEXITED | os.WNOHANG | os.WNOWAIT
