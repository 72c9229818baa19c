"""Where /proc is missing or another namespace's: kills work, no stranger is touched."""

from __future__ import annotations

import json
from typing import Any

import pytest

from calls import run_python
from mrelease import _proc

pytestmark = pytest.mark.needs("mount", "root", "unshare")

# Without victims.py, which needs /proc.
PRELUDE = """
import errno, json, os, signal, time
from mrelease import *
from mrelease import _proc

def child():
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    return pid

def raised(function, *args):
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__

victim = child()
"""

# An empty file system over /proc; private, or it would be mounted outside as well.
HIDE = 'mount --make-private /proc && mount -t tmpfs none /proc && exec "$0" "$@"'
NO_PROC = ("unshare", "--mount", "--propagation=unchanged", "sh", "-c", HIDE)
FOREIGN_PROC = ("unshare", "--pid", "--fork")


def without_proc(program: str) -> Any:
    return answer(run_python(PRELUDE + program, under=NO_PROC))


def with_foreign_proc(program: str) -> Any:
    return answer(run_python(PRELUDE + program, under=FOREIGN_PROC))


def answer(result: Any) -> Any:
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


RUN = {"no /proc": without_proc, "a foreign /proc": with_foreign_proc}


@pytest.fixture(params=RUN)
def run(request: pytest.FixtureRequest) -> Any:
    return RUN[request.param]


def test_this_tests_proc_is_its_own() -> None:
    assert _proc.is_ours()


def test_it_is_not_believed_and_the_kill_works(run: Any) -> None:
    program = """
result = kill(victim, wait=True, timeout=None, measure=True)
status = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])
print(json.dumps([_proc.is_ours(), result.exited, result.signal, status]))
"""
    assert run(program) == [False, True, 9, -9]


def test_no_stranger_is_boosted_or_barred() -> None:
    # The pids that this namespace knows are processes outside in its /proc. Whom its
    # threads' ids mean here is the caller itself, pid 1 of the namespace.
    program = """
os.setpriority(os.PRIO_PROCESS, 0, 5)
stranger = child()
os.sched_setaffinity(stranger, {min(os.sched_getaffinity(0))})
before = os.sched_getaffinity(stranger), os.getpriority(os.PRIO_PROCESS, stranger)
for _ in range(20):
    one = child()
    kill(one, wait=True, timeout=None)
    os.waitpid(one, 0)
after = os.sched_getaffinity(stranger), os.getpriority(os.PRIO_PROCESS, stranger)
own = os.getpriority(os.PRIO_PROCESS, 0)
for pid in (victim, stranger):
    os.kill(pid, 9)
    os.waitpid(pid, 0)
print(json.dumps([before == after, own]))
"""
    assert with_foreign_proc(program) == [True, 5]


def test_a_living_process_is_alive_not_busy(run: Any) -> None:
    program = """
outcome = release(victim).outcome if is_supported() else "alive"
os.kill(victim, 9)
os.waitpid(victim, 0)
print(json.dumps(outcome))
"""
    assert run(program) == "alive"


def test_a_descriptor_without_a_pid_to_be_told_is_refused(run: Any) -> None:
    program = """
fd = pidfd_open(victim)
try:
    Pidfd(fd)
except OSError as error:
    code = error.errno
os.kill(victim, 9)
os.waitpid(victim, 0)
print(json.dumps(code == errno.ENOSYS))
"""
    assert run(program) is True


@pytest.mark.parametrize("under", [NO_PROC, FOREIGN_PROC])
def test_the_probe_and_the_command_work(under: tuple[str, ...]) -> None:
    program = """
from mrelease._cli import main
found = probe()
status = main(["kill", "--wait", "--json", str(victim)])
os.waitpid(victim, 0)
print(json.dumps([found["pidfd_open"], status]))
main(["doctor", "--json"])
"""
    result = run_python(PRELUDE + program, under=under)
    killed, found = map(json.loads, result.stdout.splitlines()[:2])
    assert (killed["exited"], killed["signal"]) == (True, 9)
    assert found == [True, 0]
    # The doctor says in one line what it misses.
    assert len(result.stderr.splitlines()) == (1 if under is NO_PROC else 0)
    assert "Traceback" not in result.stderr
