"""Work in a forked child, and a signal just after the fork.

Signals are blocked in the thread that forks, but not in others: one of them takes it,
and its handler runs in the main thread nevertheless.
"""

from __future__ import annotations

import pytest

from calls import run_python

# The hooks are C functions, in which no handler runs: it does when os.fork() is over.
PROGRAM = """
import os, signal, threading
from functools import partial
from mrelease import _child, _mrelease, kill_tree, probe

threading.Thread(target=threading.Event().wait, daemon=True).start()
reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)
me = _mrelease.pidfd_open(os.getpid())  # as os.kill() runs handlers
send = partial(_mrelease.pidfd_send_signal, me, signal.SIGUSR1)
os.register_at_fork(after_in_parent=send)
os.register_at_fork(after_in_parent=partial(os.read, reader, 1))

def have_handled(handler):
    signal.signal(signal.SIGUSR1, handler)
"""


@pytest.mark.parametrize("act", ["probe()", "kill_tree(victim)"])
def test_a_handler_that_raises_leaves_no_child(act: str) -> None:
    program = f"""{PROGRAM}
victim = os.posix_spawnp("sleep", ["sleep", "1000"], os.environ)
have_handled(signal.default_int_handler)
try:
    {act}
except KeyboardInterrupt:
    print("raised")
os.kill(victim, signal.SIGKILL)
print(os.waitpid(victim, 0)[1])
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("none left")
"""
    result = run_python(program)
    assert (result.stdout, result.stderr) == ("raised\n9\nnone left\n", "")


def test_a_handler_may_fork_while_its_thread_does() -> None:
    program = f"""{PROGRAM}
answers = []

def handler(*args):
    have_handled(signal.SIG_IGN)
    os.write(writer, b".")  # as an ignored signal does not
    answers.append(_child.run(lambda: b"inner"))

have_handled(handler)
print(_child.run(lambda: b"outer"), answers)
"""
    result = run_python(program)
    assert result.stderr == ""
    assert result.stdout == "(b'outer', 0) [(b'inner', 0)]\n"
