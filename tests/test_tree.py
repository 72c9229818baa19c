"""kill_tree: all that descend from a process die, and nobody is left stopped."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

import cgroups
import faults
import victims
from calls import run_python
from mrelease import KillResult, Pidfd, _proc, kill_tree
from mrelease._stops import Stops
from victims import NOBODY, apart, family

MIB = 1 << 20
BOMB = 600  # processes at most


def exited(results: list[KillResult]) -> list[int]:
    """The pids of results, sorted; each must have exited, and be there once."""
    assert all(result.exited for result in results)
    return released(results)


def released(results: list[KillResult]) -> list[int]:
    """The pids of results, sorted; each must be released, and be there once."""
    for result in results:
        assert result.outcome in ("released", "exited")
        assert result.released
    pids = [result.pid for result in results]
    assert len({*pids}) == len(pids)
    return sorted(pids)


# Four levels, two children a process, so fifteen processes: named by their way down.
NESTED = """
def node(name):
    if len(name) < 4:
        for way in "ab":
            child(node, name + way)
    say(name, os.getpid())
    wait()

node("r")
"""
NAMES = ["r", *("ra", "rb"), *("raa", "rab", "rba", "rbb")]
NAMES += [f"{name}{way}" for name in NAMES[3:] for way in "ab"]


# ---- Whom it finds


def wait_asleep(tree: victims.Family, pids: set[int]) -> None:
    """Wait until these are what runs of a tree, asleep: they may not be there yet."""
    victims._until(
        lambda: tree.running() == dict.fromkeys(pids, "S"), f"{pids} to sleep"
    )


def test_all_descendants_are_killed_and_the_root_is_the_last_result() -> None:
    with family(NESTED, *NAMES) as tree:
        results = kill_tree(tree.root, wait=True, timeout=None)
        assert exited(results) == sorted({*tree.pids.values()})
        assert len(results) == 15
        assert results[-1].pid == tree.root
        assert tree.running() == {}
        for result in results:
            assert result.signal == signal.SIGKILL


def test_a_branch_is_killed_and_the_rest_lives() -> None:
    with family(NESTED, *NAMES) as tree:
        branch = {pid for name, pid in tree.pids.items() if name.startswith("ra")}
        results = kill_tree(tree.pids["ra"], wait=True, timeout=None)
        assert exited(results) == sorted(branch)
        assert results[-1].pid == tree.pids["ra"]
        wait_asleep(tree, {*tree.pids.values()} - branch)


def test_a_process_without_children_is_a_tree() -> None:
    with victims.victim() as victim:
        (result,) = kill_tree(victim.process, wait=True, timeout=None)
        assert (result.pid, result.exited) == (victim.pid, True)


def test_a_pidfd_is_a_target_and_stays_open() -> None:
    with family(NESTED, *NAMES) as tree, Pidfd.open(tree.root) as pidfd:
        assert len(kill_tree(pidfd, wait=True, timeout=None)) == 15
        assert pidfd.exited
        assert tree.running() == {}


def test_every_option_of_kill_is_taken() -> None:
    program = """
memory = bytearray(16 << 20)
child(wait)
say("ready")
wait()
"""
    with family(program, "ready") as tree:
        results = kill_tree(
            tree.root, timeout=None, wait=True, boost=False, settle=60, measure=True
        )
        assert tree.root in exited(results)
        for result in results:
            assert (result.outcome, result.attempts) == ("exited", 0)
            assert result.freed is not None
        assert results[-1].freed is not None
        assert results[-1].freed >= 16 * MIB


@pytest.mark.needs("release")
def test_a_root_that_cannot_exit_is_released() -> None:
    with victims.exit_stopped(16) as victim:
        (result,) = kill_tree(victim.pid, timeout=1)
        assert (result.outcome, result.exited) == ("released", False)
        assert victim.anon() == 0


def test_children_of_every_thread_are_found() -> None:
    # Of a thread that has ended, too: another one has its children then.
    program = """
import _thread

def thread(name):
    child(lambda: (say(name, os.getpid()), wait()))
    if name != "ended":
        wait()

for name in ("first", "second", "ended"):
    _thread.start_new_thread(thread, (name,))
while len(os.listdir("/proc/self/task")) != 3:
    time.sleep(0.001)
say("ready")
wait()
"""
    names = "first", "second", "ended", "ready"
    with family(program, *names) as tree:
        results = kill_tree(tree.root, wait=True, timeout=None)
        expected = {tree.root, *(tree.pids[name] for name in names[:3])}
        assert exited(results) == sorted(expected)
        assert tree.running() == {}


def test_the_children_of_a_leader_that_has_exited_are_found() -> None:
    program = """
import _thread

def thread():
    child(lambda: (say("child", os.getpid()), wait()))
    wait()

_thread.start_new_thread(thread, ())
"""
    program += victims._LEADER_EXITS
    with family(program, "child", "ready") as tree:
        tree.wait_states("Z", "root")
        results = kill_tree(tree.root, wait=True, timeout=None)
        assert exited(results) == sorted([tree.root, tree.pids["child"]])
        assert tree.running() == {}


def test_whoever_was_re_parented_before_the_call_lives() -> None:
    program = """
def middle():
    child(lambda: (say("orphan", os.getpid()), wait()))

os.waitpid(child(middle), 0)
child(lambda: (say("child", os.getpid()), wait()))
wait()
"""
    with family(program, "orphan", "child") as tree:
        results = kill_tree(tree.root, wait=True, timeout=None)
        assert exited(results) == sorted([tree.root, tree.pids["child"]])
        assert tree.running() == {tree.pids["orphan"]: "S"}


# ---- In whatever state they are

STATES = """
def stopped():
    child(lambda: (say("below", os.getpid()), wait()))
    os.kill(os.getpid(), signal.SIGSTOP)
    wait()

def zombie():
    say("zombie", os.getpid())
    os._exit(0)

def stubborn():
    for ignored in range(1, 32):
        if ignored not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(ignored, signal.SIG_IGN)
    say("stubborn", os.getpid())
    wait()

say("stopped", child(stopped))
os.waitid(os.P_PID, child(zombie), os.WEXITED | os.WNOWAIT)
child(stubborn)
say("ready")
wait()
"""


def test_the_stopped_the_stubborn_and_zombies_are_no_obstacle() -> None:
    names = "stopped", "below", "zombie", "stubborn"
    with family(STATES, *names, "ready") as tree:
        tree.wait_states("T", "stopped")
        results = kill_tree(tree.root, wait=True, timeout=None)
        pids = exited(results)
        assert {*pids} >= {tree.pids[name] for name in names if name != "zombie"}
        assert results[-1].pid == tree.root
        assert {*pids} <= {*tree.pids.values()}
        assert tree.running() == {}


def test_a_zombie_is_a_tree_of_one() -> None:
    with victims.zombie() as victim:
        (result,) = kill_tree(victim.pid)
        assert (result.pid, result.outcome) == (victim.pid, "exited")
        assert victim.exited()


# The parent of a vfork is held in state D, where no SIGSTOP reaches it, until its child
# ends, which has the same memory: here one in libc's getchar().
VFORK = """
import mmap
pointer = ctypes.c_void_p
libc.setvbuf(pointer.in_dll(libc, "stdin"), None, 2, 0)
libc.clone.argtypes = (pointer, pointer, ctypes.c_int, pointer)
stack = mmap.mmap(-1, 1 << 16)
top = ctypes.addressof(ctypes.c_char.from_buffer(stack)) + len(stack)
libc.setvbuf.argtypes = (pointer, pointer, ctypes.c_int, ctypes.c_size_t)

def vfork():
    say("parent", os.getpid())
    libc.clone(ctypes.cast(libc.getchar, pointer), top, 0x4000 | 0x100 | 17, None)

child(vfork)
say("ready")
wait()
"""


def test_a_parent_held_by_its_vfork_is_killed_with_its_child() -> None:
    with family(VFORK, "parent", "ready") as tree:
        tree.wait_states("D", "parent")
        (held,) = {*tree.running()} - {tree.root, tree.pids["parent"]}
        results = kill_tree(tree.root, wait=True, timeout=None)
        assert exited(results) == sorted([tree.root, tree.pids["parent"], held])
        assert tree.running() == {}


@pytest.mark.needs("freezer")
def test_a_frozen_child_does_not_keep_the_others_from_being_killed() -> None:
    program = """
def frozen():
    with open(PATH + "/cgroup.procs", "w") as procs:
        procs.write("0")
    say("frozen", os.getpid())
    wait()

child(frozen)
child(lambda: (say("child", os.getpid()), wait()))
wait()
"""
    with victims._freezer_cgroup() as path:
        program = program.replace("PATH", repr(str(path)))
        try:
            with family(program, "frozen", "child") as tree:
                state = path / "freezer.state"
                state.write_text("FROZEN")
                victims._until(lambda: state.read_text() == "FROZEN\n", "the frost")
                try:
                    results = kill_tree(tree.root, timeout=0.3)
                    found = {result.pid: result for result in results}
                    frozen = tree.pids["frozen"]
                    assert found.keys() == {tree.root, tree.pids["child"], frozen}
                    assert found[frozen].signal == signal.SIGKILL
                    assert not found[frozen].exited
                    victims._until(
                        lambda: {*tree.running()} <= {frozen}, "the others to be gone"
                    )
                finally:
                    state.write_text("THAWED")
                victims._until(lambda: not tree.running(), "the thawed to be gone")
        finally:
            cgroups.kill(path)


# ---- Those who fork meanwhile


@pytest.mark.parametrize("ends", [False, True], ids=["and-stay", "and-end"])
def test_one_that_forks_all_the_time_is_killed_with_all(ends: bool) -> None:
    # With no more than 30 alive at a time; those that end, end at once.
    program = """
say("ready")
while True:
    if len(alive) < 30:
        alive.add(child(work))
    else:
        alive.discard(os.wait()[0] if ENDS else alive.pop())
"""
    program = program.replace("ENDS", str(ends))
    if ends:
        prelude = "alive = set()\nwork = lambda: os._exit(0)\n"
    else:
        # A chain: each waits for the next to be born.
        prelude = """
alive = set()
def work():
    for _ in range(5):
        child(lambda: os._exit(0))
        os.wait()
    child(lambda: time.sleep(0.05))
    os.wait()
"""
        program = program.replace("alive.pop()", "os.wait()[0]")
    for _ in range(5):
        with family(prelude + program, "ready") as tree:
            results = kill_tree(tree.root, wait=True, timeout=None)
            assert results[-1].pid == tree.root
            exited(results)
            assert tree.running() == {}


# Whose parents live on, because the children of those that end cannot be found.
BOMB_PROGRAM = """
pause = fork_pause()
say("bomb")
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(pause)
"""


@pytest.mark.needs("root", "pids")
def test_a_fork_bomb_is_killed_to_the_last() -> None:
    with (
        cgroups.cgroup("pids", pids=BOMB) as path,
        family(BOMB_PROGRAM, "bomb", join=[path]) as tree,
    ):
        current = path / "pids.current"
        victims._until(lambda: int(current.read_text()) >= 500, "the bomb to grow")
        results = kill_tree(tree.root, wait=True, timeout=None)
        # Some results may come before the exit.
        assert len(released(results)) >= 500
        assert results[-1].pid == tree.root
        victims._until(lambda: tree.running() == {}, "the bomb to exit")
        assert cgroups.pids(path) == []


def test_a_tree_of_more_processes_than_descriptors_is_killed() -> None:
    with victims.crowd(300) as tree:
        expected = sorted(tree.running())
        kill_it = lambda: kill_tree(tree.root, wait=True, timeout=None)  # noqa: E731
        results = apart(kill_it, descriptors=64)
        # Some results may come before the exit.
        assert released(results) == expected
        assert {result.signal for result in results} == {signal.SIGKILL}
        assert len(results) == 300
        assert results[-1].pid == tree.root
        victims._until(lambda: tree.running() == {}, "the tree to exit")


# ---- What it refuses, and who is left as before


@pytest.mark.parametrize("target", [os.getpid(), 1])
def test_the_caller_and_init_are_refused(target: int) -> None:
    with pytest.raises(ValueError, match="refusing to kill"):
        kill_tree(target)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_tree_that_the_caller_is_in_is_refused_and_nobody_is_stopped(
    depth: int,
) -> None:
    # Whoever is stopped is reported to its parent by WUNTRACED, and then not killed.
    program = f"""
import os, signal
from mrelease import Pidfd, kill_tree

def refused(root):
    with Pidfd.open(root) as pidfd:
        for target in (root, pidfd):
            try:
                kill_tree(target)
            except ValueError as error:
                assert str(root) in str(error), error
            else:
                raise AssertionError

def descend(root, depth):
    beside = os.fork()
    if beside == 0:
        signal.pause()
    if depth:
        child = os.fork()
        if child == 0:
            os._exit(descend(root, depth - 1))
        _, status = os.waitpid(child, os.WUNTRACED)
        assert status == 0, status
    else:
        refused(root)
    os.kill(beside, signal.SIGTERM)
    _, status = os.waitpid(beside, os.WUNTRACED)
    assert status == signal.SIGTERM, status
    return 0

descend(os.getpid(), {depth})
"""
    result = run_python(program)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("target", [0, -1, True, 1.5, "1", None])
def test_what_is_no_target_is_refused(target: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="pid"):
        kill_tree(target)


def test_a_threads_id_is_refused() -> None:
    with victims.victim(1, threads=2) as victim:
        (tid,) = set(victim.threads()) - {victim.pid}
        with pytest.raises(ValueError, match=f"{tid} .* of process {victim.pid}"):
            kill_tree(tid)
        assert victim.state() == "S"


def test_a_reaped_process_is_not_found() -> None:
    with pytest.raises(ProcessLookupError):
        kill_tree(victims.reaped_pid())


@pytest.mark.parametrize(
    "options", [{"timeout": -1}, {"settle": "1"}, {"tiemout": 1}, {"timeout": "1"}]
)
def test_bad_options_are_refused_before_anything_is_done(options: Any) -> None:
    with family(NESTED, *NAMES) as tree:
        with pytest.raises((TypeError, ValueError)):
            kill_tree(tree.root, **options)
        wait_asleep(tree, {*tree.pids.values()})


@pytest.mark.needs("root")
def test_another_users_tree_is_refused_and_nobody_is_stopped() -> None:
    with family(NESTED, *NAMES) as tree:
        with pytest.raises(PermissionError):
            apart(lambda: kill_tree(tree.root), uid=NOBODY)
        wait_asleep(tree, {*tree.pids.values()})


@pytest.mark.needs("root")
def test_a_descendant_that_may_not_be_signalled_is_alive_and_not_stopped() -> None:
    program = """
def give_up():
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)

def ours(name):
    give_up()
    say(name, os.getpid())
    wait()

def roots():
    child(ours, "below")
    say("roots", os.getpid())
    wait()

child(roots)
give_up()
child(lambda: (say("beside", os.getpid()), wait()))
say("ready")
wait()
""".replace("NOBODY", str(NOBODY))
    with family(program, "roots", "below", "beside", "ready") as tree:
        results = apart(
            lambda: kill_tree(tree.root, wait=True, timeout=None), uid=NOBODY
        )
        refused = tree.pids["roots"]
        found = {result.pid: result for result in results}
        assert results[-1].pid == tree.root
        assert found.keys() == {*tree.pids.values()} - {0}
        assert (found[refused].outcome, found[refused].signal) == ("alive", None)
        assert (found[refused].errno, found[refused].attempts) == (errno.EPERM, 0)
        exited([result for result in results if result.pid != refused])
        assert tree.running() == {refused: "S"}


# ---- If it fails midway


def kill_interrupted(root: int) -> str:
    """Kill a tree; what it raised, a signal's handler perhaps."""

    def handler(*_: object) -> None:
        raise ZeroDivisionError

    signal.signal(signal.SIGUSR1, handler)
    try:
        kill_tree(root, wait=True, timeout=None)
    except (OSError, ZeroDivisionError) as error:
        return repr(error)
    return ""


def check_nobody_is_left_stopped(fault: str) -> None:
    with family(NESTED, *NAMES) as tree:
        stopped = tree.pids["rab"]
        os.kill(stopped, signal.SIGSTOP)
        tree.wait_states("T", "rab")
        error = faults.injected(lambda: kill_interrupted(tree.root), fault).value
        assert isinstance(error, str), error
        # Whoever was killed may be on its way out; the living have been continued.
        states = tree.running()
        living = {pid: state for pid, state in states.items() if not _proc.dying(pid)}
        assert living.pop(stopped, "T") == "T"
        assert {*living.values()} <= {"S", "R"}
        # It failed, or it got by without this one call.
        assert error or not living


@pytest.mark.needs("strace")
@pytest.mark.parametrize(
    "fault",
    [
        # In their turn: the check, the stops, the kills.
        *(f"pidfd_send_signal:error=ENOMEM:when={call}" for call in (1, 8, 17)),
        # A signal handler raises.
        "pidfd_send_signal:error=EINTR:signal=SIGUSR1:when=17",
        *(f"pidfd_open:error=EMFILE:when={call}" for call in (2, 17)),
        "pidfd_open:error=ENOMEM:when=5",
        "process_mrelease:error=EINTR:signal=SIGUSR1:when=3",
    ],
)
def test_if_it_fails_midway_nobody_is_left_stopped(fault: str) -> None:
    check_nobody_is_left_stopped(fault)


def test_whom_it_stopped_goes_on_though_another_threads_signal_raises() -> None:
    # Whichever thread a signal is for, its handler runs in the main one, which has
    # blocked it: here at each step of the end, first while two are let go on, then
    # while the guard's end is waited for.
    with victims.victim(1) as one, victims.victim(1) as two:
        program = f"""
import os, signal, threading
from mrelease import Pidfd, _stops
from mrelease._stops import Stops

signal.signal(signal.SIGUSR1, signal.default_int_handler)
tripped, wakeup = os.pipe()
os.set_blocking(wakeup, False)
signal.set_wakeup_fd(wakeup)
other = threading.Thread(target=lambda: threading.Event().wait(), daemon=True)
other.start()

def interrupt():
    signal.pthread_kill(other.ident, signal.SIGUSR1)
    os.read(tripped, 1)  # the other thread has had it; now it is the main one's turn

def interrupted(real, calls):
    def call(*args):
        if os.getpid() == caller and calls:
            calls.pop()
            interrupt()
        return real(*args)
    return call

caller = os.getpid()
_stops._let_go_on = interrupted(_stops._let_go_on, [1, 2])
os.waitpid = interrupted(os.waitpid, [1])
try:
    with Stops() as stops:
        for pid in {one.pid}, {two.pid}:
            with Pidfd.open(pid) as pidfd:
                stops.stop(pidfd)
except KeyboardInterrupt:
    print("interrupted")
try:
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
except ChildProcessError:
    print("no child")
"""
        result = run_python(program, options=("-W", "error"))
        assert (result.stdout, result.stderr) == ("interrupted\nno child\n", "")
        for victim in one, two:
            victim.wait_state("S")


def test_without_descriptors_nobody_is_killed_or_left_stopped() -> None:
    with family(NESTED, *NAMES) as tree:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            apart(lambda: kill_tree(tree.root), descriptors=3)
        # A signal is taken when the process next runs.
        time.sleep(0.01)
        wait_asleep(tree, {*tree.pids.values()})


@pytest.mark.parametrize("end", ["killed", "replaced"])
def test_whom_it_stopped_goes_on_if_the_caller_is(end: str) -> None:
    with victims.victim(1) as victim:
        program = f"""
import os, sys, threading, time
from mrelease import Pidfd
from mrelease._stops import Stops

def replace():
    sys.stdin.readline()
    os.execvp("sleep", ["sleep", "1000"])

threading.Thread(target=replace, daemon=True).start()
with Pidfd.open({victim.pid}) as pidfd, Stops() as stops:
    stops.stop(pidfd)
    print("stopped", flush=True)
    time.sleep(1000)
"""
        with subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as caller:
            try:
                assert caller.stdin
                assert caller.stdout
                assert caller.stdout.readline() == b"stopped\n"
                victim.wait_state("T")
                if end == "replaced":
                    caller.stdin.write(b"\n")
                    caller.stdin.flush()
                    victim.wait_state("S")
                    assert caller.poll() is None
            finally:
                caller.kill()
            # Nobody else has the other end.
            assert caller.stdout.read() == b""
        victim.wait_state("S")


@pytest.mark.needs("root")
def test_one_child_guards_all_that_are_stopped_and_ends_with_the_stops() -> None:
    def stop_thrice() -> list[int]:
        guards = set()
        with Stops() as stops, Pidfd.open(victim.pid) as pidfd:
            for _ in range(3):
                assert not stops.stop(pidfd)
                guards |= {
                    pid
                    for pid, (ppid, _) in _proc.processes().items()
                    if ppid == os.getpid()
                }
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        return sorted(guards)

    with victims.victim(1) as victim:
        assert len(apart(stop_thrice, uid=NOBODY)) == 1
        assert victim.state() == "S"
