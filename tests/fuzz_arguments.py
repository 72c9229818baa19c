"""Every public function with arguments of every kind; test_fuzz.py runs it apart.

Whatever it is called with, a function returns or raises what its docstring says; who
raises has killed nobody, and nothing is leaked. No number made here can be a pid of
somebody else: what is positive and small enough to be one is not made.
"""

from __future__ import annotations

import asyncio
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mrelease
from mrelease import Pidfd, Reaper, _mrelease, _proc, aio

PID_MAX = 1 << 22  # the most that Linux allows: no process has a higher pid
# pidfd_send_signal(2) takes these as "this thread" and "this process" (Linux 6.15).
PIDFD_SELF = range(-20010, -9990)
FEW_DESCRIPTORS = 100  # those of this program that are a process's are above

DOCUMENTED = (TypeError, ValueError, OverflowError, OSError)


class JunkError(Exception):
    """What an argument raises when it is asked something; it has to pass through."""


class Odd:
    """Answers what it is told to, be it an exception to raise; the rest it lacks."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.__dict__["answers"] = answers

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__["answers"]:
            raise AttributeError(name)
        return self._answer(name)

    def _answer(self, name: str) -> Any:
        answer = self.__dict__["answers"].get(name)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__dict__['answers']!r})"


class OddNumber(Odd):
    """The same with all that makes a number, a flag, a path or a list of an object."""

    def __index__(self) -> Any:
        return self._answer("index")

    def __float__(self) -> Any:
        return self._answer("float")

    def __bool__(self) -> Any:
        return self._answer("bool")

    def __fspath__(self) -> Any:
        return self._answer("fspath")

    def __iter__(self) -> Any:
        return self._answer("iter")


class Number(int):
    """An int that is none exactly."""


BORDERS = [
    sign * (1 << bits) + step
    for bits in (0, 7, 8, 15, 16, 22, 31, 32, 62, 63, 64, 65, 128)
    for sign in (1, -1)
    for step in (-2, -1, 0, 1, 2)
]
every_int = st.sampled_from(BORDERS) | st.integers() | st.integers(-300, 300)
# Neither a pid that can exist, nor one of what stands for the caller.
no_pid = every_int.filter(lambda n: not 0 < n <= PID_MAX and n not in PIDFD_SELF)
descriptors = no_pid | st.integers(0, FEW_DESCRIPTORS)
flags = every_int | st.sampled_from([0, mrelease.PIDFD_NONBLOCK, mrelease.PIDFD_THREAD])

others = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.lists(st.booleans() | st.floats(), max_size=3),
    st.sampled_from([object(), int, (), {}, "12", b"12", float("nan"), len]),
)
errors = st.sampled_from(
    [JunkError(), AttributeError("odd"), TypeError("odd"), ValueError("odd")]
)


def odd(ints: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    """Objects that claim to be a number or a process."""
    answer = ints | others | errors
    number = st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(["index", "float", "bool", "fspath", "iter"], answer),
    )
    process = st.fixed_dictionaries(
        {},
        optional={
            "pid": answer,
            "returncode": st.none() | answer,
            "exitcode": st.none() | answer,
            "is_running": answer | st.sampled_from([lambda: True, lambda: False]),
            "fileno": answer,
        },
    )
    return st.builds(OddNumber, number | process) | st.builds(Odd, process)


def anything(ints: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    return ints | ints.map(Number) | others | odd(ints)


texts = st.text(max_size=20) | st.sampled_from(
    ["", "/", "/proc", "/dev/null", "\0", "a\0b", "/\udcff", "\ud800", "x" * 5000]
)
paths = texts | st.binary(max_size=20) | anything(no_pid)


@dataclass
class World:
    """What the calls may be made with: two children, and who looks after them."""

    alive: int = 0
    zombie: int = 0
    pidfds: dict[str, Pidfd] = field(default_factory=dict)
    reaper: Any = None
    runner: Any = None

    def start(self) -> None:
        self.zombie = child(exits=True)
        os.waitid(os.P_PID, self.zombie, os.WEXITED | os.WNOWAIT)
        self.pidfds["zombie"] = high(self.zombie)
        self.renew()

    def renew(self) -> None:
        self.end("alive", self.alive)
        self.alive = child(exits=False)
        self.pidfds["alive"] = high(self.alive)

    def end(self, name: str, pid: int) -> None:
        if pid:
            os.kill(pid, signal.SIGKILL)  # not reaped: it is surely that one
            os.waitpid(pid, 0)
            self.pidfds.pop(name).close()

    def target(self, name: Any) -> Any:
        """What a call is made with, of what was made up: our own are known by name."""
        if isinstance(name, Ours):
            pidfd = self.pidfds[name.name]
            return pidfd if name.by_pidfd else pidfd.pid
        return name


@dataclass(frozen=True)
class Ours:
    """Stands for one of our two children."""

    name: str
    by_pidfd: bool


ours = st.builds(Ours, st.sampled_from(["alive", "zombie"]), st.booleans())
targets = ours | ours | anything(no_pid)


def child(*, exits: bool) -> int:
    with warnings.catch_warnings():
        # The threads of a Reaper are there, and take no part in what the child does.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            while not exits:
                signal.pause()
        finally:
            os._exit(0)
    return pid


def high(pid: int) -> Pidfd:
    """A pidfd with a number that no call is made with."""
    low = os.pidfd_open(pid)
    try:
        fd = low
        while fd <= FEW_DESCRIPTORS:
            fd = _dup_above(fd)
        return Pidfd(fd)
    finally:
        os.close(low)


def _dup_above(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FEW_DESCRIPTORS + 1)


def _as_float(value: Odd) -> Any:
    return value.__dict__["answers"].get("float")


# Seconds for what waits until the exit: that of our living child may never come.
short = st.sampled_from([0, 0.0, -0.0, 1e-9, 0.001, 5e-324, False])
no_seconds = st.sampled_from([-1, -1e-9, float("nan"), float("-inf"), -(1 << 70)])
odd_seconds = others.filter(
    lambda value: value is not None and not isinstance(value, bool | float)
) | odd(no_pid).filter(lambda value: not isinstance(_as_float(value), float))
brief = short | no_seconds | odd_seconds
long = brief | st.none() | st.floats(0, 1e300) | st.sampled_from([1 << 2000, 1e308])

booleans = st.booleans() | anything(every_int)
kill_options = {
    "timeout": long,
    "wait": booleans,
    "boost": booleans,
    "settle": brief,
    "measure": booleans,
}
asking = {**kill_options, "signal": anything(every_int)}
# Not the 10 s of the default: many signals end nobody.
grace = {"grace": brief}


@dataclass
class Call:
    """A function and strategies for its arguments; options may be left out."""

    function: Callable[..., Any]
    args: tuple[st.SearchStrategy[Any], ...] = ()
    options: dict[str, st.SearchStrategy[Any]] = field(default_factory=dict)
    always: dict[str, st.SearchStrategy[Any]] = field(default_factory=dict)
    share: float = 1.0  # of the examples

    @property
    def strategies(self) -> tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]:
        options = st.fixed_dictionaries(self.always, optional=self.options)
        return st.tuples(*self.args), options


def calls(world: World) -> dict[str, Call]:
    """Every public name, those of aio and every C function."""
    return {
        # C
        "pidfd_open": Call(opened, (anything(no_pid) | ours, anything(flags))),
        "pidfd_send_signal": Call(
            _mrelease.pidfd_send_signal,
            (anything(descriptors), anything(every_int), anything(flags)),
        ),
        "process_mrelease": Call(
            _mrelease.process_mrelease,
            (
                anything(descriptors | st.sampled_from([-10000, -20000])),
                anything(flags),
            ),
        ),
        "kill_and_release": Call(_mrelease.kill_and_release, (anything(descriptors),)),
        "bar_kill_and_release": Call(
            _mrelease.bar_kill_and_release,
            (anything(descriptors), anything(no_pid) | ours),
        ),
        "kill_and_release_next": Call(
            _mrelease.kill_and_release_next, (anything(no_pid),)
        ),
        "getcpu": Call(_mrelease.getcpu, share=0.05),
        "mlockall": Call(_mrelease.mlockall, (anything(every_int),)),
        # One process
        "kill": Call(mrelease.kill, (targets,), kill_options),
        "terminate": Call(mrelease.terminate, (targets,), asking, always=grace),
        "release": Call(mrelease.release, (targets,), {"timeout": brief}),
        "Pidfd": Call(taken_over, (anything(descriptors) | ours,)),
        "Pidfd.open": Call(
            closed(Pidfd.open),
            (targets,),
            {"verify": st.functions(like=lambda pid: 0, returns=booleans) | others},
        ),
        "Pidfd.wait": Call(Pidfd.wait, (ours_as_pidfd, brief)),
        "Pidfd.send_signal": Call(
            Pidfd.send_signal,
            (ours_as_pidfd, anything(every_int.filter(lambda n: n < 0 or n > 64))),
        ),
        "KillResult": Call(result, (st.lists(anything(every_int), max_size=10),)),
        # Many
        "kill_all": Call(
            killed_all, (st.lists(targets, max_size=4) | targets,), kill_options
        ),
        "kill_tree": Call(mrelease.kill_tree, (targets,), kill_options, share=0.3),
        "kill_cgroup": Call(mrelease.kill_cgroup, (paths,), kill_options),
        "cgroup_pidfds": Call(mrelease.cgroup_pidfds, (paths,), {}),
        # In the background
        "Reaper": Call(
            reaper,
            (anything(every_int.filter(lambda n: n < 3)),),
            {"nice": no_nice, "cpus": anything(every_int)},
            share=0.3,
        ),
        "Reaper.kill": Call(
            lambda *args, **options: world.reaper.kill(*args, **options),
            (targets,),
            kill_options,
        ),
        "aio.kill": Call(awaited(world, aio.kill), (targets,), kill_options),
        "aio.terminate": Call(
            awaited(world, aio.terminate), (targets,), asking, always=grace
        ),
        "aio.wait": Call(awaited(world, aio.wait), (targets, brief)),
        # The caller and the machine
        "harden": Call(
            mrelease.harden,
            (),
            {
                "mlock": st.just(False) | st.just(0),
                "nice": no_nice,
                "oom_score_adj": anything(
                    every_int.filter(lambda n: not -1000 <= n < 0)
                ),
            },
        ),
        "probe": Call(mrelease.probe, (), {}, share=0.01),
        "is_supported": Call(mrelease.is_supported, (), {}, share=0.01),
    }


# What is no number, or would not make this program and its like greedy.
no_nice = anything(every_int.filter(lambda n: not -20 <= n < 5))
ours_as_pidfd = st.builds(Ours, st.sampled_from(["alive", "zombie"]), st.just(True))
# Neither called nor made: a type, and two ints.
NO_CALLS = {"Target", "PIDFD_NONBLOCK", "PIDFD_THREAD"}


def opened(*args: Any) -> None:
    # A child's pid was put in its place: a raw descriptor.
    first, *rest = args
    os.close(_mrelease.pidfd_open(getattr(first, "pid", first), *rest))


def taken_over(fd: Any) -> None:
    """Pidfd(fd) on a descriptor of its own, if it is of a process."""
    if not isinstance(fd, Pidfd):
        Pidfd(fd).close()
        return
    copy = _dup_above(fd.fileno())
    with Pidfd(copy):
        pass


def closed(function: Callable[..., Pidfd]) -> Callable[..., None]:
    def call(*args: Any, **options: Any) -> None:
        with function(*args, **options):
            pass

    return call


def result(fields: list[Any]) -> None:
    made = mrelease.KillResult(*fields)
    assert list(made.as_dict().values()) == fields or fields != fields
    assert "KillResult(pid=" in repr(made)


def killed_all(listed: Any, **options: Any) -> None:
    results = mrelease.kill_all(listed, **options)
    assert len(results) == len(listed)
    assert all(isinstance(one, OSError | mrelease.KillResult) for one in results)


def reaper(workers: Any, **options: Any) -> None:
    before = os.sched_getaffinity(0)
    try:
        with Reaper(workers, **options):
            pass
    finally:
        assert os.sched_getaffinity(0) == before


def awaited(world: World, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: world.runner.run(function(*args, **options))


def placed(world: World, value: Any) -> Any:
    """The same value with our children in the places of their names."""
    if isinstance(value, list):
        return [world.target(one) for one in value]
    return world.target(value)


def descriptors_open() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


class Fuzz:
    """Makes calls, and counts them."""

    def __init__(self) -> None:
        self.world = World()
        self.count = 0

    def make(self, call: Call, profile: settings) -> None:
        @profile
        @given(*call.strategies)
        def one(args: Any, options: Any) -> None:
            self.check(call, list(args), options)

        one()

    def check(self, call: Call, args: list[Any], options: dict[str, Any]) -> None:
        world = self.world
        self.count += 1
        before = descriptors_open()
        returned: Any = None
        failed: Exception | None = None
        try:
            returned = call.function(
                *[placed(world, arg) for arg in args],
                **{name: placed(world, value) for name, value in options.items()},
            )
            if isinstance(returned, Future):
                returned = returned.result(timeout=60)
        except (*DOCUMENTED, JunkError, AttributeError) as error:
            # The word of our own objects alone, and not of any code that stumbled.
            if isinstance(error, AttributeError) and error.args[:1] != ("odd",):
                raise
            failed = error
        if isinstance(failed, OSError):
            assert failed.errno, f"no errno: {failed!r}"
        alive = _proc.dying(world.alive) is False
        assert alive or failed is None, f"it killed, and raised {failed!r}"
        if not alive or signalled(world.alive):
            world.renew()
        self.settle(before)

    def settle(self, before: set[str]) -> None:
        """What is done in the background has until then to close what it opened."""
        for _ in range(2000):
            after = descriptors_open()
            if len(after) == len(before):
                return
            signal.sigtimedwait([], 0.001)
        raise AssertionError(f"descriptors before and after: {before}, {after}")


def signalled(pid: int) -> bool:
    """Whether a child has been sent what may have changed it, such as SIGSTOP."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] not in "SR"


@contextmanager
def fuzz() -> Iterator[Fuzz]:
    this = Fuzz()
    this.world.start()
    try:
        with Reaper(1) as this.world.reaper, asyncio.Runner() as this.world.runner:
            # The loop and the threads of aio are made by their first use, and stay.
            this.world.runner.run(aio.wait(this.world.zombie))
            yield this
    finally:
        this.world.end("alive", this.world.alive)
        this.world.end("zombie", this.world.zombie)


def run(examples: float, profile: settings) -> dict[str, int]:
    """Make as many calls, shared by all functions; say how many of each were made."""
    counts = {}
    with fuzz() as this:
        table = calls(this.world)
        public = {*mrelease.__all__, *(f"aio.{name}" for name in aio.__all__)}
        missing = public - table.keys() - NO_CALLS
        assert not missing, f"no calls of {missing}"
        each = examples / sum(call.share for call in table.values())
        for name, call in table.items():
            before = this.count

            most = max(1, round(each * call.share))
            try:
                this.make(call, settings(profile, max_examples=most))
            except BaseException as error:
                error.add_note(f"Function: {name}")
                raise
            counts[name] = this.count - before
    return counts


def profile(*, long: bool) -> settings:
    return settings(
        database=None,
        deadline=None,
        derandomize=not long,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
