"""Nobody else dies: pids are recycled as fast as they can be beside a group killed.

In a pid namespace with a hundred pids to give, processes come and go: members of the
group, and outsiders, each of which ends by itself, with status 0, within milliseconds
unless somebody touches it. So a member's pid is an outsider's very soon after it has
been read, and whoever signals by what was read before hits one: of its
kills about one in a hundred does, be it through a pidfd that was opened after that.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any, Literal

import pytest

from calls import run_python
from cgroups import cgroup

RECYCLED = 20_000
APART = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")

# Outsiders and members share the memory of their parent, which makes them cheap, and
# run nothing but libc's usleep().
PROGRAM = """
import ctypes, json, mmap, os, random, signal, struct, time
import cgroups
from cgroups import Path, enter
from mrelease import KillResult, cgroup_pidfds, kill, kill_cgroup, kill_tree

MODE, TOP, GROUP, NUMBER = PARAMETERS
TOP, GROUP = Path(TOP), Path(GROUP)
CLONE_VM = 0x100
SLOTS = 256
LIVE = 40  # of each kind at a time: few pids are free, and soon taken again
LIFE = 2000  # microseconds at most

pointer = ctypes.c_void_p
libc = ctypes.CDLL(None)
libc.clone.argtypes = (pointer, pointer, ctypes.c_int, *[pointer] * 4)
stacks = mmap.mmap(-1, SLOTS << 14, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
base = ctypes.addressof(ctypes.c_char.from_buffer(stacks))
taken = [0] * SLOTS  # by the process with this pid, while there is one
usleep = ctypes.cast(libc.usleep, pointer)
shared = mmap.mmap(-1, 4096)  # what a process tells the others

def tell(place, number):
    struct.pack_into("q", shared, 8 * place, number)

def told(place):
    return struct.unpack_from("q", shared, 8 * place)[0]

BORN, HIT, MOVED, KILLS, CALLS, RECYCLED, READY, DONE = range(8)

def start(slot, life=LIFE):
    top = base + (slot + 1 << 14)
    flags = CLONE_VM | signal.SIGCHLD
    pid = libc.clone(usleep, top, flags, random.randrange(life), None, None, None)
    taken[slot] = max(pid, 0)
    return pid

def is_free(slot):
    # If its pid has been given away, it is free later.
    try:
        if taken[slot]:
            os.kill(taken[slot], 0)
    except ProcessLookupError:
        return True
    return not taken[slot]

def come_and_go(watch):
    # Children that come and go; each is reaped before its stack is given to another.
    free, slots, seen = list(range(LIVE)), {}, set()
    born = hit = moved = recycled = 0
    before = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    while not (watch and recycled >= NUMBER):
        while free:
            pid = start(free[-1])
            if pid < 0:
                break  # no pid is left just now
            slots[pid] = free.pop()
            born += 1
            recycled += pid in seen
            seen.add(pid)
        if not slots:
            time.sleep(0.001)
            continue
        if not watch:
            tell(READY, os.getpid())
        flags = os.WEXITED | os.WSTOPPED | os.WNOWAIT
        report = os.waitid(os.P_ALL, 0, flags)
        pid = report.si_pid
        now = os.sched_getaffinity(pid), os.getpriority(os.PRIO_PROCESS, pid)
        moved += now != before
        _, status = os.waitpid(pid, os.WUNTRACED)
        hit += status != 0
        if os.WIFSTOPPED(status):
            os.kill(pid, signal.SIGCONT)
            continue
        free.append(slots.pop(pid))
        if watch:
            tell(BORN, born); tell(HIT, hit); tell(MOVED, moved)
            tell(RECYCLED, recycled)

def come_and_go_unreaped():
    # The same with children that the kernel reaps at once, even those of the stopped.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    slot = 0
    while True:
        slot = (slot + 1) % SLOTS
        if is_free(slot) and start(slot, LIFE // 5) < 0:
            time.sleep(0.001)

def child(function, *args):
    while True:
        try:
            pid = os.fork()
        except OSError:
            time.sleep(0.001)  # no pid is left just now
            continue
        if pid == 0:
            try:
                function(*args)
            finally:
                os._exit(1)
        return pid

def member(function=lambda: come_and_go(False)):
    enter(GROUP, os.getpid())
    function()

def parent():
    child(come_and_go_unreaped)
    come_and_go(False)

def by_pidfds():
    leader = child(member)
    while not told(DONE):
        tell(CALLS, told(CALLS) + 1)
        for pidfd in cgroup_pidfds(GROUP):
            with pidfd:
                if pidfd.pid != leader:
                    try:
                        kill(pidfd, timeout=0)
                    except ProcessLookupError:
                        continue
                    tell(KILLS, told(KILLS) + 1)
    os.kill(leader, signal.SIGKILL)
    os.waitpid(leader, 0)

def by_kill(born, kill_them):
    while not told(DONE):
        tell(READY, 0)
        leader = child(born)
        while told(READY) != leader:
            time.sleep(0.001)
        results = kill_them(leader)
        tell(CALLS, told(CALLS) + 1)
        tell(KILLS, told(KILLS) + len(results))
        os.waitpid(leader, 0)

def killer():
    if MODE == "cgroup_pidfds":
        by_pidfds()
    elif MODE == "kill_cgroup":
        by_kill(member, lambda pid: kill_cgroup(GROUP, timeout=10))
    elif MODE == "kill_tree":
        by_kill(parent, lambda pid: kill_tree(pid, timeout=10))
    else:
        naive()
    os._exit(0)

def naive():
    leader = child(member)
    while not told(DONE):
        tell(CALLS, told(CALLS) + 1)
        for pid in cgroups.pids(GROUP):
            if pid != leader:
                try:
                    kill(pid, timeout=0)
                except ProcessLookupError:
                    continue
                tell(KILLS, told(KILLS) + 1)
    os.kill(leader, signal.SIGKILL)
    os.waitpid(leader, 0)

enter(TOP, os.getpid())  # all ends with it, whatever happens
Path("/proc/sys/kernel/pid_max").write_text("400")  # and the first 300 are reserved
begin = time.monotonic()
outsiders = child(lambda: (come_and_go(True), os._exit(0)))
killing = child(killer)
statuses = {}
while killing not in statuses:
    pid, status = os.wait()  # of orphans, too
    statuses[pid] = os.waitstatus_to_exitcode(status)
    if pid == outsiders:
        tell(DONE, 1)
print(json.dumps({
    "mode": MODE,
    "outsiders": told(BORN),
    "recycled": told(RECYCLED),
    "hit": told(HIT),
    "rescheduled": told(MOVED),
    "kills": told(KILLS),
    "calls": told(CALLS),
    "ended": [statuses.get(outsiders), statuses[killing]],
    "seconds": round(time.monotonic() - begin, 2),
}))
"""


def torture(mode: str, version: Literal["v2", "v1"], number: int = RECYCLED) -> Any:
    with ExitStack() as stack:
        top = stack.enter_context(cgroup("v2"))
        group = top / "group"
        if version == "v1":
            group = stack.enter_context(cgroup("v1")) / "group"
        group.mkdir()
        parameters = (mode, str(top), str(group), number)
        program = PROGRAM.replace("PARAMETERS", repr(parameters))
        result = run_python(program, under=APART)
        assert (result.returncode, result.stderr) == (0, "")
        figures = json.loads(result.stdout)
        print(figures)  # pytest -rP shows it
        return figures


# A child whose pid can be taken again soon.
VICTIM = """
import os, subprocess, sys
from pathlib import Path
from mrelease import _groups, kill, kill_tree

Path("/proc/sys/kernel/pid_max").write_text("400")
while True:
    victim = subprocess.Popen(["sleep", "100"])
    if victim.pid > 300:  # those up to that are given once only
        break
    victim.kill()
    victim.wait()
"""

REUSED = f"""{VICTIM}
real = _groups._check_tree

def innocent():
    child = os.fork()
    if child == 0:
        os._exit(0 if wait_for_the_end.read(1) == b"" else 1)
    _, status = os.waitpid(child, os.WUNTRACED)
    report.write(b"%d" % status)
    report.flush()
    os._exit(0)

def late(pid):
    # What may happen by itself just then: the root ends, and its pid is given away.
    real(pid)
    victim.kill()
    victim.wait()
    while True:
        child = os.fork()
        if child == 0:
            end.close()
            innocent() if os.getpid() == pid else os._exit(0)
        if child == pid:
            return
        os.waitpid(child, 0)

reader, writer = os.pipe()
answer, report = open(reader, "rb", 0), open(writer, "wb")
reader, writer = os.pipe()
wait_for_the_end, end = open(reader, "rb"), open(writer, "wb")
_groups._check_tree = late
print([result.outcome for result in kill_tree(victim.pid, timeout=1)])
end.close()
report.close()
with answer, wait_for_the_end:
    print("status", int(answer.read()))
os.wait()
"""


@pytest.mark.needs("root", "pidns", "unshare")
def test_the_children_of_one_that_got_the_roots_pid_are_not_touched() -> None:
    result = run_python(REUSED, under=APART)
    assert (result.stdout, result.stderr) == ("['exited']\nstatus 0\n", "")


# Who takes the pid is no child of the killer: that would be taken for the victim.
UNAWARE = f"""{VICTIM}
TAKE = '''
import os, sys
while True:
    child = os.fork()
    if child == 0 and os.getpid() != int(sys.argv[1]):
        os._exit(0)
    if child == 0:
        os._exit(0 if sys.stdin.read(1) == "" else 1)
    if child == int(sys.argv[1]):
        break
    os.waitpid(child, 0)
print("taken", flush=True)
print("status", os.waitpid(child, os.WUNTRACED)[1])
'''

os.kill(victim.pid, 9)
os.waitpid(victim.pid, 0)
pipe = subprocess.PIPE
command = [sys.executable, "-c", TAKE, str(victim.pid)]
with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as innocent:
    print(innocent.stdout.readline(), end="")
    try:
        print(kill(victim))
    except ProcessLookupError:
        print(victim.returncode, "refused")
    print(innocent.communicate()[0], end="")
victim.returncode = -9
"""


@pytest.mark.needs("root", "pidns", "unshare")
def test_who_got_the_pid_of_a_child_whose_object_does_not_know_is_not_touched() -> None:
    result = run_python(UNAWARE, under=APART)
    assert (result.stdout, result.stderr) == ("taken\nNone refused\nstatus 0\n", "")


@pytest.mark.timeout(300)  # for emulated machines; 5 seconds on others
@pytest.mark.needs("root", "pidns", "cgroup2", "unshare")
@pytest.mark.parametrize(
    ("mode", "version"),
    [
        ("cgroup_pidfds", "v2"),
        ("kill_cgroup", "v2"),
        ("kill_tree", "v2"),
        pytest.param("kill_cgroup", "v1", marks=pytest.mark.needs("cgroup1")),
    ],
)
def test_no_outsider_is_hit(mode: str, version: Literal["v2", "v1"]) -> None:
    figures = torture(mode, version)
    assert figures["ended"] == [0, 0]
    assert figures["recycled"] >= RECYCLED
    assert figures["kills"] > 0
    assert figures["hit"] == 0
