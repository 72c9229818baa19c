"""A lock, where a signal handler raises at any moment."""

from __future__ import annotations

import json
from threading import RLock

import pytest

from calls import run_python
from mrelease._locks import locked


def test_no_handler_leaves_a_lock_locked() -> None:
    program = """
import json, random, signal, threading, time
from mrelease._locks import locked

class Interrupt(BaseException):
    pass

def handler(*args):
    raise Interrupt

signal.signal(signal.SIGALRM, handler)
chance = random.Random(1)
lock = threading.Lock()
raised = left = 0
for _ in range(1000):
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 1e-4))
        for _ in range(300):
            locked(lock, int)
        time.sleep(0.001)
    except Interrupt:
        raised += 1
    if lock.locked():
        left += 1
        lock.release()
print(json.dumps([raised, left]))
"""
    result = run_python(program)
    assert result.stderr == ""
    raised, left = json.loads(result.stdout)
    assert raised > 500
    assert left == 0


def test_what_is_done_with_a_lock_may_raise_or_take_it_again() -> None:
    lock = RLock()
    assert locked(lock, lambda: locked(lock, lambda: 7)) == 7
    with pytest.raises(ZeroDivisionError):
        locked(lock, lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="un-acquired"):
        lock.release()
