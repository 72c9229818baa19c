"""harden(): what it locks, raises and reports, seen from /proc in a fresh process."""

from __future__ import annotations

import errno
import json
import os
from typing import Any

import pytest

import victims
from calls import run_python
from mrelease import harden

# Limits as small as an ordinary user's, who the program becomes where it is root's and
# ORDINARY is true; the imports come first, as that user may not read these files.
PRELUDE = """
import ctypes, errno, json, mmap, os, resource, sys, threading
from mrelease import _mrelease, _sched, harden, kill

if ORDINARY and os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as after an exec
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: memory page by page
MIB = 1 << 20

def report(*values):
    json.dump(values, sys.stdout)

def status(name, tid="self"):
    with open(f"/proc/{tid}/status") as file:
        return next(line.split()[1] for line in file if line.startswith(name + ":"))

def kib(name):
    return int(status(name))

def adjustment():
    with open("/proc/self/oom_score_adj") as file:
        return int(file.read())

def nices():
    tids = map(int, os.listdir("/proc/self/task"))
    return [os.getpriority(os.PRIO_PROCESS, tid) for tid in tids]

def mappings():
    # Name, size and resident size in KiB, flags.
    with open("/proc/self/smaps") as file:
        for line in file:
            words = line.split()
            if not words[0].endswith(":"):
                name = words[5] if len(words) > 5 else ""
            elif words[0] == "Size:":
                size = int(words[1])
            elif words[0] == "Rss:":
                rss = int(words[1])
            elif words[0] == "VmFlags:":
                yield name, size, rss, words[1:]

def errnos(results):
    return {name: error and error.errno for name, error in results.items()}

def limit(name, value):
    resource.setrlimit(name, (value, value))

def refused(call):
    # By the kernel, in a child: 0 or the errno.
    child = os.fork()
    if child == 0:
        try:
            call()
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def reported(
    program: str, *, ordinary: bool = False, under: tuple[str, ...] = ()
) -> Any:
    prelude = PRELUDE.replace("ORDINARY", str(ordinary))
    result = run_python(prelude + program, under=under)
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


# ---- mlock


@pytest.mark.needs("root")
def test_what_is_mapped_is_locked_and_brought_in() -> None:
    program = """
before = mmap.mmap(-1, 4 * MIB)  # of /dev/zero, and untouched
result = harden(nice=None, oom_score_adj=None)
# What cannot be locked: the kernel's own, and what it may drop (a newer C library's).
kernels = "[vvar", "[vdso]", "[vsyscall]"
unlocked = [
    name for name, *_, flags in mappings()
    if not {"lo", "dp"} & set(flags) and not name.startswith(kernels)
]
resident = [rss for name, _, rss, _ in mappings() if name == "/dev/zero"]
report(errnos(result), kib("VmLck") > 4096, unlocked, resident)
"""
    assert reported(program) == [{"mlock": None}, True, [], [4096]]


@pytest.mark.needs("root")
def test_what_is_mapped_later_is_locked_as_it_is_touched() -> None:
    program = """
harden(nice=None, oom_score_adj=None)
locked, resident = kib("VmLck"), kib("VmRSS")
area = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
more = kib("VmLck") - locked >= 64 * 1024
untouched = kib("VmRSS") - resident < 16 * 1024
area[:: mmap.PAGESIZE] = bytes(len(area) // mmap.PAGESIZE)
# The kernel counts late: up to 64 pages of each kind and thread.
report(more, untouched, kib("VmRSS") - resident > 63 * 1024)
"""
    assert reported(program) == [True, True, True]


@pytest.mark.needs("root")
def test_a_thread_started_later_does_not_bring_in_its_whole_stack() -> None:
    program = """
harden(nice=None, oom_score_adj=None)
threading.stack_size(8 * MIB)
ready, over = threading.Semaphore(0), threading.Event()

def run():
    ready.release()
    over.wait()

resident = kib("VmRSS")
threads = [threading.Thread(target=run) for _ in range(8)]
for thread in threads:
    thread.start()
    ready.acquire()
grown = kib("VmRSS") - resident
over.set()
for thread in threads:
    thread.join()
report(grown)
"""
    (grown,) = reported(program)
    assert grown < 8 * 1024  # of 64 MiB


@pytest.mark.needs("root")
def test_a_forked_child_has_nothing_locked() -> None:
    program = """
harden(nice=None, oom_score_adj=None)
report(refused(lambda: os._exit(min(kib("VmLck"), 1))), kib("VmLck") > 0)
"""
    assert reported(program) == [0, True]


@pytest.mark.parametrize("container", [False, True])
def test_where_a_limit_counts_later_allocations_do_not_fail(container: bool) -> None:
    # In a user namespace the caller seems to be root, and is not to the kernel.
    program = """
_, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
enough = (kib("VmSize") << 10) + 8 * MIB
fits = hard == resource.RLIM_INFINITY or hard >= enough
limit(resource.RLIMIT_MEMLOCK, enough if fits else hard)
result = harden(nice=None, oom_score_adj=None)
later = bytearray(64 * MIB)
thread = threading.Thread(target=bytearray, args=(64 * MIB,))
thread.start()
thread.join()
report(fits, errnos(result)["mlock"], len(later) >> 20)
"""
    under = _container() if container else ()
    fits, error, later = reported(program, ordinary=not container, under=under)
    assert error == (None if fits else errno.ENOMEM)
    assert later == 64


@pytest.mark.parametrize("who", ["caller", "ordinary", "container"])
def test_it_knows_whether_a_limit_counts(who: str) -> None:
    program = """
limit(resource.RLIMIT_MEMLOCK, 64 << 10)
expected = _sched._may_lock_all()
_mrelease.mlockall(_mrelease.MCL_FUTURE | _mrelease.MCL_ONFAULT)
try:
    mmap.mmap(-1, 16 * MIB).close()
    report(expected, True)
except OSError:
    report(expected, False)
"""
    under = _container() if who == "container" else ()
    expected, allowed = reported(program, ordinary=who == "ordinary", under=under)
    assert expected == allowed


def _container() -> tuple[str, ...]:
    """What runs a program as the root of a user namespace."""
    under = ("unshare", "-Ur")
    try:
        result = run_python("", under=under)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if result.returncode:
        pytest.skip(f"needs a user namespace: {result.stderr}")
    return under


# ---- nice and oom_score_adj


@pytest.mark.parametrize(
    "nice", [19, 5, pytest.param(-20, marks=pytest.mark.needs("root"))]
)
def test_every_thread_gets_the_priority(nice: int) -> None:
    program = f"""
ready, over = threading.Semaphore(0), threading.Event()

def run():
    ready.release()
    over.wait()

threads = [threading.Thread(target=run) for _ in range(3)]
for thread in threads[:2]:
    thread.start()
    ready.acquire()
parent = os.getpriority(os.PRIO_PROCESS, os.getppid())
result = harden(mlock=False, nice={nice}, oom_score_adj=None)
threads[2].start()  # has its maker's
ready.acquire()
found = nices()
over.set()
for thread in threads:
    thread.join()
same = os.getpriority(os.PRIO_PROCESS, os.getppid()) == parent
report(errnos(result), found, same)
"""
    assert reported(program) == [{"nice": None}, [nice] * 4, True]


@pytest.mark.parametrize("adjustment", [1000, 700])
def test_the_adjustment_of_the_oom_killer_is_set(adjustment: int) -> None:
    program = f"""
result = harden(mlock=False, nice=None, oom_score_adj={adjustment})
report(errnos(result), adjustment())
"""
    answer = [{"oom_score_adj": None}, adjustment]
    assert reported(program, ordinary=True) == answer


# ---- What is refused is reported


def test_without_privilege_each_refusal_is_reported_and_nothing_raised() -> None:
    program = """
limit(resource.RLIMIT_MEMLOCK, 64 << 10)
limit(resource.RLIMIT_NICE, 0)
before = nices(), adjustment(), kib("VmLck")
results = harden()
assert all(isinstance(error, OSError) for error in results.values())
report(errnos(results), (nices(), adjustment(), kib("VmLck")) == before)
"""
    refusals = {
        "mlock": errno.ENOMEM,
        "nice": errno.EACCES,
        "oom_score_adj": errno.EACCES,
    }
    assert reported(program, ordinary=True) == [refusals, True]


def test_without_any_right_to_lock_the_refusal_is_eperm() -> None:
    program = """
limit(resource.RLIMIT_MEMLOCK, 0)
report(errnos(harden(nice=None, oom_score_adj=None)), len(bytearray(64 * MIB)))
"""
    answer = [{"mlock": errno.EPERM}, 64 << 20]
    assert reported(program, ordinary=True) == answer


@pytest.mark.parametrize("ordinary", [False, True])
def test_a_refusal_is_the_kernels_and_the_rest_takes_effect(ordinary: bool) -> None:
    # Root may lack a capability, in a container.
    program = """
def adjust():
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")

limit(resource.RLIMIT_MEMLOCK, 64 << 10)
expected = {
    "mlock": refused(lambda: _mrelease.mlockall(_mrelease.MCL_CURRENT)),
    "nice": refused(lambda: os.setpriority(os.PRIO_PROCESS, 0, -20)),
    "oom_score_adj": refused(adjust),
}
results = errnos(harden())
effects = [kib("VmLck") > 0, nices() == [-20], adjustment() == -1000]
report(expected, {name: error or 0 for name, error in results.items()}, effects)
"""
    expected, results, effects = reported(program, ordinary=ordinary)
    assert results == expected
    assert effects == [not error for error in expected.values()]


# ---- Nothing else

SNAPSHOT = """
def read(name):
    try:
        with open(f"/proc/self/{name}") as file:
            return file.read()
    except OSError as error:
        return error.errno

# What changes by itself: SigQ counts what all processes of the user have.
RUNNING = "Vm", "Rss", "voluntary", "nonvoluntary", "State", "SigQ"

def snapshot():
    lines = read("status").splitlines()
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    files = "autogroup", "cgroup", "coredump_filter", "mounts", "timerslack_ns"
    return {
        "status": [line for line in lines if not line.startswith(RUNNING)],
        "limits": [resource.getrlimit(getattr(resource, name)) for name in names],
        "affinity": sorted(os.sched_getaffinity(0)),
        "policy": read("stat").rpartition(")")[2].split()[37:39],  # and its priority
        "ioprio": ctypes.CDLL(None).syscall(IOPRIO_GET, 1, 0),
        "thp": ctypes.CDLL(None).prctl(42, 0, 0, 0, 0),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "environment": dict(os.environ),
        "umask": [os.umask(0o22), os.umask(0o22)],
        "cwd": os.getcwd(),
        **{name: read(name) for name in files},
        "locked": kib("VmLck"),
        "nice": nices(),
        "adjustment": adjustment(),
    }

def changes(before, after):
    return sorted(name for name in before if before[name] != after[name])
""".replace("IOPRIO_GET", {"x86_64": "252"}.get(os.uname().machine, "31"))


@pytest.mark.parametrize("ordinary", [False, True])
def test_it_changes_nothing_else(ordinary: bool) -> None:
    program = """
harden(mlock=False, nice=None, oom_score_adj=None)  # loads what it needs
before = snapshot()
results = harden(nice=7, oom_score_adj=800)
report(errnos(results)["nice"], changes(before, snapshot()))
"""
    error, changed = reported(SNAPSHOT + program, ordinary=ordinary)
    assert error is None
    assert set(changed) - {"locked"} == {"nice", "adjustment"}


def test_false_and_none_leave_everything_alone() -> None:
    program = """
before = snapshot()
results = harden(mlock=False, nice=None, oom_score_adj=None)
report(results, changes(before, snapshot()))
"""
    assert reported(SNAPSHOT + program) == [{}, []]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"nice": -21}, ValueError),
        ({"nice": 20}, ValueError),
        ({"nice": 1 << 70}, ValueError),
        ({"nice": "0"}, TypeError),
        ({"nice": 1.5}, TypeError),
        ({"oom_score_adj": -1001}, ValueError),
        ({"oom_score_adj": 1001}, ValueError),
        ({"oom_score_adj": "0"}, TypeError),
        ({"oomscoreadj": 0}, TypeError),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_is_done(
    wrong: Any, error: type[Exception]
) -> None:
    def attempt() -> tuple[str, bool]:
        call: Any = harden
        before = _own()
        options = {"mlock": True, "nice": 3, "oom_score_adj": 900, **wrong}
        try:
            call(**options)
        except (TypeError, ValueError) as raised:
            return type(raised).__name__, _own() == before
        return "none", False

    assert victims.apart(attempt) == (error.__name__, True)


def _own() -> tuple[int, str, str]:
    with open("/proc/self/oom_score_adj") as adjustment, open("/proc/self/status") as s:
        locked = s.read().partition("VmLck:")[2].split("\n")[0]
        return os.getpriority(os.PRIO_PROCESS, 0), adjustment.read(), locked
